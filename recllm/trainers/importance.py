"""How far the sampler's log-probabilities were from the trainer's: TRL's correction, after answers were dropped."""

import torch
from torch import Tensor
from trl import GRPOConfig


def importance_ratio(old: Tensor, sampled: Tensor, counted: Tensor, args: GRPOConfig) -> Tensor:
    """exp(log π_old − log π_sampler), clipped or masked as the settings say.   (R, T) ×3 -> (R, T) or (R, 1)

    `counted`: tokens that were drawn by the sampler; others, such as those of an injected answer, get a ratio of 1.
    """
    difference = torch.nan_to_num((old - sampled) * counted, nan=0.0)  # nan: vLLM could not score the token
    if args.vllm_importance_sampling_mode.startswith("sequence"):
        difference = difference.sum(dim=-1, keepdim=True)
    ratio = difference.exp()
    low, high = args.vllm_importance_sampling_clip_min, args.vllm_importance_sampling_clip_max
    if args.vllm_importance_sampling_mode.endswith("truncate"):
        return ratio.clamp(min=low, max=high)
    outside = torch.zeros_like(ratio, dtype=torch.bool)
    outside |= ratio < low if low is not None else outside
    outside |= ratio > high if high is not None else outside
    return ratio.masked_fill(outside, 0.0)
