"""The figures, by hand on a few items, and against real shuffles."""

import io

import numpy as np
import pytest
import torch
from rich.console import Console

from recllm.semantic_ids.quantizer import Quantizer
from recllm.semantic_ids.report import level_usage, make_report, prefix_purity, report_tables, squared_spread

BEFORE = np.array([[0, 0], [0, 0], [0, 1], [1, 0]])
AFTER = np.array([[0, 0, 0], [0, 0, 1], [0, 1, -1], [1, 0, -1]])


def test_counts_by_hand():
    report = make_report(BEFORE, AFTER, (2, 2, 2))
    assert report["distinct_share_before"] == 3 / 4
    assert report["distinct_share_after"] == 1
    assert report["largest_bucket"] == 2
    assert report["items_in_collisions"] == 2
    assert report["items_with_extra_level"] == 2
    assert report["items_moved"] == 0
    assert make_report(BEFORE, BEFORE[[0, 2, 2, 3]], (2, 2))["items_moved"] == 1


def test_usage_by_hand():
    figures = level_usage(np.array([0, 0, 1, 3, -1]), 4, "a")
    assert figures["used"] == 3
    assert figures["entropy_bits"] == pytest.approx(1.5)  # ½·1 + ¼·2 + ¼·2
    assert figures["perplexity"] == pytest.approx(2**1.5)
    assert figures["largest_share"] == 0.5


def test_error_by_hand():
    embeddings = torch.tensor([[0.0], [2.0], [4.0], [6.0]])  # mean 3, spread 9 + 1 + 1 + 9 = 20
    quantizer = Quantizer("test", (torch.tensor([[1.0], [5.0]]),), torch.zeros(1))
    codes = np.array([[0], [0], [1], [1]])  # each is 1 away from its centroid
    moved = np.array([[0], [1], [1], [1]])  # 2 is now 3 away from 5
    report = make_report(codes, moved, (2,), quantizer=quantizer, embeddings=embeddings)
    assert squared_spread(embeddings) == 20
    assert report["relative_error_before"] == pytest.approx(4 / 20)
    assert report["relative_error"] == pytest.approx(12 / 20)


def test_purity_by_hand():
    labels = ["x", "x", "y", "x"]
    first, second = prefix_purity(BEFORE, (2, 2), labels)
    # Depth 1: items 0, 1, 2 share code 0. Of two others, one has the label of item 0, one that of 1, none that of 2.
    assert first == {
        "depth": 1,
        "prefixes": 2,
        "items_with_company": 3,
        "purity": pytest.approx(1 / 3),
        "shuffled": 0.5,
    }
    assert second["purity"] == 1  # items 0 and 1
    assert second["items_with_company"] == 2
    without = prefix_purity(BEFORE, (2, 2), ["x", None, "", "x"])
    assert without[0]["items_with_company"] == 0
    assert without[0]["purity"] is None


def test_the_baseline_is_what_shuffles_give():
    random = np.random.default_rng(0)
    codes = random.integers(0, 5, (300, 2))
    labels = random.choice(list("aaabbc"), 300)
    baseline = prefix_purity(codes, (5, 5), labels)[0]["shuffled"]
    purities = [prefix_purity(codes, (5, 5), random.permutation(labels))[1]["purity"] for _ in range(100)]
    assert np.mean(purities) == pytest.approx(baseline, abs=0.01)


def test_tables_can_be_read():
    report = make_report(BEFORE, AFTER, (2, 2, 2), ["x", "x", "y", None]) | {"label": "category"}
    stream = io.StringIO()
    for part in report_tables(report):
        Console(file=stream, width=100).print(part)
    assert all(text in stream.getvalue() for text in ("75.00%", "100.00%", "Same category?", "perplexity"))
