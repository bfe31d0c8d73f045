"""Every policy ends with distinct, prefix-free codes; reassignment is the greedy one, checked against a slow loop."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recllm.errors import UserError
from recllm.semantic_ids import SemanticIdTable, collisions, rqkmeans
from recllm.semantic_ids.collisions import add_level, reassign, resolve
from recllm.semantic_ids.quantizer import Quantizer

rows = st.lists(st.lists(st.integers(0, 2), min_size=2, max_size=2), min_size=1, max_size=30)


def table(codes, sizes) -> SemanticIdTable:
    return SemanticIdTable(tuple(map(str, range(len(codes)))), codes, sizes)


def test_extra_level_by_hand():
    codes = np.array([[1, 0], [2, 2], [1, 0], [0, 1], [1, 0]])
    deeper, sizes = add_level(codes, (3, 3), "extra-level")
    assert deeper.tolist() == [[1, 0, 0], [2, 2, -1], [1, 0, 1], [0, 1, -1], [1, 0, 2]]
    assert sizes == (3, 3, 3)
    deeper, sizes = add_level(codes, (3, 3), "extra-level-all")
    assert deeper.tolist() == [[1, 0, 0], [2, 2, 0], [1, 0, 1], [0, 1, 0], [1, 0, 2]]


def test_nothing_collides():
    codes = np.array([[0, 1], [1, 1]])
    assert add_level(codes, (2, 2), "extra-level")[0] is codes
    assert add_level(codes, (2, 2), "extra-level-all")[0].tolist() == [[0, 1, 0], [1, 1, 0]]


def test_extra_codes_of_shallow_items_follow_their_own():
    deeper, sizes = add_level(np.array([[0, -1], [0, -1], [1, 1]]), (2, 2), "extra-level")
    assert deeper.tolist() == [[0, 0], [0, 1], [1, 1]]
    assert sizes == (2, 2)


@given(rows, st.sampled_from(["extra-level", "extra-level-all"]))
def test_levels_make_valid_tables_and_keep_what_is_there(codes, policy):
    codes = np.array(codes)
    deeper, sizes = add_level(codes, (3, 3), policy)
    table(deeper, sizes)  # distinct and prefix-free, or it would refuse
    assert (deeper[:, :2] == codes).all()


def random_case(seed: int, items: int, size: int) -> tuple[np.ndarray, Quantizer, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    books = tuple(torch.randn(size, 3, generator=generator) for _ in range(2))
    embeddings = torch.randn(items, 3, generator=generator)
    quantizer = Quantizer("test", books, torch.zeros(3))
    return quantizer.encode(embeddings)[0].numpy(), quantizer, embeddings


def greedy_slowly(codes: np.ndarray, quantizer: Quantizer, embeddings: torch.Tensor) -> np.ndarray:
    """One prefix after the other, all pairs of a waiting item and a free code sorted by cost."""
    cost = quantizer.costs(quantizer.residual(embeddings, torch.from_numpy(codes), 1), 1).numpy()
    result = codes.copy()
    for prefix in set(codes[:, 0].tolist()):
        inside = [row for row in range(len(codes)) if codes[row, 0] == prefix]
        free = set(range(cost.shape[1])) - {int(codes[row, 1]) for row in inside}
        waiting = set()
        for code in {int(codes[row, 1]) for row in inside}:
            bucket = [row for row in inside if codes[row, 1] == code]
            waiting |= set(bucket) - {min(bucket, key=lambda row: (cost[row, code], row))}
        for _, row, code in sorted((cost[row, code], row, code) for row in waiting for code in free):
            if row in waiting and code in free:
                result[row, 1] = code
                waiting.remove(row)
                free.remove(code)
    return result


@pytest.mark.parametrize("limit", [1, 32_000_000])
@pytest.mark.parametrize(
    ("seed", "items", "size"), [(0, 30, 8), (1, 60, 8), (2, 200, 8), (3, 40, 4), (4, 5, 1), (5, 9, 16)]
)
def test_reassign_is_the_greedy_pairing(seed, items, size, limit, monkeypatch):
    monkeypatch.setattr(collisions, "CELLS", limit)  # in one part, and prefix by prefix
    codes, quantizer, embeddings = random_case(seed, items, size)
    before = codes.copy()
    after, staying = reassign(codes, quantizer, embeddings)
    assert after.tolist() == greedy_slowly(codes, quantizer, embeddings).tolist()
    assert staying == len(after) - len(np.unique(after, axis=0))
    assert (codes == before).all()


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10_000), st.integers(1, 80), st.integers(1, 6))
def test_reassign_then_a_level_for_what_stays(seed, items, size):
    codes, quantizer, embeddings = random_case(seed, items, size)
    after, sizes = resolve(codes, quantizer.sizes, "reassign", quantizer, embeddings)
    table(after, sizes)
    assert (after[:, 0] == codes[:, 0]).all()  # only last codes move
    alone = np.array([(codes == row).all(axis=1).sum() == 1 for row in codes])
    assert (after[alone][:, :2] == codes[alone]).all()  # and only those of items that collide
    if items <= size:  # no prefix can be full
        assert after.shape == codes.shape


def test_identical_items_fill_a_prefix_and_share_the_rest():
    embeddings = torch.zeros(10, 2)
    quantizer = Quantizer("test", (torch.zeros(1, 2), torch.arange(8.0).reshape(4, 2)), torch.zeros(2))
    codes = quantizer.encode(embeddings)[0].numpy()
    after, sizes = resolve(codes, quantizer.sizes, "reassign", quantizer, embeddings)
    table(after, sizes)
    assert sizes == (1, 4, 7)  # 3 moved to the 3 free codes; 7 stayed under the code that all had
    assert sorted(after[:, 1].tolist()) == [0] * 7 + [1, 2, 3]


def test_refuse_leaves_it_to_the_table_and_others_are_named():
    codes = np.array([[0, 0], [0, 0]])
    same, sizes = resolve(codes, (1, 1), "refuse")
    with pytest.raises(UserError, match="same codes"):
        table(same, sizes)
    with pytest.raises(UserError, match="'magic' is no collision policy"):
        resolve(codes, (1, 1), "magic")


def test_the_price_of_reassignment_is_small_on_clustered_items():
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(40, 8, generator=generator)
    embeddings = centres[torch.randint(40, (3000,), generator=generator)] + 0.4 * torch.randn(
        3000, 8, generator=generator
    )
    quantizer = rqkmeans.fit(embeddings, (32, 32, 32))
    before = rqkmeans.assign(quantizer, embeddings).numpy()
    after, sizes = resolve(before, quantizer.sizes, "reassign", quantizer, embeddings)
    table(after, sizes)
    moved = (before != after[:, :3]).any(axis=1).mean()
    errors = [quantizer.squared_error(embeddings, torch.from_numpy(codes)) for codes in (before, after)]
    assert 0 < moved < 0.2
    assert errors[0] < errors[1] < 1.2 * errors[0]
