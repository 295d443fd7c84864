"""What is found in a model: branches, the module calls they consist of, and sums that cannot rest."""

from __future__ import annotations

from dataclasses import dataclass, field


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
    dim_in: int  # and its batch dimension
    kept_before: bool  # the operation that made that argument keeps it for its own backward
    shapes_out: dict[int, tuple[int, ...]]  # of the values on the path


@dataclass
class Branch:
    """One residual branch and what is needed to rest it; numbers are those of the trace it was found in."""

    name: str
    kind: str  # "identity" | "transition"
    block: str  # innermost module that holds the sum and all of the branch
    child: str  # module below it that does most of the branch's work
    sum_op: int
    sum_number: int  # which of the forward's additions of two tensors
    branch_at: int  # which operand of the addition the branch is
    shortcut: int
    total: int
    flops: int
    parameters: list[str]
    roles: list[Role]
    dim: int | None  # batch dimension of the sum
    inner_sums: int  # additions of something else to the branch's rows on their way
    copy: bool  # the sum or the shortcut is written into later
    ambiguous: str  # why it is taken only by name
    norm_values: dict[str, int]  # BatchNorm module -> values per row and channel
    ops: frozenset[int]
    end: list[str] | None  # parameters of the affine map it ends in


@dataclass(frozen=True)
class Refused:
    """A sum that looks like a residual one but cannot rest, and why."""

    name: str
    reason: str
    op: int = field(default=-1, compare=False, repr=False)
