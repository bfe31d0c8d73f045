"""Vectors from a causal LM served by vLLM in this process, last token. Written for vLLM 0.31; it has not been run."""

import dataclasses
import functools
from collections.abc import Callable

import torch

from recllm.errors import UserError
from recllm.pretrained import which_model


@dataclasses.dataclass(frozen=True)
class VLLMEncoder:
    """The same vectors as `HFEncoder` up to rounding, faster on long catalogues. One process, its own batching."""

    model: str
    max_tokens: int = 512
    dtype: str = "bfloat16"
    revision: str | None = None

    @property
    def settings(self) -> str:
        return self.description

    @functools.cached_property
    def description(self) -> str:
        return f"{which_model(self.model, self.revision)} (vLLM, last token, {self.max_tokens} tokens, {self.dtype})"

    @functools.cached_property
    def _engine(self):
        try:
            import vllm
            from vllm.config import PoolerConfig
        except ImportError:
            raise UserError("vLLM is not installed", fix="pip install -r requirements-gpu.txt (needs a GPU)") from None
        return vllm.LLM(
            model=self.model,
            revision=self.revision,
            dtype=self.dtype,
            runner="pooling",
            convert="embed",
            pooler_config=PoolerConfig(pooling_type="LAST", use_activation=False),  # not normalised
            max_model_len=self.max_tokens,
        )

    def encode(self, texts: list[str], advance: Callable[[int], None] = lambda n: None) -> torch.Tensor:
        """texts (n,) -> (n, D) float32"""
        tokenizer = self._engine.get_tokenizer()
        ids = tokenizer(texts, truncation=True, max_length=self.max_tokens)["input_ids"]
        answers = self._engine.embed([{"prompt_token_ids": tokens} for tokens in ids], use_tqdm=False)
        advance(len(texts))
        return torch.tensor([answer.outputs.embedding for answer in answers], dtype=torch.float32)
