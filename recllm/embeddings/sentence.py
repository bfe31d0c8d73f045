"""Vectors from a sentence encoder (the sentence-transformers package, which is optional)."""

import dataclasses
import functools
from collections.abc import Callable

import torch

from recllm.errors import UserError
from recllm.pretrained import reason, which_model


@dataclasses.dataclass(frozen=True)
class SentenceEncoder:
    """Pooling and normalisation are the model's own; `max_tokens` may only lower its limit."""

    model: str
    max_tokens: int = 512
    dtype: str = "float32"
    device: str = "cpu"
    batch_size: int = 64
    revision: str | None = None

    @property
    def settings(self) -> str:
        return f"{self.description} {self.device.split(':')[0]} {self.batch_size}"

    @functools.cached_property
    def description(self) -> str:
        return f"{which_model(self.model, self.revision)} (sentence encoder, {self.max_tokens} tokens, {self.dtype})"

    @functools.cached_property
    def _model(self):
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError:
            raise UserError("sentence-transformers is not installed", fix="pip install sentence-transformers") from None
        settings = {"dtype": getattr(torch, self.dtype), "use_safetensors": True}
        try:
            model = SentenceTransformer(self.model, device=self.device, revision=self.revision, model_kwargs=settings)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # as in recllm.pretrained: what lies in a folder makes the libraries raise anything
            said = f"the encoder {self.model!r} cannot be loaded: {reason(error)}"
            raise UserError(said, fix="give the name of a sentence encoder, or its folder") from None
        model.max_seq_length = min(self.max_tokens, model.max_seq_length or self.max_tokens)
        return model

    def encode(self, texts: list[str], advance: Callable[[int], None] = lambda n: None) -> torch.Tensor:
        """texts (n,) -> (n, D) float32"""
        vectors = self._model.encode(texts, batch_size=self.batch_size, convert_to_tensor=True, show_progress_bar=False)
        advance(len(texts))
        return vectors.float().cpu()
