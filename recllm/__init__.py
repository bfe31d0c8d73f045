"""recllm: post-train a causal LM into a generative recommender. README.md has the tree, CONTRIBUTING.md the letters."""

from typing import TYPE_CHECKING

from recllm.catalogue import Catalogue
from recllm.semantic_ids import SemanticIdTable

if TYPE_CHECKING:
    from recllm.recommender import Recommendation, Recommender
    from recllm.trie import SemanticIdTrie

__all__ = ["Catalogue", "Recommendation", "Recommender", "SemanticIdTable", "SemanticIdTrie"]


def __getattr__(name: str):
    """What needs torch and transformers is imported when it is first asked for: preparing data needs neither."""
    if name in ("Recommender", "Recommendation"):
        from recllm import recommender

        return getattr(recommender, name)
    if name == "SemanticIdTrie":
        from recllm.trie import SemanticIdTrie

        return SemanticIdTrie
    raise AttributeError(f"module 'recllm' has no attribute {name!r}")
