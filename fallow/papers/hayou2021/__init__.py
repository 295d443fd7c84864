"""Hayou & Ayed (2021), "Regularization in ResNet with Stochastic Depth": its kinds of figures, as data."""

from __future__ import annotations

from fallow.papers._experiments import Item, Known, Paper, Scale
from fallow.papers.hayou2021 import errors, theory
from fallow.papers.hayou2021.cells import rates_of
from fallow.papers.hayou2021.sizes import BUDGET, by_scale, sensemode_cells


def noise_mass(rule: str) -> float:
    """Sum p (1 - p) of a rule over 16 blocks at mean rate 0.75."""
    return sum(p * (1 - p) for p in rates_of(rule, 16, 0.75))


_TOY_SETUP = (
    "The toys are this project's (theory notes, 5.6), not the paper's: its toy regression is not known.",
    "In the toys the budget is the mean survival rate; sensitivities are means of absolute gate gradients "
    "over the training samples at the full network, in a running mean, refreshed during training; smallest "
    "rate 0.1. These choices are ours: according to a summary the paper describes SenseMode in prose only.",
)
_IMAGE_SETUP = (
    "With images the budget is the expected share of the FLOPs of a whole training step, what cannot rest "
    "included, the same for every rule; SenseMode's sensitivities come from the training steps themselves.",
)
_FEW = {
    "tiny": (
        "Far too small to tell small differences of errors apart: digits, twelve epochs, four seeds, 360 "
        "test images.",
    ),
    "small": ("Subsets of 5,000 images, a few epochs, three seeds; the paper used CIFAR-10 and CIFAR-100.",),
}

PAPER = Paper(
    name="hayou2021",
    title="Regularization in ResNet with Stochastic Depth",
    cite="S. Hayou, F. Ayed, NeurIPS 2021, arXiv:2106.03091",
    items=(
        Item(
            "growth",
            "Growth of gradients by layer",
            "How much larger the gradient is at a layer than at the last one, at initialisation: theory as "
            "lines, simulation as points, for the vanilla net and the one scaled by 1/√L (figure type F1 of "
            "the notes).",
            by_scale("growth"),
            theory.growth,
            known=(
                Known("growth rate without stochastic depth", "derived", "D8, vanilla net", 2.0),
                Known("growth rate of Uniform, 1 + r", "derived", "D8, vanilla net, r = 0.7", 1 + BUDGET),
                Known(
                    "stochastic depth reduces the growth of gradients, which stays exponential",
                    "lit",
                    "a third party's summary of the paper",
                ),
            ),
            differences={
                "": (
                    "Depth 50 and r = 0.7 are a recollection of the paper's table; its numbers are not "
                    "available to us, and the lines are ours.",
                )
            },
        ),
        Item(
            "histogram",
            "Law of a pre-activation over masks",
            "Histogram of one unit of the last layer over masks with the Gaussian beside it, for growing "
            "depth, before and after training (F2).",
            by_scale("law"),
            theory.law,
            known=(
                Known(
                    "in the large-depth limit stochastic depth mimics Gaussian noise injection",
                    "paper",
                    "its contribution (iii)",
                ),
                Known("the limit needs scaled blocks; the vanilla net has none", "derived", "D15, D16"),
            ),
            differences={"": ("Survival rate 0.5; depths, width and the toy regression are ours.",)},
        ),
        Item(
            "penalty",
            "Regularisation term over training",
            "Σ p(1−p) g over training for Uniform and Linear at equal budget (F3), beside the exact term.",
            by_scale("penalty"),
            theory.penalty,
            known=(
                Known(
                    "Uniform has maximal regularisation at initialisation under a fixed budget",
                    "paper",
                    "its contribution (ii)",
                ),
                Known(
                    "Uniform's noise mass over Linear's at r = 0.75, where all blocks weigh the same",
                    "derived",
                    "D7 with 16 blocks",
                    noise_mass("uniform") / noise_mass("linear"),
                ),
            ),
            differences={"": (_TOY_SETUP[0],)},
        ),
        Item(
            "rates",
            "SenseMode's rates over the blocks",
            "Survival rates at the end of training, a curve a budget (F4).",
            sensemode_cells(),
            errors.sense_rates,
            differences={"": (*_TOY_SETUP, *_IMAGE_SETUP)},
        ),
        Item(
            "error",
            "Error against budget",
            "Test error of Uniform, Linear and SenseMode at several budgets, with standard errors over seeds "
            "(F5). Linear has no rates for small budgets.",
            by_scale("toys", "images"),
            errors.errors,
            differences={"": (*_TOY_SETUP, *_IMAGE_SETUP), **_FEW},
        ),
        Item(
            "curves",
            "Training curves",
            "Validation error over epochs at the smallest and the largest budget (F5).",
            by_scale("images"),
            errors.curves,
            differences={"": _IMAGE_SETUP, **_FEW},
        ),
        Item(
            "hypothesis",
            "The Budget Hypothesis, tested",
            "Which rule is better at each budget, and by how many standard errors.",
            by_scale("toys", "images"),
            errors.hypothesis,
            known=(
                Known("there is a Budget Hypothesis, and it is tested", "paper", "its contribution (iv)"),
                Known("its content as stated below", "memory", "theory notes, 4.2"),
                Known("no rule is best at every budget", "lit", "a third party's report citing the paper"),
            ),
            differences={"": (*_TOY_SETUP, *_IMAGE_SETUP), **_FEW},
        ),
    ),
    scales={
        "tiny": Scale(
            "Toys of 12 to 16 blocks and digits with ResNet-20; 3 to 4 seeds; a few minutes on two cores."
        ),
        "small": Scale(
            "Longer toys with 6 seeds; digits with ResNet-56, 5,000 images each of Fashion-MNIST "
            "and CIFAR-10 with ResNet-20, 3 seeds; about an hour on two cores."
        ),
        "full": Scale(
            "ResNet-56 and ResNet-110 on CIFAR-10 and CIFAR-100, 164 epochs, batch 64, SGD with the learning "
            "rate divided by 10 at a half and three quarters, weight decay 1e-4, 3 seeds: the protocol of "
            "the repository that the paper is thought to build on.",
            takes="168 training runs, by estimate 180 hours of one GPU (not measured), on two cores months",
            on_gpu=True,
        ),
    },
    notes=(
        "Every number of these plots and tables is ours. The paper's tables and figures are not available to "
        "us, so none of its numbers stands here, and its figures are matched by type.",
        "Lines marked derived are theory worked out for this project (numbers D... refer to its notes); they "
        "are not the paper's either.",
    ),
)
