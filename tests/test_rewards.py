"""Rewards as TRL calls them: by keywords, one number an answer, from codes that were parsed once."""

import math

import numpy as np
import polars as pl
import pytest
import torch
from helpers import write_catalogue
from trl.trainer.utils import get_callable_name

from recllm.errors import UserError
from recllm.evaluation.ranking import Ranking
from recllm.metrics import ndcg_at_k, ranks
from recllm.models.sasrec import SASRecConfig, SASRecRanker
from recllm.models.sasrec_training import train_sasrec
from recllm.rewards import (
    CollaborativeReward,
    PrefixReward,
    dcg,
    format_reward,
    gated,
    hit,
    rank_penalty,
    reward_functions,
)
from recllm.semantic_ids import SemanticIdTable

# Four answers to one prompt, whose target has two codes of three levels.
GROUP = {
    "codes": [[4, 7, -1], [4, 2, -1], [-1, -1, -1], [4, 2, 0]],
    "target": [[4, 2, -1]] * 4,
    "rank": [0, 1, 2, 3],
    "formed": [True, True, False, True],
    "history": [["i0", "i3"]] * 4,
}


def call(reward, **changes) -> list[float]:
    """As TRL does, with what it adds of its own."""
    answers = {**GROUP, **changes}
    r = len(answers["codes"])
    own = {"prompts": ["p"] * r, "completions": ["c"] * r, "completion_ids": [[1]] * r, "trainer_state": None}
    return reward(**own, **answers)


def test_hit_and_prefix():
    assert call(hit) == [0, 1, 0, 0]
    assert call(PrefixReward(0.5)) == pytest.approx([0.5**0.5, 1, 0, 0.5**0.5])
    assert call(PrefixReward(1.0)) == pytest.approx([0.5, 1, 0, 0.5])


def test_rows_need_no_padding():
    assert call(hit, codes=[[4], [4, 2], [], [4, 2, 0]], target=[[4, 2]] * 4) == [0, 1, 0, 0]
    assert call(hit, **{key: [] for key in GROUP}) == []


def test_the_misses_above_are_punished_most_and_only_where_the_target_was_found():
    """Beams 0 … 3 of two groups, the target third in the first and nowhere in the second: d = 1, .63, ·, .43."""
    codes = [[5], [6], [7], [8], [5], [6], [9], [8]]
    found = call(rank_penalty, codes=codes, target=[[7]] * 8, rank=[0, 1, 2, 3] * 2)
    discounts = [1, 1 / math.log2(3), 1 / math.log2(5)]
    first, second, fourth = (-one / sum(discounts) for one in discounts)
    assert found == pytest.approx([first, second, 0, fourth, 0, 0, 0, 0])


def test_dcg_is_the_metrics_own():
    assert call(dcg) == pytest.approx([0, 1 / math.log2(3), 0, 0])
    beams = torch.tensor([[5, 9, 3, 7]])  # one list of items; whichever is the target, its group's rewards add up to it
    for target in (5, 7, 1):
        found = call(dcg, codes=[[item] for item in beams[0].tolist()], target=[[target]] * 4)
        assert sum(found) == pytest.approx(ndcg_at_k(ranks(beams, torch.tensor([target])), 4).item())


def test_the_form_is_a_reward_and_a_gate():
    assert call(format_reward) == [1, 1, 0, 1]
    assert call(gated(hit), formed=[True, False, True, True]) == [0, 0, 0, 0]
    assert call(gated(PrefixReward()), formed=[False, True, True, True]) == pytest.approx([0, 1, 0, 0.5**0.5])


@pytest.mark.parametrize("gate", [False, True])
def test_trl_logs_a_reward_under_its_name(gate):
    names = ["hit", "prefix", "dcg", "format"]
    made = reward_functions(names, gate=gate)
    assert [get_callable_name(reward) for reward in made] == names
    for reward in made:
        found = call(reward)
        assert len(found) == 4
        assert all(type(value) is float for value in found)


