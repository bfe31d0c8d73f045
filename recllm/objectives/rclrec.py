"""RCLRec: which history items stand before the answer, and what they must be worth to it.   RCLRec, sections 2 and 3.

J items of a history, T tokens of a target. Nothing of a model is in here: relevance and log-probabilities come from it.
"""

import torch
from torch import Tensor

ABSENT = -1


def ascending_top_k(scores: Tensor, k: int, mask: Tensor | None = None) -> Tensor:
    """The k most relevant items, least relevant first: the best stands right before the answer.   (P, J) -> (P, k)

    `mask` (P, J): which items there are; default: all. Where there are fewer than k, the row begins with -1. Of two
    items with one score the later one, in a history the more recent, is the more relevant.
    """
    if k < 1:
        raise ValueError(f"k is {k}: a prefix has at least one item")
    mask = torch.ones_like(scores, dtype=torch.bool) if mask is None else mask.bool()
    order = scores.detach().argsort(dim=1, stable=True)  # (P, J)
    present = mask.gather(1, order)
    last = present.long().argsort(dim=1, stable=True)  # what is absent first, both parts in the order of their scores
    order = order.gather(1, last).masked_fill(~present.gather(1, last), ABSENT)
    return torch.nn.functional.pad(order, (max(k - order.size(1), 0), 0), value=ABSENT)[:, -k:]


def straight_through(mask: Tensor, p: Tensor) -> Tensor:
    """m + p − stop_gradient(p): the value of the hard mask, the gradient of the soft one.   (…, J), (…, J) -> (…, J)

    The value is m exactly: p − p is computed first, and is 0 for every finite p.
    """
    return mask.to(p.dtype) + (p - p.detach())


def average_nll(logps: Tensor, mask: Tensor | None = None) -> Tensor:
    """ℓ = −Σ_t m_t log π_t / Σ_t m_t, the mean over the target's own tokens.   (P, T), (P, T) -> (P,)

    `mask`: which tokens count; default: all. 0 where none does. What does not count is not read: it may be -inf.
    """
    if mask is None:
        return -logps.mean(dim=1)
    mask = mask.bool()
    return -logps.masked_fill(~mask, 0.0).sum(dim=1) / mask.sum(dim=1).clamp(min=1)


def quality_loss(nll: Tensor, nll_base: Tensor, margin: float = 0.1) -> Tensor:
    """L_q = max(0, ℓ_cur − ℓ_base + m).   RCLRec, section 3.   (P,), (P,) -> (P,)

    ℓ_cur with the prefix under θ, ℓ_base without it under the frozen θ₀, a constant. 0 once the prefix makes a token of
    the target e^m times as probable as it was; until then the gradient is that of ℓ_cur.
    """
    return (nll - nll_base.detach() + margin).clamp(min=0)
