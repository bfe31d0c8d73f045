"""Which items may be answered: for everybody, and without some of them for each prompt."""

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from recllm.trie import SemanticIdTrie


@dataclasses.dataclass(frozen=True)
class Allowed:
    """Answers about nodes: does an item lie below that is allowed? The trie stays as it is."""

    masks: tuple[Tensor, ...] | None = None  # for depth 1 … L, the nodes with an allowed item below
    below: Tensor | None = None  # (N + 1,) allowed leaves before each leaf
    excluded: Tensor | None = None  # (P, E) leaves, ascending, all among the allowed; filled up with N

    @classmethod
    def of(cls, trie: SemanticIdTrie, rows: Tensor | None = None) -> "Allowed":
        """`rows`: (N,) bool, which items are allowed for all; None for every one."""
        if rows is None:
            return cls()
        masks = trie.node_masks(rows.to(trie.rows.device))
        return cls(masks, torch.nn.functional.pad(masks[-1].long().cumsum(0), (1, 0)))

    def without(self, trie: SemanticIdTrie, exclude: Sequence[Sequence[int]]) -> "Allowed":
        """The same less, for each prompt, the items of these rows."""
        width = max(map(len, exclude), default=0)
        if not width:
            return self
        excluded = torch.full((len(exclude), width), len(trie), dtype=torch.int64, device=trie.rows.device)
        for prompt, some in enumerate(exclude):
            leaves = trie.leaf_of_row[torch.tensor(list(some), dtype=torch.int64, device=trie.rows.device)]
            leaves = leaves.unique() if self.masks is None else leaves[self.masks[-1][leaves]].unique()
            excluded[prompt, : len(leaves)] = leaves
        return dataclasses.replace(self, excluded=excluded)

    def nodes(self, trie: SemanticIdTrie, depth: int, nodes: Tensor) -> Tensor | None:
        """Which nodes of `depth` have an allowed item below; None for all. (P, …) -> (P, …) bool"""
        keep = None if self.masks is None else self.masks[depth - 1][nodes]
        if self.excluded is None:
            return keep
        leaves = trie.leaves[depth]
        first, last = leaves[nodes].flatten(1).long(), leaves[nodes + 1].flatten(1).long()
        gone = torch.searchsorted(self.excluded, last) - torch.searchsorted(self.excluded, first)
        there = last - first if self.below is None else self.below[last] - self.below[first]
        return (there > gone).view(nodes.shape)
