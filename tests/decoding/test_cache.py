"""A cache with room holds what transformers' own holds."""

import torch
from reference import some_model
from transformers import DynamicCache

from recllm.decoding.cache import cache_on, growing_cache, shelves_for


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


def test_rows_that_come_a_few_at_a_time_are_one_cache_with_room():
    model, generator = some_model(), torch.Generator().manual_seed(0)
    shelves, stock = shelves_for(model, 5, 9 + 6), DynamicCache(config=model.config)
    pieces = []
    for first, rows in ((0, 2), (2, 2), (4, 1)):
        alone = DynamicCache(config=model.config)
        some = growing_cache(model, shelves, first)
        for size in (4, 5):  # what they share, and their own
            for layer in range(2):
                new = torch.randn(2, rows, 2, size, 8, generator=generator)
                for one, other in zip(some.update(*new, layer), alone.update(*new, layer)):
                    assert torch.equal(one, other)
        pieces.append(alone)
    for layer in range(2):
        keys, values = zip(*((own.layers[layer].keys, own.layers[layer].values) for own in pieces))
        stock.update(torch.cat(keys), torch.cat(values), layer)
    ours = cache_on(model, shelves, 9)
    assert ours.get_seq_length() == 9
    places = {ours.layers[0].keys.data_ptr()}
    for _ in range(3):
        new = torch.randn(2, 5, 2, 2, 8, generator=generator)
        for layer in range(2):
            for one, other in zip(ours.update(*new, layer), stock.update(*new, layer)):
                assert torch.equal(one, other)
        places.add(ours.layers[0].keys.data_ptr())
    assert len(places) == 1  # there was room for all
    ours.update(*torch.randn(2, 5, 2, 1, 8), 0)
    assert ours.layers[0].keys.data_ptr() not in places
