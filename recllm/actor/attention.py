"""Attention over one flat row of tokens: prompts, then answers that see their prompt and themselves.

A prompt attends causally, by the kernel that needs no mask. Answers attend to the keys of their prompt and their own,
in one of two ways, both exact:

    row     all answers behind a prompt are queries of one row, apart by a mask: no key is copied for an answer. For
            short answers.
    cache   every answer is a row of its own behind the prompt's keys: no query meets another answer's keys. For long
            ones.

The layers around it see the flat row alone, so each token goes through them once, without any padding.
"""

import functools
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from recllm.actor.rows import Packed

SUFFIX = "_answers"


@dataclass(frozen=True, eq=False)
class Places:
    """Sequences of different lengths that stand one after the other, as the rows of a right-padded batch."""

    tokens: int
    rows: int
    width: int
    take: Tensor | None  # (rows · width,) place of each slot; None where all are equally long: a view will do

    @classmethod
    def of(cls, lengths: np.ndarray, device: torch.device) -> "Places":
        tokens, width = int(lengths.sum()), int(lengths.max(initial=0))
        if (lengths == width).all():
            return cls(tokens, len(lengths), width, None)
        slots = (lengths.cumsum() - lengths)[:, None] + np.minimum(np.arange(width), (lengths - 1).clip(min=0)[:, None])
        return cls(tokens, len(lengths), width, torch.from_numpy(slots.clip(max=tokens - 1).ravel()).to(device))

    def rows_of(self, flat: Tensor) -> Tensor:
        """(tokens, H, d) -> (rows, H, width, d)"""
        some = flat if self.take is None else flat.index_select(0, self.take)
        return some.view(self.rows, self.width, *flat.shape[1:]).transpose(1, 2)


@dataclass(frozen=True, eq=False)
class Segments:
    prompts: Places
    answers: Places
    group: Tensor | None  # (rows of answers,) the prompt of each; None where it is the row's own number
    repeat: int  # rows of answers to a prompt where all have as many, else 0
    mask: Tensor  # (rows of answers or 1, 1, width, prompt width + width) bool
    back: Tensor | None  # (T,) slot of each token of the flat row; None where both are views

    @functools.cached_property
    def _additive(self) -> dict:
        return {}

    def additive(self, dtype: torch.dtype, heads: int) -> Tensor:
        """0 or -inf, made once for all layers; `heads` query heads share a key head. (…, heads · width, keys)"""
        if (dtype, heads) not in self._additive:
            mask = torch.zeros(self.mask.shape, dtype=dtype, device=self.mask.device)
            mask = mask.masked_fill_(~self.mask, float("-inf"))
            self._additive[dtype, heads] = mask.repeat(1, 1, heads, 1) if heads > 1 else mask
        return self._additive[dtype, heads]


def segments_of(packed: Packed, way: str, device: torch.device) -> Segments:
    prompt, keys = packed.prompt_lengths, int(packed.prompt_lengths.max())
    prompts = Places.of(prompt, device)
    if way == "row":
        lengths, repeat, group = packed.fed_of_group, 1, None
    else:
        some = packed.fed > 0
        lengths, group = packed.fed[some], packed.group[some]
        each = np.bincount(group, minlength=len(prompt))
        repeat = int(each[0]) if (each == each[0]).all() else 0
    answers = Places.of(lengths, device)
    own = _row_mask(packed, answers.width) if way == "row" else _answer_mask(packed, answers.width)
    seen = np.arange(keys) < prompt[:, None]  # (Pg, keys)
    if prompts.take is None:
        seen = seen[:1]
    elif way == "cache":
        seen = seen[group]
    count = max(len(seen), len(own))
    mask = np.concatenate(
        [
            np.broadcast_to(seen[:, None], (count, answers.width, keys)),
            np.broadcast_to(own, (count, answers.width, answers.width)),
        ],
        axis=2,
    )
    back = None
    if prompts.take is not None or answers.take is not None:
        slots = [np.flatnonzero(np.arange(p.width) < n[:, None]) for p, n in ((prompts, prompt), (answers, lengths))]
        back = torch.from_numpy(np.concatenate([slots[0], slots[1] + prompts.rows * prompts.width])).to(device)
    return Segments(
        prompts, answers, None if group is None else torch.from_numpy(group).to(device), repeat,
        torch.from_numpy(mask).unsqueeze(1).to(device), back,
    )  # fmt: skip


def _row_mask(packed: Packed, width: int) -> np.ndarray:
    """Which slots of its row an answer's token sees: those of the same answer that it may. (Pg or 1, width, width)"""
    lengths, (row, place) = packed.fed_of_group, np.nonzero(packed.fed_places)
    alike = (packed.fed == packed.fed[:1]).all() and (packed.of_group == packed.of_group[:1]).all()
    if alike and (packed.sees is None or _all_same(packed.fed_places)):
        lengths = lengths[:1]
        row, place = row[: lengths[0]], place[: lengths[0]]
    segment = _laid(row, lengths, width)
    mask = (segment[:, :, None] == segment[:, None, :]) & np.tri(width, dtype=bool)
    return mask if packed.sees is None else mask & _between(packed.sees, _laid(place, lengths, width))


