"""Find residual sites in a recorded forward.

A residual site is an addition one of whose operands is an ancestor of the other (*identity*), or whose
shortcut is at most one 1x1 convolution or linear layer plus norm, pool or pad while the branch is deeper and
not linear (*transition*; Huang drops those too: only the branch rests). Everything is decided from the data
flow; no architecture is known by name.
"""

from __future__ import annotations

from dataclasses import dataclass

from fallow.surgery import anatomy
from fallow.surgery.flow import POINTWISE, PRODUCTS, REARRANGING, SHORTCUT, SUMS, Flow, base_name
from fallow.surgery.found import Branch, Refused
from fallow.surgery.trace import Op, Trace

_INSIDE = "inside another site's branch"
_GATED = "its shortcut is gated (multiplied), so a branch at rest would not leave the identity"


def find(trace: Trace) -> tuple[list[Branch], list[Refused]]:
    """The residual branches of a trace in order, ambiguous ones marked, and the sums that cannot rest."""
    finder = _Finder(trace)
    for op in trace.ops:
        if op.name in SUMS and len(op.inputs) == 2 and op.inputs[0] != op.inputs[1]:
            finder.consider(op)
    finder.nest()
    _name(finder.branches)
    return finder.branches, finder.refused


@dataclass(frozen=True)
class _Sum:
    """An addition read as shortcut + branch."""

    op: Op
    kind: str
    source: int
    shortcut: int
    output: int
    branch_at: int
    region: set[int]


