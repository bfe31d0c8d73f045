"""A cache that grows step by step without copying what is there each time."""

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

# When a step needs room it is made for as many steps of its size, or by a share of what is there: an answer has few
# levels of many branches, a chain of thought hundreds of single tokens.
STEPS, SHARE = 3, 4


class RoomyLayer(DynamicLayer):
    """The first tokens are kept as they come; the step after them makes room for further ones of its size."""

    def __init__(self):
        super().__init__()
        self.room: tuple[Tensor, Tensor] | None = None  # (P, heads, room, d) keys and values, of which some are filled

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        start, size = self.get_seq_length(), key_states.size(-2)
        if not start:
            return super().update(key_states, value_states, *args, **kwargs)
        if not self._has_room(start + size):
            more = max(STEPS * size, start // SHARE)
            self.room = tuple(
                torch.cat([there, there.new_empty(*there.shape[:2], more, there.size(3))], dim=2)
                for there in (self.keys, self.values)
            )
        for room, new in zip(self.room, (key_states, value_states)):
            room[:, :, start : start + size] = new
        self.keys, self.values = (room[:, :, : start + size] for room in self.room)
        return self.keys, self.values

    def _has_room(self, size: int) -> bool:
        """Not when the rows were reordered, repeated or selected meanwhile: those lie elsewhere."""
        return (
            self.room is not None and self.room[0].size(2) >= size and self.room[0].data_ptr() == self.keys.data_ptr()
        )


def growing_cache(model: PreTrainedModel) -> DynamicCache:
    """Layers that see everything grow with room; others are the model's own kind."""
    cache = DynamicCache(config=model.config)
    cache.layers = [RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache
