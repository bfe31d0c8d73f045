"""SRPO (GREAM, section 5): a reward for every right level, and a bonus calibrated by what a hit does for pass@k.

Differences from GRPO: 1. the reward is dense, (ℓ/H)^β; 2. hits and misses get a second advantage, that of their share
in the group's pass@k. Dynamic sampling rejects the groups of which `group.has_signal` says no.
"""

import torch
from torch import Tensor

from recllm.objectives.group import code_count, common_prefix, group_normalised, is_hit, real_type


def prefix_reward(codes: Tensor, target: Tensor, beta: float = 0.5) -> Tensor:
    """r = (ℓ / H)^β, H the target's own number of codes.   GREAM, Eq. 13-14.   (P, G, L), (P, L) -> (P, G)

    Only the whole item is worth 1. An answer with all codes of a shorter target and more after them is another item
    (no item's codes begin another's, so no index holds both): its last common code led astray, and ℓ counts H − 1.
    """
    if not beta > 0:
        raise ValueError(f"beta is {beta}: an answer without a right level would be worth as much as the target")
    levels = code_count(target).unsqueeze(1)  # (P, 1)
    astray = torch.minimum(common_prefix(codes, target.unsqueeze(1)), (levels - 1).clamp(min=0))
    prefix = torch.where(is_hit(codes, target), levels, astray)  # (P, G)
    return ((prefix.double() / levels.clamp(min=1)) ** beta).to(torch.get_default_dtype())


def group_success(hits: Tensor, k: int) -> Tensor:
    """ρ = 1 − C(G−c, k) / C(G, k): that k answers drawn from the group hold one of its c hits.   (P, G) -> (P,)

    `metrics.pass_at_k` of the group.
    """
    return (1 - _all_miss(*_counted(hits, k), k)).to(real_type(hits))


def bonus_advantage(hits: Tensor, k: int) -> Tensor:
    """(1−ρ)/σ for a hit, ((1−ρ) − δ)/σ for a miss, σ = sqrt(ρ(1−ρ)); 0 for all where σ = 0.   GREAM. (P, G) -> (P, G)

    An answer's worth is the mean success of the k draws that hold it, less ρ, over σ. That is 1 for a hit, and 1 − δ
    for a miss: δ = C(G−c−1, k−1) / C(G−1, k−1) is the chance that its k−1 companions miss too. Sums to zero over a
    group, since the mean over all answers of the worth is ρ.
    """
    group, hit_count = _counted(hits, k)
    failure = _all_miss(group, hit_count, k)  # (P,) 1 − ρ, never taken as 1 − (1 − small)
    sigma = ((1 - failure) * failure).sqrt()
    moves = (sigma > 0).unsqueeze(1)
    given_miss = _all_miss(group - 1, hit_count, k - 1)  # δ
    for_hit, for_miss = failure.unsqueeze(1), (failure - given_miss).unsqueeze(1)
    bonus = torch.where(hits.bool(), for_hit, for_miss) / torch.where(moves, sigma.unsqueeze(1), 1.0)
    return torch.where(moves, bonus, 0.0).to(real_type(hits))


def srpo_advantage(codes: Tensor, target: Tensor, k: int, beta: float = 0.5) -> Tensor:
    """A = group_normalised((ℓ/H)^β) + bonus.   GREAM, section 5.   (P, G, L), (P, L) -> (P, G)"""
    return group_normalised(prefix_reward(codes, target, beta)) + bonus_advantage(is_hit(codes, target), k)


def _counted(hits: Tensor, k: int) -> tuple[int, Tensor]:
    """G, and c of each group.   (P, G) -> (), (P,)"""
    group = hits.size(1)
    if not 1 <= k <= group:
        raise ValueError(f"k is {k} in groups of {group} answers: pass@k needs 1 ≤ k ≤ G")
    return group, hits.bool().sum(dim=1)


def _all_miss(n: int, c: Tensor, k: int) -> Tensor:
    """C(n−c, k) / C(n, k) = Π_{i<k} (n−c−i) / (n−i), in float64.   (P,) -> (P,)

    Where fewer than k are no hits, one of the factors is 0.
    """
    i = torch.arange(k, device=c.device, dtype=torch.double)  # (k,)
    return ((n - c.double().unsqueeze(1) - i) / (n - i)).prod(dim=1)
