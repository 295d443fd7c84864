"""The anatomy of one branch: which modules it consists of, where it ends, what it is called."""

from __future__ import annotations

from torch.utils._pytree import tree_leaves

from fallow.surgery.flow import AFFINE, HOMOGENEOUS, KEEPS_RESULT, NORMS, REARRANGING, Flow, base_name
from fallow.surgery.found import Role
from fallow.surgery.trace import Op, Slot


def roles_of(flow: Flow, region: set[int], own: set[int]) -> tuple[list[Role], int]:
    """The outermost module calls inside the branch, in order, and how many sums between are inner ones.

    An inner sum adds something to the branch's rows on their way, so it is not the residual one.
    """
    trace = flow.trace
    outermost: dict[int, None] = {}
    free: list[Op] = []
    for op in flow.ops_of(region):
        inside = [c for c in trace.chain(op.call) if _contained(flow, c, own)]
        if inside:
            outermost[inside[-1]] = None
        else:
            free.append(op)
    roles, carrying, inner = [], set(), 0
    pending = sorted(free, key=lambda o: o.index)
    for c in sorted(outermost):
        call = trace.calls[c]
        while pending and pending[0].index < call.start:
            inner += _carry(pending.pop(0), carrying)
        entry = not any(v in carrying for v in call.inputs.values())
        rows = {p: trace.batch.get(v) for p, v in call.inputs.items() if v not in carrying}
        slots = [s.value for s in _slots(call.template)]
        on_path = {v: trace.batch.get(v, -1) for v in slots if v in region}
        shapes = {v: trace.values[v].shape for v in on_path}
        arrives = [v for v in call.inputs.values() if v in trace.batch]
        shape_in = trace.values[arrives[0]].shape if arrives else ()
        dim_in = trace.batch[arrives[0]] if arrives else 0
        made_by = trace.values[arrives[0]].op if arrives else -1
        kept = made_by >= 0 and base_name(trace.ops[made_by]) in KEEPS_RESULT
        roles.append(Role(call.name, c, entry, rows, call.template, on_path, shape_in, dim_in, kept, shapes))
        carrying |= {v for v in region if call.start <= trace.values[v].op < call.end}
    inner += sum(_carry(op, carrying) for op in pending)
    return [r for r in roles if not _ungated(flow, r)], inner


def _contained(flow: Flow, call: int, own: set[int]) -> bool:
    c = flow.trace.calls[call]
    return c.name != "" and all(o in own for o in range(c.start, c.end))


def _ungated(flow: Flow, role: Role) -> bool:
    """A module without parameters that is called elsewhere too (one ReLU for all) works on any rows."""
    module = flow.trace.calls[role.call].module
    return flow.calls[role.module] > 1 and not any(True for _ in module.parameters())


def _carry(op: Op, carrying: set[int]) -> bool:
    """Follow the rows through an operation; whether it adds something else to them."""
    mine = [i in carrying for i in op.inputs]
    if any(mine):
        carrying.update(op.outputs)
    return any(mine) and not all(mine) and len(mine) > 1 and base_name(op) == "add"


def batch_norms(flow: Flow, own: set[int]) -> dict[str, int]:
    """BatchNorm module -> values per row and channel that it normalises."""
    found = {}
    for o in own:
        op = flow.trace.ops[o]
        if "batch_norm" in op.name and op.call >= 0:
            shape = flow.trace.values[op.inputs[0]].shape
            size = 1
            for n in shape[2:]:
                size *= n
            per_row = shape[0] // flow.trace.rows if shape[0] % flow.trace.rows == 0 else 1
            found[flow.trace.calls[op.call].name] = size * max(1, per_row)
    return found


def affine_end(flow: Flow, output: int, region: set[int]) -> list[str] | None:
    """Walk back over positively homogeneous operations to the affine map they end."""
    values, at = flow.trace.values, output
    while at in region and values[at].op >= 0:
        op = flow.trace.ops[values[at].op]
        name = base_name(op)
        if op.weights and (name in AFFINE or name == "mul"):
            return _own_weights(flow, op, name)
        before = [i for i in op.inputs if i in region]
        if name == "add" and len(before) == 1 and op.weights:
            return None  # a bias that is added apart from its map
        if name not in HOMOGENEOUS or len(before) != 1:
            return None
        at = before[0]
    return None


def _own_weights(flow: Flow, op: Op, name: str) -> list[str] | None:
    """Weight and bias of a map; None where something else uses one of them or one is missing."""
    values = flow.trace.values
    elsewhere = any(o is not op and not _prepares(flow, o, op) for w in op.weights for o in flow.users[w])
    if elsewhere or any(len(values[i].weights) > 1 for i in op.inputs if values[i].weights):
        return None
    if name in NORMS:
        # mean and variance are no parameters; a norm without weight and bias has nothing to scale
        return sorted(op.weights) if len(op.weights) == 2 else None
    return sorted(op.weights)


def _prepares(flow: Flow, op: Op, user: Op) -> bool:
    """Whether an operation on parameters alone only rearranges them for the user."""
    return (
        base_name(op) in REARRANGING
        and all(not flow.trace.values[v].activation for v in op.outputs)
        and all(
            r == user.index or _prepares(flow, flow.trace.ops[r], user)
            for v in op.outputs
            for r in flow.trace.values[v].readers
        )
    )


def common_module(flow: Flow, ops: list[Op], sum_op: Op) -> str:
    """The innermost module that holds the sum and everything its branch does."""
    chains = [set(flow.trace.chain(o.call)) for o in ops]
    shared = set.intersection(*chains) if chains else set()
    at = [c for c in flow.trace.chain(sum_op.call) if c in shared]
    return flow.trace.calls[at[0]].name if at else ""


def main_child(flow: Flow, block: str, ops: list[Op]) -> str:
    """The module called directly by the block that does most of the branch's work; "" where there is none."""
    work: dict[str, tuple[int, int]] = {}
    for op in ops:
        names = [flow.trace.calls[c].name for c in reversed(flow.trace.chain(op.call))]
        below = names[names.index(block) + 1 :] if block in names else names
        if below:
            flops, count = work.get(below[0], (0, 0))
            work[below[0]] = (flops + op.flops, count + 1)
    return max(work, key=lambda name: work[name]) if work else ""


def _slots(tree: object) -> list[Slot]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Slot)]
