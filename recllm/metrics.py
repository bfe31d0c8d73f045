"""Every figure the project reports, defined once: rewards, logs and evaluation call these. Tensors in, tensors out.

Ranks are 0-based positions of the target in a list of items (never of strings); a target that is not in the list has
the rank NOT_FOUND, which every metric counts as a miss. N users, K places of a list.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

NOT_FOUND = 2**62


def ranks(ranked: Tensor, target: Tensor) -> Tensor:
    """The first place of the target in each list, NOT_FOUND where it is in none.   (N, K), (N,) -> (N,)"""
    found = ranked == target.unsqueeze(1)  # (N, K)
    return torch.where(found.any(dim=1), found.long().argmax(dim=1), NOT_FOUND)


def recall_at_k(ranks: Tensor, k: int) -> Tensor:
    """1 if the target is among the first k, else 0. With one target a user this is the hit rate.   (N,) -> (N,)"""
    return (ranks < k).double()


def ndcg_at_k(ranks: Tensor, k: int) -> Tensor:
    """1 / log2(rank + 2) within the first k, else 0: with one target the ideal DCG is 1.   (N,) -> (N,)"""
    return torch.where(ranks < k, 1 / torch.log2(ranks.double() + 2), 0.0)


def mrr_at_k(ranks: Tensor, k: int) -> Tensor:
    """1 / (rank + 1) within the first k, else 0.   (N,) -> (N,)"""
    return torch.where(ranks < k, 1 / (ranks.double() + 1), 0.0)


def set_recall_at_k(ranked: Tensor, targets: Tensor, k: int) -> Tensor:
    """|first k ∩ targets| / |targets|: several right items a case, such as all that a user took next (Recall@32).

    Each target counts once, however often it is listed; -1 fills up shorter sets and lists, and matches nothing. A case
    without targets has no recall: nan.   (N, K), (N, M) -> (N,)
    """
    found, wanted = _met(ranked, targets, k)
    return torch.where(wanted > 0, found / wanted, torch.nan)


def set_precision_at_k(ranked: Tensor, targets: Tensor, k: int) -> Tensor:
    """|first k ∩ targets| / k.   (N, K), (N, M) -> (N,)"""
    return _met(ranked, targets, k)[0] / k


def _met(ranked: Tensor, targets: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """How many different targets are among the first k, and how many there are.   (N, K), (N, M) -> (N,), (N,)"""
    ordered = targets.sort(dim=1).values
    new = ordered >= 0
    new[:, 1:] &= ordered[:, 1:] != ordered[:, :-1]
    met = (ordered.unsqueeze(2) == ranked[:, :k].unsqueeze(1)).any(dim=2) & new  # (N, M)
    return met.sum(dim=1).double(), new.sum(dim=1).double()


def pass_at_k(n: Tensor | int, c: Tensor | int, k: int) -> Tensor:
    """1 − C(n−c, k) / C(n, k): the chance that k answers drawn from n, c of them right, hold a right one (unbiased).

    Not to be confused with `ranked_hit_at_k`, which looks at the k answers the model likes best.
    """
    n, c = torch.as_tensor(n), torch.as_tensor(c)
    if (n < k).any():
        raise ValueError(f"pass@{k} needs at least {k} answers a prompt, got {int(n.min())}")
    n, c = torch.broadcast_tensors(n.double(), c.double())
    # C(n−c, k) / C(n, k) = Π_{i<k} (n − c − i) / (n − i); a factor of 0 ends it, later ones may be negative.
    miss = torch.ones_like(n)
    for i in range(k):
        miss = miss * ((n - c - i) / (n - i)).clamp(min=0)
    return 1 - miss


def ranked_hit_at_k(hits: Tensor, scores: Tensor, k: int) -> Tensor:
    """1 if one of the k best-scored answers is right; equal scores in the order given.   (N, G), (N, G) -> (N,)"""
    best = scores.argsort(dim=1, descending=True, stable=True)[:, :k]
    return hits.bool().gather(1, best).any(dim=1).double()


# ---- of the lists, whatever the target


def validity_rate(items: Tensor) -> Tensor:
    """Share of answers that name an item; -1 names none.   (N, K) -> ()"""
    return (items >= 0).double().mean()


def distinct_share(items: Tensor) -> Tensor:
    """Different items in a list over its length; an answer that names none counts as none.   (N, K) -> (N,)"""
    ordered = items.sort(dim=1).values
    new = torch.ones_like(ordered, dtype=torch.bool)
    new[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    return (new & (ordered >= 0)).double().mean(dim=1)


def exposure(items: Tensor, catalogue: int) -> Tensor:
    """How often each item is recommended.   (N, K) -> (catalogue,)"""
    return torch.bincount(items[items >= 0].flatten(), minlength=catalogue)


def coverage(items: Tensor, catalogue: int) -> Tensor:
    """Share of the catalogue that anybody is shown.   (N, K) -> ()"""
    return (exposure(items, catalogue) > 0).double().mean()


def gini(counts: Tensor) -> Tensor:
    """Σ_i (2i − n − 1) x_i / (n Σ x), x ascending, i from 1: 0 if all are shown equally, → 1 if one is. (n,) -> ()"""
    x = counts.double().sort().values
    n = len(x)
    weight = 2 * torch.arange(1, n + 1, dtype=torch.double, device=x.device) - n - 1
    return (weight * x).sum() / (n * x.sum()).clamp(min=1e-300)


def popularity_bias(items: Tensor, popularity: Tensor, targets: Tensor) -> Tensor:
    """Mean popularity percentile of what is recommended, less that of the true targets.   (N, K), (items,), (N,) -> ()

    Positive: the recommendations are more popular than what users take.
    """
    order = popularity.argsort(stable=True)
    percentile = torch.empty(len(popularity), dtype=torch.double, device=popularity.device)
    percentile[order] = torch.linspace(0, 1, len(popularity), dtype=torch.double, device=popularity.device)
    return percentile[items[items >= 0]].mean() - percentile[targets].mean()


# ---- how sure


def bootstrap_interval(
    values: Tensor, confidence: float = 0.95, draws: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Percentile interval of the mean over users drawn with replacement.   (N,) -> low, high"""
    means = _resampled_means(values, draws, seed)
    tail = (1 - confidence) / 2
    low, high = torch.quantile(means, torch.tensor([tail, 1 - tail], dtype=torch.double))
    return float(low), float(high)


