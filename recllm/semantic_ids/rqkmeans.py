"""RQ-KMeans: k-means on the embeddings, k-means on what its centroids leave, and so on.   GREAM, section 1 (3)

Differences from running k-means on all points at every level:
1. Everything happens in the principal subspace that holds 99.95 % of the variance, which is narrower than D for most
   embeddings: the quantizer's encoder is the projection onto it. What lies outside does not depend on the codes.
2. Centroids start from k-means++. Each iteration of Lloyd's sees the next 65,536 items (256 for each of 256 codes): no
   sample is seen twice before all have been, so its noise is not learnt. One last iteration sees all items.
3. Until then centroids move 1.4 times as far as the means of their points: Lloyd's steps are too short.
4. All points are assigned at the end, through all levels (`Quantizer.encode`).

Deterministic for a seed on one machine and number of threads. With another number of threads or another device the
matrix products may round differently in the last bit, which can turn the assignment of a point between two centroids.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from recllm.errors import UserError
from recllm.semantic_ids.quantizer import CHUNK, Quantizer

KEPT = 0.9995  # of the variance
SEEDING = 64  # k-means++ reads its points once for each code: it gets this many for each,
SEEDING_LIMIT = 65_536  # and no more than this
TRIALS = 4  # candidates that k-means++ draws for each code, to keep the best (greedy k-means++)
RELAXATION = 1.4  # how far centroids move, in units of the way to the mean
TOLERANCE = 1e-5  # iterations end when the error changes by less than this share


def fit(
    embeddings: Tensor,
    sizes: Sequence[int],
    seed: int = 0,
    sample: int = 65_536,
    iterations: int = 32,
    balanced: bool = False,
    device: str | torch.device = "cpu",
) -> Quantizer:
    """Codebooks of up to `sizes` codes each, in a subspace of width R. (N, D) -> L of (V_h, R)

    A level has fewer codes than asked for where the residuals hold fewer distinct points.
    `balanced` charges every code a price (the quantizer's offset) so that all are used about equally often; its prices
    are learnt on the sample alone. Memory: one copy of the embeddings in the principal subspace.
    """
    check_embeddings(embeddings)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(embeddings), generator=generator)  # in random order, any first part is a sample
    centre, basis = principal_subspace(embeddings, order[:SEEDING_LIMIT])
    residual = torch.empty(len(embeddings), basis.shape[1])  # (N, R)
    for start, rows in zip(range(0, len(embeddings), CHUNK), order.split(CHUNK)):
        residual[start : start + CHUNK] = (embeddings[rows].float() - centre) @ basis
    residual, basis = residual.to(device), basis.to(device)
    codebooks, offsets = [], []
    for size in sizes:
        codebook = seed_centroids(residual[: min(SEEDING * size, SEEDING_LIMIT)], size, generator)
        if balanced:
            codebook, offset = balanced_lloyd(residual[:sample], codebook, iterations)
            label, _ = nearest(residual, codebook, offset)
        else:
            codebook, label = lloyd(residual, codebook, iterations, sample)
            offset = codebook.new_zeros(len(codebook))
        codebooks.append(codebook)
        offsets.append(offset)
        for chunk, chosen in zip(residual.split(CHUNK), label.split(CHUNK)):
            chunk -= codebook[chosen]
    return Quantizer(
        method="balanced" if balanced else "rqkmeans",
        codebooks=tuple(codebooks),
        centre=centre.to(device),
        offsets=tuple(offsets),
        encoder=((basis.T.contiguous(), basis.new_zeros(basis.shape[1])),),
        decoder=((basis, basis.new_zeros(basis.shape[0])),),
    )


def principal_subspace(embeddings: Tensor, sample: Tensor) -> tuple[Tensor, Tensor]:
    """The mean of all rows and an orthonormal basis that keeps KEPT of the sample's variance. -> (D,), (D, R)"""
    chunks = embeddings.split(CHUNK)
    centre = (sum(chunk.sum(dim=0).double() for chunk in chunks) / len(embeddings)).float()
    width = embeddings.shape[1]
    covariance = torch.zeros(width, width, dtype=torch.float64)
    for rows in sample.split(CHUNK):
        centred = embeddings[rows].float() - centre
        covariance += (centred.T @ centred).double().cpu()
    value, vector = torch.linalg.eigh(covariance)  # ascending
    share = value.flip(0).clamp(min=0).cumsum(dim=0) / value.clamp(min=0).sum().clamp(min=1e-30)
    rank = min(int((share < KEPT).sum()) + 1, width)
    return centre, vector.flip(1)[:, :rank].float().contiguous().to(centre.device)


def assign(quantizer: Quantizer, embeddings: Tensor) -> Tensor:
    """The nearest centroid at each level. (N, D) -> (N, L) int32"""
    return quantizer.encode(embeddings)[0]


def check_embeddings(embeddings: Tensor) -> None:
    if embeddings.ndim != 2 or not len(embeddings) or not embeddings.shape[1]:
        raise UserError(f"embeddings of shape {tuple(embeddings.shape)}: (items, width) is needed")
    for start, chunk in zip(range(0, len(embeddings), CHUNK), embeddings.split(CHUNK)):
        if not chunk.sum().isfinite() and not (finite := chunk.isfinite().all(dim=1)).all():
            row = start + int(finite.long().argmin())
            raise UserError(f"the embedding in row {row} holds NaN or infinity", fix="embed the items again")


def seed_centroids(points: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Greedy k-means++: each centroid is the best of TRIALS points drawn with probability ∝ their squared distance to
    the centroids so far. Stops early when every point is a centroid.   (n, D) -> (≤size, D)
    """
    norm = points.square().sum(dim=1)
    floor = 1e-6 * float(norm.mean())  # what rounding leaves of a distance of 0
    nearest = torch.full_like(norm, torch.inf)
    chosen = []
    weight = torch.ones(len(points), dtype=torch.float64)
    while len(chosen) < size and float(weight.sum()) > 0:
        cumulative = weight.cumsum(dim=0)
        draw = torch.rand(TRIALS, generator=generator, dtype=torch.float64) * cumulative[-1]
        candidate = torch.searchsorted(cumulative, draw, right=True).clamp(max=len(points) - 1).to(points.device)
        distance = norm + norm[candidate, None] - 2 * points[candidate] @ points.T  # (TRIALS, n)
        distance = torch.minimum(distance, nearest)
        best = int(distance.sum(dim=1).min(dim=0).indices)
        chosen.append(int(candidate[best]))
        nearest = distance[best]
        nearest[chosen[-1]] = 0.0
        nearest[nearest <= floor] = 0.0
        weight = nearest.double().cpu()
    return points[chosen]


def lloyd(points: Tensor, codebook: Tensor, iterations: int, sample: int) -> tuple[Tensor, Tensor]:
    """Assign, move towards the means; each time on the next `sample` points. A last step ends at the means of all.

    A code that no point chose moves to the point farthest from its own centroid. (n, D), (V, D) -> centroids (V, D) and
    the code whose mean each point is part of (n,)
    """
    samples = [part for part in points.split(sample) if len(part) == min(sample, len(points))]  # no short rest
    free = codebook.new_zeros(len(codebook))
    before = torch.inf
    for step in range(iterations):
        part = samples[step % len(samples)]
        label, cost = nearest(part, codebook, free)
        distance = torch.linalg.vector_norm(part, dim=1).square() + cost
        error = float(distance.sum(dtype=torch.float64))
        if len(samples) == 1 and abs(before - error) <= TOLERANCE * error:
            break
        before = error
        mean, count = _means(part, label, codebook)
        codebook = codebook + RELAXATION * (mean - codebook)
        if (empty := (count == 0).nonzero().flatten()).numel():
            farthest = distance.argsort(descending=True, stable=True)[: len(empty)]
            codebook[empty] = part[farthest]
    label, _ = nearest(points, codebook, free)
    return _means(points, label, codebook)[0], label


def balanced_lloyd(points: Tensor, codebook: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """Lloyd with a price for each code that evens their use out. (n, D), (V, D) -> (V, D), prices (V,)"""
    price = balance(points, codebook, codebook.new_zeros(len(codebook)))
    for _ in range(iterations):
        codebook, _ = _means(points, nearest(points, codebook, price)[0], codebook)
        price = balance(points, codebook, price)
    return codebook, price


def balance(points: Tensor, codebook: Tensor, price: Tensor, rounds: int = 10, softness: float = 0.05) -> Tensor:
    """Prices under which every code is chosen about equally often: the dual of optimal transport by Sinkhorn's steps.

    price_v += ε log(V · mean_n softmax_v(−(distance + price) / ε)),   ε = softness × mean squared distance
    """
    spread = float(points.square().sum(dim=1).mean())
    epsilon = max(softness * spread, 1e-12)
    for _ in range(rounds):
        load = price.new_zeros(len(price))
        for chunk in points.split(CHUNK):
            load += torch.softmax(-_costs(chunk, codebook, price) / epsilon, dim=1).sum(dim=0)
        price = price + epsilon * torch.log((load * len(price) / len(points)).clamp(min=1e-6))
    return price - price.mean()


def nearest(points: Tensor, codebook: Tensor, price: Tensor) -> tuple[Tensor, Tensor]:
    """The cheapest code of each point and ‖C‖² − 2 r·C + price there. (n, D), (V, D) -> (n,), (n,)"""
    best = [_costs(chunk, codebook, price).min(dim=1) for chunk in points.split(CHUNK)]
    return torch.cat([part.indices for part in best]), torch.cat([part.values for part in best])


def _costs(points: Tensor, codebook: Tensor, price: Tensor) -> Tensor:
    return torch.addmm(codebook.square().sum(dim=1) + price, points, codebook.T, alpha=-2)


def _means(points: Tensor, label: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
    """The mean of each code's points, where it has any, and how many these are. (n, D), (n,), (V, D) -> (V, D), (V,)"""
    if points.is_cuda:  # atomics add in any order there; a product does not
        chosen = zip(points.split(CHUNK), label.split(CHUNK))
        total = sum(torch.nn.functional.one_hot(part, len(codebook)).to(rows).T @ rows for rows, part in chosen)
    else:
        total = torch.zeros_like(codebook).index_add_(0, label, points)
    count = torch.bincount(label, minlength=len(codebook))
    return torch.where(count[:, None] > 0, total / count[:, None], codebook), count
