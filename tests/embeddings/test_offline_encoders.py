import itertools
from math import log

import numpy as np
import pytest
import scipy.sparse
import threadpoolctl
import torch
from helpers import write_catalogue

from recllm.embeddings import CollaborativeEncoder, TfidfEncoder, fuse_vectors
from recllm.embeddings.collaborative import co_occurrence, ppmi, training_events
from recllm.embeddings.fusion import centred
from recllm.embeddings.svd import truncated_svd
from recllm.errors import UserError

TEXTS = ["red tea cup", "blue tea cup", "red rubber hose", "green rubber hose", "…", "zebra"]


def cosine(vectors, i, j):
    return torch.cosine_similarity(vectors[i], vectors[j], dim=0).item()


def test_tfidf_puts_like_texts_together_and_knows_nothing_of_an_empty_one():
    vectors = TfidfEncoder(dim=4).encode(TEXTS)
    assert len(vectors) == 6
    assert cosine(vectors, 0, 1) > 0.5 > cosine(vectors, 0, 3)
    assert not vectors[4].any()  # no word
    assert not vectors[5].any()  # no word that another text has


def test_tfidf_width_is_at_most_the_rank():
    assert TfidfEncoder(dim=128).encode(["a b", "a b", "a c"]).shape == (3, 2)
    assert TfidfEncoder(dim=128).encode(["one", "two"]).shape == (2, 2)  # no shared word: all are kept
    with pytest.raises(UserError, match="hold no word"):
        TfidfEncoder().encode(["?", ""])


def test_offline_encoders_give_the_same_bytes_for_any_number_of_threads():
    rng = np.random.default_rng(0)
    texts = [" ".join(f"w{word}" for word in rng.zipf(1.3, 30) % 500) for _ in range(3000)]
    results = []
    for threads in (1, 2):
        with threadpoolctl.threadpool_limits(threads):
            results.append(TfidfEncoder(dim=32).encode(texts))
    assert torch.equal(*results)


def test_truncated_svd_is_the_svd():
    rng = np.random.default_rng(0)
    dense = rng.normal(size=(60, 5)) @ rng.normal(size=(5, 40))  # rank 5
    left, values = truncated_svd(scipy.sparse.csr_array(dense), dim=20, seed=0)
    expected = np.linalg.svd(dense)[1][:5]
    np.testing.assert_allclose(values, expected, rtol=1e-6)
    np.testing.assert_allclose((left * values) @ (left * values).T, dense @ dense.T, atol=1e-8)


def test_co_occurrence_by_hand():
    # user 0: a b a c, user 1: c b; window 2. Pairs: ab, (aa is none), ba, bc, ac | cb
    items, users = np.array([0, 1, 0, 2, 2, 1]), np.array([0, 0, 0, 0, 1, 1])
    expected = [[0, 2, 1], [2, 0, 2], [1, 2, 0]]
    assert co_occurrence(items, users, 3, window=2).toarray().tolist() == expected


def test_co_occurrence_equals_a_slow_count():
    rng = np.random.default_rng(1)
    items, users = rng.integers(0, 20, 400), np.sort(rng.integers(0, 30, 400))
    slow = np.zeros((20, 20))
    for i, j in itertools.combinations(range(400), 2):
        if j - i <= 3 and users[i] == users[j] and items[i] != items[j]:
            slow[items[i], items[j]] += 1
            slow[items[j], items[i]] += 1
    assert (co_occurrence(items, users, 20, window=3).toarray() == slow).all()


def test_ppmi_by_hand():
    # C = [[0 3 1] [3 0 0] [1 0 0]], degrees 4 3 1; unsmoothed: log(C_ij · 8 / (d_i d_j)) where positive
    counts = scipy.sparse.csr_array(np.array([[0, 3, 1], [3, 0, 0], [1, 0, 0]], dtype=float))
    half = log(8 / 4)
    np.testing.assert_allclose(ppmi(counts, 1.0).toarray(), [[0, half, half], [half, 0, 0], [half, 0, 0]], rtol=1e-6)
    # smoothing makes the rare context more frequent, so that it says less
    assert ppmi(counts, 0.5).toarray()[0, 2] < half < ppmi(counts, 0.5).toarray()[0, 1]


