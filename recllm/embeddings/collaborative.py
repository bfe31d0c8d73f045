"""Who is consumed near whom: positive pointwise mutual information of co-occurrence, then truncated SVD.

Only training events are read (`Catalogue.training_sequences`): an event of validation or test changes no byte.
"""

import dataclasses

import numpy as np
import polars as pl
import scipy.sparse
import torch

from recllm.catalogue import Catalogue
from recllm.embeddings.svd import truncated_svd
from recllm.errors import UserError
from recllm.files import digest


@dataclasses.dataclass(frozen=True)
class CollaborativeEncoder:
    dim: int = 128
    window: int = 5  # events before and after
    smoothing: float = 0.75  # power of the context's frequency: rare neighbours say less (Levy et al., 2015)
    power: float = 1.0  # of the singular values: less than 1 evens the directions out
    seed: int = 0

    @property
    def description(self) -> str:
        settings = f"window {self.window}, smoothing {self.smoothing}, power {self.power}, seed {self.seed}"
        return f"PPMI-SVD (dim {self.dim}, {settings})"

    def encode(self, catalogue: Catalogue) -> torch.Tensor:
        """-> (N, D), D = min(dim, rank). An item without a neighbour in training is a zero row."""
        items, users = training_events(catalogue)
        counts = co_occurrence(items, users, len(catalogue.items), self.window)
        if not counts.nnz:
            raise UserError(
                "no two training events of a user lie within the window, so there are no collaborative vectors",
                file=catalogue.folder,
                fix="--collaborative_weight 0 uses text alone",
            )
        weights = ppmi(counts, self.smoothing)
        left, values = truncated_svd(weights, self.dim, self.seed)
        left[np.diff(weights.indptr) == 0] = 0  # exactly, where rounding leaves 1e-17
        return torch.from_numpy((left * values**self.power).astype("float32"))


def training_events(catalogue: Catalogue) -> tuple[np.ndarray, np.ndarray]:
    """Item rows and user numbers of the training events, in order.   -> (E,) int64, (E,) int64"""
    items = catalogue.training_sequences()["items"]
    rows = items.explode(empty_as_null=False).cast(pl.Enum(catalogue.item_ids)).to_physical().to_numpy()
    users = np.repeat(np.arange(len(items)), items.list.len().to_numpy())
    return rows.astype(np.int64), users


def hash_events(catalogue: Catalogue) -> str:
    """What `CollaborativeEncoder.encode` is a function of, besides its settings."""
    items, users = training_events(catalogue)
    return digest(items.tobytes(), users.tobytes())


def co_occurrence(items: np.ndarray, users: np.ndarray, n_items: int, window: int) -> scipy.sparse.csr_array:
    """C_ij = pairs of one user's events, at most `window` apart, of items i and j ≠ i.   -> (N, N) symmetric"""
    counts = scipy.sparse.csr_array((n_items, n_items), dtype=np.float64)
    for distance in range(1, window + 1):
        first, second = items[:-distance], items[distance:]
        pair = (users[:-distance] == users[distance:]) & (first != second)
        ones = np.ones(int(pair.sum()))
        counts = counts + scipy.sparse.csr_array((ones, (first[pair], second[pair])), shape=counts.shape)
    return (counts + counts.T).tocsr()


def ppmi(counts: scipy.sparse.csr_array, smoothing: float) -> scipy.sparse.csr_array:
    """max(0, log(p_ij / (p_i q_j))), q_j ∝ (Σ_i C_ij)^smoothing.   Levy et al. 2015, Eq. 3   (N, N) -> (N, N)"""
    degree = counts.sum(axis=1)  # (N,)
    context = degree**smoothing / (degree**smoothing).sum()  # (N,)
    pairs = counts.tocoo()
    row, column = pairs.coords
    information = np.log(pairs.data / (degree[row] * context[column]))
    keep = information > 0
    kept = information[keep].astype(np.float32), (row[keep], column[keep])
    return scipy.sparse.csr_array(kept, shape=counts.shape)
