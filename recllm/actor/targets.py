"""What each answer token is compared with: text with the vocabulary, codes with codes, labels with their slot's."""

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
    """S' answer tokens, those that are asked about: text, codes of level 0, of level 1, …, labels of slot 0, …"""

    order: np.ndarray  # (S',) which of the tokens, counted answer after answer
    counts: tuple[int, ...]  # of text, of each level's codes, of each slot's labels
    wanted: Tensor  # (S',) token ids of text, then codes and labels
    allowed: tuple[Tensor | None, ...]  # of each level or slot (n, V) bool: what to compare with; None for all
    places: tuple[Tensor, Tensor]  # (S',), (S',) where in (R, C)

    @classmethod
    def of(
        cls, packed: Packed, normaliser: Normaliser, trie: SemanticIdTrie, code_of: Sequence[np.ndarray],
        sizes: Sequence[int], device: torch.device,
    ) -> "Targets":  # fmt: skip
        row, place = packed.token_places
        kind = packed.kinds_of(trie.levels)
        if normaliser == "full":
            kind = np.full_like(kind, -1)
        wanted = np.where(kind < 0, packed.answer_ids[row, place], 0)
        allowed: list[Tensor | None] = [None] * len(sizes)
        if (kind >= 0).any():
            codes = codes_of_tokens(packed, kind, code_of, trie.levels)
            wanted = np.where(kind < 0, wanted, codes)
            if normaliser == "children":
                for depth, (here, which, children) in enumerate(siblings(packed, kind, codes, trie)):
                    mask = np.zeros((len(here), sizes[depth]), bool)
                    mask[which, children] = True
                    allowed[depth] = torch.from_numpy(mask[packed.asked[here]]).to(device)
        order = np.flatnonzero(packed.asked)
        order = order[np.argsort(kind[order], kind="stable")]
        places = tuple(torch.from_numpy(part[order]).to(device) for part in (packed.rows[row], place))
        return cls(
            order, tuple(np.bincount(kind[order] + 1, minlength=len(sizes) + 1).tolist()),
            torch.from_numpy(wanted[order]).to(device), tuple(allowed), places,
        )  # fmt: skip
