"""Questions about the data flow of a recorded forward, and what kinds of operations there are."""

from __future__ import annotations

import re

from fallow.surgery.trace import Op, Trace

SUMS = ("aten.add.Tensor", "aten.add_.Tensor")

_VIEWS = """
    view _unsafe_view reshape permute transpose t expand unsqueeze squeeze slice select split
    split_with_sizes chunk unbind clone contiguous alias detach _to_copy to copy flatten unflatten
    as_strided narrow unsafe_split unsafe_chunk unsafe_split_with_sizes movedim constant_pad_nd cat stack
    lift_fresh roll flip repeat"""
_POOLS = "avg_pool1d avg_pool2d avg_pool3d mean _adaptive_avg_pool2d adaptive_avg_pool2d adaptive_avg_pool1d"
_BATCH_NORMS = """
    native_batch_norm cudnn_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training
    _batch_norm_with_update batch_norm miopen_batch_norm"""
PRODUCTS = frozenset("convolution _convolution mm addmm bmm baddbmm mkldnn_linear linear".split())
NORMS = frozenset(f"{_BATCH_NORMS} native_layer_norm native_group_norm".split())
REARRANGING = frozenset(_VIEWS.split())
LINEAR = REARRANGING | PRODUCTS | frozenset(f"{_POOLS} {_BATCH_NORMS}".split())
LINEAR |= frozenset("add sub native_dropout bernoulli_ dropout empty_like ones_like".split())
SHORTCUT = REARRANGING | NORMS | frozenset(_POOLS.split())
SHORTCUT |= frozenset(
    """max_pool2d_with_indices max_pool2d upsample_nearest2d upsample_bilinear2d zeros new_zeros full empty
    arange _pad_circular reflection_pad2d rms_norm""".split()
)
POINTWISE = frozenset(
    """mul div pow sin cos exp tanh sigmoid relu abs neg square reciprocal sqrt rsqrt erf clamp leaky_relu
    _prelu_kernel prelu add sub rsub silu gelu elu softplus log log1p where maximum minimum gt lt ge le sgn
    sign addcmul""".split()
)
KEEPS_RESULT = frozenset("relu sigmoid tanh".split())
AFFINE = PRODUCTS | NORMS
HOMOGENEOUS = (REARRANGING - {"cat", "stack"}) | frozenset(_POOLS.split())
HOMOGENEOUS |= frozenset("max_pool2d relu leaky_relu native_dropout dropout".split())


def base_name(op: Op) -> str:
    """``aten.add_.Tensor`` -> ``add``."""
    name = op.name.split(".")[1] if "." in op.name else op.name
    return name.rstrip("_") if not name.startswith("_") else name


class Flow:
    """The data flow of one trace."""

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self.users: dict[str, list[Op]] = {}  # parameter -> operations that read it or a view of it
        self.calls = trace.times_called()
        self.written: dict[int, int] = {}  # memory -> last operation that wrote into it
        self.number: dict[int, int] = {}  # addition -> which of the forward's additions it is
        for op in trace.ops:
            for weight in op.weights:
                self.users.setdefault(weight, []).append(op)
            if re.match(r"aten\.\w*_\.", op.name):
                for out in op.outputs:
                    self.written[trace.values[out].storage] = op.index
            if op.name in SUMS:
                self.number[op.index] = len(self.number)

    def is_ancestor(self, a: int, b: int) -> bool:
        """Whether value b was computed from value a."""
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
        """The operations that made these values, in order."""
        ops = {self.trace.values[v].op for v in values}
        return [self.trace.ops[o] for o in sorted(ops) if o >= 0]

    def closed(self, region: set[int], sum_op: int) -> tuple[set[int], int | None]:
        """Operations that serve the region alone, and a value of the region that something else reads."""
        own: set[int] = set()
        first = min((self.trace.values[v].op for v in region if self.trace.values[v].op >= 0), default=sum_op)
        call = self.trace.ops[first].call
        start = self.trace.calls[call].start if call >= 0 else first
        for op in reversed(self.trace.ops[min(start, first) : sum_op]):
            readers = {r for v in op.outputs for r in self.trace.values[v].readers}
            on_path = any(v in region for v in op.outputs)
            if on_path or all(r in own for r in readers):
                own.add(op.index)
        for v in sorted(region):
            outside = [r for r in self.trace.values[v].readers if r not in own and r != sum_op]
            if v in self.trace.outputs or not all(self._dead(r, own) for r in outside):
                return own, v
        return own, None

    def _dead(self, op: int, own: set[int]) -> bool:
        """Whether nothing is computed from the operation's results in the end (monitoring)."""
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
            at += bool(op.weights) and base_name(op) in PRODUCTS
            for v in op.outputs:
                best[v] = at
        return max(best.values(), default=0)

    def frontier(self, end: int, common: int) -> int | None:
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

    def constant_factor(self, op: Op) -> bool:
        """A multiplication by something that does not depend on the input."""
        if base_name(op) not in ("mul", "div"):
            return False
        return sum(self.trace.values[i].activation for i in op.inputs) < 2

    def pointwise_product(self, op: Op) -> bool:
        """A linear layer, or a convolution whose kernel is one point wide."""
        if not op.weights:
            return False
        if "convolution" not in op.name:
            return True
        kernel = self.trace.values[op.inputs[1]].shape[2:]
        return all(k == 1 for k in kernel)

    def upsamples(self, op: Op) -> bool:
        """An interpolation, or a transposed convolution."""
        return base_name(op).startswith("upsample") or (
            "convolution" in op.name and any(a is True for a in op.arguments)
        )

    def nonlinear(self, ops: list[Op]) -> bool:
        """Whether any of the operations is not linear in the input."""
        return any(base_name(o) not in LINEAR and not self.constant_factor(o) for o in ops)
