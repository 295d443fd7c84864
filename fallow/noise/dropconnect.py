"""DropConnect: random masks of weights, for one linear map or inside any module."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from fallow.errors import ArgumentError, UsageError, check_choice, check_count, check_rate, refuse_unknown
from fallow.noise import _row_masks
from fallow.noise._attached import check_names
from fallow.noise._connected import DropConnect, check_row, dropped, masked


def drop_connect(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    survival_rate: float | None = None,
    mode: str = "batch",
    training: bool = True,
    generator: torch.Generator | None = None,
    **unknown: Any,
) -> Tensor:
    """A linear map whose weights are dropped one by one.

    Formula: in training ``y = (M * W / p) x + b``, each number of M 1 with probability p and otherwise 0; at
    evaluation, and at p = 1, ``y = W x + b``. The bias is never masked.

    Shape:
        x: (..., in): every leading index is a row.
        weight: (out, in).
        bias: (out,).
        returns: (..., out).

    Args:
        x: The features.
        weight: As in `torch.nn.functional.linear`.
        bias: As there, or None.
        survival_rate: p in (0, 1], the probability that a weight is kept.
        mode: "batch": one mask for the call; "row": one for each row. Row masks are drawn for a few rows at a
            time and drawn again in backward: memory does not grow with rows times weights, but time does.
        training: Drop or not.
        generator: Of the draws; None: torch's default ones, in row mode that of the CPU, for a seed.
        unknown: Refused, with the conversion for p=, drop_prob= and the like.

    Raises:
        RateError: A rate outside (0, 1].
        ArgumentError: An unknown keyword, or no rate.
        UsageError: Another mode, or tensors that do not fit.

    Estimator:
        Unbiased for the plain map. The expected squared loss is the same in both modes, and for every W and x
        that of Dropout of the inputs at the same rate: ``|Y - W X|^2 + (1-p)/p sum_i |w_i|^2 |x_i|^2``, with
        w_i a column of W and x_i a feature over the rows. What it does for weights that are not the last
        depends on the data. Row mode has first derivatives alone.

    References:
        Wan et al. 2013 (DropConnect). That it is Dropout is said in Pal et al. 2020; when it is, is derived.

    Examples:
        >>> x, weight = torch.ones(2, 3), torch.ones(4, 3)
        >>> drop_connect(x, weight, survival_rate=1.0).tolist()
        [[3.0, 3.0, 3.0, 3.0], [3.0, 3.0, 3.0, 3.0]]
    """
    refuse_unknown("drop_connect", unknown, ("survival_rate", "mode", "training", "generator"))
    p = _checked("drop_connect", survival_rate, mode)
    if weight.dim() != 2 or not x.dim() or x.shape[-1] != weight.shape[1]:
        raise UsageError(
            "drop_connect takes x (..., in) and weight (out, in), got shapes "
            f"{list(x.shape)} and {list(weight.shape)}"
        )
    if not training or p == 1:
        return linear(x, weight, bias)
    if mode == "batch":
        return linear(x, masked(weight, p, generator), bias)
    return _row_masks.linear(x, weight, bias, p, generator)


def drop_connect_mask(
    shape: Sequence[int],
    *,
    survival_rate: float | None = None,
    rows: int | None = None,
    device: torch.device | str | None = None,
    generator: torch.Generator | None = None,
    **unknown: Any,
) -> Tensor:
    """The masks of `drop_connect`, bool, True = kept: [out, in], or [rows, out, in] of row mode.

    Args:
        shape: (out, in) of the weight.
        survival_rate: As in `drop_connect`.
        rows: How many masks of row mode; None: the one of batch mode.
        device: Of the mask.
        generator: Of the draws; in the same state it gives the masks of a forward on that device.
        unknown: Refused.

    Raises:
        RateError: A rate outside (0, 1].
        ArgumentError: An unknown keyword, or no rate.
        UsageError: A shape of other than two numbers in row mode, or a number of rows below 0.

    Examples:
        >>> drop_connect_mask((4, 3), survival_rate=0.5, rows=7).shape
        torch.Size([7, 4, 3])
    """
    refuse_unknown("drop_connect_mask", unknown, ("survival_rate", "rows", "device", "generator"))
    p, place = _checked("drop_connect_mask", survival_rate, "batch"), torch.device(device or "cpu")
    if rows is None:
        return ~dropped(tuple(shape), p, place, generator)
    check_count("rows", rows)
    if len(shape) != 2:
        raise UsageError(f"drop_connect_mask takes a shape (out, in) for rows, got {tuple(shape)}")
    out, width = shape
    seed = _row_masks.seed_of(generator)
    parts = list(_row_masks.masks(rows, (out, width), p, seed, place))
    return torch.cat(parts) if parts else torch.empty((0, out, width), dtype=torch.bool, device=place)


def drop_connect_(
    module: nn.Module,
    *,
    survival_rate: float | None = None,
    names: str | Iterable[str] = ("weight",),
    mode: str = "batch",
    generator: torch.Generator | None = None,
    **unknown: Any,
) -> DropConnect:
    """Drop weights of a module, of whatever kind, in every training forward, until it is taken off again.

    During a forward, and only then, the module sees ``mask * parameter / p`` where its parameter is. The
    parameters themselves, state_dict keys, the class and optimisers stay as they are; copies and pickles of
    the module drop too. At evaluation the module is the plain one.

    Args:
        module: Linear, convolution, embedding, attention, recurrent; its forward must read the parameters as
            attributes, as all of torch's do.
        survival_rate: p in (0, 1], the probability that a weight is kept.
        names: Of parameters, as in `named_parameters`: those of submodules that the forward reads without
            calling the submodule ("out_proj.weight" of nn.MultiheadAttention) too.
        mode: "batch": one mask a forward; "row": one a row, for nn.Linear and its weight alone.
        generator: Of the draws; None: torch's default one of the parameter's device, in row mode of the CPU.
        unknown: Refused, with the conversion for p=, drop_prob= and the like.

    Returns:
        The handle: its `survival_rate` may be set at any time, `remove()` takes it off.

    Raises:
        RateError: A rate outside (0, 1].
        ArgumentError: No module, an unknown keyword, no rate.
        UsageError: Names that are no parameters or masked already; another mode; row mode for another module
            than nn.Linear; an embedding with max_norm= or sparse=True.

    Estimator:
        Unbiased for the weights, not in general for what a non-linear module makes of them.

    References:
        Wan et al. 2013; Merity et al. 2018 for the recurrent weights of an LSTM ("weight_hh_l0").

    Examples:
        >>> layer = nn.Linear(3, 2)
        >>> handle = drop_connect_(layer, survival_rate=0.8)
        >>> handle
        DropConnect(survival_rate=0.8, names=('weight',), mode='batch')
        >>> list(layer.state_dict())
        ['weight', 'bias']
        >>> handle.remove()
    """
    keywords = ("survival_rate", "names", "mode", "generator")
    refuse_unknown("drop_connect_", unknown, keywords)
    p = _checked("drop_connect_", survival_rate, mode)
    if not isinstance(module, nn.Module):
        raise ArgumentError(f"drop_connect_ takes a torch.nn.Module, got {type(module).__name__}")
    wanted = (names,) if isinstance(names, str) else tuple(names)
    check_names(module, wanted)
    if mode == "row":
        check_row(module, wanted)
    return DropConnect(module, p, wanted, mode, generator)


def _checked(function: str, survival_rate: float | None, mode: str) -> float:
    check_choice("mode", mode, ("batch", "row"))
    if survival_rate is None:
        raise ArgumentError(f"{function} needs survival_rate, the probability in (0, 1] to keep a weight")
    return check_rate(survival_rate)
