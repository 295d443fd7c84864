"""Pal et al. (2020), "On the Regularization Properties of Structured Dropout": its questions, as data."""

from __future__ import annotations

from fallow.papers._experiments import Item, Known, Paper, Scale
from fallow.papers.pal2020 import curves, optima
from fallow.papers.pal2020.sizes import ADAPTIVE, BASE_RATE, WIDTH, by_scale
from fallow.penalties import adaptive_survival_rate

_ABSTRACT = "its abstract or introduction"
_SUMMARY = "a third party's summary of the paper"
_LINEAR = (
    "Linear networks: a target of 120 x 80 with singular values 10 exp(-i/8), one-hot inputs, 160 "
    "hidden units, survival rate 0.5 (theory notes, 10.2). All of it is ours; the paper's data and "
    "sizes are not known to us.",
)
_DESCENT = (
    "Plain gradient steps on all samples with fresh masks, for blocks one a sample and for DropConnect one a "
    "step; learning rate 0.01 for half of the steps, then falling linearly to 0.",
)
_RANK = (
    "Block sizes up to the effective rank of the solution are the same as Dropout (notes, 3.6); r = 1 "
    "and 4 are among them to show it.",
)
_DEEP = (
    "Deep networks: squared error on all images at every step, no augmentation, no weight decay, and "
    "features of any sign in front of the head; with BatchNorm, augmentation, weight decay or "
    "cross-entropy the closed form does not hold (the ResNets have BatchNorm inside, which is then a "
    "function of the fixed images).",
    "Targets are a trained classifier's logits, or outputs of a random network whose singular values are set "
    "to exp(-i/4); one-hot labels would show one factor for all values.",
    "The closed form is the least of what any features could reach; that these networks can is an assumption "
    "that the duality gap, which needs none, tests.",
)

