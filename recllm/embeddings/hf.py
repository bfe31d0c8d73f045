"""Vectors from a language model: the last layer's hidden state at the text's last token, as GREAM takes it."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Literal

import torch

from recllm.errors import UserError
from recllm.pretrained import load_backbone, which_model

Pooling = Literal["last", "mean"]


@dataclasses.dataclass(frozen=True)
class HFEncoder:
    """Any causal LM of the Hub or of a folder, loaded without its head; weights in safetensors only.

    A text is read on its own: padding stands after it, where a causal model does not look back from. Batches hold
    texts of similar length, at most `batch_tokens` tokens with their padding.
    """

    model: str
    pooling: Pooling = "last"
    max_tokens: int = 512
    dtype: Literal["float32", "bfloat16"] = "float32"
    device: str = "cpu"
    batch_tokens: int = 16_384
    revision: str | None = None

    @property
    def settings(self) -> str:
        return f"{self.description} {self.device.split(':')[0]} {self.batch_tokens}"

    @functools.cached_property
    def description(self) -> str:
        pooled = "last token" if self.pooling == "last" else "mean of tokens"
        return f"{which_model(self.model, self.revision)} ({pooled}, {self.max_tokens} tokens, {self.dtype})"

    @functools.cached_property
    def _parts(self):
        """(tokenizer, model)"""
        model, tokenizer = load_backbone(self.model, self.dtype, self.revision)
        return tokenizer, model.to(self.device).eval()

    @torch.inference_mode()
    def encode(self, texts: list[str], advance: Callable[[int], None] = lambda n: None) -> torch.Tensor:
        """texts (n,) -> (n, D) float32; a text without a token is a zero row."""
        tokenizer, model = self._parts
        ids = tokenizer(texts, truncation=True, max_length=self.max_tokens, return_attention_mask=False)["input_ids"]
        ids = [tokens if text else [] for text, tokens in zip(texts, ids, strict=True)]
        vectors = torch.zeros(len(texts), model.config.get_text_config().hidden_size)
        for batch in batches_by_length([len(tokens) for tokens in ids], self.batch_tokens):
            try:
                vectors[batch] = self._pooled(model, [ids[row] for row in batch]).float().cpu()
            except torch.cuda.OutOfMemoryError:
                raise UserError(
                    f"the GPU's memory does not hold {self.batch_tokens:,} tokens",
                    fix="lower --batch_tokens; what is encoded is kept",
                ) from None
            advance(len(batch))
        advance(sum(not tokens for tokens in ids))
        return vectors

    def _pooled(self, model, ids: list[list[int]]) -> torch.Tensor:
        lengths = torch.tensor([len(tokens) for tokens in ids])  # (b,)
        padded = torch.zeros(len(ids), int(lengths.max()), dtype=torch.long)  # (b, T); token 0 is never looked at
        for row, tokens in enumerate(ids):
            padded[row, : len(tokens)] = torch.tensor(tokens)
        mask = torch.arange(padded.size(1)) < lengths.unsqueeze(1)  # (b, T)
        padded, mask, lengths = (part.to(model.device) for part in (padded, mask, lengths))
        hidden = model(input_ids=padded, attention_mask=mask, use_cache=False).last_hidden_state  # (b, T, D)
        if self.pooling == "last":
            return hidden[torch.arange(len(ids), device=hidden.device), lengths - 1]
        return (hidden.float() * mask.unsqueeze(-1)).sum(1) / lengths.unsqueeze(1)


def batches_by_length(lengths: list[int], batch_tokens: int) -> list[list[int]]:
    """Rows in batches, the longest first; size × longest ≤ `batch_tokens`, or one row. Empty rows are left out."""
    rows = sorted((row for row, length in enumerate(lengths) if length), key=lambda row: (-lengths[row], row))
    batches: list[list[int]] = []
    for row in rows:
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= batch_tokens:
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches
