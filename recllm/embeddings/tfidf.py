"""TF-IDF of words and word pairs, then truncated SVD (latent semantic analysis): the encoder that needs no model."""

import dataclasses

import numpy as np
import torch
from sklearn.feature_extraction.text import TfidfVectorizer

from recllm.embeddings.svd import truncated_svd
from recllm.errors import UserError

WORD = r"(?u)\b\w+\b"  # scikit-learn's own pattern drops words of one character: "C", "7"


@dataclasses.dataclass(frozen=True)
class TfidfEncoder:
    """Sublinear counts, 1-2 grams; a gram in one text only is dropped unless nothing would be left."""

    dim: int = 128
    seed: int = 0
    max_features: int = 200_000

    @property
    def description(self) -> str:
        return f"TF-IDF + SVD (dim {self.dim}, seed {self.seed}, at most {self.max_features} grams)"

    def encode(self, texts: list[str]) -> torch.Tensor:
        """texts (N,) -> (N, D), D = min(dim, rank). A text without a known gram is a zero row."""
        for min_df in (2, 1):
            vectorizer = TfidfVectorizer(
                ngram_range=(1, 2), sublinear_tf=True, min_df=min_df, max_features=self.max_features,
                token_pattern=WORD, dtype=np.float32,
            )  # fmt: skip
            try:
                counts = vectorizer.fit_transform(texts)
                break
            except ValueError:  # an empty vocabulary
                continue
        else:
            raise UserError("the items' texts hold no word", fix="choose another --text, or --encoder collaborative")
        left, values = truncated_svd(counts, self.dim, self.seed)
        left[np.diff(counts.indptr) == 0] = 0  # exactly, where rounding leaves 1e-17
        return torch.from_numpy((left * values).astype("float32"))
