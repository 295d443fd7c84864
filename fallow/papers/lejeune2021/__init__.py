"""LeJeune, Javadi & Baraniuk (2021), "The Flip Side of the Reweighted Coin": figures and table, as data."""

from __future__ import annotations

from functools import partial

from fallow.papers._experiments import Item, Known, Paper, Scale
from fallow.papers.lejeune2021 import beyond, figure, results
from fallow.papers.lejeune2021.beyond import ANCHORS
from fallow.papers.lejeune2021.methods import METHODS
from fallow.papers.lejeune2021.results import AUTHORS
from fallow.papers.lejeune2021.sizes import by_scale

_NOTEBOOKS = "the authors' notebooks, a single unseeded run"
_SETUP = (
    "LeNet-300-100, Adam with a learning rate that falls linearly to 0 by epoch, batch 128, a fifth of the "
    "training images held out; λ = 0.001, LogSum with ε = 2, weights with a survival rate below 0.05 cut; "
    "learning rate 1e-3 for VarDrop, VarDrop+LR and the eta-Trick, 1e-4 for the others: all of it that of "
    "the authors' code. Which images are held out, and all random numbers, are ours.",
    "The eta-Trick is run twice: with the dual function of LogSum, and as the authors' code has it "
    "(as published), with the second term of the dual function doubled and 0.001 log η added. "
    "--as-published draws and counts the second one among the seven; both are always there.",
    "Variational dropout has the published fit of its divergence, weighted for the number of training images "
    "with those held out, as the authors have it, and no slow start; log α is clipped to ±10 in the additive "
    "form, in the noise as in the divergence.",
    "AdaProx is cut by the survival rates of its last step, which hold the optimiser's step size.",
)
_SMALL = {
    "tiny": (
        "Digits of 8x8 pixels and 300 epochs of 9 steps: too little to say anything of the paper's numbers. "
        "Learning rates are 30 times the authors', the eta-Trick's 10 times, so that so few steps take the "
        "weights somewhere.",
    ),
    "small": (
        "40 of 200 epochs at 5 times the authors' learning rates, so that weights can move as far; one seed "
        "of each method, three of the recipes beside them.",
    ),
}
_BEYOND = (
    "Trained on all training images, none held out, as the published results were. Sparse VD has Molchanov's "
    "schedule: batch 100, learning rate 1e-3, constant for half of the epochs, then linearly to 0; the "
    "divergence counts from 2.5 % of the training on, in full from 10 %; log α clipped to ±8, cut at 3.",
    "Gradual magnitude and LogSum to a target take the smallest weights along Zhu and Gupta's cubic ramp, "
    "VarDrop to a target those of the least survival rate, from 10 % of the training to 50 % (magnitude), "
    "70 % (LogSum) or 90 % (VarDrop), in the whole network together, and train on after it without a "
    "penalty; each at the learning rate that suited it best, same batch and epochs.",
    "VarDrop to a target is variational dropout in the additive form, its divergence rising as in Sparse VD. "
    "It is not run on moved images, of which a trial (one seed, 200 epochs) ended above LogSum.",
)
_TUNING = (
    "A fifth of the training images held out; LogSum has the usual ramp from 0.1 to 0.7 throughout. The "
    "choice is used at every compression, with and without shifts, and at every scale.",
)


def _authors() -> tuple[Known, ...]:
    """Both numbers of each method."""
    known = []
    for method, (error, fraction) in AUTHORS.items():
        title = METHODS[method].title
        known.append(Known(f"{title}: test error in %", "lit", _NOTEBOOKS, error))
        known.append(Known(f"{title}: fraction of nonzero weights", "lit", _NOTEBOOKS, fraction))
    return tuple(known)


def _anchors() -> tuple[Known, ...]:
    known = []
    for source, (error, compression) in ANCHORS.items():
        known.append(Known("test error in %", "lit", source, error))
        known.append(Known("compression", "lit", source, compression))
    return tuple(known)


def _items(as_published: bool) -> tuple[Item, ...]:
    return (
        Item(
            "figure1",
            "Penalties of dropout methods",
            "The effective penalty of one weight, and of vectors of unit length with more and more entries, "
            "for dropout methods (solid) and classical penalties (dashed); figure 1.",
            by_scale("figure1"),
            figure.figure,
            known=(
                Known(
                    "dropout that adapts monotonically has a subquadratic penalty, and vice versa",
                    "paper",
                    "its abstract",
                ),
                Known("VarDrop against 2 LogSum(2), largest gap to 5", "derived", "notes, 2.1", 0.32),
                Known("HardConcrete against √2 MCP(1/2, √2), largest gap", "derived", "notes, 2.2", 0.032),
                Known("slope of HardConcrete at 0", "derived", "notes, 2.2", 1.4752),
            ),
            differences={
                "": (
                    "Curves and their parameters are those of the authors' notebook; each is computed from "
                    "the penalty of that name in `fallow.penalties`, not digitised.",
                )
            },
        ),
        Item(
            "figure2",
            "Sparsity and error over training",
            "Fraction of nonzero parameters and validation error by epoch, for the seven methods; figure 2.",
            by_scale("methods"),
            partial(results.curves, as_published=as_published),
            differences={"": _SETUP, **_SMALL},
        ),
        Item(
            "table",
            "Error and sparsity at the end",
            "Test error and nonzero fraction of the seven methods with what is cut set to zero, the authors' "
            "beside them.",
            by_scale("methods"),
            partial(results.methods, as_published=as_published),
            known=_authors(),
            differences={"": _SETUP, **_SMALL},
        ),
        Item(
            "beyond",
            "At equal compression",
            "Sparse variational dropout on Molchanov's schedule, gradual magnitude pruning, and LogSum and "
            "variational dropout to a target, with the same epochs.",
            by_scale("beyond"),
            beyond.beyond,
            known=_anchors(),
            differences={"": _BEYOND, **_SMALL},
        ),
        Item(
            "tuning",
            "How the recipes' settings were chosen",
            "Validation errors of gradual magnitude pruning and of LogSum and variational dropout to a "
            "target, more settings of the first than of the others, on images as they are.",
            by_scale("tuning"),
            beyond.tuning,
            differences={"": _TUNING},
        ),
    )


def _paper(as_published: bool) -> Paper:
    return Paper(
        name="lejeune2021",
        title="The Flip Side of the Reweighted Coin: Duality of Adaptive Dropout and Regularization",
        cite="D. LeJeune, H. Javadi, R. G. Baraniuk, NeurIPS 2021, arXiv:2106.07769",
        items=_items(as_published),
        scales={
            "tiny": Scale("Digits of 8x8 pixels, 300 epochs, 2 seeds; a few minutes on two cores."),
            "small": Scale("MNIST, 40 epochs, one seed; about half an hour on two cores."),
            "full": Scale("MNIST, 200 epochs, 3 seeds; about four hours on two cores."),
        },
        notes=(
            "The paper's body was not available to us: only its abstract and introduction. What its figures "
            "and its table hold is known from the authors' public notebooks and their stored outputs, of one "
            "unseeded run a method; it was not compared with the printed paper.",
            "All curves and all numbers in our tables are ours; the authors' are in columns that say so and "
            'under "held against".',
        ),
    )


PAPER, PUBLISHED = _paper(False), _paper(True)
