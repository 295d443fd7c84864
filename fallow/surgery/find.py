"""Find residual sites in a recorded forward.

A residual site is an addition one of whose operands is an ancestor of the other (*identity*), or whose
shortcut is at most one 1x1 convolution or linear layer plus norm, pool or pad while the branch is deeper and
not linear (*transition*; Huang drops those too: only the branch rests). Everything is decided from the data
flow; no architecture is known by name.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from fallow.surgery.trace import Op, Slot, Trace

SUMS = ("aten.add.Tensor", "aten.add_.Tensor")
_VIEWS = (
    "view _unsafe_view reshape permute transpose t expand unsqueeze squeeze slice select split split_with_sizes "
    "chunk unbind clone contiguous alias detach _to_copy to copy flatten unflatten as_strided narrow unsafe_split "
    "unsafe_chunk unsafe_split_with_sizes movedim constant_pad_nd cat stack lift_fresh roll flip repeat"
)
_POOLS = "avg_pool1d avg_pool2d avg_pool3d mean _adaptive_avg_pool2d adaptive_avg_pool2d adaptive_avg_pool1d"
_NORMS = (
    "native_batch_norm cudnn_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training "
    "_batch_norm_with_update batch_norm native_layer_norm native_group_norm miopen_batch_norm"
)
_PRODUCTS = "convolution _convolution mm addmm bmm baddbmm mkldnn_linear linear"
_FREE = set(_VIEWS.split())
_LINEAR = _FREE | set(
    f"{_POOLS} {_PRODUCTS} add sub native_dropout bernoulli_ dropout empty_like ones_like".split()
)
_LINEAR |= {n for n in _NORMS.split() if "batch_norm" in n}
_SHORTCUT = _FREE | set(f"{_POOLS} {_NORMS} max_pool2d_with_indices max_pool2d upsample_nearest2d".split())
_SHORTCUT |= {"upsample_bilinear2d", "zeros", "new_zeros", "_pad_circular", "reflection_pad2d", "rms_norm"}
_POINTWISE = set(
    "mul div pow sin cos exp tanh sigmoid relu abs neg square reciprocal sqrt rsqrt erf clamp".split()
)
_POINTWISE |= {
    "leaky_relu",
    "_prelu_kernel",
    "prelu",
    "add",
    "sub",
    "rsub",
    "silu",
    "gelu",
    "elu",
    "softplus",
    "log",
}
_POINTWISE |= {"log1p", "where", "maximum", "minimum", "gt", "lt", "ge", "le", "sgn", "sign", "addcmul"}
_AFFINE = set(_PRODUCTS.split()) | set(_NORMS.split())
_HOMOGENEOUS = _FREE | set(f"{_POOLS} max_pool2d relu leaky_relu native_dropout dropout".split()) - {
    "cat",
    "stack",
}


def base_name(op: Op) -> str:
    """``aten.add_.Tensor`` -> ``add``."""
    name = op.name.split(".")[1] if "." in op.name else op.name
    return name.rstrip("_") if not name.startswith("_") else name


@dataclass
class Role:
    """One call of a module that belongs to a branch from end to end."""

    module: str
    call: int
    entry: bool  # takes the branch's input; other calls are handed the kept rows by an earlier one
    rows: dict[str, int | None]  # argument -> batch dimension to slice; None: leave it
    template: object  # the output's structure: `Slot`, else data
    on_path: dict[int, int]  # value in the template that carries rows -> its batch dimension
    shape_in: tuple[int, ...]  # of the first batched argument in the example
    shapes_out: dict[int, tuple[int, ...]]  # of the values on the path


@dataclass
class Branch:
    """One residual branch and what is needed to rest it."""

    name: str
    kind: str  # "identity" | "transition"
    block: str
    sum_op: int
    sum_number: int  # which of the forward's additions of two tensors
    branch_at: int  # which operand of the addition the branch is
    source: int
    shortcut: int
    output: int
    total: int
    region: set[int]
    flops: int
    parameters: list[str]
    roles: list[Role]
    dim: int | None
    inner_sums: int
    copy: bool
    ambiguous: str = ""  # why it is taken only by name
    inside: int = -1  # index of the branch it is nested in
    norm_values: dict[str, int] = field(
        default_factory=dict
    )  # BatchNorm module -> values per row and channel
    ops: list[int] = field(default_factory=list)
    child: str = ""
    end: list[str] | None = None  # parameters of the affine map the branch ends in


@dataclass(frozen=True)
class Refused:
    """A sum that looks like a residual one but cannot rest, and why."""

    name: str
    reason: str


class Finder:
    """Finds the branches of one trace."""

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self.refused: list[Refused] = []
        self.branches: list[Branch] = []
        self._sum_of_value: dict[int, Branch] = {}
        self._storage_writes: dict[int, int] = {}
        for op in trace.ops:
            if re.match(r"aten\.\w*_\.", op.name):
                for out in op.outputs:
                    self._storage_writes[trace.values[out].storage] = op.index

    # --- data-flow questions --------------------------------------------------------------------------
    def is_ancestor(self, a: int, b: int) -> bool:
        return a != b and bool(self.trace.values[b].ancestors >> a & 1)

    def between(self, source: int, end: int) -> set[int]:
        """Values computed from ``source`` that ``end`` is computed from, ``end`` included."""
        bits = self.trace.values[end].ancestors
        return {
            i
            for i in range(source + 1, end + 1)
            if bits >> i & 1 and self.trace.values[i].ancestors >> source & 1
        }

    def ops_of(self, values: set[int]) -> list[Op]:
        ops = {self.trace.values[v].op for v in values}
        return [self.trace.ops[o] for o in sorted(ops) if o >= 0]

    def closed(self, region: set[int], end: int, sum_op: int) -> tuple[set[int], int | None]:
        """Operations that serve the region alone, and a value of the region that something else reads."""
        own: set[int] = set()
        first = min((self.trace.values[v].op for v in region if self.trace.values[v].op >= 0), default=sum_op)
        start = (
            self.trace.calls[self.trace.ops[first].call].start if self.trace.ops[first].call >= 0 else first
        )
        for op in reversed(self.trace.ops[min(start, first) : sum_op]):
            readers = {r for v in op.outputs for r in self.trace.values[v].readers}
            on_path = any(v in region for v in op.outputs)
            if on_path or all(r in own for r in readers):
                own.add(op.index)
        for v in sorted(region):
            outside = [r for r in self.trace.values[v].readers if r not in own and r != sum_op]
            dead = all(self._dead(r, own) for r in outside)
            if outside and not dead:
                return own, v
        return own, None

    def _dead(self, op: int, own: set[int]) -> bool:
        """Whether nothing is ever computed from the operation's results (monitoring, a returned side value)."""
        todo = [op]
        while todo:
            for v in self.trace.ops[todo.pop()].outputs:
                if v in self.trace.outputs:
                    return False
                todo += [r for r in self.trace.values[v].readers if r not in own]
            if len(todo) > 64:
                return False
        return True

    def depth(self, region: set[int]) -> int:
        """Weighted products (convolutions, linear layers) on the longest path."""
        best: dict[int, int] = {}
        for op in self.ops_of(region):
            at = max((best.get(i, 0) for i in op.inputs), default=0)
            at += bool(op.weights) and base_name(op) in _PRODUCTS.split()
            for v in op.outputs:
                best[v] = at
        return max(best.values(), default=0)

    # --- candidates -----------------------------------------------------------------------------------
    def run(self) -> None:
        for op in self.trace.ops:
            if op.name in SUMS and len(op.inputs) == 2 and op.inputs[0] != op.inputs[1]:
                self._consider(op)
        self._nest()
        self._name()

    def _consider(self, op: Op) -> None:
        values = self.trace.values
        a, b = op.inputs
        if not (values[a].activation and values[b].activation) or not values[a].dtype.is_floating_point:
            return
        for shortcut, output, at in ((a, b, 1), (b, a, 0)):
            source = self._identity_source(shortcut, output)
            if source is not None:
                return self._identity(op, source, shortcut, output, at)
        self._transition(op, a, b)

    def _identity_source(self, shortcut: int, output: int) -> int | None:
        if self.is_ancestor(shortcut, output):
            return shortcut
        # x + f(x) + g(x): the first sum stands between x and the second addition.
        at = shortcut
        while (branch := self._sum_of_value.get(at)) is not None:
            at = branch.shortcut
            if self.is_ancestor(at, output):
                return at
        return None

    def _identity(self, op: Op, source: int, shortcut: int, output: int, at: int) -> None:
        values = self.trace.values
        region = self.between(source, output)
        ops = self.ops_of(region)
        weights = frozenset().union(*(o.weights for o in ops))
        working = [o for o in ops if base_name(o) not in _POINTWISE and base_name(o) not in _FREE]
        if not weights or not working:
            return  # an activation written out, x + c x^3 say
        total = op.outputs[0]
        if values[output].shape != values[total].shape or values[shortcut].shape != values[total].shape:
            return self._refuse(op, "the two operands of the sum differ in shape")
        nonlinear = any(base_name(o) not in _LINEAR and not self._constant_factor(o) for o in ops)
        products = [o for o in ops if o.weights and base_name(o) in _PRODUCTS.split()]
        ambiguous = ""
        if not nonlinear and len(products) > 1 and self.depth(region) == 1:
            ambiguous = "parallel linear layers and the identity: re-parameterised into one at inference"
        self._accept(op, "identity", source, shortcut, output, at, region, ambiguous)

    def _constant_factor(self, op: Op) -> bool:
        if base_name(op) not in ("mul", "div"):
            return False
        return sum(self.trace.values[i].activation for i in op.inputs) < 2

    def _transition(self, op: Op, a: int, b: int) -> None:
        values = self.trace.values
        common = values[a].ancestors & values[b].ancestors
        if not common:
            return
        found = None
        for shortcut, output, at in ((a, b, 1), (b, a, 0)):
            source = self._frontier(shortcut, common)
            if source is None:
                continue
            short, region = self.between(source, shortcut), self.between(source, output)
            verdict = self._compare(short, region, shortcut, source)
            if verdict == "site":
                found = (source, shortcut, output, at, region)
            elif verdict:
                self._refuse(op, verdict)
                return
        if found is None:
            return
        source, shortcut, output, at, region = found
        if values[shortcut].shape == values[output].shape:
            self._accept(op, "transition", source, shortcut, output, at, region, "")

    def _frontier(self, end: int, common: int) -> int | None:
        """The one common ancestor that the path to ``end`` leaves from."""
        seen, todo, sources = set(), [end], set()
        while todo:
            v = todo.pop()
            if v in seen:
                continue
            seen.add(v)
            if common >> v & 1:
                sources.add(v)
            elif self.trace.values[v].op >= 0:
                made_by = self.trace.ops[self.trace.values[v].op]
                todo += [i for i in made_by.inputs if self.trace.values[i].activation and i != v]
            if len(sources) > 1 or len(seen) > 200:
                return None
        return sources.pop() if sources else None

    def _compare(self, short: set[int], region: set[int], shortcut: int, source: int) -> str:
        """ "site", the reason of a refusal, or "" for a sum that is nothing of the kind."""
        short_ops, ops = self.ops_of(short), self.ops_of(region)
        names = [base_name(o) for o in short_ops]
        products = [o for o in short_ops if base_name(o) in _PRODUCTS.split()]
        if not all(
            n in _SHORTCUT or o in products or self._subsample(o)
            for n, o in zip(names, short_ops, strict=True)
        ):
            gate = [o for o in short_ops if base_name(o) in ("mul", "lerp")]
            deeper = (
                self.depth(region) >= 1
                and not products
                and all(n in _SHORTCUT or n in ("mul", "rsub", "sub", "lerp", "sigmoid") for n in names)
            )
            if gate and deeper:
                return (
                    "its shortcut is gated (multiplied), so resting the branch would not leave the identity"
                )
            return ""
        if len(products) > 1 or any(not self._pointwise_product(o) for o in products):
            return ""
        nonlinear = any(base_name(o) not in _LINEAR and not self._constant_factor(o) for o in ops)
        if self.depth(region) >= 2 and self.depth(region) > len(products) and nonlinear:
            return "site"
        return ""

    def _subsample(self, op: Op) -> bool:
        return base_name(op) in ("arange", "zeros", "full", "empty")

    def _pointwise_product(self, op: Op) -> bool:
        """A linear layer, or a convolution whose kernel is one point wide."""
        if not op.weights:
            return False
        if "convolution" not in op.name:
            return True
        kernel = self.trace.values[op.inputs[1]].shape[2:]
        return all(k == 1 for k in kernel)

    # --- accepted ones --------------------------------------------------------------------------------
    def _accept(self, op, kind, source, shortcut, output, at, region, ambiguous) -> None:
        own, escaped = self.closed(region, output, op.index)
        if escaped is not None:
            return self._refuse(op, "a value inside its branch is used outside the branch too")
        if at == 0 and op.alpha != 1:
            return self._refuse(
                op, "its shortcut is scaled (alpha), so resting the branch would not leave the identity"
            )
        roles, inner = self._roles(region, own)
        if not roles:
            return self._refuse(
                op, "its branch is written without a module of its own, so there is nothing to rest"
            )
        trace, values = self.trace, self.trace.values
        ops = [trace.ops[o] for o in sorted(own) if trace.ops[o].weights or self._on(region, trace.ops[o])]
        total = op.outputs[0]
        after = max(
            self._storage_writes.get(values[total].storage, -1),
            self._storage_writes.get(values[shortcut].storage, -1),
        )
        onto_shortcut = op.name.startswith("aten.add_") and at == 1
        branch = Branch(
            name="",
            kind=kind,
            block=self._common([op, *ops], op),
            sum_op=op.index,
            sum_number=sum(o.name in SUMS for o in trace.ops[: op.index]),
            branch_at=at,
            source=source,
            shortcut=shortcut,
            output=output,
            total=total,
            region=region,
            flops=sum(o.flops for o in ops),
            parameters=sorted({w for o in ops for w in o.weights}),
            roles=roles,
            dim=trace.batch.get(total),
            inner_sums=inner,
            copy=after > op.index and not onto_shortcut,
            ambiguous=ambiguous,
            norm_values=self._norms(own),
            ops=sorted(own),
        )
        branch.child = self._main_child(branch, ops)
        branch.end = self._affine_end(output, region)
        self.branches.append(branch)
        self._sum_of_value[total] = branch

    def _on(self, region: set[int], op: Op) -> bool:
        return any(v in region for v in op.outputs)

    def _roles(self, region: set[int], own: set[int]) -> tuple[list[Role], int]:
        """The outermost module calls inside the branch, in order, and how many sums between them are inner ones.

        An inner sum adds something to the branch's rows on their way, so it is not the residual one.
        """
        trace = self.trace
        counts: dict[str, int] = {}
        for call in trace.calls:
            counts[call.name] = counts.get(call.name, 0) + 1
        outermost: dict[int, None] = {}
        free: list[Op] = []
        for op in self.ops_of(region):
            inside = [c for c in trace.chain(op.call) if self._contained(c, own)]
            if inside:
                outermost[inside[-1]] = None
            else:
                free.append(op)
        roles, carrying, inner = [], set(), 0
        pending = sorted(free, key=lambda o: o.index)
        for c in sorted(outermost):
            call = trace.calls[c]
            while pending and pending[0].index < call.start:
                inner += self._carry(pending.pop(0), carrying)
            entry = not any(v in carrying for v in call.inputs.values())
            rows = {p: trace.batch.get(v) for p, v in call.inputs.items() if v not in carrying}
            slots = [s.value for s in _slots(call.template)]
            on_path = {v: trace.batch.get(v, -1) for v in slots if v in region}
            shapes = {v: trace.values[v].shape for v in on_path}
            arrives = [v for v in call.inputs.values() if v in trace.batch]
            shape_in = trace.values[arrives[0]].shape if arrives else ()
            roles.append(Role(call.name, c, entry, rows, call.template, on_path, shape_in, shapes))
            carrying |= {v for v in region if call.start <= trace.values[v].op < call.end}
        inner += sum(self._carry(op, carrying) for op in pending)
        return [r for r in roles if not self._ungated(r, counts)], inner

    def _ungated(self, role: Role, counts: dict[str, int]) -> bool:
        """A module without parameters that is called elsewhere too (one ReLU for all): it works on any rows."""
        module = self.trace.calls[role.call].module
        return counts[role.module] > 1 and not any(True for _ in module.parameters())

    def _carry(self, op: Op, carrying: set[int]) -> bool:
        """Follow the rows through an operation; whether it adds something else to them."""
        mine = [i in carrying for i in op.inputs]
        if any(mine):
            carrying.update(op.outputs)
        return any(mine) and not all(mine) and len(mine) > 1 and base_name(op) == "add"

    def _contained(self, call: int, own: set[int]) -> bool:
        c = self.trace.calls[call]
        return c.name != "" and all(o in own for o in range(c.start, c.end))

    def _norms(self, own: set[int]) -> dict[str, int]:
        found = {}
        for o in own:
            op = self.trace.ops[o]
            if "batch_norm" in op.name and op.call >= 0:
                shape = self.trace.values[op.inputs[0]].shape
                size = 1
                for n in shape[2:]:
                    size *= n
                per_row = shape[0] // self.trace.rows if shape[0] % self.trace.rows == 0 else 1
                found[self.trace.calls[op.call].name] = size * max(1, per_row)
        return found

    def _affine_end(self, output: int, region: set[int]) -> list[str] | None:
        """Walk back over positively homogeneous operations to the affine map they end."""
        values, at = self.trace.values, output
        while at in region and values[at].op >= 0:
            op = self.trace.ops[values[at].op]
            name = base_name(op)
            if op.weights and (name in _AFFINE or name == "mul"):
                return self._own_weights(op, name)
            before = [i for i in op.inputs if i in region]
            if name == "add" and len(before) == 1 and op.weights:
                return None  # a bias that is added apart from its map
            if name not in _HOMOGENEOUS or len(before) != 1:
                return None
            at = before[0]
        return None

    def _own_weights(self, op: Op, name: str) -> list[str] | None:
        """Weight and bias of a map; None where something else uses one of them, or where either is missing."""
        values = self.trace.values
        elsewhere = {
            w for o in self.trace.ops if o is not op and not self._prepares(o, op) for w in o.weights
        }
        if op.weights & elsewhere or any(len(values[i].weights) > 1 for i in op.inputs if values[i].weights):
            return None
        if name in _NORMS.split():
            # mean and variance are no parameters; a norm without weight and bias has nothing to scale
            return sorted(op.weights) if len(op.weights) == 2 else None
        return sorted(op.weights)

    def _prepares(self, op: Op, user: Op) -> bool:
        """Whether an operation on parameters alone only rearranges them for the user."""
        return (
            base_name(op) in _FREE
            and all(not self.trace.values[v].activation for v in op.outputs)
            and all(
                r == user.index or self._prepares(self.trace.ops[r], user)
                for v in op.outputs
                for r in self.trace.values[v].readers
            )
        )

    # --- names ----------------------------------------------------------------------------------------
    def _common(self, ops: list[Op], sum_op: Op) -> str:
        """The innermost module that holds the sum and everything its branch does."""
        chains = [set(self.trace.chain(o.call)) for o in ops]
        shared = set.intersection(*chains) if chains else set()
        at = [c for c in self.trace.chain(sum_op.call) if c in shared]
        return self.trace.calls[at[0]].name if at else ""

    def _main_child(self, branch: Branch, ops: list[Op]) -> str:
        """The module called directly by the block that does most of the branch's work."""
        work: dict[str, tuple[int, int]] = {}
        for op in ops:
            names = [self.trace.calls[c].name for c in reversed(self.trace.chain(op.call))]
            below = names[names.index(branch.block) + 1 :] if branch.block in names else names
            if below:
                flops, size = work.get(below[0], (0, 0))
                work[below[0]] = (flops + op.flops, size + 1)
        return max(work, key=lambda n: work[n]) if work else branch.roles[0].module

    def _nest(self) -> None:
        """Leave out sums inside another site's branch, and skips around most of the model."""
        dense = sum(op.flops for op in self.trace.ops) or 1
        owned = [(set(b.ops), b) for b in self.branches]
        for own, outer in owned:
            inner = [b for b in self.branches if b.sum_op in own]
            shapes = {self.trace.values[b.total].shape for b in inner}
            around = len(inner) >= 3 and outer.flops / dense > 2 / 3
            apart = len(inner) >= 2 and self.trace.values[outer.total].shape not in shapes
            if not outer.ambiguous and (around or apart):
                outer.ambiguous = (
                    f"a long skip around {len(inner)} residual sums; its branch is most of the model"
                )
        for own, outer in owned:
            if outer.ambiguous.startswith("a long skip"):
                continue
            for b in self.branches:
                if b.sum_op in own and not b.ambiguous:
                    b.inside = outer.sum_op
                    b.ambiguous = "inside another site's branch"
        for own, outer in owned:
            if not outer.ambiguous.startswith("a long skip"):
                self.refused = [r for r in self.refused if not self._refused_in(r, own)]

    def _refused_in(self, refused: Refused, own: set[int]) -> bool:
        return self._refused_op.get(id(refused), -1) in own

    _refused_op: dict[int, int] = {}

    def _refuse(self, op: Op, reason: str) -> None:
        names = [self.trace.calls[c].name for c in self.trace.chain(op.call)]
        refused = Refused(names[0] if names else "", reason)
        self._refused_op = {**self._refused_op, id(refused): op.index}
        self.refused.append(refused)

    def _name(self) -> None:
        """After the block; after block + branch child where a block has two, or is the whole model."""
        taken: dict[str, int] = {}
        main = [b for b in self.branches if not b.ambiguous]
        for b in self.branches:
            others = [o for o in main if o is not b and _holds(b.block, o.block)]
            b.name = b.block if b.block and not others else b.child
        for b in self.branches:
            same = [o for o in self.branches if o.name == b.name]
            if len(same) > 1:
                taken[b.name] = taken.get(b.name, 0) + 1
        seen: dict[str, int] = {}
        for b in self.branches:
            if taken.get(b.name, 0) > 1:
                seen[b.name] = seen.get(b.name, 0) + 1
                b.child, b.name = b.name, f"{b.name}#{seen[b.name]}"


def _holds(outer: str, inner: str) -> bool:
    return outer == "" or inner == outer or inner.startswith(outer + ".")


def _slots(tree: object) -> list[Slot]:
    from torch.utils._pytree import tree_leaves

    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Slot)]
