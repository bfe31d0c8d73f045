"""What the methods share: how far an answer agrees with the target, and rewards relative to those of the same group.

Codes are -1 where there are none: at the end of an item with fewer codes than L, everywhere in an answer that names no
item. Few numbers are computed here, so it is done in float64; the result has the type of the argument, and torch's
default type where that holds whole numbers.
"""

import torch
from torch import Tensor

# Rewards are float32 and sums of products: their rounding is no difference between answers. Relative to the largest
# reward, so that expected rewards of 1e-4 count as what they are, and a little for what is left where terms cancel.
RELATIVE, ABSOLUTE = 1e-5, 1e-7


# ---- answers and the target


def code_count(codes: Tensor) -> Tensor:
    """|p|, how many codes there are.   (…, L) -> (…)"""
    return (codes >= 0).sum(dim=-1)


def common_prefix(codes: Tensor, target: Tensor) -> Tensor:
    """ℓ(p, t), the length of the longest common prefix; absent codes match nothing.   (…, L), (…, L) -> (…)"""
    match = (codes == target) & (target >= 0)
    return match.long().cumprod(dim=-1).sum(dim=-1)


def is_hit(codes: Tensor, target: Tensor) -> Tensor:
    """Is the answer the target, the whole of it and nothing more?   (P, G, L), (P, L) -> (P, G) bool"""
    target = target.unsqueeze(1)  # (P, 1, L)
    return (codes == target).all(dim=-1) & (code_count(target) > 0)


# ---- rewards and the group


def has_signal(rewards: Tensor) -> Tensor:
    """Does anything tell the group's answers apart: is std(r) above rounding?   (P, G) -> (P,) bool"""
    rewards = rewards.double()
    return _std(rewards) > _rounding(rewards)


def group_normalised(rewards: Tensor) -> Tensor:
    """A_i = (r_i − mean r) / std r, std unbiased, nothing added to it; 0 for a group without signal. (P, G) -> (P, G)

    DeepSeekMath (GRPO), section 4.1; without the ε that turns the rounding of a constant group into advantages.
    """
    exact = rewards.double()
    signal = has_signal(rewards).unsqueeze(1)  # (P, 1)
    std = torch.where(signal, _std(exact).unsqueeze(1), 1.0)
    advantages = (exact - exact.mean(dim=1, keepdim=True)) / std
    return torch.where(signal, advantages, 0.0).to(real_type(rewards))


def rank_normalised(returns: Tensor) -> Tensor:
    """`group_normalised` of the average ranks: only the order counts, ties share theirs.   GRC.   (P, G) -> (P, G)

    rank_i = #{j: R_j < R_i} + #{j ≠ i: R_j = R_i} / 2, where what differs by rounding is equal.
    """
    exact = returns.double()
    above = exact.unsqueeze(2) - exact.unsqueeze(1)  # (P, G, G) of i over j
    rounding = _rounding(exact)[:, None, None]
    ranks = (above > rounding).double() + (above.abs() <= rounding).double() / 2  # itself included: 1/2 for everybody
    return group_normalised(ranks.sum(dim=2)).to(real_type(returns))


def real_type(given: Tensor) -> torch.dtype:
    """The floating type that a result has."""
    return given.dtype if given.is_floating_point() else torch.get_default_dtype()


def _std(values: Tensor) -> Tensor:
    """Unbiased; 0 for a single answer.   (P, G) -> (P,)"""
    centred = values - values.mean(dim=1, keepdim=True)
    return (centred.square().sum(dim=1) / max(values.size(1) - 1, 1)).sqrt()


def _rounding(values: Tensor) -> Tensor:
    """(P, G) -> (P,)"""
    return ABSOLUTE + RELATIVE * values.abs().amax(dim=1)
