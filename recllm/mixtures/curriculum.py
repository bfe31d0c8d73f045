"""Which batch comes when: alignment first, reasoning ever denser.   GREAM, section 4.3.

A batch is all of one kind. The order is a function of the seed and the epoch alone, so that it is the same on every
process and after a resume.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from recllm.errors import UserError
from recllm.files import digest

ALIGN, REASON = "align", "reason"
Batch = tuple[str, int]  # kind, and which of its batches
Kind = Literal["curriculum", "uniform", "direct_then_reasoning"]
MEGABATCH = 50  # batches within which examples of like length are brought together


def insert_probability(i: int, n_align: int, n_reason: int, gamma: float = 1.5) -> float:
    """p = min(1, γ · (i / N_align) · (N_reason / N_align)): a reasoning batch after alignment batch i (0-based)."""
    return min(1.0, gamma * (i / n_align) * (n_reason / n_align))


def curriculum_order(n_align: int, n_reason: int, epochs: int, gamma: float, seed: int) -> list[list[Batch]]:
    """The batches of each epoch, every one of them once.

    All epochs but the last: the alignment batches in order; after batch i a reasoning batch with `insert_probability`;
    what is left of them at the end. The last epoch mixes both uniformly. With a kind missing, every epoch is the other.
    """
    return [
        uniform_order(n_align, n_reason, _random(seed, epoch))
        if epoch == epochs - 1 or not n_align
        else _inserted(n_align, n_reason, gamma, _random(seed, epoch))
        for epoch in range(epochs)
    ]


def uniform_order(n_align: int, n_reason: int, draw: random.Random) -> list[Batch]:
    """Every order is equally likely in which each kind keeps its own (which is shuffled already)."""
    kinds = [ALIGN] * n_align + [REASON] * n_reason
    draw.shuffle(kinds)
    return _numbered(kinds)


def sequential_order(n_align: int, n_reason: int, epochs: int) -> list[list[tuple[str, int, int]]]:
    """D → R: all passes over the alignment batches, then all over reasoning, cut into epochs of one length.

    (kind, batch, pass): a pass is not an epoch here.
    """
    flat = [(kind, i, p) for kind, n in ((ALIGN, n_align), (REASON, n_reason)) for p in range(epochs) for i in range(n)]
    size = n_align + n_reason
    return [flat[start : start + size] for start in range(0, len(flat), size)]


def _inserted(n_align: int, n_reason: int, gamma: float, draw: random.Random) -> list[Batch]:
    kinds, left = [], n_reason
    for i in range(n_align):
        kinds.append(ALIGN)
        if draw.random() < insert_probability(i, n_align, n_reason, gamma) and left:
            kinds.append(REASON)
            left -= 1
    return _numbered(kinds + [REASON] * left)


def _numbered(kinds: Sequence[str]) -> list[Batch]:
    seen = {ALIGN: 0, REASON: 0}
    order = []
    for kind in kinds:
        order.append((kind, seen[kind]))
        seen[kind] += 1
    return order


def _random(seed: int, *of: int | str) -> random.Random:
    return random.Random(digest(str(seed), *map(str, of)))


@dataclass(frozen=True)
class Schedule:
    """How the two kinds of data share the epochs. One of them may be absent."""

    kind: Kind = "curriculum"
    gamma: float = 1.5
    seed: int = 0

    def __post_init__(self):
        if self.kind not in ("curriculum", "uniform", "direct_then_reasoning"):
            raise UserError(f"schedule {self.kind!r} is not one of curriculum, uniform, direct_then_reasoning")
        if self.gamma <= 0:
            raise UserError(f"gamma must be above 0, got {self.gamma}")

    def order(self, n_align: int, n_reason: int, epochs: int) -> list[list[tuple[str, int, int]]]:
        """(kind, batch, pass over that kind) for each epoch."""
        if self.kind == "direct_then_reasoning":
            return sequential_order(n_align, n_reason, epochs)
        if self.kind == "uniform":
            found = [uniform_order(n_align, n_reason, _random(self.seed, epoch)) for epoch in range(epochs)]
        else:
            found = curriculum_order(n_align, n_reason, epochs, self.gamma, self.seed)
        return [[(kind, batch, epoch) for kind, batch in order] for epoch, order in enumerate(found)]


class ScheduledSampler:
    """Rows of a data set whose first `align` rows are alignment and the others reasoning, batch after batch.

    `batch` is what one step of the optimizer sees on all processes together. The last batch of a kind is filled up
    from the beginning of its order, so that no batch is short or mixed. `lengths`: rows of like length come together.
    """

    def __init__(
        self, align: int, total: int, batch: int, epochs: int, schedule: Schedule, lengths: Sequence[int] | None = None
    ):
        self.rows = {ALIGN: np.arange(align), REASON: np.arange(align, total)}
        self.batch, self.schedule = batch, schedule
        self.lengths = None if lengths is None else np.asarray(lengths)
        self.batches = {kind: -(-len(rows) // batch) for kind, rows in self.rows.items()}
        self.orders = schedule.order(self.batches[ALIGN], self.batches[REASON], epochs)
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """transformers and accelerate call this at the start of every epoch, resumed ones too."""
        self.epoch = epoch

    def __len__(self) -> int:
        return sum(self.batches.values()) * self.batch

    def __iter__(self) -> Iterator[int]:
        shuffled: dict[tuple[str, int], np.ndarray] = {}  # not kept: a pass of millions of rows is large
        for kind, number, done in self.orders[min(self.epoch, len(self.orders) - 1)]:
            if (kind, done) not in shuffled:
                shuffled = {key: rows for key, rows in shuffled.items() if key[0] != kind}
                shuffled[kind, done] = self.shuffled(kind, done)
            yield from shuffled[kind, done][number].tolist()

    def shuffled(self, kind: str, done: int) -> np.ndarray:
        """The rows of a kind in their batches, for one pass. (batches, batch)"""
        generator = np.random.default_rng(int(digest(str(self.schedule.seed), kind, str(done))[:16], 16))
        rows = generator.permutation(self.rows[kind])
        if self.lengths is not None:
            size = MEGABATCH * self.batch
            pieces = [rows[start : start + size] for start in range(0, len(rows), size)]
            rows = np.concatenate([piece[np.argsort(-self.lengths[piece], kind="stable")] for piece in pieces])
        full = np.resize(rows, self.batches[kind] * self.batch).reshape(-1, self.batch)
        return full if self.lengths is None else generator.permutation(full, axis=0)
