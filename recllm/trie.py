"""Every valid prefix of a catalogue's semantic IDs, as flat tensors: what may follow, on the device, without a loop.

A node is a prefix of some item's codes; the nodes of one depth are numbered in lexicographic order, so the children of
a node are neighbours. Depth 0 is the root, depth L the leaves, one for each item.

    ptr[h]  (nodes of depth h + 1,) int32    the children of node n of depth h are ptr[h][n] … ptr[h][n + 1] − 1
    tok[h]  (nodes of depth h + 1,) uint8    the code that leads to each of them (uint16 above 256 codes)
    pad[h]  (nodes of depth h + 1,) bool     no code at all: the item ended above (empty where no item did)
    rows    (N,) int32                       leaf → row of the item

An item of fewer codes is carried down to depth L by padding nodes, so that every item is one leaf.
"""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from recllm.errors import UserError
from recllm.files import require, write_whole
from recllm.semantic_ids.prefixes import PADDING, tuple_keys

FORMAT = "recllm trie 1"


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class SemanticIdTrie:
    sizes: tuple[int, ...]  # (L,) codes a level
    ptr: tuple[Tensor, ...]
    tok: tuple[Tensor, ...]
    pad: tuple[Tensor, ...]
    rows: Tensor

    @classmethod
    def from_codes(cls, codes: np.ndarray | Tensor | Sequence, sizes: Sequence[int] | None = None) -> "SemanticIdTrie":
        """Codes (N, L), -1 padding at the end of a shallower item; row i of `codes` is item i."""
        codes = np.asarray(codes)
        if codes.ndim != 2 or not len(codes) or codes.dtype.kind not in "iu":
            raise UserError(f"a trie is made of integer codes (N, L), got {codes.dtype} of shape {codes.shape}")
        sizes = tuple(map(int, sizes)) if sizes is not None else tuple((codes.max(axis=0) + 1).clip(min=1).tolist())
        if len(sizes) != codes.shape[1] or (codes < PADDING).any() or (codes >= np.array(sizes)).any():
            raise UserError(f"codes of {codes.shape[1]} levels do not fit the levels' sizes {sizes}")
        ended = codes == PADDING
        if ended[:, 0].any() or (ended[:, :-1] & ~ended[:, 1:]).any():
            raise UserError("padding (-1) may stand at the end of an item's codes alone")
        order = np.argsort(tuple_keys(codes, sizes), kind="stable")
        begins = np.zeros(len(codes), bool)  # is this row, in order, the first with its prefix?
        begins[0] = True
        parents, ptr, tok, pad = np.zeros(1, np.int64), [], [], []
        for level, size in enumerate(sizes):
            column = codes[order, level]
            begins[1:] |= column[1:] != column[:-1]
            first = np.flatnonzero(begins)  # the first row of each node
            ptr.append(np.append(np.searchsorted(first, parents), len(first)).astype(np.int32))
            code = column[first]
            tok.append(code.clip(min=0).astype(np.uint8 if size <= 256 else np.uint16 if size <= 65536 else np.int32))
            pad.append(code == PADDING if (code == PADDING).any() else np.zeros(0, bool))
            parents = first
        if len(parents) < len(codes):
            raise UserError("two items have the same codes", fix="resolve collisions first: SemanticIdTable does")
        for starts, nothing in zip(ptr, pad):
            if len(nothing) and (nothing[starts[:-1]] & (np.diff(starts) > 1)).any():  # padding sorts first
                raise UserError(
                    "the codes of an item are the beginning of another's", fix="give one of them other codes"
                )
        as_tensors = (tuple(map(torch.from_numpy, arrays)) for arrays in (ptr, tok, pad))
        return cls(sizes, *as_tensors, torch.from_numpy(order.astype(np.int32)))

    # ---- for people

    def __len__(self) -> int:
        return len(self.rows)

    def __repr__(self) -> str:
        return f"SemanticIdTrie({len(self)} items, sizes={self.sizes}, {self.bytes / 1e6:.1f} MB)"

    @property
    def levels(self) -> int:
        return len(self.sizes)

    @property
    def bytes(self) -> int:
        """Memory of the prefixes, without the item map."""
        return sum(part.nbytes for parts in (self.ptr, self.tok, self.pad) for part in parts)

    def allowed_next(self, prefix: Sequence[int]) -> list[int]:
        """The codes that may follow, ascending; none after a finished item or a prefix that no item has."""
        node = self._find(prefix)
        if node is None or len(prefix) == self.levels:
            return []
        children = slice(*self.ptr[len(prefix)][node : node + 2].tolist())
        if len(self.pad[len(prefix)]) and bool(self.pad[len(prefix)][children].any()):
            return []
        return self.tok[len(prefix)][children].tolist()

    def row_of(self, codes: Sequence[int]) -> int | None:
        """The row of the item with exactly these codes (padding may be left out), or None."""
        codes = [code for code in codes if code != PADDING]
        node = self._find(codes)
        for level in range(len(codes), self.levels):
            if node is None or not len(self.pad[level]):
                return None
            child = int(self.ptr[level][node])
            node = child if bool(self.pad[level][child]) else None
        return None if node is None else int(self.rows[node])

    def _find(self, prefix: Sequence[int]) -> int | None:
        if len(prefix) > self.levels:
            return None
        node = 0
        for level, code in enumerate(prefix):
            first, last = self.ptr[level][node : node + 2].tolist()
            if len(self.pad[level]) and bool(self.pad[level][first]):
                return None
            place = first + int(np.searchsorted(self.tok[level][first:last].numpy(force=True), code))
            if place >= last or int(self.tok[level][place]) != code:
                return None
            node = place
        return node

    # ---- for the engine

    @functools.cached_property
    def fanout(self) -> tuple[int, ...]:
        """The most children that a node of each depth has. (L,)"""
        return tuple(int(ptr.diff().max()) for ptr in self.ptr)

    def nodes(self, depth: int) -> int:
        """How many prefixes of `depth` codes there are; of the root's depth, 0, one."""
        return len(self.tok[depth - 1]) if depth else 1

    def children(self, depth: int, nodes: Tensor) -> tuple[Tensor, Tensor]:
        """Children of nodes of `depth`, and which of the places hold one. (…) -> (…, C) int64, (…, C) bool

        C is the depth's fanout; a place without a child repeats one, so that it can be looked up.
        """
        ptr = self.ptr[depth]
        first, last = ptr[nodes].long().unsqueeze(-1), ptr[nodes + 1].long().unsqueeze(-1)
        places = first + torch.arange(self.fanout[depth], device=nodes.device)
        return places.clamp(max=len(self.tok[depth]) - 1), places < last

    def codes(self, depth: int, nodes: Tensor) -> Tensor:
        """The code that leads to each node of `depth` (1 … L); 0 for padding, see `is_padding`. (…) -> (…) int64"""
        return self.tok[depth - 1][nodes].long()

    def is_padding(self, depth: int, nodes: Tensor) -> Tensor | None:
        """Which nodes of `depth` are no code; None where all are codes. (…) -> (…) bool"""
        return self.pad[depth - 1][nodes] if len(self.pad[depth - 1]) else None

    def node_masks(self, allowed: Tensor) -> tuple[Tensor, ...]:
        """Nodes of depth 1 … L under which an allowed item lies. (N,) bool by row -> L masks"""
        mask = allowed[self.rows.long()]
        masks = [mask]
        for ptr in reversed(self.ptr[1:]):
            below = torch.nn.functional.pad(mask.long().cumsum(0), (1, 0))
            mask = below[ptr[1:].long()] > below[ptr[:-1].long()]
            masks.append(mask)
        return tuple(reversed(masks))

    @functools.cached_property
    def leaves(self) -> tuple[Tensor, ...]:
        """For depth 0 … L the first leaf under each node, and N at the end. (nodes + 1,) int32 each"""
        bounds = [torch.arange(len(self) + 1, dtype=torch.int32, device=self.rows.device)]
        for ptr in reversed(self.ptr):
            bounds.append(bounds[-1][ptr.long()])
        return tuple(reversed(bounds))

    @functools.cached_property
    def leaf_of_row(self) -> Tensor:
        """row → leaf. (N,) int64"""
        leaf = torch.empty(len(self), dtype=torch.int64, device=self.rows.device)
        leaf[self.rows.long()] = torch.arange(len(self), device=self.rows.device)
        return leaf

    def codes_of_leaves(self, leaves: Tensor) -> Tensor:
        """The codes that lead to each leaf, -1 where it has none. (…) -> (…, L) int64"""
        codes, nodes = [], leaves
        for depth in range(self.levels, 0, -1):
            padding = self.is_padding(depth, nodes)
            code = self.codes(depth, nodes)
            codes.append(code if padding is None else code.masked_fill(padding, PADDING))
            nodes = torch.searchsorted(self.ptr[depth - 1], nodes.int(), right=True) - 1  # the parent
        return torch.stack(codes[::-1], dim=-1)

    def to(self, device: torch.device | str) -> "SemanticIdTrie":
        if self.rows.device == torch.device(device):
            return self
        ptr, tok, pad = (tuple(part.to(device) for part in parts) for parts in (self.ptr, self.tok, self.pad))
        if torch.device(device).type != "cpu":  # where torch cannot look up uint16
            tok = tuple(part.int() if part.dtype == torch.uint16 else part for part in tok)
        return SemanticIdTrie(self.sizes, ptr, tok, pad, self.rows.to(device))

    # ---- files

    def save(self, path: str | Path) -> None:
        tensors = {"rows": self.rows}
        for level in range(self.levels):
            tensors |= {f"ptr{level}": self.ptr[level], f"tok{level}": self.tok[level], f"pad{level}": self.pad[level]}
        tensors = {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}
        with write_whole(path) as partial:
            save_file(tensors, partial, {"format": FORMAT, "sizes": " ".join(map(str, self.sizes))})

    @classmethod
    def load(cls, path: str | Path) -> "SemanticIdTrie":
        path = require(path, "the trie", "make it with SemanticIdTrie.from_codes(...).save(...)")
        try:
            with safe_open(path, framework="pt") as file:
                head = file.metadata() or {}
                if head.get("format") != FORMAT:
                    raise UserError("not a trie of ours", file=path)
                sizes = tuple(map(int, head["sizes"].split()))
                parts = (tuple(file.get_tensor(f"{n}{h}") for h in range(len(sizes))) for n in ("ptr", "tok", "pad"))
                return cls(sizes, *parts, file.get_tensor("rows"))
        except (SafetensorError, KeyError, ValueError) as error:
            raise UserError(f"not a readable trie ({error})", file=path, fix="save it again") from None
