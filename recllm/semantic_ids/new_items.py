"""New items get codes from the stored quantizer; those of old items, which a model has learnt, stay as they are."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from recllm.errors import UserError
from recllm.semantic_ids.prefixes import PADDING, find_prefixes, number_prefixes
from recllm.semantic_ids.quantizer import Quantizer
from recllm.semantic_ids.rqkmeans import check_embeddings
from recllm.semantic_ids.table import SemanticIdTable

CLOSED = -2  # one shallow item has the codes: nothing can be added under them


def encode_new(
    table: SemanticIdTable, quantizer: Quantizer, items: Sequence[str], embeddings: Tensor
) -> SemanticIdTable:
    """A table with M more items (M, D). The same tokens, hence the same model.

    An item whose codes are free gets them; one whose codes an earlier collision has split by an extra level takes the
    next extra code, if the model has one; any other moves to the free codes that cost the least, last level first.
    """
    levels, items = len(quantizer.sizes), tuple(items)
    if table.sizes[:levels] != quantizer.sizes or table.levels > levels + 1:
        raise UserError(f"a quantizer of sizes {quantizer.sizes} did not make a table of sizes {table.sizes}")
    if len(items) != len(embeddings):
        raise UserError(f"{len(items)} new items but {len(embeddings)} embeddings")
    if known := [item for item in items if item in table]:
        raise UserError(f"item {known[0]!r} has semantic IDs already, as have {len(known) - 1} others of the new items")
    if not items:
        return table
    check_embeddings(embeddings)
    nearest = quantizer.encode(embeddings)[0].numpy()
    places = _Places(table, levels)
    codes = np.full((len(items), table.levels), PADDING, np.int32)
    # First whoever can have the nearest codes to itself, so that nobody is moved onto them.
    first = np.zeros(len(items), bool)
    first[np.unique(nearest, axis=0, return_index=True)[1]] = True
    alone = first & (find_prefixes(nearest, quantizer.sizes, places.keys) < 0)
    for row in [*np.flatnonzero(alone).tolist(), *np.flatnonzero(~alone).tolist()]:
        candidates = [tuple(nearest[row].tolist())] if alone[row] else _near(quantizer, embeddings[row : row + 1])
        for candidate in candidates:
            if (extra := places.take(candidate)) != CLOSED:
                codes[row, :levels] = candidate
                if table.levels > levels:
                    codes[row, levels] = extra
                break
        else:
            raise UserError(f"no free codes are left for item {items[row]!r}", fix="build the semantic IDs anew")
    return SemanticIdTable(
        items=table.items + items,
        codes=np.concatenate([table.codes, codes]),
        sizes=table.sizes,
        pattern=table.pattern,
        items_fingerprint=table.items_fingerprint,
        report=table.report,
    )


class _Places:
    """Which codes are taken, and which extra code comes next under those that a collision has split."""

    def __init__(self, table: SemanticIdTable, levels: int):
        self.sizes = table.sizes[:levels]
        self.extra_size = table.sizes[levels] if table.levels > levels else 0
        self.always_deep = table.levels > levels and int(table.depths.min()) > levels  # policy extra-level-all
        self.keys, numbers = number_prefixes(table.codes[:, :levels], self.sizes)
        self.next = np.full(len(self.keys[-1]), CLOSED)
        if self.extra_size:
            deepest = np.full(len(self.keys[-1]), PADDING)
            np.maximum.at(deepest, numbers[-1], table.codes[:, levels])
            self.next = np.where(deepest == PADDING, CLOSED, deepest + 1)
        self.changed: dict[tuple[int, ...], int] = {}

    def take(self, codes: tuple[int, ...]) -> int:
        """The extra code under which these codes are now taken, PADDING for none, CLOSED if they are not free."""
        if (extra := self.changed.get(codes)) is None:
            number = find_prefixes(np.array([codes]), self.sizes, self.keys)[0]
            extra = (0 if self.always_deep else PADDING) if number < 0 else int(self.next[number])
        if extra == PADDING:
            self.changed[codes] = CLOSED
        elif extra >= self.extra_size:
            return CLOSED
        elif extra != CLOSED:
            self.changed[codes] = extra + 1
        return extra


@torch.no_grad()
def _near(quantizer: Quantizer, embedding: Tensor) -> Iterator[tuple[int, ...]]:
    """Codes for one embedding (1, D): the nearest, other last codes by cost, then other codes of the level before, …"""
    latent = quantizer.latent(embedding)
    nearest = quantizer.encode(embedding)[0]
    for level in reversed(range(len(quantizer.sizes))):
        stem = nearest[0, :level].tolist()
        residual = quantizer.residual(embedding, nearest, level)
        order = quantizer.costs(residual, level)[0].argsort(stable=True).tolist()
        for code in order:
            codes = [*stem, code]
            for deeper in range(level + 1, len(quantizer.sizes)):
                so_far = latent - quantizer.partial_sum(torch.tensor([codes]))
                codes.append(int(quantizer.costs(so_far, deeper).argmin()))
            yield tuple(codes)
