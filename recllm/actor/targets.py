"""What each answer token is compared with: text with the vocabulary, a code with codes; in order of kind."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from recllm.actor.rows import Packed, codes_of_tokens, siblings
from recllm.decoding.head import Normaliser
from recllm.trie import SemanticIdTrie


@dataclass(frozen=True, eq=False)
class Targets:
    """S answer tokens: text first, then the codes of level 0, of level 1, …"""

    order: np.ndarray  # (S,) which of the tokens, counted answer after answer
    counts: tuple[int, ...]  # of text, and of each level's codes
    wanted: Tensor  # (S,) token ids of text, then codes
    allowed: tuple[Tensor | None, ...]  # of each level (n, V) bool: codes to compare with; None for all
    places: tuple[Tensor, Tensor]  # (S,), (S,) where in (R, C)

    @classmethod
    def of(
        cls, packed: Packed, normaliser: Normaliser, trie: SemanticIdTrie, code_of: Sequence[np.ndarray],
        sizes: Sequence[int], device: torch.device,
    ) -> "Targets":  # fmt: skip
        row, place = packed.token_places
        level = packed.levels_of(trie.levels)
        if normaliser == "full":
            level = np.full_like(level, -1)
        wanted = np.where(level < 0, packed.answer_ids[row, place], 0)
        allowed: list[Tensor | None] = [None] * trie.levels
        if (level >= 0).any():
            codes = codes_of_tokens(packed, level, code_of)
            wanted = np.where(level < 0, wanted, codes)
            if normaliser == "children":
                for depth, (here, which, children) in enumerate(siblings(packed, level, codes, trie)):
                    mask = np.zeros((len(here), sizes[depth]), bool)
                    mask[which, children] = True
                    allowed[depth] = torch.from_numpy(mask).to(device)
        order = np.argsort(level, kind="stable")
        places = tuple(torch.from_numpy(part[order]).to(device) for part in (packed.rows[row], place))
        return cls(
            order, tuple(np.bincount(level + 1, minlength=trie.levels + 1).tolist()),
            torch.from_numpy(wanted[order]).to(device), tuple(allowed), places,
        )  # fmt: skip
