"""What a random mask in front of a linear map penalises under squared loss, exactly and without sampling.

For features G [N, d], a weight W [outputs, d] and masks of a scheme, one for all samples or one for each,

    E |Y - (G * mask) W^T|_F^2 = |Y - G W^T|_F^2 + Omega(W, G)                                         (5)

with ``Omega = <C, W^T W * G^T G>`` and C the characteristic matrix of the scheme. Of the mask only C counts.

References:
    Pal, Lane, Vidal, Haeffele: On the regularization properties of structured dropout (2020), for the
    statement that any law of masks has an explicit regulariser. The formulas are derived; blocks of 1 agree
    with Cavazza and others (2017).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from fallow.errors import UsageError, check_count
from fallow.penalties._checks import check_floats
from fallow.penalties._forms import check_scheme, checked, form_of
from fallow.schemes import Scheme


def omega(weight: Tensor, features: Tensor, scheme: Scheme) -> Tensor:
    """The regulariser Omega of (5), a scalar; differentiable, twice too, in weight and features.

    Formula and cost, with C the outputs, c = (1 - p) / p and X_b the columns of a block b of r:

    - `Units`, `Gaussian`: ``sum_j c_j |W_j|^2 |G_j|^2``, O((N + C) d)
    - `Blocks`, disjoint: ``c sum_b <W_b^T W_b, G_b^T G_b>``, or ``c sum_b |G_b W_b^T|^2`` where that is less
      work; O(d min((N + C) r, N C))
    - `Blocks`, sliding: a band of ``p^(t / r - 1) - 1`` at lag t, O(2 (N + C) d r)
    - `Layer`: ``c |G W^T|^2``
    - `Exchangeable`, `FixedSize`, `UnitsInBlocks`: sums of two of these
    - `Correlated`, and schemes of your own: the matrix itself, O((N + C) d^2)

    A bias that is added after the mask changes nothing.

    Args:
        weight: [outputs, d], as in nn.Linear.
        features: [N, d], or with more leading axes; what the masks multiply.
        scheme: One of `fallow.schemes`.

    Returns:
        A sum over samples and outputs: divide it by what the loss divides by, N times outputs for
        ``F.mse_loss``. In float32, or in float64 where one of the two is.

    Raises:
        ArgumentError: a weight or features that are no real floating-point tensors, another scheme.
        UsageError: shapes that do not fit each other, or a scheme that does not fit the width.

    Estimator:
        Exact for all values and every scheme, also for non-linear networks in front of the features, and for
        weights instead of features masked independently (DropConnect: `Units`).

    References:
        Equation (5) and its cheap forms are derived; see the module.

    Examples:
        >>> from fallow.schemes import Blocks, Units
        >>> g, w = torch.ones(4, 6), torch.ones(2, 6)
        >>> omega(w, g, Units(0.5)), omega(w, g, Blocks(0.5, 3))
        (tensor(48.), tensor(144.))
    """
    w, g, form = checked(weight, features, scheme)
    # autocast would take the products in half precision, whatever comes in
    with torch.autocast(w.device.type, enabled=False):
        return form.total(w, g)


def kappa(scheme: Scheme, width: int) -> float:
    """Weight of the mean prediction: ``1 / (1' C^-1 1)``, the least of ``v' C v`` over v that sum to 1.

    Over all features and weights with predictions A the least of `omega` is at least ``kappa |A|_F^2``, which
    it is for predictions of rank one, and its convex envelope lies between that and ``kappa |A|_*^2``.
    Dropout has ``kappa = c / d`` and the upper end, the whole layer c and the lower one; k disjoint blocks
    have ``c / k`` and lie between. At 0 (as with `FixedSize`) some predictions cost nothing.

    Estimator:
        Exact; through a pseudo-inverse in double precision for sliding blocks and covariances, where
        directions of less than d eps of the largest count as outside C's range.

    References:
        Derived.

    Examples:
        >>> from fallow.schemes import Blocks, FixedSize, Layer, Units
        >>> kappa(Units(0.5), 8), kappa(Blocks(0.5, 4), 8), kappa(Layer(0.5), 8), kappa(FixedSize(4), 8)
        (0.125, 0.5, 1.0, 0.0)
    """
    d = check_count("width", width, 1)
    form = form_of(check_scheme(scheme), d)
    if form.dense is None and form.band is None:
        a = torch.as_tensor(form.diagonal, dtype=torch.float64).expand(d)
        inverse = pad(1 / a, (0, -d % form.block_size)).view(-1, form.block_size).sum(1)
        blocks = 1 / inverse + form.block
        negligible = float(blocks.min()) <= 1e-14 * (float(a.max()) + abs(form.block))
        return 0.0 if negligible else float(1 / (1 / blocks).sum())
    values, vectors = torch.linalg.eigh(scheme.characteristic_matrix(d))
    inside = values > d * torch.finfo(values.dtype).eps * values.abs().amax()
    ones = vectors.sum(0).square()
    if not bool(inside.any()) or float(ones[~inside].sum()) > 1e-9 * d:
        return 0.0
    return float(1 / (ones[inside] / values[inside]).sum())


def effective_rank(predictions: Tensor) -> float:
    """Nuclear over spectral norm, ``|A|_* / |A|_2``: from 1 to the rank; 0 for predictions that are 0.

    Raises:
        UsageError: predictions that are not finite or of another shape than [N, outputs].

    Examples:
        >>> effective_rank(torch.diag(torch.tensor([4.0, 2.0, 1.0])))
        1.75
    """
    a = check_floats("predictions", predictions, 2).detach()
    if a.dim() != 2 or not a.numel() or not bool(a.isfinite().all()):
        raise UsageError(
            f"predictions must be finite and of shape [N, outputs], got {list(a.shape)}: look for NaN"
        )
    values = torch.linalg.svdvals(a.double())
    return float(values.sum() / values[0]) if values[0] > 0 else 0.0


def acts_as_dropout(predictions: Tensor, block_size: int) -> bool:
    """Whether disjoint DropBlock penalises as Dropout of this rate and width does: ``r |A|_2 <= |A|_*``.

    The least penalty of these predictions is then ``(1 - p) / p |A|_*^2 / d`` with both, so that block sizes
    up to the effective rank of the solution change nothing but the noise of training.

    Args:
        predictions: A, [N, outputs], of the trained network without masks or of `closed_form`.
        block_size: r.

    Estimator:
        Exact for what the penalty is at best (any width that `closed_form` reaches); a network in training
        may be away from that.

    References:
        Derived.
    """
    r = check_count("block_size", block_size, 1)
    return r <= effective_rank(predictions) * (1 + 1e-12) or r == 1


def block_size_note(predictions: Tensor, block_size: int) -> str:
    """One sentence for a report: whether DropBlock is Dropout here, and from which block size on it is not.

    Examples:
        >>> block_size_note(torch.eye(6), 4)
        'at block size 4 DropBlock is Dropout here: it differs above the effective rank, 6.0'
        >>> block_size_note(torch.eye(6), 8)
        'at block size 8 DropBlock is more than Dropout here: the effective rank is 6.0'
    """
    rank = effective_rank(predictions)
    if acts_as_dropout(predictions, block_size):
        end = f"DropBlock is Dropout here: it differs above the effective rank, {rank:.1f}"
    else:
        end = f"DropBlock is more than Dropout here: the effective rank is {rank:.1f}"
    return f"at block size {block_size} {end}"
