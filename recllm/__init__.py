"""recllm: post-train a causal LM into a generative recommender. README.md has the tree, CONTRIBUTING.md the letters."""

import importlib
from typing import TYPE_CHECKING

from recllm.catalogue import Catalogue
from recllm.semantic_ids import SemanticIdTable

if TYPE_CHECKING:
    from recllm.recommender import Recommendation, Recommender
    from recllm.trainers.sft import RecSFTConfig, RecSFTTrainer
    from recllm.trie import SemanticIdTrie

__all__ = [
    "Catalogue", "RecSFTConfig", "RecSFTTrainer", "Recommendation", "Recommender", "SemanticIdTable", "SemanticIdTrie",
]  # fmt: skip
# What needs torch and transformers is imported when it is first asked for: preparing data needs neither.
LATE = {
    "Recommender": "recllm.recommender",
    "Recommendation": "recllm.recommender",
    "RecSFTConfig": "recllm.trainers.sft",
    "RecSFTTrainer": "recllm.trainers.sft",
    "SemanticIdTrie": "recllm.trie",
}


def __getattr__(name: str):
    if name not in LATE:
        raise AttributeError(f"module 'recllm' has no attribute {name!r}")
    return getattr(importlib.import_module(LATE[name]), name)
