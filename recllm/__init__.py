"""recllm: post-train a causal LM into a generative recommender. README.md has the tree, CONTRIBUTING.md the letters."""

from recllm.catalogue import Catalogue
from recllm.semantic_ids import SemanticIdTable

__all__ = ["Catalogue", "SemanticIdTable"]
