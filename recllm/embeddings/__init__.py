"""Item vectors: from text (TF-IDF, a language model), from training events (collaborative), or from both."""

from recllm.embeddings.collaborative import CollaborativeEncoder
from recllm.embeddings.container import FILE_NAME, Embeddings
from recllm.embeddings.fusion import fuse_vectors
from recllm.embeddings.hf import HFEncoder
from recllm.embeddings.sentence import SentenceEncoder
from recllm.embeddings.stage import EmbedConfig, embed
from recllm.embeddings.tfidf import TfidfEncoder
from recllm.embeddings.vllm_pooling import VLLMEncoder

__all__ = [
    "FILE_NAME", "CollaborativeEncoder", "EmbedConfig", "Embeddings", "HFEncoder", "SentenceEncoder", "TfidfEncoder",
    "VLLMEncoder", "embed", "fuse_vectors",
]  # fmt: skip
