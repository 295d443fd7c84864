"""The deep cells of `pal2020`: a network on real images with DropBlock in front of its last layer.

Targets are real-valued with a spectrum that falls: one-hot labels have a flat one, on which all block sizes
up to the number of classes do the same. Every step sees all images, so that the inputs are fixed as the
theory wants them, and a BatchNorm is a function of them; nothing else regularises.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fallow import data, models
from fallow.errors import UsageError
from fallow.papers._packed import pack, unpack
from fallow.papers.pal2020.cells import minimiser, optimum, trained
from fallow.papers.pal2020.train import Law, Pieces, expected_loss, minimise, sampled_loss
from fallow.penalties import closed_form, effective_gamma
from fallow.recipes._batches import generator

_PARTS = 5
TARGETS = {"teacher": "logits of a trained classifier", "falling": "16 outputs of a random network"}


def deep_cell(
    data: str,
    images: int,
    targets: str,
    net: str,
    width: int,
    block_size: int,
    survival_rate: float,
    method: str,
    steps: int,
    learning_rate: float,
    seed: int,
    pieces: Pieces,
    data_dir: str | None = None,
) -> dict[str, Any]:
    """Train features and head under (1), and hold the predictions against the closed form.

    Args:
        data: an image set.
        images: so many of it, as equally many a class as there are.
        targets: one of `TARGETS`.
        net: "mlp-H" with two hidden layers of H units in double precision, or "resnet-D" in single.
        width: d, features in front of the head; they may have any sign.
        block_size: r.
        survival_rate: of a block.
        method: "minimise" (L-BFGS on (1)), "adam" (Adam on (1)) or "sampled" (Adam, fresh masks).
        steps: of the optimiser.
        learning_rate: of Adam at the start; it falls linearly to 0 over the second half.
        seed: of weights and masks.
        pieces: keeps parts of the training.
        data_dir: where image sets are.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.float64 if net.startswith("mlp") else torch.float32
    x, labels, print_of = pictures(data, images, data_dir)
    y = unpack(pieces("targets", lambda: {"state": pack([target_of(targets, x, labels)])})["state"])[0]
    law = Law("disjoint", survival_rate, block_size)
    network = extractor(net, x, width, seed).to(device, dtype)
    head = torch.randn(y.shape[1], width, generator=generator(seed, "head"), dtype=torch.float64)
    head = (head / width**0.5).to(device, dtype).requires_grad_()
    x, goal = x.to(device, dtype), y.to(device, dtype)
    if method == "minimise":
        parameters = [*network.parameters(), head]
        curve = minimise(
            lambda: expected_loss(goal, network(x), head, law.scheme), parameters, steps, pieces, parts=_PARTS
        )
    else:
        training = Training(network, head, law, method == "sampled", steps, learning_rate, seed)
        curve = training.run(x, goal, pieces)
    best = minimiser(y, law, width)
    with torch.no_grad():
        features = network(x).double().cpu()
    return {
        "curve": curve,
        "optimum": optimum(best, y),
        "last": trained(y, (features, head.double().cpu()), law, best),
        "one_hot": one_hot(labels, law, width),
        "fingerprint": print_of,
    }


def pictures(name: str, images: int, data_dir: str | None) -> tuple[Tensor, Tensor, str]:
    """Images [N, c, h, w] of mean 0 and variance 1 as a whole, in double precision, labels, fingerprint."""
    found = data.load(name, data_dir, train_size=images)
    x = found.train_x.double()
    return (x - x.mean()) / x.std(), found.train_y, found.fingerprint


def target_of(kind: str, x: Tensor, labels: Tensor) -> Tensor:
    """Targets [N, outputs] of mean 0 over the images and mean square 1.

    "teacher": logits of a small network that was trained to tell the classes apart. "falling": outputs of a
    random one, with singular values that are set to exp(-i / 4).
    """
    flat, classes = x.flatten(1), int(labels.max()) + 1
    outputs = classes if kind == "teacher" else 16
    teacher = _perceptron([flat.shape[1], 64, outputs], nn.Tanh, generator(0, f"teacher {kind}")).double()
    if kind == "teacher":
        optimiser = torch.optim.Adam(teacher.parameters(), 1e-2)
        for _ in range(60):
            optimiser.zero_grad()
            F.cross_entropy(teacher(flat), labels).backward()
            optimiser.step()
    y = teacher(flat).detach()
    y = y - y.mean(0)
    if kind == "falling":
        p, values, q = torch.linalg.svd(y, full_matrices=False)
        y = (p * torch.exp(-torch.arange(len(values), dtype=y.dtype) / 4)) @ q
    return y / y.square().mean().sqrt()


