"""What DropBlock on feature maps penalises where global average pooling and a linear layer follow."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fallow.errors import UsageError, check_choice, check_count, check_rate
from fallow.penalties._checks import check_floats
from fallow.schemes import odds


def class_activation_omega(
    weight: Tensor,
    maps: Tensor,
    *,
    survival_rate: float,
    block_size: int,
    grid: str = "sliding",
    shared_channels: bool = True,
) -> Tensor:
    """What DropBlock adds to the expected squared error, a scalar; differentiable, twice too.

    Maps F [N, channels, *map] go through masks, the mean over their S positions and a linear layer W, so that
    with class-activation maps ``l_ncs = <W_c, F_n.s> / S``

        E |Y - W pool(F * mask)|^2 = |Y - W pool(F)|^2 + sum_nc l_nc' C l_nc

    where C is the covariance between positions of the masks over the rate p: sliding blocks of side k have
    ``C_st = p^(-o / k^D) - 1`` with ``o = prod_i max(k - |s_i - t_i|, 0)`` places of a seed that cover both
    (on a grid padded by k - 1, the same at the border), disjoint ones ``(1 - p) / p`` within a block. With
    own masks for each channel it is ``sum_j |W_j|^2 sum_n F_nj' C F_nj / S^2`` instead.

    Cost: O(N S (C channels + C S)), with own masks O(N channels S^2), and the matrix of S^2 numbers: made for
    the small maps in front of a pooling.

    Args:
        weight: [outputs, channels], of the linear layer.
        maps: [N, channels, *map], the map of any number of axes; what the masks multiply.
        survival_rate: p, of every position.
        block_size: k; even and larger than the map are as good as others.
        grid: "sliding" or "disjoint", as in `fallow.drop_block2d`.
        shared_channels: One mask for all channels of a sample, or one for each. (The default of the layers is
            one for each.)

    Returns:
        A sum over samples and outputs: divide it by what the loss divides by. In float32 at least.

    Raises:
        RateError: a rate outside (0, 1].
        ArgumentError: a weight or maps that are no real floating-point tensors.
        UsageError: shapes that do not fit each other, a block size below 1, another grid.

    Estimator:
        Exact for squared error and ``normalise="expected"``, whatever comes before the maps, and as long as
        nothing nonlinear comes between the masks and the loss. A bias changes nothing.

    References:
        Derived.

    Examples:
        >>> w, maps = torch.ones(2, 3), torch.ones(4, 3, 4, 4)
        >>> class_activation_omega(w, maps, survival_rate=0.5, block_size=5, grid="disjoint")
        tensor(72.)
    """
    p, k = check_rate(survival_rate), check_count("block_size", block_size, 1)
    check_choice("grid", grid, ("sliding", "disjoint"))
    w, f = check_floats("weight", weight, 2), check_floats("maps", maps, 3)
    if w.dim() != 2 or w.shape[1] != f.shape[1]:
        raise UsageError(
            "weight must be [outputs, channels] and maps [N, channels, *map] of as many channels, got shapes "
            f"{list(w.shape)} and {list(f.shape)}"
        )
    dtype = torch.promote_types(torch.promote_types(w.dtype, f.dtype), torch.float32)
    matrix = _matrix(f.shape[2:], p, k, grid).to(w.device, dtype)
    w, f = w.to(dtype), f.to(dtype).flatten(2) / max(f[0, 0].numel() if len(f) else 1, 1)
    with torch.autocast(w.device.type, enabled=False):
        if shared_channels:
            activations = w @ f
            return ((activations @ matrix) * activations).sum()
        each = ((f @ matrix) * f).sum((0, 2))
        return (each * w.square().sum(0)).sum()


def _matrix(shape: Sequence[int], p: float, k: int, grid: str) -> Tensor:
    """C between all pairs of positions, in double precision; counts are products over the axes."""
    shared = torch.ones(1, 1, dtype=torch.float64)
    for size in shape:
        i = torch.arange(size)
        if grid == "disjoint":
            axis = ((i // k)[:, None] == i // k).double()
        else:
            axis = (k - (i[:, None] - i).abs()).clamp_min(0).double() / k
        shared = torch.kron(shared, axis)
    return odds(p) * shared if grid == "disjoint" else torch.expm1(-math.log(p) * shared)
