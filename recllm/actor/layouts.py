"""What goes through the model: flat rows that compute each prompt once, or the padded batch; and which costs less."""

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from recllm.actor.attention import Segments, segments_of
from recllm.actor.rows import AnswerRows, Packed
from recllm.decoding.body import backbone, plain_attention
from recllm.errors import UserError

Layout = Literal["auto", "row", "cache", "padded"]
# An operation of attention takes as long as this many of a matrix product, of those below the diagonal where a kernel
# knows no other mask, and under a mask of ours. CPU: measured (heads of 32 and 128, fp32); CUDA: estimates.
SLOWER = {"cpu": (3.0, 1.75), "cuda": (1.5, 3.0)}
COPY = 60.0  # operations that copying a number of a key or value for an answer takes as long as, and its way back
SAVING = 0.95  # the padded batch is left for what promises to be this much cheaper: it needs no gathering


@dataclass(frozen=True, eq=False)
class Feed:
    """What one call of the model is given, and where the hidden state before each answer token comes out."""

    ids: Tensor  # (rows, tokens)
    positions: Tensor  # (rows, tokens)
    mask: Tensor | None  # of the padded batch (rows, tokens), or (rows, 1, tokens, tokens); None: nothing is padded
    segments: Segments | None  # of the flat row
    before: np.ndarray  # (S,) place, in the flattened batch, of the state that predicts each answer token

    @classmethod
    def of_one_token(cls, device: torch.device) -> "Feed":
        token = torch.zeros(1, 1, dtype=torch.int64, device=device)
        return cls(token, token, None, None, np.zeros(0, np.int64))


def check_layout(name: str) -> None:
    if name not in get_args(Layout):
        raise UserError(f"layout {name!r} is not one of {', '.join(get_args(Layout))}")


def feed_of(packed: Packed, layout: str, device: torch.device) -> Feed:
    return padded_feed(packed, device) if layout == "padded" else flat_feed(packed, layout, device)


def flat_feed(packed: Packed, way: str, device: torch.device) -> Feed:
    """[prompt 1 | prompt 2 | … | answer 1 | answer 2 …]; an answer's positions go on where its prompt's end."""
    prompt, total = packed.prompt_lengths, int(packed.prompt_lengths.sum())
    ends = prompt.cumsum()
    row, place = np.nonzero(packed.fed_places)
    ids = np.concatenate([packed.prompt_tokens, packed.answer_ids[packed.fed_places]])
    own = prompt[packed.group[row]] + packed.form.offsets[place]
    positions = np.concatenate([np.arange(total) - np.repeat(ends - prompt, prompt), own])
    row, place = packed.token_places
    begins, which = total + packed.fed.cumsum() - packed.fed, packed.form.before[place]
    before = np.where(which < 0, ends[packed.group[row]] - 1, begins[row] + packed.rank[row, which])
    return Feed(_row(ids, device), _row(positions, device), None, segments_of(packed, way, device), before)