def _answer_mask(packed: Packed, width: int) -> np.ndarray:
    """The same where each answer has a row to itself. (rows of answers or 1, width, width)"""
    mask = np.tri(width, dtype=bool)[None]
    if packed.sees is None:
        return mask
    places = packed.fed_places[packed.fed > 0]
    places = places[:1] if _all_same(places) else places
    return mask & _between(packed.sees, _laid(np.nonzero(places)[1], places.sum(axis=1), width))


def _all_same(rows: np.ndarray) -> bool:
    return bool((rows == rows[:1]).all())


def _laid(values: np.ndarray, lengths: np.ndarray, width: int) -> np.ndarray:
    """Side by side in rows of these lengths, and -1 behind. (rows, width)"""
    rows = np.full((len(lengths), width), -1)
    rows[np.arange(width) < lengths[:, None]] = values
    return rows


def _between(sees: np.ndarray, places: np.ndarray) -> np.ndarray:
    """(C, C), (rows, width) -> (rows, width, width)"""
    return sees[places[:, :, None], places[:, None, :]]


def attend(query: Tensor, key: Tensor, value: Tensor, segments: Segments, scaling: float | None, dropout: float):
    """(1, H, T, d), (1, K, T, d), (1, K, T, d) -> (1, T, H, d)"""
    heads, groups = query.size(1), key.size(1)
    parts = [
        part.transpose(1, 2)[0].split((segments.prompts.tokens, segments.answers.tokens))
        for part in (query, key, value)
    ]
    asked, keys, values = (segments.prompts.rows_of(prompt) for prompt, _ in parts)  # (Pg, H or K, Tp, d)
    out = [
        scaled_dot_product_attention(
            asked, keys, values, is_causal=True, scale=scaling, dropout_p=dropout, enable_gqa=heads > groups
        )
    ]
    if segments.answers.width:
        asked, *own = (segments.answers.rows_of(answer) for _, answer in parts)  # (B, H or K, Q, d)
        rows, _, width, size = asked.shape
        # The query heads of a group become further queries of their key head: no keys are repeated.
        asked = asked.reshape(rows, groups, heads // groups * width, size)
        behind = [_behind(segments, *some) for some in zip((keys, values), own)]
        mask = segments.additive(asked.dtype, heads // groups)
        answered = scaled_dot_product_attention(asked, *behind, attn_mask=mask, scale=scaling, dropout_p=dropout)
        out.append(answered.view(rows, heads, width, size))
    flat = torch.cat([part.transpose(1, 2).flatten(0, 1) for part in out])  # (slots, H, d)
    return (flat if segments.back is None else flat.index_select(0, segments.back)).unsqueeze(0)


def _behind(segments: Segments, prompt: Tensor, own: Tensor) -> Tensor:
    """Keys of each row of answers: its prompt's, then its own. (Pg, K, Tp, d), (B, K, Q, d) -> (B, K, Tp + Q, d)"""
    if segments.group is None:
        return torch.cat([prompt, own], dim=2)
    if not segments.repeat:
        return torch.cat([prompt.index_select(0, segments.group), own], dim=2)
    own = own.unflatten(0, (len(prompt), segments.repeat))  # the prompt's are copied once, into place
    return torch.cat([prompt.unsqueeze(1).expand(-1, segments.repeat, -1, -1, -1), own], dim=3).flatten(0, 1)


def _forward_of(before: str):
    ordinary = ALL_ATTENTION_FUNCTIONS[before]

    def forward(module, query, key, value, attention_mask, segments=None, scaling=None, dropout=0.0, **settings):
        if segments is None:
            return ordinary(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **settings)
        if query.device.type != "cpu" or query.dtype == torch.double:
            return attend(query, key, value.to(query.dtype), segments, scaling, dropout), None
        # On a CPU the backward pass of attention in bf16 is far slower (recllm/models/attention.py).
        with torch.autocast("cpu", enabled=False):
            output = attend(query.float(), key.float(), value.float(), segments, scaling, dropout)
        return output.to(value.dtype), None

    return forward


def take_segments(model: PreTrainedModel) -> bool:
    """From now on the model's attention understands `segments=`; without them it is what it was. Could it be done?

    For good, not for one call: gradient checkpointing computes layers again during the backward pass.
    """
    before = model.config.get_text_config()._attn_implementation
    if before.endswith(SUFFIX):
        return True
    if not before.startswith("sdpa"):
        return False
    AttentionInterface.register(before + SUFFIX, _forward_of(before))
    AttentionMaskInterface.register(before + SUFFIX, ALL_MASK_ATTENTION_FUNCTIONS[before])
    model.set_attn_implementation(before + SUFFIX)
    return True
