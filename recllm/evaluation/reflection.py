"""A checkpoint that reflects as a ranker: drafts by constrained beams, what it says of them, and the corrected list.

The list is that of `decoding.reflecting`, entropy-guided as GRC has it; an item's score is its draft's, what the doubt
adds, and the log-probability of the correction. The drafts and their labels stand beside it in the predictions.
"""

import dataclasses
import functools

import polars as pl
import torch
from torch import Tensor

from recllm.decoding.reflecting import Reflected, Reflector, check_entropy_weight
from recllm.evaluation.direct import DirectRanker, in_catalogue, rows_of
from recllm.evaluation.ranking import Drafts, Ranking


@dataclasses.dataclass(frozen=True, eq=False)
class ReflectionRanker(DirectRanker):
    """`beams` drafts, and as many corrected items."""

    entropy_weight: float = 0.2  # α_e
    skip: bool = True  # is a draft that is called right left as it is?
    reflect_on: int | None = None  # so many of the best drafts, the others fill up the list; None: all

    def __post_init__(self):
        check_entropy_weight(self.entropy_weight)
        super().__post_init__()
        _ = self.reflector  # a model that was not taught to reflect is refused here

    @functools.cached_property
    def reflector(self) -> Reflector:
        return Reflector(self.decoder, self.checkpoint.reflection.tokens)

    def describe(self) -> dict:
        return super().describe() | {
            "ranker": "reflection",
            "mode": "reflection",
            "entropy_weight": self.entropy_weight,
            "skip": self.skip,
            **({} if self.reflect_on is None else {"reflect_on": self.reflect_on}),
            "reflection": self.checkpoint.reflection.as_json(),
        }

    def rank(self, cases: pl.DataFrame, k: int) -> Ranking:
        histories = cases["history"].to_list()
        own = rows_of(self.checkpoint, histories) if self.exclude_history else None
        found = self.reflector.scheduled(
            self.writer.ids(histories), max(k, self.beams), entropy_weight=self.entropy_weight, skip=self.skip,
            reflect_on=self.reflect_on, allowed=self.known, exclude=own,
        )  # fmt: skip
        drafts = in_catalogue(found.drafts.rows, self.rows)
        return Ranking(
            in_catalogue(found.found.rows[:, :k], self.rows), found.found.scores[:, :k],
            drafts=Drafts(drafts, found.drafts.scores, *said_of(found)),
        )  # fmt: skip


def said_of(found: Reflected) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """loc, same, entropies and kept of every draft, as `Drafts` has them; 0 where nothing is said of it."""
    rows, (_, drafts, slots) = found.drafts.rows, found.labels.shape
    loc, entropies, kept = torch.zeros_like(rows), torch.zeros(rows.shape), torch.zeros_like(rows, dtype=torch.bool)
    same = torch.zeros(*rows.shape, max(0, slots - 1), dtype=torch.bool)
    if slots:  # none in GC
        loc[:, :drafts], same[:, :drafts] = found.labels[..., 0] + 1, found.labels[..., 1:].bool()
        entropies[:, :drafts], kept[:, :drafts] = found.entropies.mean(-1), found.kept
    return loc.masked_fill(rows < 0, 0), same, entropies, kept
