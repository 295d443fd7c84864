"""Prove that a site rests as it should, before anybody trains with it.

The reference runs the whole branch and masks its result where the recorded addition reads it, below every
module and hook. The model at rest must give the same sums, for whole batches and for rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fallow.rows import Selection
from fallow.surgery.branch import BranchState, Run, autocast_dtype
from fallow.surgery.flow import SUMS
from fallow.surgery.found import Branch
from fallow.surgery.handle import Handle

_SCALE = 1.25
Decision = Callable[[BranchState, tuple[Tensor, int]], Run]


class _Masked(TorchDispatchMode):
    """Runs the dense model with each branch masked at its sum, found by the addition's number."""

    def __init__(self, branches: dict[int, tuple[Branch, Selection | None]]) -> None:
        super().__init__()
        self.branches = branches
        self.count = -1
        self.sums: dict[str, Tensor] = {}
        self.sizes: dict[str, tuple[float, float]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if str(func) not in SUMS:  # other operations may come and go, detach for one
            return func(*args, **(kwargs or {}))
        self.count += 1
        if self.count not in self.branches:
            return func(*args, **(kwargs or {}))
        branch, selection = self.branches[self.count]
        z, shortcut = args[branch.branch_at], args[1 - branch.branch_at]
        self.sizes[branch.name] = (_size(z), _size(shortcut))
        masked = z * _factor(z, branch.dim or 0, selection)
        if branch.branch_at == 0 and func is torch.ops.aten.add_.Tensor:
            out = func(
                z.copy_(masked), shortcut, **(kwargs or {})
            )  # below autograd: any tensor may be written
        else:
            pair = (masked, shortcut) if branch.branch_at == 0 else (shortcut, masked)
            out = func(*pair, **(kwargs or {}))
        self.sums[branch.name] = out.detach().clone()
        return out


def _size(t: Tensor) -> float:
    return float(t.detach().abs().amax()) if t.numel() else 0.0


def _factor(z: Tensor, dim: int, selection: Selection | None) -> Tensor:
    if selection is None:
        return torch.zeros((), dtype=z.dtype, device=z.device)
    shape = [1] * z.dim()
    shape[dim] = selection.total
    return (selection.mask().to(z.device) * _SCALE).to(z.dtype).reshape(shape)


def check(
    model: nn.Module,
    handle: Handle,
    branches: list[Branch],
    inputs: tuple,
    selections: dict[str, Selection | None],
) -> str | tuple[str, str]:
    """Compare the model at rest with the reference; "" or (name of the first branch that differs, why).

    Args:
        model: the model, in eval mode and with the handle's gates on.
        handle: whose decisions the gates follow.
        branches: to check; those left out of ``selections`` run dense.
        inputs: (args, kwargs).
        selections: branch name -> rows kept, None for none.
    """
    by_name = {b.name: b for b in branches}
    selections = {n: s for n, s in selections.items() if n in by_name}
    reference = _Masked({by_name[n].sum_number: (by_name[n], s) for n, s in selections.items()})
    sums: dict[str, Tensor] = {}
    begun: list[str] = []

    def watch(run: Run, shortcut: Tensor, value: Tensor | None, out: Tensor) -> None:
        sums[run.branch.name] = out.detach().clone()

    def decide(branch: BranchState, entry: tuple[Tensor, int]) -> Run | None:
        if branch.name not in selections:
            return None
        begun.append(branch.name)
        selection = selections[branch.name]
        return Run(branch, _SCALE, selection, selection is None, watch=watch)

    with torch.enable_grad():  # as recorded: libraries take other paths without gradients
        handle._decider.probe = lambda *_: None
        with reference:
            model(*inputs[0], **inputs[1])
        handle._decider.probe = decide
        try:
            model(*inputs[0], **inputs[1])
        except Exception as error:
            last = begun[-1] if begun else branches[0].name
            return (
                last,
                f"resting it fails with {type(error).__name__}: {str(error).strip().splitlines()[:1]}",
            )
        finally:
            handle._decider.probe = None
    for branch in branches:
        if branch.name in selections and (why := _differs(branch.name, sums, reference)):
            return branch.name, why
    return ""


def _differs(name: str, sums: dict[str, Tensor], reference: _Masked) -> str:
    if name not in reference.sums:
        return "its residual sum was not reached again, so the model's operations change from call to call"
    if name not in sums:
        return "its branch leaves its modules in a way that hides the residual sum"
    ours, theirs = sums[name], reference.sums[name]
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        ours_is, theirs_is = (f"{tuple(ours.shape)} {ours.dtype}", f"{tuple(theirs.shape)} {theirs.dtype}")
        return f"at rest its sum is {ours_is}, not {theirs_is}"
    size, shortcut = reference.sizes[name]
    eps = torch.finfo(theirs.dtype).eps
    allowed = min(2e3 * eps, 0.1) * size + min(64 * eps, 0.1) * shortcut
    error = float((ours - theirs).abs().nan_to_num(0.0).amax())
    return "" if error <= allowed else f"resting it is off by {error:.2g} from the masked branch ({size:.2g})"


def note_dtypes(model: nn.Module, handle: Handle, inputs: tuple, device: str) -> None:
    """Record each sum's dtype with and without autocast, so that a sum at rest keeps it."""

    def watch(run: Run, shortcut: Tensor, value: Tensor | None, out: Tensor) -> None:
        run.branch.dtypes[autocast_dtype(shortcut.device.type), shortcut.dtype] = out.dtype

    def decide(branch: BranchState, entry: Any) -> Run:
        return Run(branch, 1.0, None, False, watch=watch)

    # fp16 autocast on a CPU is too slow to try on a whole model
    dtypes = [None, torch.bfloat16] + ([torch.float16] if device == "cuda" else [])
    for dtype in dtypes:
        handle._decider.probe = decide
        try:
            with (
                torch.no_grad(),
                torch.autocast(device, dtype=dtype or torch.bfloat16, enabled=dtype is not None),
            ):
                model(*inputs[0], **inputs[1])
        except (RuntimeError, TypeError, ValueError):
            continue  # this model does not run under autocast, so nobody needs its dtypes there
        finally:
            handle._decider.probe = None
