"""Metrics against hand arithmetic, worked examples and brute force."""

import itertools
import json
import math
from pathlib import Path

import pytest
import torch

from recllm import metrics as m

VECTORS = json.loads((Path(__file__).parent / "vectors" / "metrics.json").read_text())


def one(value) -> torch.Tensor:
    return torch.tensor([value])


@pytest.mark.parametrize("example", VECTORS["metrics"], ids=lambda example: str(example["target"]))
def test_worked_examples_of_recall_and_ndcg(example):
    rank = m.ranks(torch.tensor([example["ranked"]]), one(example["target"]))
    for k in (1, 5, 10):
        assert float(m.recall_at_k(rank, k)) == pytest.approx(example[f"recall@{k}"], abs=1e-6)
        assert float(m.ndcg_at_k(rank, k)) == pytest.approx(example[f"ndcg@{k}"], abs=1e-6)


@pytest.mark.parametrize("example", VECTORS["pass_at_k"], ids=lambda x: f"{x['n']}-{x['c']}-{x['k']}")
def test_worked_examples_of_pass_at_k(example):
    assert float(m.pass_at_k(example["n"], example["c"], example["k"])) == pytest.approx(example["value"], abs=1e-6)


def test_pass_at_k_counts_the_draws_that_hold_a_right_answer():
    answers = [1, 0, 0, 1, 0]
    draws = list(itertools.combinations(answers, 3))
    assert float(m.pass_at_k(5, 2, 3)) == pytest.approx(sum(any(draw) for draw in draws) / len(draws))
    with pytest.raises(ValueError, match="needs at least 3 answers"):
        m.pass_at_k(2, 1, 3)


def test_by_hand():
    rank = torch.tensor([0, 1, 4, m.NOT_FOUND])
    assert m.recall_at_k(rank, 2).tolist() == [1, 1, 0, 0]
    assert m.ndcg_at_k(rank, 5).tolist() == pytest.approx([1, 1 / math.log2(3), 1 / math.log2(6), 0])
    assert m.mrr_at_k(rank, 5).tolist() == pytest.approx([1, 1 / 2, 1 / 5, 0])


def test_a_duplicate_target_counts_at_its_first_place_and_minus_one_is_nobody():
    assert m.ranks(torch.tensor([[3, 5, 5, -1]]), one(5)).tolist() == [1]
    assert m.ranks(torch.tensor([[3, -1]]), one(7)).tolist() == [m.NOT_FOUND]


def test_ranked_hit_looks_at_the_likeliest_answers():
    hits = torch.tensor([[0, 0, 1]])
    assert float(m.ranked_hit_at_k(hits, torch.tensor([[0.1, 0.2, 0.9]]), 1)) == 1
    assert float(m.ranked_hit_at_k(hits, torch.tensor([[0.9, 0.2, 0.1]]), 2)) == 0
    assert float(m.ranked_hit_at_k(hits, torch.zeros(1, 3), 2)) == 0, "equal scores keep their order"


def test_figures_of_lists():
    items = torch.tensor([[0, 0, 1, -1], [2, 1, 0, 0]])
    assert float(m.validity_rate(items)) == 7 / 8
    assert m.distinct_share(items).tolist() == [2 / 4, 3 / 4]
    assert m.exposure(items, 5).tolist() == [4, 2, 1, 0, 0]
    assert float(m.coverage(items, 5)) == 3 / 5


def test_gini_is_0_for_equal_and_by_hand_for_unequal():
    assert float(m.gini(torch.tensor([3, 3, 3]))) == pytest.approx(0)
    # mean absolute difference over twice the mean: of 0, 0, 6 it is (6+6+6+6)/9 / (2·2) = 2/3
    assert float(m.gini(torch.tensor([0, 6, 0]))) == pytest.approx(2 / 3)


def test_popularity_bias_has_a_sign():
    popularity = torch.tensor([10, 1, 5])
    popular, rare = torch.tensor([[0, 0]]), torch.tensor([[1, 1]])
    assert float(m.popularity_bias(popular, popularity, torch.tensor([2]))) == pytest.approx(0.5)
    assert float(m.popularity_bias(rare, popularity, torch.tensor([2]))) == pytest.approx(-0.5)


def test_bootstrap_covers_the_mean_at_its_rate():
    generator = torch.Generator().manual_seed(1)
    covered = 0
    for trial in range(100):
        values = (torch.rand(200, generator=generator) < 0.3).double()
        low, high = m.bootstrap_interval(values, draws=300, seed=trial)
        covered += low <= 0.3 <= high
    assert 85 <= covered <= 100


def test_the_paired_test_equals_enumeration_and_knows_no_difference():
    a, b = torch.tensor([1.0, 1, 0, 1, 0, 1]), torch.tensor([0.0, 1, 0, 0, 0, 0])  # three wins, no loss
    signs = itertools.product([-1, 1], repeat=3)
    exact = sum(abs(sum(sign)) >= 3 for sign in signs) / 8
    assert m.paired_p_value(a, b) == pytest.approx(exact, abs=0.02)
    assert m.paired_p_value(a, a) == 1.0
    assert m.paired_p_value(a, b) == m.paired_p_value(b, a)
    with pytest.raises(ValueError, match="paired"):
        m.paired_p_value(a, b[:3])


def test_mean_and_deviation_of_seeds():
    assert m.mean_and_deviation([1.0, 3.0]) == (2.0, pytest.approx(math.sqrt(2)))
    assert m.mean_and_deviation([1.0]) == (1.0, 0.0)


def test_sets_of_targets_count_each_once():
    ranked = torch.tensor([[4, 7, 1, 9], [4, 4, -1, -1], [0, 1, 2, 3]])
    targets = torch.tensor([[1, 4, 8], [4, 4, -1], [-1, -1, -1]])
    recall = m.set_recall_at_k(ranked, targets, 3)
    assert recall[:2].tolist() == [2 / 3, 1.0]  # 4 and 1 of {1, 4, 8}; the one target of {4}
    assert recall[2].isnan()  # nothing was to be found
    assert m.set_recall_at_k(ranked, targets, 1)[:2].tolist() == [1 / 3, 1.0]
    assert m.set_precision_at_k(ranked, targets, 2).tolist() == [0.5, 0.5, 0.0]


def test_a_set_of_one_target_is_plain_recall():
    generator = torch.Generator().manual_seed(0)
    ranked = torch.stack([torch.randperm(50, generator=generator)[:20] for _ in range(40)])
    target = torch.randint(0, 50, (40,), generator=generator)
    plain = m.recall_at_k(m.ranks(ranked, target), 10)
    assert torch.equal(m.set_recall_at_k(ranked, target.unsqueeze(1), 10), plain)
