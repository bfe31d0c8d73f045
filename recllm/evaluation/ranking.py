"""What every recommender is to the evaluation, whether it counts, multiplies or decodes: something that ranks items."""

import dataclasses
from typing import NamedTuple, Protocol

import polars as pl
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Sample:
    """One reasoned answer to a case."""

    row: int  # of the catalogue; -1 where it came to no answer
    score: float  # log-probability of the answer's codes after its chain; -inf without an answer
    logp: float  # of the chain, as it was drawn
    tokens: int  # of the chain
    parsed: bool  # does the whole text have the form that was taught?
    text: str | None = None  # of the chain, where it is kept


class Drafts(NamedTuple):
    """What a ranker that reflects found first and said of it, best first; fewer than B are filled with row -1."""

    rows: Tensor  # (P, B) int64, rows of the catalogue
    scores: Tensor  # (P, B)
    loc: Tensor  # (P, B) int64: the level, from 1, at which it is said to go wrong; L + 1: nowhere; 0: nothing was said
    same: Tensor  # (P, B, K) bool: has it the target's value of each attribute, as is said?
    entropies: Tensor  # (P, B): mean of what was said
    kept: Tensor  # (P, B) bool: was it called right, and not corrected?


class Evidence(NamedTuple):
    """An event of the history that stood before an answer."""

    item: str
    behaviour: str
    relevance: float | None  # None where it was not by relevance that it was chosen


class Ranking(NamedTuple):
    """The best items of each case, best first; fewer than K are filled with row -1 and score -inf."""

    rows: Tensor  # (P, K) int64, rows of the catalogue
    scores: Tensor  # (P, K) float, descending
    samples: list[list[Sample]] | None = None  # of a ranker that reasons: equally many for each case
    drafts: Drafts | None = None  # of a ranker that reflects
    evidence: list[list[Evidence]] | None = None  # of one that chooses from the history: least relevant first


class Ranker(Protocol):
    def describe(self) -> dict:
        """What it is and how it was made, for metrics.json: plain JSON values, the name of its kind under `ranker`."""

    def rank(self, cases: pl.DataFrame, k: int) -> Ranking:
        """`cases` are rows of `Catalogue.targets`; the answer depends on user, history and history_behaviours alone.

        A case's answer must not depend on which other cases it came with, but for the last bits of a float.
        """