def _resampled_means(values: Tensor, draws: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = values.double().cpu()
    return torch.stack(
        [values[torch.randint(len(values), (len(values),), generator=generator)].mean() for _ in range(draws)]
    )


def paired_p_value(a: Tensor, b: Tensor, draws: int = 10_000, seed: int = 0) -> float:
    """Sign-flip test of mean(a − b) ≠ 0 over the same users, two-sided: (1 + #{|flipped| ≥ |seen|}) / (1 + draws).

    Users on whom both agree carry no sign and are left out of the drawing. (N,), (N,) -> p
    """
    if a.shape != b.shape:
        raise ValueError(f"paired values of {tuple(a.shape)} and {tuple(b.shape)}")
    difference = (a.double() - b.double()).cpu()
    difference = difference[difference != 0]
    if not len(difference):
        return 1.0
    generator = torch.Generator().manual_seed(seed)
    seen = difference.sum().abs()
    at_least = 0
    for start in range(0, draws, 256):
        count = min(256, draws - start)
        signs = torch.randint(0, 2, (count, len(difference)), generator=generator).double() * 2 - 1
        at_least += int(((signs @ difference).abs() >= seen - 1e-12).sum())
    return (1 + at_least) / (1 + draws)


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    """Mean and unbiased standard deviation over seeds; 0 for a single one."""
    values = torch.tensor(values, dtype=torch.double)
    return float(values.mean()), float(values.std()) if len(values) > 1 else 0.0
