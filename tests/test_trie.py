"""The trie knows exactly the prefixes of its items."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recllm.errors import UserError
from recllm.semantic_ids import SemanticIdTable
from recllm.trie import SemanticIdTrie

# Item 1 ends after two codes, item 3 after one; item 2 is written first on purpose.
CODES = np.array([[0, 2, 1], [0, 1, -1], [0, 2, 0], [1, -1, -1], [2, 0, 3]])


def test_what_may_follow():
    trie = SemanticIdTrie.from_codes(CODES)
    assert trie.allowed_next([]) == [0, 1, 2]
    assert trie.allowed_next([0]) == [1, 2]
    assert trie.allowed_next([0, 2]) == [0, 1]
    assert trie.allowed_next([2, 0]) == [3]


def test_nothing_follows_a_finished_item_or_a_prefix_of_none():
    trie = SemanticIdTrie.from_codes(CODES)
    for prefix in ([0, 1], [1], [0, 2, 0], [5], [0, 0], [1, 0], [0, 2, 0, 0], [0, 1, 0]):
        assert trie.allowed_next(prefix) == []


def test_rows_of_items():
    trie = SemanticIdTrie.from_codes(CODES)
    assert [trie.row_of(codes) for codes in CODES] == [0, 1, 2, 3, 4]
    assert trie.row_of([1]) == 3
    assert [trie.row_of(codes) for codes in ([0], [0, 2], [2, 0, 0], [1, 0], [])] == [None] * 5


@st.composite
def catalogues(draw):
    sizes = draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    rows = draw(
        st.lists(st.tuples(*(st.integers(0, size - 1) for size in sizes)), min_size=1, max_size=40, unique=True)
    )
    codes = np.array(rows, np.int64).reshape(len(rows), len(sizes))
    if draw(st.booleans()) and len(sizes) > 1:  # make some items end early, where no other item begins with them
        for depth in range(1, len(sizes)):
            prefixes, counts = np.unique(codes[:, :depth], axis=0, return_counts=True)
            for prefix in prefixes[counts == 1][::2]:
                codes[(codes[:, :depth] == prefix).all(axis=1), depth:] = -1
    return codes, tuple(sizes)


@settings(max_examples=80, deadline=None)
@given(catalogues())
def test_against_the_list_of_prefixes(case):
    codes, sizes = case
    trie = SemanticIdTrie.from_codes(codes, sizes)
    items = [tuple(int(code) for code in row if code >= 0) for row in codes]
    prefixes = {item[:length] for item in items for length in range(len(item) + 1)}
    for prefix in prefixes:
        following = sorted({item[len(prefix)] for item in items if item[: len(prefix)] == prefix and item != prefix})
        assert trie.allowed_next(prefix) == following
    assert [trie.row_of(item) for item in items] == list(range(len(items)))
    leaves = torch.arange(len(items))
    assert np.array_equal(trie.codes_of_leaves(leaves).numpy(), codes[trie.rows.numpy()])
    assert torch.equal(trie.rows[trie.leaf_of_row].long(), leaves)


@settings(max_examples=40, deadline=None)
@given(catalogues(), st.integers(0, 2**32 - 1))
def test_masks_and_leaf_ranges_agree_with_the_items_below(case, seed):
    codes, sizes = case
    trie = SemanticIdTrie.from_codes(codes, sizes)
    allowed = torch.from_numpy(np.random.default_rng(seed).random(len(codes)) < 0.4)
    masks = trie.node_masks(allowed)
    for depth, mask in enumerate(masks, start=1):
        for node in range(len(mask)):
            first, last = trie.leaves[depth][node : node + 2].tolist()
            assert bool(mask[node]) == bool(allowed[trie.rows[first:last].long()].any())
    assert trie.leaves[0].tolist() == [0, len(codes)]


def test_the_order_of_items_does_not_change_the_prefixes():
    trie, other = SemanticIdTrie.from_codes(CODES), SemanticIdTrie.from_codes(CODES[::-1].copy())
    assert all(torch.equal(one, two) for one, two in zip(trie.ptr + trie.tok, other.ptr + other.tok))


def test_more_than_256_codes():
    codes = np.array([[300, 1], [5, 70_000]])
    trie = SemanticIdTrie.from_codes(codes)
    assert trie.tok[0].dtype == torch.uint16
    assert trie.allowed_next([]) == [5, 300]
    assert trie.allowed_next([5]) == [70_000]
    nodes, valid = trie.children(0, torch.zeros(1, dtype=torch.long))
    assert trie.codes(1, nodes).tolist() == [[5, 300]]
    assert valid.all()


def test_saved_and_loaded(tmp_path):
    trie = SemanticIdTrie.from_codes(CODES)
    trie.save(tmp_path / "trie.safetensors")
    loaded = SemanticIdTrie.load(tmp_path / "trie.safetensors")
    assert loaded.sizes == trie.sizes
    for one, two in zip(
        (*trie.ptr, *trie.tok, *trie.pad, trie.rows), (*loaded.ptr, *loaded.tok, *loaded.pad, loaded.rows)
    ):
        assert torch.equal(one, two)
        assert one.dtype == two.dtype


def test_of_a_table():
    table = SemanticIdTable(("a", "b"), np.array([[0, 1], [1, 0]], np.int32), (4, 4))
    trie = SemanticIdTrie.from_codes(table.codes, table.sizes)
    assert trie.sizes == (4, 4)
    assert trie.row_of(table.codes_of("b")) == table.row_of["b"]


@pytest.mark.parametrize(
    ("codes", "sentence"),
    [
        (np.zeros((0, 3), int), "integer codes"),
        (np.array([[0.5, 1.0]]), "integer codes"),
        (np.array([[0, 1], [0, 1]]), "same codes"),
        (np.array([[0, -2]]), "do not fit"),
        (np.array([[0, -1], [-1, 1]]), "at the end"),
        (np.array([[0, -1, 2]]), "at the end"),
        (np.array([[1, -1], [1, 2]]), "the beginning of another's"),
    ],
)
def test_what_is_no_index_is_refused(codes, sentence):
    with pytest.raises(UserError, match=sentence):
        SemanticIdTrie.from_codes(codes)


def test_damaged_files_are_named(tmp_path):
    path = tmp_path / "trie.safetensors"
    with pytest.raises(UserError, match=r"trie\.safetensors"):
        SemanticIdTrie.load(path)
    path.write_bytes(b"no")
    with pytest.raises(UserError, match="not a readable trie"):
        SemanticIdTrie.load(path)


@pytest.mark.slow
def test_ten_million_items_fit_into_50_megabytes():
    """Built in seconds; benchmarks/decoding.py has the figures."""
    codes = np.random.default_rng(0).integers(0, 256, (10_000_000, 4), dtype=np.int32)
    codes = np.unique(codes.view("<i4,<i4,<i4,<i4")).view("<i4").reshape(-1, 4)
    assert SemanticIdTrie.from_codes(codes, (256,) * 4).bytes <= 50e6


def test_sizes_of_another_length_are_refused():
    with pytest.raises(UserError, match="codes of 2 levels"):
        SemanticIdTrie.from_codes(np.array([[0, 1]]), (4,))
