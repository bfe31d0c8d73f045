"""A checkpoint that is asked what users buy, as a ranker: constrained beams behind the history of events, the opening
and the items that the model chose from it. The chosen events stand beside the list in the predictions.
"""

import dataclasses
import functools

import polars as pl

from recllm.converter import Converter
from recllm.evaluation.direct import DirectRanker, in_catalogue, rows_of
from recllm.evaluation.ranking import Evidence, Ranking
from recllm.mixtures.conversion_cases import histories_of


@dataclasses.dataclass(frozen=True, eq=False)
class ConversionRanker(DirectRanker):
    """`cases` have to have histories of events. A model of all behaviours is asked for `target_behaviour`."""

    target_behaviour: str | None = None

    def __post_init__(self):
        _ = self.converter  # refuses a model that knows no behaviours, before anything is computed
        super().__post_init__()

    @functools.cached_property
    def converter(self) -> Converter:
        return Converter.of(self.checkpoint, self.target_behaviour, self.normaliser, self.batch_size)

    def describe(self) -> dict:
        settings = self.converter.settings
        selection = {"selection": settings.selection} | ({} if settings.selection == "none" else {"k": settings.k})
        return super().describe() | {
            "ranker": "conversion",
            "mode": "conversion",
            "prompt": dataclasses.asdict(self.converter.writer.style),
            "target_behaviour": settings.target_behaviour,
            **selection,
        }

    def rank(self, cases: pl.DataFrame, k: int) -> Ranking:
        histories = histories_of(cases)
        own = rows_of(self.checkpoint, cases["history"].to_list()) if self.exclude_history else None
        found = self.converter.beams(histories, max(k, self.beams), cases["user"].to_list(), self.known, own)
        rows, scores = found.found.rows[:, :k], found.found.scores[:, :k]
        chosen = [self.converter.evidence(history, found, case) for case, history in enumerate(histories)]
        evidence = [[Evidence(*event, relevance) for event, relevance in some] for some in chosen]
        return Ranking(in_catalogue(rows, self.rows), scores, evidence=evidence)
