"""Every method as one weight over the target's probability P: its expected gradient is W(P) ∇log P. Ours.

What is assumed, and said once: G answers are drawn from the policy itself (no clipping, ratio 1, no KL); only hit or
miss is known of an answer; the gradient of a group is Σ_i A_i ∇log π(a_i) over the number of answers averaged over, G
where all are active and 2 under ReCast's boundary, and 0 for a group without signal. A hit pulls at ∇log P. A miss
pulls, in expectation, at −P/(1−P) ∇log P, since Σ_a π(a) ∇log π(a) = 0. So with c ~ Bin(G, P) hits and advantages A⁺
of hits, A⁻ of misses,

    W(P) = E_c[c A⁺(c) − (G−c) A⁻(c) P/(1−P)] / G

which is E_c[c A⁺(c)] / (G (1−P)) where the advantages of a group sum to zero, as GRPO's and SRPO's do.

An anchor is the target: it pulls at ∇log P with its full advantage, whatever P is. ReCast's hardest miss is taken for a
miss like any other; one that shares the target's first codes pulls otherwise at those.

All take P (n,), from 0 to below 1, and give (n,) in float64.
"""

import torch
from torch import Tensor

from recllm.objectives.group import group_normalised
from recllm.objectives.srpo import bonus_advantage


def weight_curves(p: Tensor, group: int, k: int, weight: float = 1.0) -> dict[str, Tensor]:
    """Each method's curve, by the name that a plot shows; `weight` is ReCast's λ.   (n,) -> (n,) each"""
    return {
        "SFT": sft_weight(p),
        "REINFORCE": reinforce_weight(p),
        f"success@{k}": success_weight(p, k),
        "GRPO, G → ∞": grpo_limit_weight(p),
        f"GRPO, G = {group}": grpo_weight(p, group),
        f"SRPO's bonus, k = {k}": srpo_bonus_weight(p, group, k),
        "ReCast": recast_weight(p, group, weight),
        "ReCast, repair only": repair_only_weight(p, group),
        "ReCast, boundary only": boundary_only_weight(p, group, weight),
    }


def sft_weight(p: Tensor) -> Tensor:
    """∇log P itself: 1."""
    return torch.ones_like(p.double())


def reinforce_weight(p: Tensor) -> Tensor:
    """∇E[hit] = P ∇log P, with or without a baseline."""
    return p.double()


def success_weight(p: Tensor, k: int) -> Tensor:
    """∇(1 − (1−P)^k) = k (1−P)^(k−1) P ∇log P."""
    return k * (1 - p.double()) ** (k - 1) * p.double()


def grpo_limit_weight(p: Tensor) -> Tensor:
    """E[hit] over its std, held fixed: P / sqrt(P (1−P)) = sqrt(P / (1−P))."""
    return (p.double() / (1 - p.double())).sqrt()


def grpo_weight(p: Tensor, group: int) -> Tensor:
    """Group-normalised hits: c A⁺ / G = sqrt(c (G−c) (G−1) / G³), so nothing at c = 0 and c = G."""
    return _mean(p, _pull(group_normalised(_outcomes(p, group)))) / (1 - p.double())


def srpo_bonus_weight(p: Tensor, group: int, k: int) -> Tensor:
    """SRPO's bonus alone; its prefix reward depends on the levels, not on P."""
    return _mean(p, _pull(bonus_advantage(_outcomes(p, group), k))) / (1 - p.double())


def repair_only_weight(p: Tensor, group: int) -> Tensor:
    """GRPO, where the anchor in a group of zeros is its one hit: (G−1) / G^1.5 as P → 0."""
    pulls = _pull(group_normalised(_outcomes(p, group)))
    if group > 1:
        pulls[0] = pulls[1]
    return _mean(p, pulls) / (1 - p.double())


def recast_weight(p: Tensor, group: int, weight: float = 1.0) -> Tensor:
    """(1 + λ P/(1−P)) / 2 of every group that has a miss beside a hit or an anchor: 1/2 as P → 0."""
    return _contrast(p, group, weight, fewest=0)


def boundary_only_weight(p: Tensor, group: int, weight: float = 1.0) -> Tensor:
    """(1 + λ P/(1−P)) / 2 of every group that has a hit and a miss of its own: G P / 2 as P → 0."""
    return _contrast(p, group, weight, fewest=1)


def _contrast(p: Tensor, group: int, weight: float, fewest: int) -> Tensor:
    """One positive and one negative of groups with `fewest` … G−1 hits.   (n,) -> (n,)"""
    counts = torch.arange(group + 1, device=p.device)
    learnable = (counts >= fewest) & (counts < group) & (group > 1)  # an anchor alone has no miss beside it
    odds = p.double() / (1 - p.double())
    return _mean(p, learnable.double()) * (1 + weight * odds) / 2


def _outcomes(p: Tensor, group: int) -> Tensor:
    """A group for each number of hits c = 0 … G, the hits first.   -> (G+1, G) float64 of 0 and 1"""
    counts = torch.arange(group + 1, device=p.device)
    return (counts[:group] < counts.unsqueeze(1)).double()


def _pull(advantages: Tensor) -> Tensor:
    """c A⁺(c) / G, of groups as in `_outcomes`.   (G+1, G) -> (G+1,)"""
    return (advantages * _outcomes(advantages, advantages.size(1))).mean(dim=1)


def _mean(p: Tensor, values: Tensor) -> Tensor:
    """Σ_c C(G, c) P^c (1−P)^(G−c) values(c).   (n,), (G+1,) -> (n,)"""
    p, group = p.double().unsqueeze(1), torch.tensor(len(values) - 1.0, dtype=torch.double, device=p.device)
    c = torch.arange(len(values), dtype=torch.double, device=p.device)  # (G+1,)
    ways = torch.lgamma(group + 1) - torch.lgamma(c + 1) - torch.lgamma(group - c + 1)
    chances = (ways + torch.xlogy(c, p) + torch.special.xlog1py(group - c, -p)).exp()  # (n, G+1)
    return chances @ values