def groups(n_users=60, valid="z", test="z"):
    """Two circles of items; every user stays in one, and ends with the same two events (valid, test)."""
    rng = np.random.default_rng(0)
    circles = ["abcd", "efgh"]
    return {
        f"u{user}": [*(circles[user % 2][i] for i in rng.integers(0, 4, 6)), valid, test] for user in range(n_users)
    }


def test_collaborative_vectors_know_who_goes_with_whom(tmp_path):
    vectors = CollaborativeEncoder(dim=4).encode(write_catalogue(tmp_path, "abcdefghz", groups()))
    assert len(vectors) == 9
    assert cosine(vectors, 0, 3) > 0.5 > 0.2 > cosine(vectors, 0, 4)
    assert not vectors[8].any()  # z is only in validation and test


def test_collaborative_vectors_do_not_see_validation_or_test(tmp_path):
    one = write_catalogue(tmp_path / "1", "abcdefghz", groups(valid="z", test="z"))
    other = write_catalogue(tmp_path / "2", "abcdefghz", groups(valid="a", test="e"))
    assert not one.interactions["item"].equals(other.interactions["item"])
    vectors = [CollaborativeEncoder(dim=8).encode(catalogue).numpy().tobytes() for catalogue in (one, other)]
    assert vectors[0] == vectors[1]
    # and they do see training: the same events, all of them in training
    trained = write_catalogue(tmp_path / "3", "abcdefghz", groups(valid="a", test="e"), split="train")
    assert CollaborativeEncoder(dim=8).encode(trained).numpy().tobytes() != vectors[0]


def test_training_events_are_rows_of_the_catalogue(tmp_path):
    catalogue = write_catalogue(tmp_path, "cba", {"u": "abcab", "v": "b"})
    items, users = training_events(catalogue)
    assert (items.tolist(), users.tolist()) == ([2, 1, 0, 1], [0, 0, 0, 1])  # u's last two are valid and test


def test_without_pairs_there_are_no_collaborative_vectors(tmp_path):
    with pytest.raises(UserError, match=r"no two training events.*collaborative_weight 0"):
        CollaborativeEncoder().encode(write_catalogue(tmp_path, "ab", {"u": "a", "v": "b"}))


def test_fused_distances_add_with_the_weights():
    generator = torch.Generator().manual_seed(0)
    one, two = torch.randn(5, 3, generator=generator), 100 * torch.randn(5, 7, generator=generator)
    fused = fuse_vectors([(one, 0.25), (two, 0.75)])
    assert fused.shape == (5, 10)
    unit = [torch.nn.functional.normalize(part, dim=1) for part in (one, two)]
    expected = 0.25 * torch.cdist(unit[0], unit[0]) ** 2 + 0.75 * torch.cdist(unit[1], unit[1]) ** 2
    torch.testing.assert_close(torch.cdist(fused, fused) ** 2, expected, atol=1e-5, rtol=1e-5)


def test_centred_moves_what_is_known_and_leaves_zero_rows():
    moved = centred(torch.tensor([[1.0, 5.0], [0.0, 0.0], [3.0, 5.0]]))
    assert moved.tolist() == [[-1, 0], [0, 0], [1, 0]]
    assert not centred(torch.zeros(2, 3)).any()


def test_a_part_that_knows_nothing_leaves_the_others_order():
    text = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]])
    use = torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 0.0]])  # item 0 has no training event
    fused = fuse_vectors([(text, 0.5), (use, 0.5)])
    assert torch.isfinite(fused).all()
    assert torch.dist(fused[0], fused[1]) < torch.dist(fused[0], fused[2])
