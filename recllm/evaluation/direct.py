"""A checkpoint as a ranker: constrained beams right after the history."""

import dataclasses
from collections.abc import Sequence

import polars as pl
import torch
from torch import Tensor

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
        rows, known = catalogue_rows(self.checkpoint, self.catalogue)
        if not 1 <= self.beams <= len(self.checkpoint.table):
            raise UserError(f"{self.beams} beams over {len(self.checkpoint.table):,} items", fix="fewer beams")
        writer, model, tokens = self.checkpoint.writer, self.checkpoint.model, self.checkpoint.tokens
        decoder = Decoder(model, tokens, normaliser=self.normaliser, prefix=writer.prefix, batch_size=self.batch_size)
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
        own = rows_of(self.checkpoint, histories) if self.exclude_history else None
        found = self.decoder.beams(self.writer.ids(histories), max(k, self.beams), self.known, own)
        return Ranking(in_catalogue(found.rows[:, :k], self.rows), found.scores[:, :k])


def catalogue_rows(checkpoint: Checkpoint, catalogue: Catalogue) -> tuple[Tensor, Tensor | None]:
    """Rows of the model's index → rows of the catalogue, and which items may be answered (None: all). (N,), (N,)

    Items that only the model knows are not of this data set: row -1, and no answer.
    """
    unknown = [item for item in catalogue.item_ids if item not in checkpoint.table]
    if unknown:
        raise UserError(
            f"{len(unknown):,} items of the data have no semantic ID in the model, {unknown[0]!r} first",
            fix="evaluate on the data that the model was made from, or give new items an ID (encode_new)",
        )
    rows = torch.tensor([catalogue.row_of.get(item, -1) for item in checkpoint.table.items])
    return rows, None if bool((rows >= 0).all()) else rows >= 0


def in_catalogue(found: Tensor, rows: Tensor) -> Tensor:
    """Items as rows of the model's index → as rows of the catalogue; -1 stays. Any shape."""
    return rows[found.clamp(min=0)].masked_fill(found < 0, -1)


def rows_of(checkpoint: Checkpoint, histories: Sequence[Sequence[str]]) -> list[list[int]]:
    """The items of each history as rows of the model's index."""
    return [[checkpoint.table.row_of[item] for item in history] for history in histories]
