"""Attention of a few query positions over a long cache, without copying the keys of grouped heads.

transformers repeats keys and values to the number of query heads when there is a mask, which for our short queries
costs as much as the attention. Here the query heads of a group become further query positions of their key head.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel

from recllm.decoding.body import attention_of

NAME = "recllm_grouped"


def grouped_attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor,
    scaling: float | None = None, **_,
) -> tuple[Tensor, None]:  # fmt: skip
    """(P, H, Q, d), (P, K, T, d), (P, K, T, d), (P, 1, Q, T) -> (P, Q, H, d): heads of K groups, H / K in each."""
    prompts, heads, queries, width = query.shape
    groups = heads // key.size(1)
    query = query.reshape(prompts, key.size(1), groups * queries, width)
    mask = attention_mask.to(query.dtype)
    if groups > 1:
        mask = mask.repeat(1, 1, groups, 1)
    output = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)
    return output.view(prompts, heads, queries, width).transpose(1, 2).contiguous(), None


@contextlib.contextmanager
def attending_in_groups(model: PreTrainedModel) -> Iterator[None]:
    """For the steps alone: the model's own attention computes the prompts, and trains."""
    AttentionInterface.register(NAME, grouped_attention)
    config = model.config.get_text_config()
    before = attention_of(model)
    if before.startswith("sdpa"):
        config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = before
