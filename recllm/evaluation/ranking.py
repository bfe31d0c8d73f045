"""What every recommender is to the evaluation, whether it counts, multiplies or decodes: something that ranks items."""

from typing import NamedTuple, Protocol

import polars as pl
from torch import Tensor


class Ranking(NamedTuple):
    """The best items of each case, best first; fewer than K are filled with row -1 and score -inf."""

    rows: Tensor  # (P, K) int64, rows of the catalogue
    scores: Tensor  # (P, K) float, descending


class Ranker(Protocol):
    def describe(self) -> dict:
        """What it is and how it was made, for metrics.json: plain JSON values, the name of its kind under `ranker`."""

    def rank(self, cases: pl.DataFrame, k: int) -> Ranking:
        """`cases` are rows of `Catalogue.targets`; the answer depends on user, history and history_behaviours alone.

        A case's answer must not depend on which other cases it came with, but for the last bits of a float.
        """