def test_settings_reach_their_reward():
    (reward,) = reward_functions(["prefix"], beta=1.0)
    assert call(reward)[0] == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("names", "settings", "sentence"),
    [
        (["hti"], {}, "'hti' is no reward. Fix: did you mean 'hit'?"),
        (["xyz"], {}, "'xyz' is no reward. Fix: choose from hit, prefix, dcg, rank, format, collaborative"),
        (["hit", "hit"], {}, "hit, hit names a reward twice"),
        ([], {}, "no reward is named"),
        (["prefix"], {"beta": 0.0}, "beta is 0.0. Fix: above 0"),
        (["collaborative"], {}, "needs a trained SASRec"),
        (["collaborative"], {"sasrec": "s"}, "needs the prepared data"),
        (["collaborative"], {"sasrec": "s", "data": "nowhere"}, "nowhere"),
    ],
)
def test_bad_names_and_settings_are_a_sentence(names, settings, sentence):
    with pytest.raises(UserError) as error:
        reward_functions(names, **settings)
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


# ---- collaborative

ITEMS = [f"i{row}" for row in range(12)]
SMALL = SASRecConfig(width=16, layers=1, heads=2, max_length=6, dropout=0.1, batch=64, epochs=30, patience=30)


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """Each item is followed by the one three further on; SASRec learns it. The table's order is not the catalogue's."""
    folder = tmp_path_factory.mktemp("shop")
    walks = {f"u{user}": [f"i{(user + 3 * step) % 12}" for step in range(3 + user % 7)] for user in range(40)}
    catalogue = write_catalogue(folder / "data", ITEMS, walks)
    model = train_sasrec(catalogue, SMALL, folder / "sasrec")
    items = tuple(reversed(ITEMS))
    table = SemanticIdTable(items, np.array([[n // 4, n % 4] for n in range(12)], np.int32), (3, 4))
    return folder, catalogue, model, table


def answers_of(table, history) -> dict:
    """Every item of the table as an answer to one history."""
    return {
        "codes": [list(table.codes_of(item)) for item in table.items],
        "target": [[0, 0]] * 12, "history": [history] * 12, "rank": list(range(12)), "formed": [True] * 12,
    }  # fmt: skip


def test_the_liking_orders_items_as_sasrec_does_and_lies_between_0_and_1(shop):
    folder, catalogue, model, table = shop
    (reward,) = reward_functions(["collaborative"], sasrec=folder / "sasrec", data=folder / "data", table=table)
    assert get_callable_name(reward) == "collaborative"
    liking = dict(zip(table.items, call(reward, **answers_of(table, ["i1", "i4"]))))
    ranked: Ranking = SASRecRanker(model, catalogue.item_ids).rank(pl.DataFrame({"history": [["i1", "i4"]]}), 12)
    assert sorted(liking, key=liking.get, reverse=True) == [ITEMS[row] for row in ranked.rows[0].tolist()]
    scores = ranked.scores[0]
    expected = torch.sigmoid((scores - scores.mean()) / scores.std(correction=0))
    assert [liking[ITEMS[row]] for row in ranked.rows[0].tolist()] == pytest.approx(expected.tolist(), abs=1e-5)
    assert max(liking, key=liking.get) == "i7"
    assert all(0 < value < 1 for value in liking.values())


def test_groups_are_told_apart_and_what_names_nothing_gets_nothing(shop):
    folder, _, _, table = shop
    reward = CollaborativeReward.load(folder / "sasrec", folder / "data", table)
    codes = list(table.codes_of("i7"))
    found = call(
        reward, codes=[codes, codes, [-1, -1], codes, [2, 9]], target=[codes] * 5,
        history=[["i1", "i4"], ["i5", "i8"], ["i1", "i4"], [], ["i1", "i4"]],
    )  # fmt: skip
    assert found[0] > 0.7 > found[1] > 0
    assert found[2:] == [0, 0, 0], "nothing named, no history, codes that no item has"


def test_an_item_that_sasrec_does_not_know_is_a_sentence(shop):
    folder, _, _, _ = shop
    table = SemanticIdTable(("i0", "new"), np.array([[0], [1]], np.int32), (2,))
    with pytest.raises(UserError, match="'new' has a semantic ID, but SASRec does not know it"):
        CollaborativeReward.load(folder / "sasrec", folder / "data", table)
