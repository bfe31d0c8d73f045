"""Of a model's last layer a prompt needs the keys and values of all its tokens, and the rest at its end alone.

Queries, attention and feed-forward of a layer make the states that the next layer reads. Behind the last layer nobody
reads a prompt's states but the last one, so there they need not be made, which saves most of a layer. A pre-hook puts
the other tokens' keys and values into the cache and hands the layer the last token; the model's own code does the rest.
Layers of another make than Llama's are left alone.
"""

import contextlib
import weakref
from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.models.llama.modeling_llama import rotate_half

from recllm.decoding.body import backbone, plain_attention


def _leave_the_last(layer: torch.nn.Module, given: tuple[Tensor], others: dict) -> tuple[tuple[Tensor], dict] | None:
    """Forward pre-hook: hidden states (P, T, D) -> (P, 1, D), with the keys and values of the others in the cache."""
    hidden, attention = given[0], layer.self_attn
    if hidden.size(1) == 1:
        return None
    cos, sin = others["position_embeddings"]
    before = layer.input_layernorm(hidden[:, :-1])
    shape = (*before.shape[:-1], -1, attention.head_dim)
    keys, values = attention.k_proj(before).view(shape), attention.v_proj(before).view(shape).transpose(1, 2)
    keys = (attention.k_norm(keys) if hasattr(attention, "k_norm") else keys).transpose(1, 2)  # (P, heads, T - 1, d)
    keys = keys * cos[:, :-1].unsqueeze(1) + rotate_half(keys) * sin[:, :-1].unsqueeze(1)
    others["past_key_values"].update(keys, values, attention.layer_idx)
    shorter = {"position_embeddings": (cos[:, -1:], sin[:, -1:]), "position_ids": others["position_ids"][:, -1:]}
    mask = others.get("attention_mask")
    if mask is not None and mask.dim() == 4:
        shorter["attention_mask"] = mask[:, :, -1:]
    return (hidden[:, -1:],), others | shorter


@contextlib.contextmanager
def only_the_last_state(model: PreTrainedModel) -> Iterator[None]:
    """Within, a pass into a cache gives the state of the last position alone, (P, 1, D), where the model allows it."""
    if not _can_leave_others(model):
        yield
        return
    with _leaving_others(model):
        yield


@contextlib.contextmanager
def _leaving_others(model: PreTrainedModel) -> Iterator[None]:
    handle = backbone(model).layers[-1].register_forward_pre_hook(_leave_the_last, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


_can: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def _can_leave_others(model: PreTrainedModel) -> bool:
    """Is the last state, and the cache, what the whole pass gives? Tried on eight tokens, once a model."""
    if model not in _can:
        _can[model] = plain_attention(model) and _agrees(model)  # a window keeps no more keys than it needs
    return _can[model]


@torch.no_grad()
def _agrees(model: PreTrainedModel) -> bool:
    ids = torch.tensor([[3, 4, 5, 6], [0, 0, 7, 8]], device=model.device)
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]], device=model.device)
    places = (mask.cumsum(dim=1) - 1).clamp(min=0)
    found = []
    try:
        for within in (contextlib.nullcontext, _leaving_others):
            cache = DynamicCache(config=model.config)
            with within(model):
                state = backbone(model)(
                    input_ids=ids, attention_mask=mask, position_ids=places, past_key_values=cache, use_cache=True
                ).last_hidden_state[:, -1]
            seen = mask[:, None, :, None].bool()
            last = cache.layers[-1]
            found.append([state, last.keys.masked_fill(~seen, 0), last.values.masked_fill(~seen, 0)])
    except Exception:  # another architecture: whatever it raises, it is left alone
        return False
    tolerance = 1e-4 if model.dtype == torch.float32 else 0.05
    return all(
        ours.shape == whole.shape and bool((ours.float() - whole.float()).norm() <= tolerance * whole.float().norm())
        for whole, ours in zip(*found)
    )
