"""New items get codes; old ones keep theirs; the tokens stay the same."""

import numpy as np
import pytest
import torch

from recllm.catalogue import fingerprint_items
from recllm.errors import UserError
from recllm.semantic_ids import SemanticIdTable, rqkmeans
from recllm.semantic_ids.collisions import resolve
from recllm.semantic_ids.new_items import encode_new
from recllm.semantic_ids.quantizer import Quantizer


def built(policy: str, items: int = 400, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    embeddings = torch.randn(items, 4, generator=generator)
    quantizer = rqkmeans.fit(embeddings, (8, 8), seed)
    codes, sizes = resolve(
        rqkmeans.assign(quantizer, embeddings).numpy(), quantizer.sizes, policy, quantizer, embeddings
    )
    table = SemanticIdTable(tuple(f"old {i}" for i in range(items)), codes, sizes)
    return table, quantizer, torch.randn(60, 4, generator=generator)


@pytest.mark.parametrize("policy", ["extra-level", "extra-level-all", "reassign"])
def test_old_items_keep_their_codes_and_the_model_its_tokens(policy):
    table, quantizer, embeddings = built(policy)
    new = tuple(f"new {i}" for i in range(30))
    larger = encode_new(table, quantizer, new, embeddings[:30])  # a valid table, or it would have been refused
    assert (larger.codes[:400] == table.codes).all()
    assert larger.items == table.items + new
    assert larger.sizes == table.sizes
    assert larger.all_tokens() == table.all_tokens()
    assert larger.items_fingerprint == table.items_fingerprint == fingerprint_items(table.items)
    assert larger.own_items_fingerprint == fingerprint_items(larger.items) != table.own_items_fingerprint
    if policy == "extra-level-all":
        assert (larger.depths == 3).all()


def test_a_free_place_is_taken_and_a_taken_one_left_for_the_next_nearest():
    codebook = torch.tensor([[0.0], [1.0], [3.0]])
    quantizer = Quantizer("test", (torch.zeros(1, 1), codebook), torch.zeros(1))
    table = SemanticIdTable(("old",), np.array([[0, 0]]), (1, 3))
    larger = encode_new(table, quantizer, ["p", "q"], torch.tensor([[0.1], [0.9]]))
    assert larger.codes_of("q") == (0, 1)  # it has its own nearest code, though it came second
    assert larger.codes_of("p") == (0, 2)  # 0 and 1 are taken
    with pytest.raises(UserError, match="no free codes are left for item 'r'"):
        encode_new(larger, quantizer, ["r"], torch.tensor([[0.0]]))


def test_codes_split_by_an_extra_level_take_another():
    quantizer = Quantizer("test", (torch.tensor([[0.0], [5.0]]),), torch.zeros(1))
    table = SemanticIdTable(("a", "b", "c"), np.array([[0, 0], [0, 1], [1, -1]]), (2, 3))
    larger = encode_new(table, quantizer, ["d"], torch.tensor([[0.2]]))
    assert larger.codes_of("d") == (0, 2)
    with pytest.raises(UserError, match="no free codes"):  # 0 has no extra code left, 1 is an item of one code
        encode_new(larger, quantizer, ["e"], torch.tensor([[0.2]]))


def test_a_full_prefix_is_left_for_the_next_one():
    quantizer = Quantizer("test", (torch.tensor([[0.0], [10.0]]), torch.tensor([[0.0], [1.0]])), torch.zeros(1))
    table = SemanticIdTable(("a", "b", "c"), np.array([[0, 0], [0, 1], [1, 1]]), (2, 2))
    assert encode_new(table, quantizer, ["d"], torch.tensor([[0.2]])).codes_of("d") == (1, 0)


def test_what_does_not_fit_is_refused():
    table, quantizer, embeddings = built("reassign")
    with pytest.raises(UserError, match="'old 3' has semantic IDs already"):
        encode_new(table, quantizer, ["new", "old 3"], embeddings[:2])
    with pytest.raises(UserError, match="2 new items but 3 embeddings"):
        encode_new(table, quantizer, ["new", "newer"], embeddings[:3])
    with pytest.raises(UserError, match="is there twice"):
        encode_new(table, quantizer, ["new", "new"], embeddings[:2])
    with pytest.raises(UserError, match="did not make a table"):
        encode_new(table, Quantizer("test", (torch.zeros(3, 4),), torch.zeros(4)), ["new"], embeddings[:1])
    assert encode_new(table, quantizer, [], embeddings[:0]) is table
