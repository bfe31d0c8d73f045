"""recllm: post-train a causal LM into a generative recommender. README.md has the tree, CONTRIBUTING.md the letters."""

import importlib
from typing import TYPE_CHECKING

from recllm.catalogue import Catalogue
from recllm.semantic_ids import SemanticIdTable

if TYPE_CHECKING:
    from recllm.recommender import Recommendation, Recommender
    from recllm.trainers.base import RecGRPOTrainer
    from recllm.trainers.exact import ExactConfig, ExactTrainer
    from recllm.trainers.grpo import GRPOSettings, RecGRPO
    from recllm.trainers.recast import ReCast, ReCastSettings
    from recllm.trainers.sft import RecSFTConfig, RecSFTTrainer
    from recllm.trainers.srpo import SRPO, SRPOSettings
    from recllm.trie import SemanticIdTrie

__all__ = [
    "SRPO", "Catalogue", "ExactConfig", "ExactTrainer", "GRPOSettings", "ReCast", "ReCastSettings", "RecGRPO",
    "RecGRPOTrainer", "RecSFTConfig", "RecSFTTrainer", "Recommendation", "Recommender", "SRPOSettings",
    "SemanticIdTable", "SemanticIdTrie",
]  # fmt: skip
# What needs torch and transformers is imported when it is first asked for: preparing data needs neither.
LATE = {
    "Recommender": "recllm.recommender",
    "Recommendation": "recllm.recommender",
    "RecGRPOTrainer": "recllm.trainers.base",
    "ExactConfig": "recllm.trainers.exact",
    "ExactTrainer": "recllm.trainers.exact",
    "GRPOSettings": "recllm.trainers.grpo",
    "RecGRPO": "recllm.trainers.grpo",
    "ReCast": "recllm.trainers.recast",
    "ReCastSettings": "recllm.trainers.recast",
    "SRPO": "recllm.trainers.srpo",
    "SRPOSettings": "recllm.trainers.srpo",
    "RecSFTConfig": "recllm.trainers.sft",
    "RecSFTTrainer": "recllm.trainers.sft",
    "SemanticIdTrie": "recllm.trie",
}


def __getattr__(name: str):
    if name not in LATE:
        raise AttributeError(f"module 'recllm' has no attribute {name!r}")
    return getattr(importlib.import_module(LATE[name]), name)
