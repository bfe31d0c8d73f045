"""ReCast: repair a group without a hit, then contrast its best answer with its hardest miss.

Differences from GRPO: 1. a group in which nothing is right gets one right answer, an anchor that stands in for its
worst; 2. two answers of G carry an advantage, the others are not active: the update's width is 2, whatever G is.
`repair_groups` alone, then `group_normalised`, is the paper's "repair only"; `boundary_signal(…, repair=False)` its
"boundary only".
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from recllm.objectives.group import code_count, common_prefix, real_type


@dataclass(frozen=True, eq=False)
class RepairedGroups:
    rewards: Tensor  # (P, G) 1 where the anchor stands
    scores: Tensor  # (P, G) the same
    replaced: Tensor  # (P,) int64, the answer that the anchor stands in for, or -1


@dataclass(frozen=True, eq=False)
class BoundarySignal:
    """A group moves the model only if it has both a positive and a negative; otherwise none of it is active."""

    advantages: Tensor  # (P, G) 1 for the positive, −λ for the negative, else 0
    active: Tensor  # (P, G) bool, two of a group or none
    replaced: Tensor  # (P,) int64, the answer that the anchor stands in for, or -1
    positive: Tensor  # (P,) int64, i⁺; -1 if nothing in the group is right
    negative: Tensor  # (P,) int64, i⁻; -1 if everything is


def structural_score(codes: Tensor, target: Tensor) -> Tensor:
    """s = max over the M items p that an answer names of ℓ(p, t) / max(|p|, |t|).   (P, G, M, L), (P, L) -> (P, G)

    0 if it names none. Orders answers inside a group; never a reward.
    """
    target = target[:, None, None]  # (P, 1, 1, L)
    longer = torch.maximum(code_count(codes), code_count(target)).clamp(min=1)  # (P, G, M)
    scores = common_prefix(codes, target) / longer
    return torch.nn.functional.pad(scores, (0, 1)).amax(dim=2)  # a 0 beside them, so that M may be 0


def repair_groups(rewards: Tensor, scores: Tensor, repair: bool | Tensor = True) -> RepairedGroups:
    """Where all r = 0, an anchor with r = s = 1 replaces the answer of smallest s, the first of equals. (P, G), (P, G)

    `repair` says of which groups, where it is a (P,) bool tensor: `adaptive_repair_probability` draws it.
    """
    wanted = (rewards <= 0).all(dim=1) & torch.as_tensor(repair, device=rewards.device)  # (P,)
    replaced = torch.where(wanted, scores.argmin(dim=1), -1)
    anchor = _places(rewards) == replaced.unsqueeze(1)  # (P, G)
    return RepairedGroups(rewards.masked_fill(anchor, 1), scores.masked_fill(anchor, 1), replaced)


def boundary_signal(
    rewards: Tensor, scores: Tensor, weight: float = 1.0, repair: bool | Tensor = True
) -> BoundarySignal:
    """A[i⁺] = 1, A[i⁻] = −λ; i⁺ best by (r, s), i⁻ the miss of largest s, the first of equals.   (P, G), (P, G)

    ReCast, Eq. 1. `weight` is λ. A miss is an answer with r = 0. An answer that names nothing has s = 0, so it is i⁻
    only if no miss has a higher score. Groups are repaired first; one of zeros that is not has no positive, one of
    hits no negative: no signal.
    """
    if not weight >= 0:
        raise ValueError(f"the contrastive weight is {weight}: it is 0 or more")
    groups = repair_groups(rewards, scores, repair)
    right = groups.rewards > 0  # (P, G)
    best = right & (groups.rewards == groups.rewards.amax(dim=1, keepdim=True))
    positive, negative = _highest(groups.scores, best), _highest(groups.scores, ~right)
    both = ((positive >= 0) & (negative >= 0)).unsqueeze(1)  # (P, 1)
    is_positive = both & (_places(rewards) == positive.unsqueeze(1))  # (P, G)
    is_negative = both & (_places(rewards) == negative.unsqueeze(1))
    advantages = torch.zeros_like(rewards, dtype=real_type(rewards))
    advantages = advantages.masked_fill(is_positive, 1).masked_fill(is_negative, -weight)
    return BoundarySignal(advantages, is_positive | is_negative, groups.replaced, positive, negative)


def adaptive_repair_probability(trainable_share: float) -> float:
    """1 − q: how often a group without a hit is repaired, q the running share of groups with a hit and a miss. Ours.

    The paper finds that repair carries a weak model and can hurt a strong one, and leaves the rule open. An anchor is
    not drawn from the policy: it pulls at the target with a weight of its own however unlikely the target is
    (`curves`), as SFT does. That is needed as long as nothing else teaches, which is what q measures. So: all groups
    are repaired at q = 0, none at q = 1, evenly between, with nothing to tune. At most a share 1 − q of the groups
    has no hit, so at most (1 − q)² are repaired: at the paper's 12 % and 56 %, 77 % and 19 % in place of 88 % and
    44 %. It needs no schedule, and comes back by itself where targets grow harder.
    """
    if not 0 <= trainable_share <= 1:
        raise ValueError(f"a share is from 0 to 1, got {trainable_share}")
    return 1 - trainable_share


def _highest(scores: Tensor, among: Tensor) -> Tensor:
    """The place of the largest score among those marked, the first of equals; -1 if none is.   (P, G) -> (P,)"""
    place = scores.masked_fill(~among, -torch.inf).argmax(dim=1)
    return torch.where(among.any(dim=1), place, -1)


def _places(values: Tensor) -> Tensor:
    """(G,)"""
    return torch.arange(values.size(1), device=values.device)