PAPER = Paper(
    name="pal2020",
    title="On the Regularization Properties of Structured Dropout",
    cite="A. Pal, C. Lane, R. Vidal, B. D. Haeffele, CVPR 2020, arXiv:1910.14186",
    items=(
        Item(
            "curves",
            "Stochastic training against the deterministic objective",
            "Running means of the sampled loss of DropBlock and DropConnect, the deterministic "
            "objective (1) at the same iterates, and gradient descent on it from the same start "
            "(question 1).",
            by_scale("curves"),
            curves.curves,
            known=(
                Known("training with dropout is SGD on a regularised loss", "paper", _ABSTRACT),
                Known("the regulariser of disjoint blocks, (1)", "derived", "notes, 2.5; its check a"),
                Known("the regulariser of blocks of 1", "lit", "Cavazza et al. 2017"),
            ),
            differences={"": (*_LINEAR, *_DESCENT)},
        ),
        Item(
            "optimum",
            "Convergence to the computed global minimum",
            "Distance of the trained objective to F* of (4), and the duality gap that certifies it "
            "without (4) (question 2).",
            by_scale("optimum"),
            optima.optimum,
            known=(
                Known("a closed form of the global minimiser exists", "paper", _ABSTRACT),
                Known("the formula (4)", "derived", "notes, 4.1; its checks b and c'"),
                Known("factors of a minimiser have equal norms", "paper", _ABSTRACT),
                Known(
                    "the lower convex envelope of the regulariser is the spectral k-support norm, squared",
                    "paper",
                    _ABSTRACT,
                ),
                Known(
                    "blocks up to the effective rank do what Dropout does",
                    "derived",
                    "notes, 3.6; its check l",
                ),
            ),
            differences={"": (*_LINEAR, *_RANK)},
        ),
        Item(
            "spectra",
            "Singular values of trained predictions",
            "Singular values against (4), with head and kept counts (q, ρ), for linear networks and for deep "
            "ones on real images with DropBlock in front of the last layer (question 3).",
            by_scale("optimum", "deep"),
            optima.spectra,
            known=(
                Known(
                    "the analysis extends to dropout on the last layer of deep networks", "paper", _ABSTRACT
                ),
                Known("under which assumptions, A1 to A4", "derived", "notes, section 8; its check g"),
                Known("its spectra are of deep networks trained with DropBlock", "lit", _SUMMARY),
            ),
            differences={
                "": (*_LINEAR, *_DEEP),
                "full": ("ResNets on 5,000 images of CIFAR-10, in single precision.",),
            },
        ),
        Item(
            "sliding",
            "Sliding against disjoint DropBlock",
            "Curves and minima of the original DropBlock, whose blocks may start anywhere, and of the "
            "disjoint blocks that have a closed form, at equal survival rates (question 4).",
            by_scale("sliding"),
            curves.sliding,
            known=(
                Known(
                    "the paper analyses an approximation of DropBlock and compares it with the original",
                    "lit",
                    _SUMMARY,
                ),
                Known("the approximation is disjoint blocks", "memory", "notes, 2.3"),
                Known(
                    "sliding blocks that wrap around have the same minimum up to the effective rank, and a "
                    "slightly smaller one beyond",
                    "derived",
                    "notes, section 7; its check l",
                ),
            ),
            differences={
                "": (
                    *_LINEAR,
                    "Windows do not wrap around: seeds may lie up to r - 1 units before the first one, "
                    "so that every unit has the asked rate; each seed has probability 1 - θ^(1/r). "
                    "Blocks over either end are cut.",
                )
            },
        ),
        Item(
            "dropconnect",
            "DropConnect against Dropout",
            "Training of the last layer with either from the same starts, and mean losses over masks at one "
            "point for masks on the outgoing, the incoming and both weights (question 5).",
            by_scale("pairs", "points"),
            curves.dropconnect,
            known=(
                Known("DropConnect is equivalent to Dropout", "paper", _ABSTRACT),
                Known(
                    "on outgoing weights always; on incoming ones where the inputs are whitened; on "
                    "both layers with the square of the rate",
                    "derived",
                    "notes, section 5; its check d",
                ),
                Known(
                    "with outgoing masks the gradients in the features have another noise than Dropout's",
                    "derived",
                    "notes, 5.1",
                ),
                Known("the paper masks the last layer's weights", "memory", "notes, section 5"),
            ),
            differences={
                "": (
                    *_LINEAR,
                    "Which weights the paper masks is not known to us; the fifth question is cut off in the "
                    "summary we have.",
                )
            },
        ),
        Item(
            "adaptive",
            "The adaptive survival rate",
            "The rate (2) that keeps the penalty when the network is wider, and the minimum at it.",
            by_scale("adaptive"),
            optima.adaptive,
            known=(
                Known("at a fixed rate the penalty vanishes with the width", "lit", "Cavazza et al. 2017"),
                *(
                    Known(
                        f"rate at {WIDTH} units, base {BASE_RATE:g}, r = {r}",
                        "lit" if r == 1 else "derived",
                        "Cavazza et al. 2017" if r == 1 else "equation (2)",
                        adaptive_survival_rate(survival_rate=BASE_RATE, width=WIDTH, block_size=r),
                    )
                    for r in ADAPTIVE
                ),
            ),
            differences={"": (_LINEAR[0].replace("survival rate 0.5", "base survival rate 0.9"),)},
        ),
    ),
    scales={
        "tiny": Scale(
            "Linear networks of full size with 6,000 steps of descent and 1,000 of L-BFGS; MLPs on 128 "
            "digits; a few minutes on two cores."
        ),
        "small": Scale(
            "20,000 steps of descent and 4,000 of L-BFGS; MLPs on 256 digits and 500 images of "
            "Fashion-MNIST, ResNet-8 on 200 images of CIFAR-10; about 20 minutes on two cores."
        ),
        "full": Scale(
            "600,000 steps of descent and 8,000 of L-BFGS; an MLP on 2,000 images of MNIST, ResNet-20 and "
            "ResNet-56 on 5,000 images of CIFAR-10.",
            takes="by estimate 40 hours of one GPU (not measured); its linear networks run on CPU cores",
            on_gpu=True,
        ),
    },
    notes=(
        "The paper's own numbers, figures, data and hyper-parameters were not available to us: only "
        "its abstract, the first paragraph of its introduction and a third party's summary of its "
        "questions. Every number, every set-up and every plot here is ours.",
        "Formulas (1) to (4) and lines marked derived are this project's reconstruction (numbers refer "
        "to its theory notes), checked numerically; the paper states such results, and may state them "
        "otherwise.",
        "Expected values are computed from the formulas in each run, never listed.",
    ),
)
