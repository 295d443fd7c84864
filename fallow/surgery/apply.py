"""`sites` and `apply`: what can rest in a model, and making it rest."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, cast

from torch import nn

from fallow.errors import ArgumentError, SiteError, UsageError, check_choice, refuse_unknown
from fallow.schedules import rate_at
from fallow.surgery import probe, prove
from fallow.surgery.decide import Options, check_seed
from fallow.surgery.gate import Gated
from fallow.surgery.handle import Handle, handle_of
from fallow.surgery.site import Sites
from fallow.surgery.survey import bind, patterns, survey


def sites(
    model: nn.Module,
    example: Any,
    *,
    granularity: str = "branch",
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
) -> Sites:
    """Find every place in a model where a residual branch can rest, and prove each one.

    Two small probe forwards record the data flow. A residual site is an addition one of whose operands is an
    ancestor of the other, or whose shortcut is at most one 1x1 convolution or linear layer plus norm, pool or
    pad while the branch is deeper. Each is then rested, for whole batches and for rows, and compared with the
    masked branch. The model, its gradients and the random number generators are left as they were.

    Args:
        model: any module; it is not changed.
        example: inputs of one forward, at least one row: a tensor, a tuple of positional arguments or a dict
            of keyword arguments. It is tiled to small probe batches.
        granularity: "branch": each branch is a site; "block": the branches of one block rest together.
        include: patterns (fnmatch) of site names to take; names of ambiguous ones count only here.
        exclude: patterns of site names to leave out.

    Returns:
        The sites in the order they run, a list; its ``ambiguous`` and ``refused`` say what was left out.

    Raises:
        SiteError: the model cannot run the example; a pattern matches nothing.
        ArgumentError: example is none of the above.
    """
    check_choice("granularity", granularity, ("branch", "block"))
    return survey(model, example, granularity, patterns(include), patterns(exclude)).sites


def apply(
    model: nn.Module,
    rates: Any = None,
    *,
    example: Any = None,
    mode: str = "batch",
    sampler: str = "bernoulli",
    scale: str = "train",
    grads: str = "none",
    ranks: str = "same",
    rows: str = "window",
    granularity: str = "branch",
    schedule: Any = None,
    seed: int = 0,
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
    **unknown: Any,
) -> Handle:
    """Put stochastic depth on a model in place: in training, branches rest and are really not run.

    Formula: ``y = x + b/p f(x)`` in training and ``x + f(x)`` at evaluation (``scale="train"``), or
    ``y = x + b f(x)`` and ``x + p f(x)`` (``scale="eval"``), with b Bernoulli of mean p.

    The training loop stays as it is, state_dict keys do not change, `Handle.remove` takes everything off.

    Args:
        model: a module with residual branches; changed in place.
        rates: a rule (`fallow.rates`), a mapping site name -> survival rate (others 1) or a plan.
        example: as in `sites`.
        mode: "batch": one draw for the whole mini-batch (Huang et al.); "row": one draw per sample.
        sampler: "bernoulli": independent draws; "exact": the same marginals at constant cost, floor or
            ceil(sum p) branches (batch) or floor or ceil(p b) rows (row).
        scale: "train": inverted, evaluation is the plain model; "eval": Huang's, p f(x) at evaluation.
        grads: what the parameters of a branch that rests get: "none" (optimisers skip them) or "zero"
            (weight decay and momentum still act, as in Huang's code).
        ranks: "same": every data-parallel rank draws alike in batch mode; "independent": each its own.
        rows: "window": kept rows of the exact sampler are neighbours (fastest; for shuffled batches);
            "scattered": any rows. Independent (bernoulli) row draws are scattered in any case.
        granularity: "branch", or "block": the branches of one block rest together.
        schedule: how rates move over training time (`fallow.schedules`); None: constant.
        seed: of the draws; torch's global generators are never touched.
        include: patterns of site names to take, as in `sites`.
        exclude: patterns of site names to leave out.
        unknown: refused, with the conversion for drop_prob= and the like.

    Returns:
        The handle.

    Raises:
        SiteError: no residual site; unknown names (with the nearest); a site that cannot rest this way; a
            model that drops paths already or has a handle; an example it cannot run.
        RateError: a rate outside (0, 1], an infeasible budget.
        ArgumentError: an unknown keyword.
        UsageError: several processes with ``grads="none"``; DataParallel; a compiled model.

    References:
        Huang, Sun, Liu, Sedra, Weinberger: Deep Networks with Stochastic Depth (2016), eq. 2-5.
    """
    keywords = ("mode", "sampler", "scale", "grads", "ranks", "rows", "granularity", "schedule", "seed")
    refuse_unknown("apply(rates=fallow.rates.uniform(...)):", unknown, keywords)
    if rates is None or example is None:
        raise ArgumentError(
            f"apply needs {'rates' if rates is None else 'example'}: call "
            "fallow.apply(model, fallow.rates.uniform(0.8), example=x) with x as the model takes it"
        )
    for name, value, allowed in (
        ("mode", mode, ("batch", "row")),
        ("sampler", sampler, ("bernoulli", "exact")),
        ("scale", scale, ("train", "eval")),
        ("grads", grads, ("none", "zero")),
        ("ranks", ranks, ("same", "independent")),
        ("rows", rows, ("window", "scattered")),
        ("granularity", granularity, ("branch", "block")),
    ):
        check_choice(name, value, allowed)
    check_seed(seed)
    if not (schedule is None or callable(schedule)):
        raise ArgumentError(
            f"schedule must be one of fallow.schedules or a function of the step, got {schedule!r}"
        )
    rate_at(1.0, cast(Any, schedule), 0)  # refuses a strength outside [0, 1]
    _refuse_model(model)
    named = tuple(rates) if isinstance(rates, Mapping) else ()
    found = survey(model, example, granularity, patterns(include), patterns(exclude), named)
    if not found.sites:
        raise SiteError(_no_sites(found.sites))
    options = Options(mode, sampler, scale, grads, ranks, rows, seed)
    handle = Handle(model, list(found.sites), found.branches, bind(model, found.branches), options, schedule)
    handle._decider.refuse_unreduced()
    try:
        handle.set_rates(rates)
        _note_dtypes(model, handle, example)
    except BaseException:
        handle.remove()
        raise
    handle.attach()
    return handle


def _refuse_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, nn.DataParallel):
        raise UsageError(
            "DataParallel copies the model at every step, and draws would be lost with the copies. Use "
            "torch.nn.parallel.DistributedDataParallel, and apply to the model inside before wrapping it."
        )
    if "_orig_mod" in model._modules or model._compiled_call_impl is not None:
        raise UsageError(
            "this model is compiled, and torch.compile of an applied model is not supported yet: apply to "
            "the plain model, and train it as it is."
        )
    if handle_of(model) is not None or any(isinstance(m, Gated) for m in model.modules()):
        raise SiteError(
            "stochastic depth is on this model already: change it with "
            "fallow.handle_of(model).set_rates(...), or call remove() first."
        )


def _no_sites(found: Sites) -> str:
    text = "no residual site that can rest was found in this model."
    for r in found.ambiguous[:3]:
        text += f" {r.name} is ambiguous ({r.reason}): take it by name with include=."
    for r in found.refused[:3]:
        text += f" {r.name or 'the model'} cannot rest: {r.reason}."
    if not found.ambiguous and not found.refused:
        text += " A site is an addition of a value and a branch with parameters computed from it (x + f(x))."
    return text


def _note_dtypes(model: nn.Module, handle: Handle, example: Any) -> None:
    args, kwargs = probe.arguments(example)
    device = next((p.device.type for p in model.parameters()), "cpu")
    with probe.undisturbed(model), probe.by_modules():
        model.eval()
        prove.note_dtypes(model, handle, probe.tiled(args, kwargs, probe.ROWS[1]), device)
