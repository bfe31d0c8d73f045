"""Several views of an item in one vector: what it says of itself, beside who consumes it."""

import torch


def centred(matrix: torch.Tensor) -> torch.Tensor:
    """(N, D) -> (N, D) less the mean of its rows; zero rows, which know nothing, stay zero.

    Texts share a direction (a language model's vectors nearly all of it), which would make their cosines, and so their
    part of a fused distance, small whatever its weight.
    """
    known = (matrix != 0).any(dim=1, keepdim=True)  # (N, 1)
    return torch.where(known, matrix - matrix.sum(dim=0) / known.sum().clamp(min=1), 0.0)


def fuse_vectors(parts: list[tuple[torch.Tensor, float]]) -> torch.Tensor:
    """[(N, D_p), weight w_p] -> (N, Σ D_p): each row to length 1, times sqrt(w_p), side by side.

    So squared distances add with the weights: |x_i − x_j|² = Σ_p w_p |x̂_pi − x̂_pj|². A part that knows nothing of an
    item (a zero row) is the same distance from everything, and leaves the comparison to the others.
    """
    return torch.cat([torch.nn.functional.normalize(matrix, dim=1) * weight**0.5 for matrix, weight in parts], dim=1)
