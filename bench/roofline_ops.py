"""Operators of a step, and which of them could share a kernel.

Fused bytes: operators that work element by element (pointwise, casts, batch norms, concatenations)
join the same kernel along the data's way, up to the next convolution, multiplication, pooling or
reduction, and never from forward into backward. Such a group reads what comes from outside once and
writes what is used outside once. A concatenation of what groups wrote costs nothing: they write
into its place.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

from mentorch.engine.kernel_families import family

FUSIBLE = ("pointwise", "batch norm", "copies and casts")


@dataclass
class Op:
    """An operator that launches a kernel (or several)."""

    name: str
    """As "aten::add"."""
    flop: int
    reads: dict[int, int]
    """Bytes by storage."""
    writes: dict[int, int]
    launches: int
    backward: bool
    made_by: dict[int, int] = field(default_factory=dict)
    """Which operator wrote each storage that is read; none for what was there before."""

    @property
    def family(self) -> str:
        return family(self.name)

    @property
    def bytes(self) -> int:
        return sum(self.reads.values()) + sum(self.writes.values())


def _levels(ops: list[Op]) -> list[int]:
    """How many operators that cannot be fused stand before each on the longest way to it.

    Two of one level have none between them, so they may share a kernel.
    """
    levels: list[int] = []
    for op in ops:
        behind = (
            levels[maker] + (ops[maker].family not in FUSIBLE) for maker in op.made_by.values()
        )
        levels.append(max(behind, default=0))
    return levels


def groups(ops: list[Op]) -> Iterator[list[int]]:
    """Operators that share a kernel, by number."""
    levels, parent = _levels(ops), list(range(len(ops)))

    def root(at: int) -> int:
        while parent[at] != at:
            at = parent[at]
        return at

    for at, op in enumerate(ops):
        for maker in op.made_by.values():
            same = levels[maker] == levels[at] and ops[maker].backward == op.backward
            if same and {op.family, ops[maker].family} <= set(FUSIBLE):
                parent[root(at)] = root(maker)
    members: dict[int, list[int]] = defaultdict(list)
    for at in range(len(ops)):
        members[root(at)].append(at)
    yield from members.values()


def fused_bytes(ops: list[Op]) -> dict[str, int]:
    """Bytes of a step by the family of each group's last operator, if neighbours are fused."""
    users: dict[tuple[int, int], set[int]] = defaultdict(set)  # of (operator, storage it wrote)
    for at, op in enumerate(ops):
        for storage, maker in op.made_by.items():
            users[maker, storage].add(at)
    found: Counter[str] = Counter()
    for group in groups(ops):
        found[ops[group[-1]].family] += _of_group(ops, set(group), users)
    return dict(found)


def _of_group(ops: list[Op], inside: set[int], users: dict[tuple[int, int], set[int]]) -> int:
    reads: dict[tuple[int, int], int] = {}  # what a group needs in several places it reads once
    writes = 0
    for at in inside:
        op = ops[at]
        placed = _placed(ops, at, inside)
        for storage, size in op.reads.items():
            maker = op.made_by.get(storage, -1)
            if maker not in inside and storage not in placed:
                reads[maker, storage] = max(reads.get((maker, storage), 0), size)
        for storage, size in op.writes.items():
            used = users[at, storage]
            if not used or used - inside:
                writes += size - sum(placed.values())
    return sum(reads.values()) + writes


def _placed(ops: list[Op], at: int, inside: set[int]) -> dict[int, int]:
    """Bytes by storage that a concatenation finds in place: other groups have put them there."""
    op = ops[at]
    if op.name != "aten::cat":
        return {}
    makers = {storage: op.made_by.get(storage, -1) for storage in op.reads}
    return {
        storage: op.reads[storage]
        for storage, maker in makers.items()
        if maker >= 0 and maker not in inside and ops[maker].family in FUSIBLE
    }
