"""What a model must beat: popularity, repeating the last items, and item-kNN. Each counts training events; none learns.

All rank the whole catalogue. Items of the history are candidates like any other, unless `exclude_history` says no.
Equal scores are ordered by row, so a ranking is a function of the data alone.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
import polars as pl
import scipy.sparse
import torch
from torch import Tensor

from recllm.catalogue import Catalogue
from recllm.embeddings.collaborative import training_events
from recllm.errors import UserError
from recllm.evaluation.ranking import Ranking

CELLS = 2**21  # scores held at a time: 16 MB of float64, whatever the catalogue's size


# ---- shared: lists of items out of scores, rows out of histories


def best_items(scores: Tensor, k: int, excluded: tuple[Tensor, Tensor] | None = None) -> Ranking:
    """The k best rows of each case, equal scores by row; -inf is no candidate.   (P, N) -> (P, k), (P, k)

    `excluded` are (case, row) pairs that may not appear, (E,) each. A list is shorter than k only by -1.
    """
    scores = scores.float() + 0.0  # -0.0 becomes 0.0, its equal
    if excluded is not None:
        scores = scores.index_put(excluded, scores.new_tensor(-torch.inf))
    bits = scores.view(torch.int32)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # as integers, floats are ordered but for the negative ones
    n_items = scores.size(1)
    key = (ordered.long() << 32) + torch.arange(n_items, 0, -1, device=scores.device)  # (P, N), no two equal
    rows = key.topk(min(k, n_items), dim=1).indices
    best = scores.gather(1, rows)
    rows = rows.masked_fill(best == -torch.inf, -1)
    missing = (0, k - rows.size(1))
    return Ranking(
        torch.nn.functional.pad(rows, missing, value=-1), torch.nn.functional.pad(best, missing, value=-torch.inf)
    )


def history_rows(cases: pl.DataFrame, item_ids: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """The histories' items as rows of the catalogue, one after the other, and the length of each. -> (E,), (P,)"""
    items = cases["history"].explode(empty_as_null=False)
    known = pl.Enum(item_ids)
    rows = items.cast(known, strict=False)
    if rows.null_count():
        unknown = items.filter(rows.is_null())[0]
        raise UserError(f"{unknown!r} of a history is not in the catalogue", fix="drop the event, or prepare it anew")
    return rows.to_physical().to_numpy().astype(np.int64), cases["history"].list.len().to_numpy().astype(np.int64)


def steps_ago(lengths: np.ndarray) -> np.ndarray:
    """0 for a history's last event, 1 for the one before.   (P,) -> (E,)"""
    ends = np.cumsum(lengths)
    return np.repeat(ends, lengths) - 1 - np.arange(lengths.sum())


def case_numbers(lengths: np.ndarray) -> np.ndarray:
    """Which case each event belongs to.   (P,) -> (E,)"""
    return np.repeat(np.arange(len(lengths)), lengths)


# ---- the baselines