def _row(values: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(values).unsqueeze(0).to(device)


def run(model: PreTrainedModel, feed: Feed) -> Tensor:
    """Hidden states. (rows, tokens, D)"""
    settings = {"attention_mask": feed.mask if feed.mask is None or feed.mask.dim() == 2 else _taken(feed.mask, model)}
    if feed.segments is not None:
        # What the mask would be is in `segments`; one of four dimensions is handed through and none is made.
        nothing = torch.zeros(1, 1, 1, 1, dtype=model.dtype, device=feed.ids.device)
        settings = {"attention_mask": nothing, "segments": feed.segments}
    body = backbone(model)
    return body(input_ids=feed.ids, position_ids=feed.positions, use_cache=False, **settings).last_hidden_state


def _taken(mask: Tensor, model: PreTrainedModel) -> Tensor:
    """As the model's attention wants a mask of four dimensions: sdpa true or false, the eager one what is added."""
    if model.config.get_text_config()._attn_implementation.startswith("sdpa"):
        return mask
    return torch.zeros_like(mask, dtype=model.dtype).masked_fill_(~mask, torch.finfo(model.dtype).min)


def takes_mask(model: PreTrainedModel) -> bool:
    """Does its attention heed a mask of our own in the padded batch?"""
    attention = model.config.get_text_config()._attn_implementation
    return plain_attention(model) and attention.startswith(("sdpa", "eager"))


@torch.no_grad()
def agree(model: PreTrainedModel) -> bool:
    """Do flat rows give the padded batch's states? Tried on a few tokens, once a model."""
    device = model.device
    prompts, seen = torch.tensor([[3, 4, 5]] * 2 + [[0, 0, 6]] * 2), torch.tensor([[1, 1, 1]] * 2 + [[0, 0, 1]] * 2)
    answers, mask = torch.tensor([[1, 2, 3], [4, 5, 6]] * 2), torch.tensor([[1, 1, 1], [1, 1, 0]] * 2)
    packed = AnswerRows(prompts, seen, answers, mask, torch.full((4,), 3)).packed
    states = []
    try:
        with torch.autocast(device.type, enabled=False):  # whose rounding is no other arithmetic
            for layout in ("padded", "row", "cache"):
                feed = feed_of(packed, layout, device)
                states.append(run(model, feed).flatten(0, 1)[torch.from_numpy(feed.before).to(device)].float())
    except Exception:  # whatever a strange architecture raises: it does not take them
        return False
    tolerance = 1e-3 if model.dtype in (torch.float32, torch.double) else 0.1
    return all(bool((state - states[0]).norm() <= tolerance * states[0].norm()) for state in states[1:])


def padded_feed(packed: Packed, device: torch.device) -> Feed:
    """[padding | prompt | answer | padding] for each answer, without columns that are padding in all."""
    prompt = packed.prompt_lengths
    left, used = int(prompt.max()), np.flatnonzero(packed.used)
    prompts = np.zeros((len(prompt), left), np.int64)
    seen = np.arange(left) >= left - prompt[:, None]
    prompts[seen] = packed.prompt_tokens
    mask = np.concatenate([seen[packed.group], packed.fed_places[:, used]], axis=1)
    ids = np.concatenate([prompts[packed.group], packed.answer_ids[:, used]], axis=1)
    positions = (mask.cumsum(axis=1) - 1).clip(min=0)
    own = prompt[packed.group][:, None] + packed.form.offsets[used]
    positions[:, left:] = np.where(mask[:, left:], own, positions[:, left:])
    row, place = packed.token_places
    which, column = packed.form.before[place], packed.used.cumsum() - 1
    before = row * mask.shape[1] + left + np.where(which < 0, -1, column[which])
    if packed.plain:
        sent = None if mask.all() else torch.from_numpy(mask.astype(np.int64)).to(device)
    else:
        sent = torch.from_numpy(_padded_mask(packed, mask, left)).to(device)
    ids, positions = (torch.from_numpy(part).to(device) for part in (np.where(mask, ids, 0), positions))
    return Feed(ids, positions, sent, None, before)


def _padded_mask(packed: Packed, real: np.ndarray, left: int) -> np.ndarray:
    """What sees what in the padded batch, padding too: itself. (B, tokens) bool -> (B, 1, tokens, tokens) bool"""
    sees = np.tri(real.shape[1], dtype=bool)
    if packed.sees is not None:
        sees[left:, left:] = packed.sees[np.ix_(packed.used, packed.used)]
    return ((sees & real[:, None, :]) | np.eye(len(sees), dtype=bool))[:, None]


def cheapest(packed: Packed, model: PreTrainedModel) -> str:
    """row, cache or padded, by a count of operations.

    tokens · 2 · (weights of a token's layers)  +  (query, key) pairs · 4 · (width of all heads) · (layers) · (how much
    slower a kernel of attention is than a matrix product). Pairs below the diagonal alone where the kernel skips the
    others: a prompt, or a padded batch without padding; all under a mask. A mask over one row grows with the square of
    all answers' tokens, which is why long answers are not laid into one; `cache` copies the prompt's keys for each.
    """
    alone = len(packed.rows) == len(packed.prompt_lengths) and (packed.prompt_lengths == packed.prompt_lengths[0]).all()
    if alone and packed.plain:
        return "padded"  # one answer a prompt: nothing is shared
    prompt, keys = packed.prompt_lengths, int(packed.prompt_lengths.max())
    fed, most = packed.fed, int(packed.fed.max())
    linear, attention, copies = operations(model)
    below, masked = SLOWER.get(model.device.type, SLOWER["cuda"])
    flat = linear * (prompt.sum() + fed.sum())
    causal = below * attention * len(prompt) * keys**2 / 2
    queries, rows = int(packed.fed_of_group.max()), int((fed > 0).sum())
    width = keys + int(packed.used.sum())
    ragged = (prompt != keys).any() or (fed != most).any() or not packed.plain
    pairs = masked * width**2 if ragged else below * width**2 / 2
    costs = {
        "padded": SAVING * (linear * len(fed) * width + attention * len(fed) * pairs),
        "row": flat + causal + masked * attention * len(prompt) * queries * (keys + queries),
        "cache": flat + causal + rows * (keys + most) * (masked * attention * most + COPY * copies),
    }
    return min(costs, key=costs.get)


def operations(model: PreTrainedModel) -> tuple[float, float, float]:
    """Of all layers, for a token's matrix products and for a (query, key) pair; and numbers in a token's cache."""
    config = model.config.get_text_config()
    width, heads = config.hidden_size, config.num_attention_heads
    size = getattr(config, "head_dim", None) or width // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    wide = getattr(config, "intermediate_size", None) or 4 * width
    weights = 2 * width * size * (heads + kv_heads) + 3 * width * wide
    layers = config.num_hidden_layers
    return 2.0 * weights * layers, 4.0 * heads * size * layers, 2.0 * kv_heads * size * layers
