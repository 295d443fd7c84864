"""Huang et al. (2016), "Deep Networks with Stochastic Depth": its tables and figures, as data."""

from __future__ import annotations

from fallow.papers._experiments import Item, Known, Paper, Scale
from fallow.papers.huang2016 import results, sweeps, times
from fallow.papers.huang2016.results import ERRORS
from fallow.papers.huang2016.sizes import by_scale
from fallow.papers.huang2016.times import MINUTES

_NAMES = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100", "svhn": "SVHN"}
_SETUP = (
    "As the authors' code has it: linear rates with p_L = 0.5, one draw a batch for each block, branches "
    "times their survival rate at test time and unscaled in training, and zero gradients for what rested, so "
    "that weight decay and momentum still move it (the prose says that such a block is not updated).",
    "SGD with Nesterov momentum 0.9 and weight decay 1e-4; the learning rate is divided by 10 at a half and "
    "at three quarters of the epochs. A tenth of the training images validates.",
    "The error is that of the last epoch; the paper takes the epoch of lowest validation error. It, too, "
    "trains on 45,000 of CIFAR's 50,000 images.",
    "Inputs are normalised by a mean and a deviation of each channel, the authors' by a mean for each pixel.",
)
_DIGITS = (
    "Digits start at a learning rate of 0.02 with a rise, and are shifted by a pixel at most, not mirrored."
)
_FEW = {
    "tiny": (
        "8x8 digits and 1,000 images of Fashion-MNIST, ResNet-20, minutes of training: too little to say "
        f"anything of the paper's errors. {_DIGITS}",
    ),
    "small": (
        "10,000 images of CIFAR-10 and 4,000 of Fashion-MNIST, ResNet-20 and 56, batch 64, 12 epochs (once "
        "100) in place of 500: too short a training to say anything of the paper's errors. ResNet-56's "
        "learning rate rises over the first two epochs.",
    ),
    "full": (
        "SVHN: the learning rate falls at a half and at three quarters of the 50 epochs (the paper: after 30 "
        "and 35), and a tenth of the images validates (the paper: 6,000).",
    ),
}
_SWEEP = {
    "": _SETUP,
    "tiny": (f"8x8 digits, ResNet-20 and 32, 20 epochs; the paper has CIFAR-10 and 500 epochs. {_DIGITS}",),
    "small": (
        "4,000 images of Fashion-MNIST, 12 epochs, ResNet-20 (by depth to 44); the paper has CIFAR-10, 500 "
        "epochs and 110 layers.",
    ),
    "full": ("One seed: differences between single points cannot be told from chance.",),
}


def _place(data: str, augmented: bool) -> str:
    return f"{_NAMES[data]}, {'augmented' if augmented else 'as it is'}"


def _errors() -> tuple[Known, ...]:
    known = []
    for (data, augmented), pair in ERRORS.items():
        place = _place(data, augmented)
        source = "its table 1" if augmented or data == "svhn" else "its text, section 4"
        for name, value in zip(("constant depth", "stochastic depth"), pair, strict=True):
            aside = "; 27.22 in its text" if value == 27.76 else ""
            known.append(Known(f"test error in %, {name}, {place}", "paper", source + aside, value))
    return tuple(known)


def _times() -> tuple[Known, ...]:
    known = []
    for (data, augmented), (constant, stochastic) in MINUTES.items():
        words = f"time of training over constant depth's, {_place(data, augmented)}"
        hours = "{:.0f} h {:02.0f} over {:.0f} h {:02.0f}".format(
            *divmod(stochastic, 60), *divmod(constant, 60)
        )
        known.append(Known(words, "paper", f"its table 2: {hours}", stochastic / constant))
    return tuple(known)