@dataclasses.dataclass(frozen=True, eq=False)
class Popularity:
    """Every case gets the items that training saw most often."""

    counts: Tensor  # (N,) training events of each item
    item_ids: list[str]
    exclude_history: bool = False
    behaviour: str | None = None  # the events that count; None: all

    @classmethod
    def of(cls, catalogue: Catalogue, exclude_history: bool = False, behaviour: str | None = None) -> "Popularity":
        items, _ = training_events(catalogue)
        if behaviour is not None:
            kinds = catalogue.training_sequences()["behaviours"].explode(empty_as_null=False)
            items = items[(kinds == behaviour).to_numpy()]
        counts = torch.from_numpy(np.bincount(items, minlength=len(catalogue.items)))
        return cls(counts, catalogue.item_ids, exclude_history, behaviour)

    def describe(self) -> dict:
        about = {"ranker": "popularity", "exclude_history": self.exclude_history}
        return about if self.behaviour is None else about | {"behaviour": self.behaviour}

    def rank(self, cases: pl.DataFrame, k: int) -> Ranking:
        if not self.exclude_history:
            best = best_items(self.counts.unsqueeze(0), k)
            return Ranking(best.rows.expand(len(cases), k), best.scores.expand(len(cases), k))
        found, lengths = history_rows(cases, self.item_ids)
        step, starts = max(1, CELLS // len(self.counts)), np.concatenate([[0], np.cumsum(lengths)])
        parts = []
        for first in range(0, len(cases), step):
            some = lengths[first : first + step]
            seen = torch.from_numpy(case_numbers(some)), torch.from_numpy(found[starts[first] :][: some.sum()])
            parts.append(best_items(self.counts.float().expand(len(some), -1), k, seen))
        return joined(parts) if parts else empty(k)


@dataclasses.dataclass(frozen=True, eq=False)
class RepeatLast:
    """The history itself, most recent first, each item once: what a model gains over it is not repetition."""

    item_ids: list[str]

    @classmethod
    def of(cls, catalogue: Catalogue) -> "RepeatLast":
        return cls(catalogue.item_ids)

    def describe(self) -> dict:
        return {"ranker": "repeat-last"}

    def rank(self, cases: pl.DataFrame, k: int) -> Ranking:
        """The score is minus the steps since the item was last met."""
        found, lengths = history_rows(cases, self.item_ids)
        events = pl.DataFrame({"case": case_numbers(lengths), "row": found, "ago": steps_ago(lengths)})
        last = events.group_by("case", "row").agg(pl.col("ago").min()).sort("case", "ago")
        last = last.with_columns(place=pl.int_range(pl.len()).over("case")).filter(pl.col("place") < k)
        where = last["case"].to_torch(), last["place"].to_torch()
        rows = torch.full((len(cases), k), -1).index_put(where, last["row"].to_torch())
        scores = torch.full((len(cases), k), -torch.inf).index_put(where, -last["ago"].to_torch().float())
        return Ranking(rows, scores)


@dataclasses.dataclass(frozen=True, eq=False)
class ItemKNN:
    """score(j) = Σ_e fading^(steps since e) · similarity(item of e, j), over the events e of the history.

    similarity(i, j) = Σ_u r_ui r_uj / (‖r_i‖ ‖r_j‖), r_ui the training events of user u with item i. An item is its own
    neighbour only as far as users come back to it: Σ_u r_ui (r_ui − 1) stands on the diagonal. Each item keeps its
    `neighbours` most similar ones. An item that no event of the history leads to is not recommended.
    """

    similarity: scipy.sparse.csr_array  # (N, N), at most `neighbours` a row
    item_ids: list[str]
    neighbours: int
    fading: float
    exclude_history: bool = False

    @classmethod
    def of(
        cls, catalogue: Catalogue, neighbours: int = 100, fading: float = 0.5, exclude_history: bool = False
    ) -> "ItemKNN":
        if neighbours < 1 or not 0 < fading <= 1:
            raise UserError(f"neighbours is {neighbours} and fading {fading}", fix="1 or more, and above 0 up to 1")
        items, users = training_events(catalogue)
        similarity = keep_best(cosine(items, users, len(catalogue.items)), neighbours)
        return cls(similarity, catalogue.item_ids, neighbours, fading, exclude_history)

    def describe(self) -> dict:
        settings = {"neighbours": self.neighbours, "fading": self.fading, "exclude_history": self.exclude_history}
        return {"ranker": "item-knn", **settings}

    def rank(self, cases: pl.DataFrame, k: int) -> Ranking:
        found, lengths = history_rows(cases, self.item_ids)
        weights = self.fading ** steps_ago(lengths)
        starts = np.concatenate([[0], np.cumsum(lengths)])
        history = scipy.sparse.csr_array((weights, found, starts), shape=(len(cases), len(self.item_ids)))
        step = max(1, CELLS // len(self.item_ids))
        parts = [self._best(history[first : first + step], k) for first in range(0, len(cases), step)]
        return joined(parts) if parts else empty(k)

    def _best(self, history: scipy.sparse.csr_array, k: int) -> Ranking:
        scores = torch.from_numpy((history @ self.similarity).toarray())  # (p, N)
        scores = scores.float().masked_fill(scores <= 0, -torch.inf)
        seen = tuple(torch.from_numpy(index.astype(np.int64)) for index in history.nonzero())
        return best_items(scores, k, seen if self.exclude_history else None)


def cosine(items: np.ndarray, users: np.ndarray, n_items: int) -> scipy.sparse.csr_array:
    """Σ_u r_ui r_uj / (‖r_i‖ ‖r_j‖), on the diagonal Σ_u r_ui (r_ui − 1) / ‖r_i‖².   (E,), (E,) -> (N, N)"""
    n_users = int(users.max(initial=-1)) + 1
    events = scipy.sparse.csr_array((np.ones(len(items)), (users, items)), shape=(n_users, n_items))  # (U, N) r_ui
    together = (events.T @ events).tocsr()  # (N, N)
    norms = np.sqrt(together.diagonal())
    inverse = scipy.sparse.diags_array(np.divide(1, norms, out=np.zeros(n_items), where=norms > 0))
    others = together - scipy.sparse.diags_array(events.sum(axis=0))  # an event is not its own neighbour
    similarity = (inverse @ others @ inverse).tocsr()
    similarity.eliminate_zeros()
    return similarity


def keep_best(similarity: scipy.sparse.csr_array, k: int) -> scipy.sparse.csr_array:
    """The k largest values of each row, equal ones by column.   (N, N) -> (N, N)"""
    similarity.sort_indices()
    row = np.repeat(np.arange(similarity.shape[0]), np.diff(similarity.indptr))
    order = np.lexsort((similarity.indices, -similarity.data, row))
    place = np.arange(len(order)) - similarity.indptr[row]  # rows stay together under the sort, so `row` is sorted too
    kept = order[place < k]
    return scipy.sparse.csr_array((similarity.data[kept], (row[kept], similarity.indices[kept])), similarity.shape)


def joined(parts: Sequence[Ranking]) -> Ranking:
    return Ranking(torch.cat([part.rows for part in parts]), torch.cat([part.scores for part in parts]))


def empty(k: int) -> Ranking:
    """The ranking of no case at all."""
    return Ranking(torch.empty(0, k, dtype=torch.int64), torch.empty(0, k))
