"""A checkpoint as a ranker: constrained beams right after the history."""

import dataclasses

import polars as pl
import torch

from recllm.catalogue import Catalogue
from recllm.checkpoint import Checkpoint
from recllm.decoding import Decoder, Normaliser
from recllm.errors import UserError
from recllm.evaluation.ranking import Ranking


@dataclasses.dataclass(frozen=True, eq=False)
class DirectRanker:
    """`beams` items are searched for; the list is the best of them."""

    checkpoint: Checkpoint
    catalogue: Catalogue
    beams: int = 20
    normaliser: Normaliser = "level"
    exclude_history: bool = False
    batch_size: int | None = None

    def __post_init__(self):
        unknown = [item for item in self.catalogue.item_ids if item not in self.checkpoint.table]
        if unknown:
            raise UserError(
                f"{len(unknown):,} items of the data have no semantic ID in the model, {unknown[0]!r} first",
                fix="evaluate on the data that the model was made from, or give new items an ID (encode_new)",
            )
        if not 1 <= self.beams <= len(self.checkpoint.table):
            raise UserError(f"{self.beams} beams over {len(self.checkpoint.table):,} items", fix="fewer beams")
        writer, model, tokens = self.checkpoint.writer, self.checkpoint.model, self.checkpoint.tokens
        decoder = Decoder(model, tokens, normaliser=self.normaliser, prefix=writer.prefix, batch_size=self.batch_size)
        # Rows of the model's index → rows of the catalogue. Items that only the model knows are not of this data set.
        table, row_of = self.checkpoint.table, self.catalogue.row_of
        rows = torch.tensor([row_of.get(item, -1) for item in table.items])
        known = None if bool((rows >= 0).all()) else rows >= 0
        for name, value in (("decoder", decoder), ("writer", writer), ("rows", rows), ("known", known)):
            object.__setattr__(self, name, value)

    def describe(self) -> dict:
        return {
            "ranker": "direct",
            "checkpoint": self.checkpoint.name,
            "weights": self.checkpoint.weights,
            "semantic_ids": self.checkpoint.table.fingerprint,
            "beams": self.beams,
            "normaliser": self.normaliser,
            "dtype": str(self.checkpoint.model.dtype).removeprefix("torch."),
            "prompt": dataclasses.asdict(self.checkpoint.style),
            "exclude_history": self.exclude_history,
            **({} if self.batch_size is None else {"batch_size": self.batch_size}),
        }

    def rank(self, cases: pl.DataFrame, k: int) -> Ranking:
        histories = cases["history"].to_list()
        own = None
        if self.exclude_history:
            row_of = self.checkpoint.table.row_of
            own = [[row_of[item] for item in history] for history in histories]
        found = self.decoder.beams(self.writer.ids(histories), max(k, self.beams), self.known, own)
        rows = self.rows[found.rows[:, :k].clamp(min=0)].masked_fill(found.rows[:, :k] < 0, -1)
        return Ranking(rows, found.scores[:, :k])
