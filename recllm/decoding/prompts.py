"""Prompts of different lengths as one left-padded batch, behind a prefix that all of them share."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PromptBatch:
    """`prefix` stands before every row; a row's own tokens stand at the right end of `ids`."""

    prefix: tuple[int, ...]
    ids: Tensor  # (P, T) int64
    mask: Tensor  # (P, T) bool, True at tokens
    read: Tensor  # (P, J) int64, columns of `ids` whose states somebody reads; the last is read always

    @classmethod
    def of(
        cls,
        prompts: Sequence[Sequence[int]],
        prefix: Sequence[int] = (),
        device: torch.device | str = "cpu",
        read: Sequence[Sequence[int]] | None = None,
    ) -> "PromptBatch":
        """`prompts` are whole, each with the prefix; at least one token of each stays behind it.

        `read`: tokens of each prompt whose states are asked for, by their place in it; not those of the prefix. Rows
        of fewer are filled up at the right with the prompt's end.
        """
        start = len(prefix)
        lengths = [len(prompt) - start for prompt in prompts]
        width = max(lengths)
        ids = torch.zeros(len(prompts), width, dtype=torch.int64)
        mask = torch.zeros(len(prompts), width, dtype=torch.bool)
        for row, (prompt, length) in enumerate(zip(prompts, lengths)):
            ids[row, width - length :] = torch.as_tensor(prompt[start:], dtype=torch.int64)
            mask[row, width - length :] = True
        columns = torch.full((len(prompts), max(map(len, read), default=0) if read else 0), width - 1)
        for row, (places, length) in enumerate(zip(read or (), lengths)):
            if any(not start <= place < start + length for place in places):
                raise ValueError(f"prompt {row}: a token that is read stands behind the prefix, and in the prompt")
            columns[row, : len(places)] = torch.as_tensor(places, dtype=torch.int64) - start + width - length
        return cls(tuple(prefix), ids.to(device), mask.to(device), columns.to(device))

    def split(self, size: int) -> Iterator["PromptBatch"]:
        """`size` rows at a time."""
        for rows in zip(*(some.split(size) for some in (self.ids, self.mask, self.read))):
            yield PromptBatch(self.prefix, *rows)

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
