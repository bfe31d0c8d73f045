"""A cache with room holds what transformers' own holds."""

import torch
from reference import some_model
from transformers import DynamicCache

from recllm.decoding.cache import growing_cache


def test_it_is_the_stock_cache_whatever_is_done_to_it():
    model, generator = some_model(), torch.Generator().manual_seed(0)
    ours, stock = growing_cache(model), DynamicCache(config=model.config)

    def step(rows: int, size: int) -> None:
        new = torch.randn(2, rows, 2, size, 8, generator=generator)
        for one, other in zip(ours.update(*new, 0), stock.update(*new, 0)):
            assert torch.equal(one, other)

    step(2, 7)
    for size in (3, 3, 3, 3, 1, 1):
        step(2, size)
    for cache in (ours, stock):
        cache.batch_repeat_interleave(2)
    step(4, 2)
    order = torch.tensor([1, 0, 3, 3])
    for cache in (ours, stock):
        cache.reorder_cache(order)
    step(4, 2)
    for cache in (ours, stock):
        cache.batch_select_indices(torch.tensor([0, 2]))
    step(2, 2)
    step(2, 2)
    for cache in (ours, stock):
        cache.layers[0].crop(-2)
    step(2, 2)
    assert ours.get_seq_length() == stock.get_seq_length()


def test_steps_after_the_first_copy_nothing_but_themselves():
    cache = growing_cache(some_model())
    new = torch.randn(2, 3, 2, 5, 8)
    cache.update(*torch.randn(2, 3, 2, 20, 8), 0)
    places = [cache.update(*new, 0)[0].data_ptr() for _ in range(3)]
    assert len(set(places)) == 1
    assert cache.update(*new, 0)[0].data_ptr() != places[0]  # the room of three steps is full
