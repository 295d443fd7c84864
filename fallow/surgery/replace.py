"""`replace`: the drop paths and DropBlocks of timm, torchvision and transformers become ours, reversibly."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from fallow.errors import ArgumentError, SiteError, UsageError, check_choice, refuse_unknown
from fallow.surgery.apply import apply
from fallow.surgery.counted import Counted
from fallow.surgery.foreign import KINDS, Noise, Place, places
from fallow.surgery.handle import Handle, handle_of
from fallow.surgery.match import match
from fallow.surgery.replaced import Change, Left, Replaced
from fallow.surgery.survey import survey

_OPTIONS = ("sampler", "grads", "rows", "schedule", "seed")
_LOOKED_FOR = {
    "drop_path": "DropPath of timm, *DropPath of transformers, StochasticDepth of torchvision",
    "drop_block": "DropBlock2d of timm, DropBlock2d and DropBlock3d of torchvision",
}
_NO_EXAMPLE = "pass example= to let its branch rest instead"


def replace(
    model: nn.Module,
    *,
    what: str | Iterable[str] = KINDS,
    example: Any = None,
    missing_ok: bool = False,
    **options: Any,
) -> Replaced:
    """Put our noise where a model of timm, torchvision or transformers has its own, at the same rates.

    - A DropBlock becomes `DropBlock2d` or `DropBlock3d` with the same block size and sharing of channels. The
      rate is now the asked one at every position (theirs drops other shares, .93 for .1 at worst), and the
      scale is 1/p instead of one over the whole batch.
    - A drop path masks what its branch has computed. With ``example`` it becomes the identity, and the branch
      that it masked rests, at the same rate and by row or batch as before, under a handle of `fallow.apply`.
      Without an example, and where no site is the one it masks, it becomes `DropPath`: the same law, exact in
      half precision, and no work saved. `Replaced.report` says which is which.

    The rate that counts as asked is ``1 - drop_prob`` (``1 - p`` in torchvision). timm's ``gamma_scale``
    multiplies the chance that blocks start, so ``1 - gamma_scale * drop_prob`` is asked there: timm's ResNets
    of ``drop_block_rate=.1`` ask for .025 dropped in their third stage and .1 in their fourth.

    Modules are exchanged in place and state_dict keys do not change; ``undo()`` puts the same objects back.
    Classes are known by name and library, subclasses of them too unless they have a forward of their own.
    Noise that is a function called in a forward (``torchvision.ops.drop_block2d``) cannot be seen; active
    drop paths that stay make every branch mask. In row mode, BatchNorm in a branch that rests sees the kept
    rows. A copy of the model (deepcopy, pickle) works, but has no way back: that is the original's.

    Args:
        model: changed in place.
        what: "drop_path", "drop_block" or both.
        example: inputs of one forward, as in `fallow.apply`; lets branches rest.
        missing_ok: for scripts that take any model: a model without such modules is no error.
        options: of `fallow.apply` for the branches that rest: sampler, grads (``"zero"`` under
            DistributedDataParallel), rows, schedule, seed.

    Returns:
        The result; ``model, undo = fallow.replace(model)`` unpacks it.

    Raises:
        SiteError: nothing to replace; the model cannot run the example, or has a handle already.
        ArgumentError: an unknown keyword, or options without an example.
        UsageError: another word than those above; what `fallow.apply` refuses.
    """
    kinds = _checked(model, what, example, options)
    found = places(model, kinds)
    left = [Left(name, p.read) for p in found if isinstance(p.read, str) for name in p.names]
    theirs = [(p, p.read) for p in found if isinstance(p.read, Noise)]
    if not theirs and not missing_ok:
        raise SiteError(_nothing(model, kinds, left))
    result = Replaced(model, tuple(left))
    try:
        paths = [(p, noise) for p, noise in theirs if p.kind == "drop_path"]
        verdicts: dict[int, list[str] | str] = dict.fromkeys((id(p) for p, _ in paths), _NO_EXAMPLE)
        if example is not None and paths:
            verdicts = _rest(result, paths, example, options)
        for place, noise in theirs:
            verdict = verdicts.get(id(place), "")
            if isinstance(verdict, str):
                result.add(_change(place, noise, noise.make(), note=verdict))
            else:
                result.add(_change(place, noise, nn.Identity(), sites=tuple(verdict)))
    except BaseException:
        result.undo()
        raise
    return result


def _checked(model: Any, what: Any, example: Any, options: dict[str, Any]) -> tuple[str, ...]:
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    unknown = {k: v for k, v in options.items() if k not in _OPTIONS}
    # rates are those of the modules that are there
    refuse_unknown("replace", unknown, ("what", "example", "missing_ok", *_OPTIONS), rate=None)
    if options and example is None:
        raise ArgumentError(
            f"{', '.join(options)} is for branches that rest, which need example=: pass the inputs of one "
            "forward, or leave it out"
        )
    if example is not None and handle_of(model) is not None:
        raise SiteError(
            "stochastic depth is on this model already: call fallow.handle_of(model).remove() first, or "
            "leave example= out, and drop paths become masks."
        )
    kinds = (what,) if isinstance(what, str) or not isinstance(what, Iterable) else tuple(what)
    for kind in kinds:
        check_choice("what", kind, KINDS)
    if not kinds:
        raise UsageError(f"what names nothing to replace; it takes {' and '.join(KINDS)}")
    return kinds


def _nothing(model: nn.Module, kinds: tuple[str, ...], left: list[Left]) -> str:
    text = (
        f"nothing to replace in this model: looked for an active {'; '.join(_LOOKED_FOR[k] for k in kinds)}."
    )
    ours = sum(isinstance(m, Counted) for m in model.modules())
    if ours:
        text += f" {ours} of its modules are fallow's already."
    for item in left[:3]:
        text += f" {item.name} stays: {item.reason}."
    return text + " A function called in a forward cannot be seen. missing_ok=True makes this no error."


def _change(place: Place, noise: Noise, new: nn.Module, **others: Any) -> Change:
    names, holders = tuple(place.names), tuple(place.holders)
    return Change(names, place.module, new, noise.survival_rate, holders=holders, **others)


# --- branches that rest ------------------------------------------------------------------------------------


def _rest(
    result: Replaced, paths: list[tuple[Place, Noise]], example: Any, options: dict[str, Any]
) -> dict[int, list[str] | str]:
    """Let branches rest in place of drop paths; by the id of each place its sites, or why it masks.

    All are the identity while sites are looked for and proved.
    """
    silent = Replaced(result.model)
    try:
        for place, noise in paths:
            silent.add(_change(place, noise, nn.Identity()))
        asked = {c.new: noise for c, (_, noise) in zip(silent.replaced, paths, strict=True)}
        verdicts = match(result.model, example, {module: noise.mode for module, noise in asked.items()})
        verdicts = _of_one_mode(verdicts, asked)
        result.handle, verdicts = _applied(result.model, verdicts, asked, example, options)
    finally:
        silent.undo()
    return {id(place): verdicts[module] for module, (place, _) in zip(asked, paths, strict=True)}


Verdicts = dict[nn.Module, "list[str] | str"]


def _of_one_mode(verdicts: Verdicts, asked: dict[nn.Module, Noise]) -> Verdicts:
    """A handle draws by row or for the batch: where modules do both, those by row rest."""
    mode = _mode(verdicts, asked)
    other = f'it draws in another way than the handle, whose mode is "{mode}"'
    return {m: v if isinstance(v, str) or asked[m].mode == mode else other for m, v in verdicts.items()}


def _mode(verdicts: Verdicts, asked: dict[nn.Module, Noise]) -> str:
    # "row" wins where modules do both: almost all do
    return max((asked[m].mode for m, v in verdicts.items() if not isinstance(v, str)), default="row")


def _applied(
    model: nn.Module,
    verdicts: Verdicts,
    asked: dict[nn.Module, Noise],
    example: Any,
    options: dict[str, Any],
) -> tuple[Handle | None, Verdicts]:
    """The handle, None where nothing rests, and the verdicts without the sites that it refuses."""
    mode = _mode(verdicts, asked)

    def applied() -> Handle | None:
        able = [(m, v) for m, v in verdicts.items() if not isinstance(v, str)]
        rates = {site: asked[m].survival_rate for m, v in able for site in v}
        return apply(model, rates, example=example, mode=mode, **options) if rates else None

    try:
        return applied(), verdicts
    except SiteError:  # rare, so that only then every site is looked at once more
        verdicts = _able(model, verdicts, example, mode)
    return applied(), verdicts


def _able(model: nn.Module, verdicts: Verdicts, example: Any, mode: str) -> Verdicts:
    """The verdicts without sites that cannot rest; a model that drops paths elsewhere has none."""
    named = tuple(s for v in verdicts.values() if not isinstance(v, str) for s in v)
    try:
        found = survey(model, example, "branch", None, None, named).sites
    except SiteError as error:
        return {m: v if isinstance(v, str) else str(error) for m, v in verdicts.items()}
    by_name = {s.name: s for s in found}
    refused = {r.name: r.reason for r in found.refused}

    def checked(names: list[str]) -> list[str] | str:
        for name in names:
            site = by_name.get(name)
            if site is None:
                return refused.get(name) or refused.get(name.partition("#")[0]) or "its branch cannot rest"
            if mode not in site.modes:
                return site.why_not_row
        return names

    return {m: v if isinstance(v, str) else checked(v) for m, v in verdicts.items()}
