"""GRC: rewards of a draft, what was said of it, and its correction; which drafts deserve another look.

Differences from GRPO: 1. an answer is a trajectory of three parts, and each earns; 2. hits are counted level by level,
not as a prefix; 3. advantages are those of the ranks of the returns (`group.rank_normalised`).

Codes are (…, L), -1 everywhere in an answer that names no item. Attributes are ids (…, K), -1 where the answer names no
item or nothing is known of it: a missing value equals nothing, not even another missing one.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from recllm.objectives.group import common_prefix


class GRCReward(NamedTuple):
    """Of P prompts and G trajectories each. All (P, G); the parts as they are before any weight but β_last."""

    task: Tensor  # R_task = ℓ0 + β_last ℓ1
    loc: Tensor  # R_loc
    sem: Tensor  # R_sem
    delta: Tensor  # R_Δ
    total: Tensor  # R


def first_divergence(draft: Tensor, target: Tensor) -> Tensor:
    """r_loc, the first level in 1 … L at which the draft is not the target; L + 1 for the target itself. GRC, 4.1

    (…, L), (…, L) -> (…); where drafts have one dimension more they are a target's group: (P, G, L), (P, L) -> (P, G)
    """
    if draft.dim() == target.dim() + 1:
        target = target.unsqueeze(-2)
    return common_prefix(draft, target) + 1


def same_attributes(attributes: Tensor, target: Tensor) -> Tensor:
    """Which are the target's.   (P, G, K), (P, K) -> (P, G, K) bool"""
    target = target.unsqueeze(1)  # (P, 1, K)
    return (attributes == target) & (target >= 0)


def grc_reward(
    draft: Tensor, corrected: Tensor, target: Tensor, loc: Tensor, sem: Tensor, draft_attributes: Tensor,
    corrected_attributes: Tensor, target_attributes: Tensor, *, beta_cor: float = 2.2, beta_last: float = 2.0,
    beta_loc: float = 1.0, beta_sem: float = 0.8, beta_delta: float = 1.0, task_weight: float = 1.0, eps: float = 1e-6,
) -> GRCReward:  # fmt: skip
    """R = w_task R_task + β_cor (β_loc R_loc + β_sem R_sem + β_Δ R_Δ).   GRC, section 4.2; w_task and β_Δ are ours, 1

        ℓ0, ℓ1 = levels at which the draft ẑ⁰, the correction ẑ¹ have the target's code, whatever stands before them
        R_task = ℓ0 + β_last ℓ1
        R_loc  = 1[r̂_loc = r_loc] + |E ∩ F| / (|E| + ε)     E: the levels from r̂_loc on, F: those that were put right
        R_sem  = mean_k 1[r̂_k = r_k] + mean_k 1[r̂_k = 0, attribute k of ẑ⁰ is not the target's, that of ẑ¹ is]
        R_Δ    = max(0, ℓ1 − ℓ0)

    draft, corrected (P, G, L), target (P, L); loc (P, G) in 1 … L + 1 and sem (P, G, K) in {0, 1} are what was said;
    attributes (P, G, K), of the target (P, K). A weight of 0 leaves its term out.
    """
    if not eps > 0:
        raise ValueError(f"eps is {eps}: nothing is divided by nothing where the draft is called right")
    wanted = target.unsqueeze(1)  # (P, 1, L)
    before, after = ((codes == wanted) & (wanted >= 0) for codes in (draft, corrected))  # (P, G, L)
    hits0, hits1 = before.sum(-1).double(), after.sum(-1).double()  # (P, G)
    task, delta = hits0 + beta_last * hits1, (hits1 - hits0).clamp(min=0)

    places = torch.arange(1, target.size(-1) + 1, device=target.device)
    edited = places >= loc.unsqueeze(-1)  # E   (P, G, L)
    fixed = (edited & ~before & after).sum(-1) / (edited.sum(-1).double() + eps)
    right = (loc == first_divergence(draft, target)) + fixed

    same0, same1 = (same_attributes(given, target_attributes) for given in (draft_attributes, corrected_attributes))
    said = sem.bool()
    meant = _mean(said == same0) + _mean(~said & ~same0 & same1)

    total = task_weight * task + beta_cor * (beta_loc * right + beta_sem * meant + beta_delta * delta)
    return GRCReward(*(part.to(torch.get_default_dtype()) for part in (task, right, meant, delta, total)))


def label_entropy(logps: Tensor) -> Tensor:
    """H = −Σ_y p_y log p_y over a slot's own labels; a label of logp −inf adds nothing.   (…, C) -> (…)"""
    return torch.special.entr(logps.softmax(dim=-1)).sum(dim=-1)


def calibrated_scores(scores: Tensor, entropies: Tensor, weight: float = 0.2) -> Tensor:
    """score_b + α_e H̄_b, H̄_b the mean entropy of the draft's slots: doubt is looked at first.   GRC, 4.3 (EGRS)

    (P, B), (P, B) -> (P, B). α_e = 0 leaves the scores as they are.
    """
    return scores + weight * entropies


def _mean(each: Tensor) -> Tensor:
    """Over attributes; 0 where there are none.   (P, G, K) bool -> (P, G)"""
    return each.sum(-1).double() / max(each.size(-1), 1)
