"""Attention in fp32 under bf16 autocast on a CPU.

There, torch's backward pass of attention in bf16 takes a small model longer than all its matrix products together, and
in fp32 a fraction of them; everything else is faster in bf16 where the processor has tiles for it.
"""

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "sdpa_fp32"


def _attention(module, query, key, value, attention_mask, **settings):
    with torch.autocast(query.device.type, enabled=False):
        output, weights = sdpa_attention_forward(
            module, query.float(), key.float(), value.float(), attention_mask, **settings
        )
    return output.to(query.dtype), weights


def use_fp32_attention(model: PreTrainedModel) -> None:
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)
