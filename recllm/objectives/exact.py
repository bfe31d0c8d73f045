"""The expectation that a group of answers estimates, in closed form from one pass over the target. Ours.

p_h = π(c_h | x, c_<h), given as logs (P, L); P_h = p_1 ⋯ p_h is the chance that an answer shares the target's first h
codes, so that the prefix reward is r = Σ_h (w_h − w_{h−1}) 1[ℓ ≥ h], w_h = (h/H)^β, w_0 = 0. All are differentiable,
and as exact at P = 1e-30 as at 1 − 1e-7: no two nearly equal numbers are subtracted.

`lengths` (P,) are the targets' own numbers of codes H, where they differ; what stands beyond them is not read.
"""

import torch
from torch import Tensor


def expected_prefix_reward(path_logps: Tensor, beta: float = 0.5, lengths: Tensor | None = None) -> Tensor:
    """E[r] = Σ_h (w_h − w_{h−1}) P_h.   (P, L) -> (P,)"""
    return (_steps(path_logps, beta, lengths) * _reached(path_logps, lengths).exp()).sum(dim=1)


def prefix_reward_std(path_logps: Tensor, beta: float = 0.5, lengths: Tensor | None = None) -> Tensor:
    """sqrt(Var[r]), Var[r] = Σ_h (w_h² − w_{h−1}²) P_h − E[r]².   (P, L) -> (P,)

    With d_h = w_h − w_{h−1}, and as ℓ ≥ h implies ℓ ≥ g for g ≤ h, Cov(1[ℓ ≥ g], 1[ℓ ≥ h]) = P_h (1 − P_g). So

        Var[r] = Σ_h d_h P_h (d_h (1 − P_h) + 2 Σ_{g<h} d_g (1 − P_g))

    is the same as a sum of positive terms. Where it is 0 the gradient is 0 too.
    """
    steps, reached = _steps(path_logps, beta, lengths), _reached(path_logps, lengths)
    lost = steps * -reached.expm1()  # (P, L) d_h (1 − P_h)
    earlier = torch.nn.functional.pad(lost, (1, 0)).cumsum(dim=1)[:, :-1]  # Σ_{g<h}
    variance = (steps * reached.exp() * (lost + 2 * earlier)).sum(dim=1)
    varies = variance > 0
    return torch.where(varies, torch.where(varies, variance, 1.0).sqrt(), 0.0)


def expected_success(path_logps: Tensor, k: int, lengths: Tensor | None = None) -> Tensor:
    """success@k = 1 − (1 − P_H)^k, that one of k answers is the target.   (P, L) -> (P,)

    Summed as P_H Σ_{i<k} (1 − P_H)^i: nothing cancels where P_H is small, and the gradient k (1 − P_H)^(k−1) P_H of
    log P_H stays finite where it is 1.
    """
    if k < 1:
        raise ValueError(f"k is {k}: success@k needs 1 or more answers")
    whole = _reached(path_logps, lengths)[:, -1:]  # (P, 1)
    powers = torch.arange(k, device=whole.device)  # (k,)
    return whole.exp().squeeze(1) * ((-whole.expm1()) ** powers).sum(dim=1)


def prefix_token_weights(path_logps: Tensor, beta: float = 0.5, lengths: Tensor | None = None) -> Tensor:
    """a_j = Σ_{h≥j} (w_h − w_{h−1}) P_h, so that ∇E[r] = Σ_j a_j ∇log p_j.   (P, L) -> (P, L)

    Since ∇P_h = P_h Σ_{j≤h} ∇log p_j, every level that lies on the way to h gets h's share: a falls with j, and a_1
    is E[r]. The last level is moved by (1 − w_{H−1}) P_H alone.
    """
    gains = _steps(path_logps, beta, lengths) * _reached(path_logps, lengths).exp()  # (P, L)
    return gains.flip(1).cumsum(dim=1).flip(1)


def _reached(path_logps: Tensor, lengths: Tensor | None) -> Tensor:
    """log P_h; constant from h = H on. Rounding above 0 is cut: no probability is more than 1.   (P, L) -> (P, L)"""
    if lengths is not None:
        level = torch.arange(path_logps.size(1), device=path_logps.device)
        path_logps = path_logps.masked_fill(level >= lengths.unsqueeze(1), 0.0)
    return path_logps.cumsum(dim=1).clamp(max=0)


def _steps(path_logps: Tensor, beta: float, lengths: Tensor | None) -> Tensor:
    """d_h = w_h − w_{h−1}; 0 beyond H.   (P, L) -> (1, L) or (P, L)"""
    if not beta > 0:
        raise ValueError(f"beta is {beta}: an answer without a right level would be worth as much as the target")
    levels = path_logps.size(1)
    level = torch.arange(levels + 1, device=path_logps.device, dtype=torch.double)  # 0, 1, … L
    own = level.new_full((1, 1), levels) if lengths is None else lengths.double().unsqueeze(1)
    return ((level / own).clamp(max=1) ** beta).diff(dim=1).to(path_logps.dtype)
