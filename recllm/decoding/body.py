"""A causal LM as the engine sees it: its body, apart from the head."""

import torch
from transformers import PreTrainedModel


def backbone(model: PreTrainedModel) -> torch.nn.Module:
    """The model without its head: what gives hidden states."""
    model = model.get_base_model() if hasattr(model, "get_base_model") else model  # PEFT
    return model.get_decoder() or model.base_model


def attention_of(model: PreTrainedModel) -> str:
    """transformers' name of how the model attends, which may be changed at any time."""
    return model.config.get_text_config()._attn_implementation


def takes_masks(model: PreTrainedModel) -> bool:
    """May it be told who sees whom? Flash attention and its like read a mask of ours as lengths, out of bounds."""
    return attention_of(model).startswith(("sdpa", "eager"))


def plain_attention(model: PreTrainedModel) -> bool:
    """Every layer attends to everything: a window would take branches, and padding inside a prompt, for distance."""
    config = model.config.get_text_config()
    if layers := getattr(config, "layer_types", None):
        return all(kind == "full_attention" for kind in layers)
    return not getattr(config, "sliding_window", None) and not getattr(config, "attention_chunk_size", None)
