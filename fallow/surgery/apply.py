"""`sites` and `apply`: what can rest in a model, and making it rest."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from fallow.errors import ArgumentError, SiteError, UsageError, check_choice, nearest, refuse_unknown
from fallow.rows import Selection
from fallow.surgery import probe, prove
from fallow.surgery.branch import BranchState, branch_state
from fallow.surgery.find import Branch, Finder, Refused
from fallow.surgery.gate import Gated
from fallow.surgery.handle import Handle, Options, handle_of
from fallow.surgery.site import Site, Sites


@dataclass
class _Survey:
    """What a model was found to hold."""

    branches: dict[str, list[Branch]]  # site -> its branches
    sites: Sites
    why_not: dict[str, dict[str, str]] = field(default_factory=dict)  # mode -> branch -> reason


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
    return _survey(model, example, granularity, _patterns(include), _patterns(exclude)).sites


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
        UsageError: several processes with ``grads="none"``; DataParallel.

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
    _refuse_model(model)
    named = tuple(rates) if isinstance(rates, Mapping) else ()
    survey = _survey(model, example, granularity, _patterns(include), _patterns(exclude), named)
    if not survey.sites:
        raise SiteError(_no_sites(survey.sites))
    order = [b.name for branches in survey.branches.values() for b in branches]
    states = _states(model, survey.branches, order)
    handle = Handle(
        model,
        list(survey.sites),
        survey.branches,
        states,
        Options(mode, sampler, scale, grads, ranks, rows, seed),
        schedule,
    )
    handle._refuse_unreduced()
    handle.set_rates(rates)
    try:
        _refuse_mode(handle, survey, mode)
        _note_dtypes(model, handle, example)
    except BaseException:
        handle.remove()
        raise
    handle.attach()
    return handle


def _states(
    model: nn.Module, branches: dict[str, list[Branch]], order: list[str]
) -> dict[str, list[BranchState]]:
    position = {name: i for i, name in enumerate(sorted(order, key=lambda n: _sum_op(branches, n)))}
    return {s: [branch_state(model, b, s, position[b.name]) for b in bs] for s, bs in branches.items()}


def _sum_op(branches: dict[str, list[Branch]], name: str) -> int:
    return next(b.sum_op for bs in branches.values() for b in bs if b.name == name)


def _patterns(given: str | Iterable[str] | None) -> tuple[str, ...] | None:
    if given is None:
        return None
    return (given,) if isinstance(given, str) else tuple(given)


def _refuse_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, nn.DataParallel):
        raise UsageError(
            "DataParallel copies the model at every step, and draws would be lost with the copies. Use "
            "torch.nn.parallel.DistributedDataParallel, and apply to the model inside before wrapping it."
        )
    if handle_of(model) is not None or any(isinstance(m, Gated) for m in model.modules()):
        raise SiteError(
            "stochastic depth is on this model already: change it with fallow.handle_of(model).set_rates(...), "
            "or call remove() first."
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


# --- the survey ----------------------------------------------------------------------------------------


def _survey(
    model: nn.Module,
    example: Any,
    granularity: str,
    include: tuple[str, ...] | None,
    exclude: tuple[str, ...] | None,
    named: tuple[str, ...] = (),
) -> _Survey:
    args, kwargs = probe.arguments(example)
    with probe.undisturbed(model):
        trace, training, batch_known = probe.traces(model, args, kwargs)
        if (where := probe.dropping(training, model)) is not None:
            raise SiteError(
                f"{where} drops paths already; two such noises would multiply. Switch it off (drop_prob=0, "
                "drop_path_rate=0, layerdrop=0) before fallow.apply."
            )
        finder = Finder(trace)
        finder.run()
        dense = sum(op.flops for op in trace.ops)
        refused = list(finder.refused)
        branches = _unshared(finder.branches, trace, refused)
        branches = _chosen(branches, granularity, include, exclude, named)
        why = _proved(
            model, branches, tiled=probe.tiled(args, kwargs, probe.ROWS[0]), batch_known=batch_known
        )
    refused += [Refused(b.name, why["batch"][b.name]) for b in branches if b.name in why["batch"]]
    good = [b for b in branches if b.name not in why["batch"]]
    taken = {b.name for b in branches}
    ambiguous = [Refused(b.name, b.ambiguous) for b in finder.branches if b.ambiguous and b.name not in taken]
    groups = _groups(good, granularity)
    table = [_site(name, group, why["row"], dense) for name, group in groups.items()]
    return _Survey(groups, Sites(table, ambiguous, refused), why)


def _unshared(branches: list[Branch], trace: Any, refused: list[Refused]) -> list[Branch]:
    """Leave out branches whose modules are called more than once in a forward (shared weights)."""
    calls: dict[str, int] = {}
    for call in trace.calls:
        calls[call.name] = calls.get(call.name, 0) + 1
    kept = []
    for b in branches:
        shared = [r.module for r in b.roles if calls[r.module] > 1]
        if shared:
            times = calls[shared[0]]
            refused.append(Refused(b.name, f"its module {shared[0]} is called {times} times in one forward"))
        else:
            kept.append(b)
    return kept


def _chosen(
    branches: list[Branch],
    granularity: str,
    include: tuple[str, ...] | None,
    exclude: tuple[str, ...] | None,
    named: tuple[str, ...],
) -> list[Branch]:
    def site(b: Branch) -> str:
        return _block_name(b, branches) if granularity == "block" else b.name

    names = [site(b) for b in branches]
    for pattern in (*(include or ()), *(exclude or ())):
        if not any(fnmatchcase(n, pattern) for n in names):
            close = nearest(pattern, names)
            raise SiteError(f"no site matches {pattern!r}" + (f"; did you mean {close!r}?" if close else "."))

    def wanted(b: Branch) -> bool:
        name = site(b)
        if exclude and any(fnmatchcase(name, p) for p in exclude):
            return False
        if b.ambiguous:  # a wildcard does not name it
            return name in named or name in (include or ())
        return include is None or any(fnmatchcase(name, p) for p in include)

    return [b for b in branches if wanted(b)]


def _block_name(branch: Branch, branches: list[Branch]) -> str:
    """The outermost block of a site that holds this one; flat models have no blocks beyond the branch."""
    around = [
        o.block
        for o in branches
        if o.block and not o.ambiguous and (branch.block == o.block or branch.block.startswith(o.block + "."))
    ]
    return min(around, key=len) if around else branch.name


def _groups(branches: list[Branch], granularity: str) -> dict[str, list[Branch]]:
    groups: dict[str, list[Branch]] = {}
    for b in branches:
        groups.setdefault(_block_name(b, branches) if granularity == "block" else b.name, []).append(b)
    return groups


def _site(name: str, group: list[Branch], row: dict[str, str], dense: int) -> Site:
    reasons = [row[b.name] for b in group if b.name in row]
    kind = "transition" if any(b.kind == "transition" for b in group) else "identity"
    return Site(
        name=name,
        kind=kind,
        cost=sum(b.flops for b in group) / dense if dense else 0.0,
        block=group[0].block,
        modules=tuple(r.module for b in group for r in b.roles),
        modes=("batch",) if reasons else ("batch", "row"),
        why_not_row=reasons[0] if reasons else "",
    )


# --- the proof ------------------------------------------------------------------------------------------


def _proved(
    model: nn.Module, branches: list[Branch], tiled: tuple, batch_known: bool
) -> dict[str, dict[str, str]]:
    """Mode -> branch -> why it cannot rest so."""
    why: dict[str, dict[str, str]] = {"batch": {}, "row": {}}
    if not branches:
        return why
    found = {b.name: [b] for b in branches}
    table = [Site(b.name, b.kind, 0.0, b.block, ()) for b in branches]
    handle = Handle(model, table, found, _states(model, found, list(found)), Options())
    model.eval()
    with probe.no_silent_parameters(model):
        try:
            handle.set_rates(dict.fromkeys(found, 0.5))
            for parity in (0, 1):
                _until_right(model, handle, branches, tiled, why["batch"], "batch", parity)
            why["row"].update(why["batch"])
            for b in branches:
                if b.dim is None or not batch_known:
                    why["row"].setdefault(b.name, "its sum has no one dimension that is the batch")
            for parity in (0, 1):
                _until_right(model, handle, branches, tiled, why["row"], "row", parity)
        finally:
            handle.remove()
    return why


def _until_right(model, handle, branches, tiled, why: dict[str, str], mode: str, parity: int) -> None:
    """Check all branches together; set aside the first that differs and check again.

    Rounding differs with the number of rows and adds up over a deep model, so one that differs in company is
    checked alone before it is refused.
    """
    cleared: set[str] = set()
    while True:
        able = [b for b in branches if b.name not in why]
        plan: dict[str, Selection | None] = {}
        for i, b in enumerate(able):
            if mode == "batch":
                if i % 2 == parity:
                    plan[b.name] = None
            else:
                total = probe.ROWS[0]
                plan[b.name] = (
                    Selection(total, 2, index=torch.tensor([i % 2, 3]))
                    if parity
                    else Selection(total, 1 + i % 3, i % total)
                )
        verdict = prove.check(model, handle, [b for b in able if b.name not in cleared], tiled, plan)
        if not verdict:
            return
        name = verdict[0]
        if _fewer_inner_sums(handle, branches, name):
            continue
        if name in plan and not prove.check(
            model, handle, [b for b in able if b.name == name], tiled, {name: plan[name]}
        ):
            cleared.add(name)
        else:
            why[name] = verdict[1]


def _fewer_inner_sums(handle: Handle, branches: list[Branch], name: str) -> bool:
    """Try again with one inner sum less: the trace also counts those inside torch's own compositions."""
    branch = next(b for b in branches if b.name == name)
    if branch.inner_sums == 0:
        return False
    branch.inner_sums -= 1
    for state in handle._states[name]:
        state.inner_sums = branch.inner_sums
    return True


def _refuse_mode(handle: Handle, survey: _Survey, mode: str) -> None:
    if mode != "row":
        return
    for site in survey.sites:
        if "row" not in site.modes and handle.rates[site.name] < 1:
            raise SiteError(
                f'{site.name}: cannot rest row by row: {site.why_not_row}. Leave it out with exclude="{site.name}" '
                'or take mode="batch".'
            )


def _note_dtypes(model: nn.Module, handle: Handle, example: Any) -> None:
    args, kwargs = probe.arguments(example)
    device = next((p.device.type for p in model.parameters()), "cpu")
    with probe.undisturbed(model):
        model.eval()
        prove.note_dtypes(model, handle, probe.tiled(args, kwargs, probe.ROWS[1]), device)
