"""Of a model's last layer a prompt needs the keys and values of all its tokens, and the rest where a state is read.

Queries, attention and feed-forward of a layer make the states that the next layer reads. Behind the last layer nobody
reads a prompt's states but those at its end and what a caller asks for, so the others need not be made, which saves
most of a layer. A pre-hook puts all keys and values into the cache and hands the layer the tokens that are read; the
model's own code does the rest. Layers of another make than Llama's are left alone.
"""

import contextlib
import weakref
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.models.llama.modeling_llama import rotate_half

from recllm.decoding.body import attention_of, backbone, plain_attention, takes_masks


class _Filled:
    """The cache for a layer whose keys and values it holds already."""

    def __init__(self, keys: Tensor, values: Tensor):
        self.of_all = keys, values  # (P, heads, T, d) each

    def update(self, keys: Tensor, values: Tensor, *_, **__) -> tuple[Tensor, Tensor]:
        """Those of the tokens that are read come a second time."""
        return self.of_all


@dataclass(frozen=True, eq=False)
class _LeaveOthers:
    """Forward pre-hook: hidden states (P, T, D) -> (P, J, D) of the tokens at `columns` (P, J)."""

    columns: Tensor

    def __call__(self, layer: torch.nn.Module, given: tuple[Tensor], others: dict) -> tuple[tuple[Tensor], dict] | None:
        hidden, attention, columns = given[0], layer.self_attn, self.columns
        if hidden.size(1) == 1:
            return None
        cos, sin = others["position_embeddings"]
        before = layer.input_layernorm(hidden)
        shape = (*before.shape[:-1], -1, attention.head_dim)
        keys, values = attention.k_proj(before).view(shape), attention.v_proj(before).view(shape).transpose(1, 2)
        keys = (attention.k_norm(keys) if hasattr(attention, "k_norm") else keys).transpose(1, 2)  # (P, heads, T, d)
        keys = keys * cos.unsqueeze(1) + rotate_half(keys) * sin.unsqueeze(1)
        filled = _Filled(*others["past_key_values"].update(keys, values, attention.layer_idx))
        shorter = {
            "past_key_values": filled,
            "position_embeddings": (_at(columns, cos), _at(columns, sin)),
            "position_ids": others["position_ids"].expand(len(hidden), -1).gather(1, columns),
            "attention_mask": self._mask(others.get("attention_mask"), hidden, filled.of_all[0].size(2)),
        }
        return (_at(columns, hidden),), others | shorter

    def _mask(self, mask: Tensor | None, hidden: Tensor, keys: int) -> Tensor | None:
        """What the tokens that are read see. Nothing is said of the last token alone, which sees all that is there."""
        rows, columns = len(hidden), self.columns
        if mask is not None and mask.dim() == 4:
            index = columns[:, None, :, None].expand(-1, mask.size(1), -1, mask.size(3))
            return mask.expand(rows, -1, -1, -1).gather(2, index)
        if columns.size(1) == 1 or mask is not None:
            return mask
        sees = torch.arange(keys, device=columns.device) <= (keys - hidden.size(1) + columns).unsqueeze(2)  # (P, J, T)
        said = torch.zeros_like(sees, dtype=hidden.dtype).masked_fill(~sees, torch.finfo(hidden.dtype).min)
        return said.unsqueeze(1)


def _at(columns: Tensor, states: Tensor) -> Tensor:
    """(P, J), (P or 1, T, D) -> (P, J, D)"""
    return states.expand(len(columns), -1, -1).gather(1, columns.unsqueeze(2).expand(-1, -1, states.size(2)))


def states_at(model: PreTrainedModel, columns: Tensor, ids: Tensor, cache: DynamicCache, **inputs) -> Tensor:
    """A pass into the cache, and the last hidden states of some of its tokens alone. (P, J), (P, T) -> (P, J, D)

    The last column is the last token's.
    """
    return _states_at(model, columns, ids, cache, _can_leave_others(model, columns.size(1) > 1), **inputs)


def _states_at(
    model: PreTrainedModel, columns: Tensor, ids: Tensor, cache: DynamicCache, leave: bool, **inputs
) -> Tensor:
    with _leaving_others(model, columns) if leave else contextlib.nullcontext():
        hidden = backbone(model)(input_ids=ids, past_key_values=cache, use_cache=True, **inputs).last_hidden_state
    return hidden if leave and ids.size(1) > 1 else _at(columns, hidden)


@contextlib.contextmanager
def _leaving_others(model: PreTrainedModel, columns: Tensor) -> Iterator[None]:
    hook = _LeaveOthers(columns)
    handle = backbone(model).layers[-1].register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


_can: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def _can_leave_others(model: PreTrainedModel, several: bool) -> bool:
    """Are the states that are read, and the cache, what the whole pass gives? Tried on eight tokens, once a model and
    kind of attention, for the last token alone and for several, which need a mask of ours."""
    tried, which = _can.setdefault(model, {}), (attention_of(model), several)
    if which not in tried:  # a window keeps no more keys than it needs
        may = plain_attention(model) and (takes_masks(model) or not several)
        tried[which] = may and all(_agrees(model, several, padded) for padded in (False, True))
    return tried[which]


@torch.no_grad()
def _agrees(model: PreTrainedModel, several: bool, padded: bool) -> bool:
    device = model.device
    ids = torch.tensor([[3, 4, 5, 6], [0, 0, 7, 8] if padded else [9, 3, 7, 8]], device=device)
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]], device=device) if padded else torch.ones_like(ids)
    columns = torch.tensor([[1, 2, 3], [2, 2, 3]] if several else [[3], [3]], device=device)
    inputs = {"attention_mask": mask if padded else None, "position_ids": (mask.cumsum(dim=1) - 1).clamp(min=0)}
    found = []
    try:
        for leave in (False, True):
            cache = DynamicCache(config=model.config)
            states = _states_at(model, columns, ids, cache, leave, **inputs)
            seen = mask[:, None, :, None].bool()
            last = cache.layers[-1]
            found.append([states, last.keys.masked_fill(~seen, 0), last.values.masked_fill(~seen, 0)])
    except Exception:  # another architecture: whatever it raises, it is left alone
        return False
    tolerance = 1e-4 if model.dtype == torch.float32 else 0.05
    return all(
        ours.shape == whole.shape and bool((ours.float() - whole.float()).norm() <= tolerance * whole.float().norm())
        for whole, ours in zip(*found)
    )