def extractor(net: str, x: Tensor, width: int, seed: int) -> nn.Module:
    """Images to `width` features after a last linear map, with weights of this seed."""
    kind, _, number = net.partition("-")
    if kind == "mlp" and number.isdigit():
        sizes = [x[0].numel(), int(number), int(number), width]
        return nn.Sequential(nn.Flatten(), _perceptron(sizes, nn.ReLU, generator(seed, "weights")))
    if kind == "resnet" and number.isdigit():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(generator(seed, "weights").initial_seed())
            return models.CifarResNet(int(number), classes=width, channels=x.shape[1])
    raise UsageError(f"net must be mlp-WIDTH or resnet-DEPTH, got {net}")


def _perceptron(sizes: list[int], activation: type[nn.Module], draws: torch.Generator) -> nn.Sequential:
    """Linear maps of He's variance with activations between them."""
    layers: list[nn.Module] = []
    for place, (inputs, outputs) in enumerate(zip(sizes, sizes[1:], strict=False)):
        linear = nn.Linear(inputs, outputs)
        with torch.no_grad():
            linear.weight.normal_(0, (2 / inputs) ** 0.5, generator=draws)
            linear.bias.zero_()
        layers += [activation(), linear] if place else [linear]
    return nn.Sequential(*layers)


def one_hot(labels: Tensor, law: Law, width: int) -> dict[str, float]:
    """What the closed form makes of one-hot labels of these images: least and largest shrinkage (10.3)."""
    y = F.one_hot(labels).double()
    gamma = effective_gamma(survival_rate=law.survival_rate, width=width, block_size=law.block_size)
    found = closed_form(y, law.block_size, gamma)
    factors = found.spectrum / found.target_spectrum
    return {"least": float(factors.min()), "most": float(factors.max())}


class Training:
    """Adam on all images at a time, with fresh masks for each image or on the expected loss, in parts.

    Args:
        network: features of the images; changed in place.
        head: weight [outputs, width]; changed in place.
        law: what drops in front of the head.
        sampled: whether masks are drawn.
        steps: of the optimiser.
        learning_rate: at the start; constant for half of the steps, then falling linearly to 0.
        seed: of the masks.
    """

    def __init__(
        self,
        network: nn.Module,
        head: Tensor,
        law: Law,
        sampled: bool,
        steps: int,
        learning_rate: float,
        seed: int,
    ) -> None:
        self.network, self.head, self.law, self.sampled = network, head, law, sampled
        self.steps, self.learning_rate, self.seed = steps, learning_rate, seed
        self.optimiser = torch.optim.Adam([*network.parameters(), head], learning_rate)

    def run(self, x: Tensor, y: Tensor, pieces: Pieces) -> list[tuple[int, float]]:
        """(step, expected loss) at the start and after each part."""
        self.network.train()
        curve = [(0, self._expected(x, y))]
        for part in range(_PARTS):
            steps = range(self.steps * part // _PARTS, self.steps * (part + 1) // _PARTS)

            def stretch(steps: range = steps) -> dict[str, Any]:
                self._steps(x, y, steps)
                return {"objective": self._expected(x, y), "state": pack(self._state())}

            found = pieces(f"part{part}", stretch)
            self._load(unpack(found["state"]))
            curve.append((steps.stop, found["objective"]))
        return curve

    def _expected(self, x: Tensor, y: Tensor) -> float:
        with torch.no_grad():
            return float(expected_loss(y, self.network(x), self.head, self.law.scheme))

    def _steps(self, x: Tensor, y: Tensor, steps: range) -> None:
        draws = torch.Generator(x.device).manual_seed(
            generator(self.seed, "masks", steps.start).initial_seed()
        )
        for step in steps:
            rate = self.learning_rate * min(1.0, 2 * (1 - step / self.steps))
            for group in self.optimiser.param_groups:
                group["lr"] = rate
            self.optimiser.zero_grad(set_to_none=True)
            features = self.network(x)
            loss = (
                sampled_loss(y, features, self.head, self.law, draws)
                if self.sampled
                else expected_loss(y, features, self.head, self.law.scheme)
            )
            (loss / y.numel()).backward()
            self.optimiser.step()

    def _state(self) -> dict[str, Any]:
        return {
            "network": self.network.state_dict(),
            "head": self.head.detach(),
            "optimiser": self.optimiser.state_dict(),
        }

    def _load(self, state: dict[str, Any]) -> None:
        self.network.load_state_dict(state["network"])
        self.optimiser.load_state_dict(state["optimiser"])
        with torch.no_grad():
            self.head.copy_(state["head"])
