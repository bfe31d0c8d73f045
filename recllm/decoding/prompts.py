"""Prompts of different lengths as one left-padded batch, behind a prefix that all of them share."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PromptBatch:
    """`prefix` stands before every row; a row's own tokens stand at the right end of `ids`."""

    prefix: tuple[int, ...]
    ids: Tensor  # (P, T) int64
    mask: Tensor  # (P, T) bool, True at tokens

    @classmethod
    def of(
        cls, prompts: Sequence[Sequence[int]], prefix: Sequence[int] = (), device: torch.device | str = "cpu"
    ) -> "PromptBatch":
        """`prompts` are whole, each with the prefix; at least one token of each stays behind it."""
        start = len(prefix)
        lengths = [len(prompt) - start for prompt in prompts]
        width = max(lengths)
        ids = torch.zeros(len(prompts), width, dtype=torch.int64)
        mask = torch.zeros(len(prompts), width, dtype=torch.bool)
        for row, (prompt, length) in enumerate(zip(prompts, lengths)):
            ids[row, width - length :] = torch.as_tensor(prompt[start:], dtype=torch.int64)
            mask[row, width - length :] = True
        return cls(tuple(prefix), ids.to(device), mask.to(device))

    @property
    def lengths(self) -> Tensor:
        """Tokens of each prompt, with the prefix. (P,)"""
        return self.mask.sum(dim=1) + len(self.prefix)


def common_prefix(prompts: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """The tokens that all prompts begin with, one short of the shortest prompt at most."""
    first, last = min(prompts), max(prompts)  # in lexicographic order, the two that differ earliest
    most = min(len(prompt) for prompt in prompts) - 1
    shared = 0
    while shared < most and first[shared] == last[shared]:
        shared += 1
    return tuple(first[:shared])
