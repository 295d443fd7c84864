"""What a random mask in front of a softmax costs under cross-entropy, without sampling: two surrogates.

For features G [N, d], a weight W [outputs, d] and logits ``G W^T + bias`` the exact expectation over masks
has no short form. `quadratic_surrogate` is its second order, an approximation for every scheme;
`jensen_bound` is a number that it never exceeds, for independent blocks.

Measured on 2000 samples, 8 blocks of 4 features, 10 classes, standard normal features and weights scaled to
logits of the given standard deviation, uniform targets; mean losses, the expectation by all 256 masks
(`tests/penalties/test_surrogates.py` checks the table):

===============  ======  ===========  =================  =======
rate, logits     plain   expectation  plain + quadratic  bound
===============  ======  ===========  =================  =======
0.9, 1           2.7387  2.7845       2.7832             2.7869
0.7, 1           2.7387  2.9107       2.9104             2.9196
0.5, 1           2.7387  3.1203       3.1393             3.1453
0.9, 2           3.8106  3.9423       3.9325             3.9731
0.7, 2           3.8106  4.2901       4.2808             4.4261
0.5, 2           3.8106  4.8301       4.9078             5.2129
0.9, 5           8.0895  8.4709       8.4253             9.3327
0.5, 5           8.0895  10.9190      11.1110            15.8834
===============  ======  ===========  =================  =======

References:
    Wager, Wang, Liang: Dropout training as adaptive regularization (2013), for the quadratic form of Dropout.
    Its form for other schemes and the bound are derived.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from fallow.errors import ArgumentError, UsageError, check_rate
from fallow.penalties._forms import checked
from fallow.schemes import Blocks, Scheme


def quadratic_surrogate(
    weight: Tensor, features: Tensor, scheme: Scheme, *, bias: Tensor | None = None
) -> Tensor:
    """The second order of what the masks add to the cross-entropy, a scalar; differentiable.

    ``1/2 sum_n [sum_j p_j l_j' C l_j - m' C m]`` with p the softmax without masks, ``l_j = W_j * G_n``,
    ``m = sum_j p_j l_j`` and C the characteristic matrix: half the variance under p of the noise in the
    logits. For blocks ``(1 - theta) / (2 theta) sum_b [sum_j p_j S_bj^2 - (sum_j p_j S_bj)^2]`` with S_b the
    share of block b in the logits. No targets, as in the expectation itself.

    Cost: a few products of size N d C; sliding blocks times the block size, covariances times d. Blocks keep
    their shares in the logits, N times blocks times C numbers.

    Args:
        weight: [outputs, d], as in nn.Linear.
        features: [N, d], or with more leading axes; what the masks multiply.
        scheme: One of `fallow.schemes`.
        bias: [outputs], added after the mask.

    Returns:
        A sum over samples, to add to the plain loss of the same sum, in float32 at least.

    Estimator:
        Biased, by terms of third order in the noise of the logits (of fourth for symmetric noise, `Gaussian`
        or a rate of 1/2), so good where logits are small or spread over many blocks; a rate near 1 makes the
        noise rarer and not smaller, and leaves the relative error. Either sign; see the table above.

    Raises:
        ArgumentError: a weight or features that are no real floating-point tensors, another scheme.
        UsageError: shapes that do not fit each other, or a scheme that does not fit the width.

    References:
        Wager and others (2013) for `Units`; derived for other schemes.
    """
    w, g, form = checked(weight, features, scheme)
    with torch.autocast(w.device.type, enabled=False):
        chances = _logits(w, g, bias).softmax(1)
        # a shift of all classes changes no probability, and takes off what would cancel
        w = w - w.mean(0)
        return ((chances * form.outputs(w, g)).sum() - form.rows(g * (chances @ w)).sum()) / 2


def jensen_bound(
    weight: Tensor,
    features: Tensor,
    targets: Tensor,
    *,
    survival_rate: float,
    block_size: int,
    bias: Tensor | None = None,
) -> Tensor:
    """An upper bound of the expected cross-entropy under disjoint block masks, a scalar; differentiable.

    Per sample, with S_b the share of block b in the logits less its mean under the softmax p without masks
    (``S_bj - sum_i p_i S_bi``), beta the bias, theta the rate and y the target:

        lse_j(beta_j + sum_b log[theta exp(S_bj / theta) + 1 - theta]) - beta_y - sum_b S_by

    It takes the mean over masks inside the logarithm. Blocks of 1 are Dropout, one block is the whole layer.
    Memory: N times blocks times outputs numbers.

    Args:
        weight: [outputs, d], as in nn.Linear.
        features: [N, d], or with more leading axes.
        targets: Classes, integers of the shape of the samples; or probabilities, with an axis of outputs.
        survival_rate: theta, of a block.
        block_size: Features in a block; the last one may be smaller.
        bias: [outputs], added after the mask.

    Returns:
        A sum over samples, in float32 at least; the plain loss is part of it.

    Estimator:
        An upper bound for all values, by Jensen's inequality (probabilities must sum to 1); equal to the
        expectation for a rate of 1 and for shares that do not differ between classes. Centring by the mean
        under p makes it much tighter than no centring.

    Raises:
        RateError: a rate outside (0, 1].
        ArgumentError: a weight or features that are no real floating-point tensors.
        UsageError: shapes or targets that do not fit.

    References:
        Derived.
    """
    rate = check_rate(survival_rate)
    w, g, form = checked(weight, features, Blocks(rate, block_size))
    y = picked(targets, g.shape[0], w.shape[0]).to(w)
    with torch.autocast(w.device.type, enabled=False):
        plain = _logits(w, g, bias)
        if rate == 1:
            return (plain.logsumexp(1) - (y * plain).sum(1)).sum()
        shares = form.logits(w, g)
        shares = shares - (plain.softmax(1)[:, None] * shares).sum(2, keepdim=True)
        dropped = torch.full_like(shares, math.log(1 - rate))
        means = torch.logaddexp(math.log(rate) + shares / rate, dropped).sum(1)
        offset = 0 if bias is None else bias.to(w)
        return ((means + offset).logsumexp(1) - (y * (shares.sum(1) + offset)).sum(1)).sum()


def picked(targets: Tensor, samples: int, outputs: int) -> Tensor:
    """Probabilities [samples, outputs] of targets that are classes or probabilities."""
    if not isinstance(targets, Tensor):
        raise ArgumentError(f"targets must be a tensor, got {type(targets).__name__}")
    if targets.is_floating_point():
        if targets.dim() < 2 or targets.numel() != samples * outputs or targets.shape[-1] != outputs:
            raise UsageError(
                f"targets that are probabilities must have shape [{samples}, {outputs}], got "
                f"{list(targets.shape)}; classes must be integers"
            )
        return targets.flatten(0, -2)
    if targets.numel() != samples or targets.dtype == torch.bool:
        raise UsageError(
            f"targets must be {samples} classes, one for each sample, got {targets.dtype} of shape "
            f"{list(targets.shape)}"
        )
    if samples and not 0 <= int(targets.min()) <= int(targets.max()) < outputs:
        span = f"{int(targets.min())} to {int(targets.max())}"
        raise UsageError(f"targets must be classes from 0 to {outputs - 1}, got {span}")
    return one_hot(targets.flatten().long(), outputs)


def _logits(weight: Tensor, features: Tensor, bias: Tensor | None) -> Tensor:
    plain = features @ weight.T
    if bias is None:
        return plain
    if bias.shape != weight.shape[:1]:
        raise UsageError(f"bias must have shape [{weight.shape[0]}], got {list(bias.shape)}")
    return plain + bias.to(plain)
