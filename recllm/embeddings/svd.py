"""The truncated SVD that both offline encoders stand on: seeded, sign-fixed, the same for any number of threads."""

import numpy as np
import scipy.sparse
import threadpoolctl
from sklearn.utils.extmath import randomized_svd

MATRIX_RANK_TOLERANCE = 1e-6  # relative to the largest singular value; float32 noise lies below it


def truncated_svd(matrix: scipy.sparse.csr_array, dim: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Left singular vectors (N, D) and singular values (D,), D = min(dim, rank). Halko, Martinsson, Tropp 2011."""
    dim = min(dim, *matrix.shape)
    # One BLAS thread: how a sum is split over threads changes its last bits. The sparse products, which are most of
    # the work, use one thread anyway.
    with threadpoolctl.threadpool_limits(1, "blas"):
        left, values, _ = randomized_svd(matrix, dim, n_iter=4, random_state=seed, flip_sign=True)
    rank = int((values > MATRIX_RANK_TOLERANCE * values[:1].max(initial=1e-30)).sum())
    return left[:, :rank], values[:rank]
