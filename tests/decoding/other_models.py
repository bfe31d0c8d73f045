"""Causal LMs of other makes than Qwen3, untrained, and an attention that takes no mask of ours."""

import torch
from torch import Tensor
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)
from transformers.masking_utils import flash_attention_mask

COMMON = dict(vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)  # noqa: C408
OTHERS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**COMMON, num_key_value_heads=2)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=128, n_embd=64, n_layer=2, n_head=4)),
    "mistral with a window": lambda: MistralForCausalLM(
        MistralConfig(**COMMON, num_key_value_heads=2, sliding_window=5)
    ),
    "gemma2 with soft caps": lambda: Gemma2ForCausalLM(
        Gemma2Config(**COMMON, num_key_value_heads=2, head_dim=16, sliding_window=5, final_logit_softcapping=2.0)
    ),
}


def attention_by_lengths(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    scaling: float | None = None, **_,
) -> tuple[Tensor, None]:  # fmt: skip
    """Causal by itself, told nothing but which tokens are padding (P, T): as flash attention is on a GPU."""
    if attention_mask is not None and attention_mask.dim() != 2:
        raise IndexError("on a GPU this would be read out of bounds")
    queries, keys, groups = query.size(2), key.size(2), query.size(1) // key.size(1)
    sees = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
    if attention_mask is not None:
        sees = sees & attention_mask[:, None, None, -keys:].bool()
    key, value = (some.repeat_interleave(groups, dim=1) for some in (key, value))
    scores = (scaling * query @ key.transpose(2, 3)).masked_fill(~sees, torch.finfo(query.dtype).min)
    return (scores.softmax(dim=-1) @ value).transpose(1, 2).contiguous(), None


def attend_by_lengths(model) -> None:
    AttentionInterface.register("by_lengths", attention_by_lengths)
    AttentionMaskInterface.register("by_lengths", flash_attention_mask)
    model.set_attn_implementation("by_lengths")
