"""A cache that grows step by step without copying what is there each time."""

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

# When a step needs room it is made for as many steps of its size, or by a share of what is there: an answer has few
# levels of many branches, a chain of thought hundreds of single tokens.
STEPS, SHARE = 3, 4


class Shelf:
    """Room for one layer's keys and values of `rows` prompts, which may be computed a few at a time."""

    def __init__(self, rows: int, tokens: int):
        self.rows, self.tokens = rows, tokens
        self.room: tuple[Tensor, Tensor] | None = None  # (P, heads, tokens, d) each

    def at(self, start: int, like: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Room from row `start` on, for as many rows as `like` has."""
        if self.room is None:
            self.room = tuple(
                own.new_empty(self.rows, own.size(1), self.tokens, own.size(3)) for own in like
            )  # fmt: skip
        return tuple(room[start : start + len(own)] for room, own in zip(self.room, like))


class RoomyLayer(DynamicLayer):
    """The first tokens are kept as they come, or put on a shelf; a step without room makes some for further ones."""

    def __init__(self, shelf: Shelf | None = None, row: int = 0):
        super().__init__()
        self.shelf, self.row = shelf, row  # where its rows begin there
        self.room: tuple[Tensor, Tensor] | None = None  # (P, heads, room, d) keys and values, of which some are filled

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        start, size = self.get_seq_length(), key_states.size(-2)
        if not start:
            if self.shelf is None:
                return super().update(key_states, value_states, *args, **kwargs)
            self.lazy_initialization(key_states, value_states)
            self.room = self.shelf.at(self.row, (key_states, value_states))
        elif not self._has_room(start + size):
            more = max(STEPS * size, start // SHARE)
            self.room = tuple(
                torch.cat([there, there.new_empty(*there.shape[:2], more, there.size(3))], dim=2)
                for there in (self.keys, self.values)
            )
        for room, new in zip(self.room, (key_states, value_states)):
            room[:, :, start : start + size] = new
        self._fill(start + size)
        return self.keys, self.values

    def _fill(self, size: int) -> None:
        self.keys, self.values = (room[:, :, :size] for room in self.room)

    def _has_room(self, size: int) -> bool:
        """Not when the rows were reordered, repeated or selected meanwhile: those lie elsewhere."""
        return (
            self.room is not None and self.room[0].size(2) >= size and self.room[0].data_ptr() == self.keys.data_ptr()
        )

    @classmethod
    def of_whole(cls, shelf: Shelf, size: int) -> "RoomyLayer":
        """All rows of a shelf, filled up to `size` tokens. Of a layer that the model leaves out there is nothing."""
        layer = cls()
        if shelf.room is None:
            return layer
        layer.lazy_initialization(*shelf.room)
        layer.room = shelf.room
        layer._fill(size)
        return layer


def growing_cache(model: PreTrainedModel, shelves: list[Shelf] | None = None, row: int = 0) -> DynamicCache:
    """Layers that see everything grow with room; others are the model's own kind.

    `shelves`: one for each layer, where rows from `row` on are kept; all layers have to see everything.
    """
    cache = DynamicCache(config=model.config)
    shelves = shelves or [None] * len(cache.layers)
    cache.layers = [
        RoomyLayer(shelf, row) if type(layer) is DynamicLayer else layer
        for layer, shelf in zip(cache.layers, shelves)
    ]  # fmt: skip
    return cache


def shelves_for(model: PreTrainedModel, rows: int, tokens: int) -> list[Shelf] | None:
    """One for each layer, or None where a layer keeps its tokens in another way."""
    layers = DynamicCache(config=model.config).layers
    return [Shelf(rows, tokens) for _ in layers] if all(type(layer) is DynamicLayer for layer in layers) else None


def cache_on(model: PreTrainedModel, shelves: list[Shelf], size: int) -> DynamicCache:
    """All rows, which hold `size` tokens."""
    cache = DynamicCache(config=model.config)
    cache.layers = [RoomyLayer.of_whole(shelf, size) for shelf in shelves]
    return cache