PAPER = Paper(
    name="huang2016",
    title="Deep Networks with Stochastic Depth",
    cite="G. Huang, Y. Sun, Z. Liu, D. Sedra, K. Q. Weinberger, ECCV 2016, arXiv:1603.09382v3",
    items=(
        Item(
            "table1",
            "Constant against stochastic depth",
            "Test errors with and without augmentation; table 1 and the errors of figure 3.",
            by_scale("tables"),
            results.errors,
            known=_errors(),
            differences={"": _SETUP, **_FEW},
        ),
        Item(
            "table2",
            "Time of training",
            "Time of a step of stochastic depth over constant depth's, beside the ideal ratio; table 2.",
            by_scale("tables"),
            times.times,
            known=(
                *_times(),
                Known(
                    "share of the blocks' work that rests at p_L = 0.5, 54 blocks",
                    "derived",
                    "(1 - p_L)(L + 1) / (2 L)",
                    0.5 * 55 / 108,
                ),
            ),
            differences={
                "": (
                    "Processor time of interleaved steps (on a GPU wall clock), without data loading and "
                    "evaluation; nets, batches and hardware are those of the table, the paper's ResNet-110 "
                    "(SVHN: 152 layers) in batches of 128 on a GPU.",
                )
            },
        ),
        Item(
            "curves",
            "Training curves",
            "Validation and test error and training loss over epochs; figures 3 and 4.",
            by_scale("tables"),
            results.curves,
            differences={"": _SETUP, **_FEW},
        ),
        Item(
            "gradients",
            "Gradients of the first layer",
            "Mean gradient magnitude of the network's first convolution over epochs, after figure 7.",
            by_scale("tables"),
            results.gradients,
            known=(
                Known(
                    "that of the first convolution of the first block is larger with stochastic depth",
                    "paper",
                    "its figure 7, ResNet-110",
                ),
            ),
            differences={
                "": (
                    "Ours is the convolution before the first block, which never rests; the paper's is the "
                    "first one in the first block.",
                    *_SETUP,
                ),
                **_FEW,
            },
        ),
        Item(
            "rates",
            "Uniform and linear rates",
            "Test error against p_L for both rules; figure 8, left.",
            by_scale("sweep"),
            sweeps.sweep,
            known=(
                Known("both rules beat constant depth where p_L is set well", "paper", "its figure 8"),
                Known("linear rates are consistently better than uniform ones", "paper", "its section 5"),
                Known("linear rates are good for p_L from 0.4 to 0.8", "paper", "its section 5"),
                Known(
                    "at p_L = 0.2 the error is about that of constant depth, in 40 % less time",
                    "paper",
                    "its section 5",
                ),
            ),
            differences=_SWEEP,
        ),
        Item(
            "depths",
            "p_L by depth",
            "Test error by p_L and number of layers, linear rates, as a map; figure 8, right.",
            by_scale("heat"),
            sweeps.heat_map,
            known=(
                Known(
                    "shorter nets want their blocks to rest less, deeper ones do better with p_L = 0.5",
                    "paper",
                    "its section 5",
                ),
            ),
            differences=_SWEEP,
        ),
        Item(
            "deep",
            "1202 layers",
            "The very deep net with constant and with stochastic depth: what a step takes, how it trains.",
            by_scale("deep"),
            results.deep,
            known=(
                *(
                    Known(f"test error in %, {arm} depth, CIFAR-10, augmented", how, source, value)
                    for arm, how, source, value in (
                        ("stochastic", "paper", "its text", 4.91),
                        ("constant", "paper", "its text", 6.67),
                        ("constant", "lit", "He et al. (2016), as it quotes them", 7.93),
                    )
                ),
            ),
            differences={
                "": _SETUP,
                "tiny": ("A few steps on digits: that it runs and what it costs, not what it learns.",),
                "small": ("A few steps on 96 images: that it runs and what it costs, not what it learns.",),
                "full": (
                    "The learning rate rises over the first 10 epochs; the paper has a tenth of it then. "
                    "The batch of 128 is ours: the paper does not say its own.",
                ),
            },
        ),
        Item(
            "ablation",
            "Samplers, modes and gradients",
            "Test error and time of other ways of stochastic depth at the same rates; the paper has no such "
            "table.",
            by_scale("ablation"),
            sweeps.ablation,
            differences={
                "": (
                    "bernoulli: independent draws; exact: the same rates at constant cost; batch: a branch "
                    "rests for the whole batch, row: for each image; none: what rested has no gradient and "
                    "stays as it is, zero: it has a zero gradient and decays.",
                )
            },
        ),
    ),
    scales={
        "tiny": Scale("Digits and 1,000 images of Fashion-MNIST, ResNet-20; a few minutes on two cores."),
        "small": Scale(
            "10,000 images of CIFAR-10 with ResNet-20 and 56, 4,000 of Fashion-MNIST with ResNet-20 to 44, "
            "three seeds; about two hours on two cores."
        ),
        "full": Scale(
            "The paper's protocol: ResNet-110 on CIFAR-10 and CIFAR-100 for 500 epochs, 152 layers on SVHN, "
            "1202 layers for 300 epochs.",
            takes="some thousand GPU hours by estimate (not measured), on two cores most of a year",
        ),
    },
    notes=(
        "Numbers marked paper are the paper's, from its third version on arXiv; all others are ours.",
        "Constant and stochastic depth are trained in one process, step by step in turn, from the same "
        "initial weights on the same batches.",
    ),
)