class _Finder:
    def __init__(self, trace: Trace) -> None:
        self.trace, self.flow = trace, Flow(trace)
        self.refused: list[Refused] = []
        self.branches: list[Branch] = []
        self.sum_of: dict[int, Branch] = {}

    def consider(self, op: Op) -> None:
        """Read one addition as a residual sum, if it is one."""
        values = self.trace.values
        a, b = op.inputs
        if not (values[a].activation and values[b].activation) or not values[a].dtype.is_floating_point:
            return
        for shortcut, output, at in ((a, b, 1), (b, a, 0)):
            source = self._identity_source(shortcut, output)
            if source is not None:
                region = self.flow.between(source, output)
                return self._identity(_Sum(op, "identity", source, shortcut, output, at, region))
        self._transition(op, a, b)

    def _identity_source(self, shortcut: int, output: int) -> int | None:
        if self.flow.is_ancestor(shortcut, output):
            return shortcut
        # x + f(x) + g(x): the first sum stands between x and the second addition.
        at = shortcut
        while (branch := self.sum_of.get(at)) is not None:
            at = branch.shortcut
            if self.flow.is_ancestor(at, output):
                return at
        return None

    def _identity(self, found: _Sum) -> None:
        values, ops = self.trace.values, self.flow.ops_of(found.region)
        working = [o for o in ops if base_name(o) not in POINTWISE and base_name(o) not in REARRANGING]
        if not working or not any(o.weights for o in ops):
            return  # an activation written out, x + c x^3 say
        shapes = {values[v].shape for v in (found.output, found.shortcut, found.op.outputs[0])}
        if len(shapes) > 1:
            return self._refuse(found.op, "the two operands of the sum differ in shape")
        products = [o for o in ops if o.weights and base_name(o) in PRODUCTS]
        parallel = len(products) > 1 and self.flow.depth(found.region) == 1
        ambiguous = ""
        if parallel and not self.flow.nonlinear(ops):
            ambiguous = "parallel linear layers and the identity: re-parameterised into one at inference"
        self._accept(found, ambiguous)

    def _transition(self, op: Op, a: int, b: int) -> None:
        values = self.trace.values
        common = values[a].ancestors & values[b].ancestors
        if not common or values[a].shape != values[b].shape:
            return
        found = None
        for shortcut, output, at in ((a, b, 1), (b, a, 0)):
            if self._gated(shortcut, output):
                return self._refuse(op, _GATED)
            source = self.flow.frontier(shortcut, common)
            if source is None:
                continue
            region = self.flow.between(source, output)
            if self._is_transition(self.flow.between(source, shortcut), region):
                found = _Sum(op, "transition", source, shortcut, output, at, region)
        if found is not None:
            up = any(self.flow.upsamples(o) for o in self.flow.ops_of(found.region))
            self._accept(found, "its branch upsamples: a lateral connection of a pyramid" if up else "")

    def _gated(self, shortcut: int, output: int) -> bool:
        """Whether the shortcut is a multiple of what a branch with weights starts from."""
        made_by = self.trace.values[shortcut].op
        if made_by < 0 or base_name(self.trace.ops[made_by]) not in ("mul", "div"):
            return False
        factors = [v for v in self.trace.ops[made_by].inputs if self.flow.is_ancestor(v, output)]
        return any(self.flow.depth(self.flow.between(v, output)) for v in factors)

    def _is_transition(self, short: set[int], region: set[int]) -> bool:
        ops = self.flow.ops_of(short)
        products = [o for o in ops if base_name(o) in PRODUCTS]
        others = {base_name(o) for o in ops if base_name(o) not in PRODUCTS}
        if not others <= SHORTCUT or len(products) > 1:
            return False
        if not all(self.flow.pointwise_product(o) for o in products):
            return False
        # A linear branch beside a linear layer is a low-rank update or a layer to be re-parameterised.
        depth = self.flow.depth(region)
        return depth >= 2 and depth > len(products) and self.flow.nonlinear(self.flow.ops_of(region))

    def _accept(self, found: _Sum, ambiguous: str) -> None:
        op, region, trace = found.op, found.region, self.trace
        own, escaped = self.flow.closed(region, op.index)
        if escaped is not None:
            return self._refuse(op, "a value inside its branch is used outside the branch too")
        if found.branch_at == 0 and op.alpha != 1:
            return self._refuse(
                op, "its shortcut is scaled, so a branch at rest would not leave the identity"
            )
        roles, inner = anatomy.roles_of(self.flow, region, own)
        if not roles:
            return self._refuse(op, "its branch has no module of its own, so there is nothing to rest")
        work = [trace.ops[o] for o in sorted(own)]
        work = [o for o in work if o.weights or any(v in region for v in o.outputs)]
        total = op.outputs[0]
        written = max(self.flow.written.get(trace.values[v].storage, -1) for v in (total, found.shortcut))
        onto_shortcut = op.name.startswith("aten.add_") and found.branch_at == 1
        block = anatomy.common_module(self.flow, [op, *work], op)
        branch = Branch(
            name="",
            kind=found.kind,
            block=block,
            child=anatomy.main_child(self.flow, block, work) or roles[0].module,
            sum_op=op.index,
            sum_number=self.flow.number[op.index],
            branch_at=found.branch_at,
            shortcut=found.shortcut,
            total=total,
            flops=sum(o.flops for o in work),
            parameters=sorted({w for o in work for w in o.weights}),
            roles=roles,
            dim=trace.batch.get(total),
            inner_sums=inner,
            copy=written > op.index and not onto_shortcut,
            ambiguous=ambiguous,
            norm_values=anatomy.batch_norms(self.flow, own),
            ops=frozenset(own),
            end=anatomy.affine_end(self.flow, found.output, region),
        )
        self.branches.append(branch)
        self.sum_of[total] = branch

    def nest(self) -> None:
        """Leave out sums inside another site's branch, and skips around most of the model."""
        dense = sum(op.flops for op in self.trace.ops) or 1
        for outer in self.branches:
            inner = [b for b in self.branches if b.sum_op in outer.ops]
            shapes = {self.trace.values[b.total].shape for b in inner}
            around = len(inner) >= 3 and outer.flops / dense > 2 / 3
            apart = len(inner) >= 2 and self.trace.values[outer.total].shape not in shapes
            if not outer.ambiguous and (around or apart):
                outer.ambiguous = f"a long skip around {len(inner)} residual sums"
        for outer in self.branches:
            if outer.ambiguous and outer.ambiguous != _INSIDE:
                continue
            for b in self.branches:
                if b.sum_op in outer.ops and not b.ambiguous:
                    b.ambiguous = _INSIDE
            self.refused = [r for r in self.refused if r.op not in outer.ops]

    def _refuse(self, op: Op, reason: str) -> None:
        names = [self.trace.calls[c].name for c in self.trace.chain(op.call)]
        self.refused.append(Refused(names[0] if names else "", reason, op.index))


def _name(branches: list[Branch]) -> None:
    """After the block; after block + branch child where a block has two, or is the whole model."""
    blocks = [b.block for b in branches if not b.ambiguous]
    for b in branches:
        others = sum(_holds(b.block, o) for o in blocks) - (not b.ambiguous)
        b.name = b.block if b.block and not others else b.child
    counts: dict[str, int] = {}
    for b in branches:
        counts[b.name] = counts.get(b.name, 0) + 1
    seen: dict[str, int] = {}
    for b in branches:
        if counts[b.name] > 1:  # one module in several sums: shared weights
            seen[b.name] = seen.get(b.name, 0) + 1
            b.name = f"{b.name}#{seen[b.name]}"


def _holds(outer: str, inner: str) -> bool:
    return outer == "" or inner == outer or inner.startswith(outer + ".")
