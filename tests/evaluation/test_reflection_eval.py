"""What a model says of its drafts is measured against the truth, and beside it what correcting them did."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor

import msgspec
import polars as pl
import pytest
import torch
from helpers import write_catalogue
from reflecting_for_tests import write_reflecting_model

from recllm.attributes import Attribute, ItemAttributes
from recllm.card import figures
from recllm.catalogue import Catalogue
from recllm.checkpoint import Checkpoint
from recllm.decoding import Decoder
from recllm.decoding.reflecting import Reflector
from recllm.errors import UserError
from recllm.evaluation.comparison import CompareConfig, compare
from recllm.evaluation.comparison_tables import render
from recllm.evaluation.drafts import Truth
from recllm.evaluation.predictions import DraftLine, Prediction
from recllm.evaluation.run import evaluate_ranker
from recllm.evaluation.scoring import score, score_tables
from recllm.evaluation.stage import EvaluateConfig, evaluate, ranker_of
from recllm.processes import Processes


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return write_reflecting_model(tmp_path_factory.mktemp("reflecting"))


@pytest.fixture(scope="module")
def checkpoint(folders):
    return Checkpoint.load(folders[1], "cpu")


def config(folders, output, mode="reflection", **settings) -> EvaluateConfig:
    data, model = map(str, folders)
    given = {"beams": 6, "k": [1, 3]} | settings
    return EvaluateConfig(model=model, data=data, output=str(output), mode=mode, **given)


def lines_of(output) -> list[dict]:
    return [json.loads(line) for line in (output / "predictions.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def evaluated(folders, tmp_path_factory):
    output = tmp_path_factory.mktemp("evaluated") / "run"
    return evaluate(config(folders, output)), output


# ---- figures by hand


TRUTH = Truth(  # a and b share the first code; a and c the brand; of d no brand is known
    torch.tensor([[0, 0], [0, 1], [1, 0], [2, 0]]),
    ItemAttributes.of([Attribute("brand", "brand")], pl.DataFrame({"brand": ["X", "Y", "X", ""]})),
)


@pytest.fixture
def four(tmp_path) -> Catalogue:
    """Three users, who took a, b and d last."""
    return write_catalogue(tmp_path, list("abcd"), {u: ["c", "c", t] for u, t in (("u", "a"), ("v", "b"), ("w", "d"))})


def draft(item, loc, same, kept=False, entropy=0.5):
    return DraftLine(item, -1.0, loc, [same], entropy, kept)


BY_HAND = [
    # true loc 3 1 2, true brand same same other
    Prediction("u", 2, "a", ["a", "b"], [-1, -2], [], [draft("a", 3, True, True), draft("c", 2, True, entropy=1.1)]),
    # true loc 2 3, true brand other same
    Prediction("v", 2, "b", ["b", "a"], [-1, -2], [], [draft("a", 2, False), draft("b", 1, False)]),
    # true loc 1 1, no brand to be right about
    Prediction("w", 2, "d", ["a", "b"], [-1, -2], [], [draft("a", 3, True, True), draft("b", 1, True)]),
]


def test_the_figures_of_reflection_by_hand(four):
    scores = score(BY_HAND, four, "test", (1, 2), length=2, truth=TRUTH)
    found = scores["reflection"]
    wanted = {
        "acc_loc@1": (1 + 1 + 0) / 3,  # a as a; a as b with its second code wrong; a as d is wrong from the first
        "acc_loc@2": (1 / 2 + 1 / 2 + 1 / 2) / 3,
        "acc_brand@1": (1 + 1) / 2,  # w is left out
        "acc_brand@2": (1 + 1 / 2) / 2,
        "draft_recall@1": 1 / 3,
        "draft_recall@2": 2 / 3,
        "draft_ndcg@1": 1 / 3,
        "draft_ndcg@2": (1 + 1 / torch.log2(torch.tensor(3.0)).item()) / 3,
        "changed@2": 2 / 3,  # u: a c → a b; v: a b → b a
    }
    assert found["metrics"] == pytest.approx(wanted)
    assert set(found["intervals"]) == set(wanted)
    # True locs of all first drafts are 3 2 1, so always saying 1 is right once; of all six 3 1 2 3 1 1.
    assert found["majority"] == pytest.approx(
        {"acc_loc@1": 1 / 3, "acc_loc@2": 1 / 2, "acc_brand@1": 1 / 2, "acc_brand@2": 3 / 4}
    )
    assert found["majority_label"] == {
        "acc_loc@1": "1", "acc_loc@2": "1", "acc_brand@1": "other", "acc_brand@2": "same"
    }  # fmt: skip
    assert found["drafts"] == 2
    assert found["drafts_right"] == pytest.approx(2 / 6)
    assert found["called_right"] == pytest.approx(2 / 6)
    assert found["called_right_precision"] == pytest.approx(1 / 2)
    assert found["kept"] == pytest.approx(2 / 6)
    assert found["entropy_mean"] == pytest.approx((5 * 0.5 + 1.1) / 6)
    assert scores["metrics"]["recall@1"] == pytest.approx(2 / 3)
    assert score(BY_HAND[::-1], four, "test", (1, 2), length=2, truth=TRUTH) == scores
    assert "reflection" not in score(BY_HAND, four, "test", (1, 2), length=2)
    assert "acc_brand@2" in figures({"run": {}, **scores})
    assert figures({"run": {}, **scores})["majority acc_loc@1"][0] == pytest.approx(1 / 3)


def test_fewer_drafts_than_others_have_and_none_called_right(four):
    given = [msgspec.structs.replace(one, drafts=[]) for one in BY_HAND[:1]]
    given += [msgspec.structs.replace(one, drafts=[draft("c", 1, False)]) for one in BY_HAND[1:]]
    found = score(given, four, "test", (1, 2), length=2, truth=TRUTH)["reflection"]
    assert found["metrics"]["acc_loc@1"] == found["metrics"]["acc_loc@2"] == 1  # u has nothing to be right about
    assert found["metrics"]["acc_brand@2"] == 1
    assert (found["drafts"], found["called_right"], found["called_right_precision"]) == (1, 0, None)
    assert found["metrics"]["draft_recall@2"] == 0
    assert any("–" in str(list(table.columns[1].cells)) for table in score_tables(
        score(given, four, "test", (1, 2), length=2, truth=TRUTH)
    ))  # fmt: skip


def test_a_model_that_says_nothing_has_no_accuracy(four):
    given = [
        msgspec.structs.replace(one, drafts=[DraftLine(line.item, line.score) for line in one.drafts])
        for one in BY_HAND
    ]
    found = score(given, four, "test", (1, 2), length=2, truth=TRUTH)["reflection"]
    assert list(found["metrics"]) == [
        "draft_recall@1", "draft_ndcg@1", "draft_recall@2", "draft_ndcg@2", "changed@2"
    ]  # fmt: skip
    assert found["majority"] == {}
    assert found["drafts_right"] == pytest.approx(2 / 6)


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        (draft("zz", 1, True), r"mine\.jsonl, line 2: a draft is 'zz', which tiny does not have"),
        (draft("a", 4, True), "goes wrong at level 4, and the model's items have 2"),
        (DraftLine("a", -1.0, 1, [True, False]), "has 2 labels of attributes, and the model has 1"),
    ],
)
def test_drafts_of_another_model_are_refused(four, line, sentence):
    given = [BY_HAND[0], msgspec.structs.replace(BY_HAND[1], drafts=[line]), BY_HAND[2]]
    with pytest.raises(UserError, match=sentence):
        score(given, four, "test", (1, 2), length=2, truth=TRUTH, file="mine.jsonl")


# ---- a model that reflects


def test_every_user_is_reflected_on_and_scored(evaluated, checkpoint):
    """Everything again from the lines, by plain loops."""
    result, output = evaluated
    lines, table, items = lines_of(output), checkpoint.table, checkpoint.items.rows_by_key("item", named=True)
    assert len(lines) == result["users"] == 30
    truth, said, found = {}, {}, result["reflection"]
    for line in lines:
        assert len(line["drafts"]) == len(line["items"]) == len(set(line["items"])) == 6
        scores = [one["score"] for one in line["drafts"]]
        assert scores == sorted(scores, reverse=True)
        for one in line["drafts"]:
            own, target = table.codes_of(one["item"]), table.codes_of(line["target"])
            one["true_loc"] = next((at + 1 for at in range(2) if own[at] != target[at]), 3)
            facts, wanted = items[one["item"]][0], items[line["target"]][0]
            one["true"] = [facts["categories"][-1] == wanted["categories"][-1], facts["brand"] == wanted["brand"]]
    for k in (1, 3):
        first = [line["drafts"][:k] for line in lines]
        for name, right, true in (
            ("loc", lambda one: one["loc"] == one["true_loc"], lambda one: one["true_loc"]),
            ("categories", lambda one: one["same"][0] == one["true"][0], lambda one: one["true"][0]),
            ("brand", lambda one: one["same"][1] == one["true"][1], lambda one: one["true"][1]),
        ):
            said[f"acc_{name}@{k}"] = sum(right(one) for some in first for one in some) / (30 * k)
            labels = [true(one) for some in first for one in some]
            truth[f"acc_{name}@{k}"] = max(labels.count(label) for label in labels) / (30 * k)
        drafted = [line["target"] in [one["item"] for one in line["drafts"][:k]] for line in lines]
        assert found["metrics"][f"draft_recall@{k}"] == pytest.approx(sum(drafted) / 30)
    assert {name: found["metrics"][name] for name in said} == pytest.approx(said)
    assert found["majority"] == pytest.approx(truth)
    drafts = [one | {"target": line["target"]} for line in lines for one in line["drafts"]]
    kept = [one for one in drafts if one.get("kept")]
    assert kept == [one for one in drafts if one["loc"] == 3]
    assert 0.05 < len(kept) / 180 < 0.95
    assert found["kept"] == found["called_right"] == pytest.approx(len(kept) / 180)
    right = sum(one["item"] == one["target"] for one in kept)
    assert found["called_right_precision"] == pytest.approx(right / len(kept))
    changed = [line["items"][:3] != [one["item"] for one in line["drafts"][:3]] for line in lines]
    assert found["metrics"]["changed@3"] == pytest.approx(sum(changed) / 30)
    assert 0 < sum(changed) < 30, "these tests need a model that corrects some drafts"
    assert {one["loc"] for one in drafts} == {1, 2, 3}
    assert len({one["entropy"] for one in drafts}) > 100
    assert "reflection, at most 6 drafts a target" in [table.title for table in score_tables(result)]


def test_the_lists_are_the_reflectors_and_the_drafts_those_of_mode_direct(evaluated, folders, checkpoint, tmp_path):
    result, output = evaluated
    direct = evaluate(config(folders, tmp_path / "direct", "direct"))
    for one, other in zip(lines_of(output), lines_of(tmp_path / "direct"), strict=True):
        assert [draft["item"] for draft in one["drafts"]] == other["items"]
    for name in ("recall@1", "ndcg@3", "recall@6"):
        drafts = result["reflection"]["metrics"]
        assert drafts.get(f"draft_{name}", direct["metrics"][name]) == direct["metrics"][name]
    cases = Catalogue.load(folders[0]).targets("test")
    prompts = checkpoint.writer.ids(cases["history"].to_list())
    decoder = Decoder(checkpoint.model, checkpoint.tokens)
    found = Reflector(decoder, checkpoint.reflection.tokens).scheduled(prompts, 6)
    for case, line in enumerate(lines_of(output)):
        assert line["items"] == [checkpoint.table.items[row] for row in found.found.rows[case].tolist()]
        assert line["scores"] == pytest.approx(found.found.scores[case].tolist(), abs=1e-4)
        assert [one["loc"] for one in line["drafts"]] == (found.labels[case, :, 0] + 1).tolist()
        assert [one["same"] for one in line["drafts"]] == found.labels[case, :, 1:].bool().tolist()
        doubt = found.entropies[case].mean(-1).tolist()
        assert [one["entropy"] for one in line["drafts"]] == pytest.approx(doubt, abs=1e-4)
    about = result["run"]["ranker"]
    assert (about["mode"], about["entropy_weight"], about["skip"]) == ("reflection", 0.2, True)
    assert about["reflection"]["template"]["attributes"] == ["categories", "brand"]


def test_settings_change_the_lists_and_not_the_drafts(evaluated, folders, tmp_path):
    for number, settings in enumerate(({"entropy_weight": 3.0}, {"skip": False})):
        other = evaluate(config(folders, tmp_path / str(number), **settings))
        one, two = lines_of(evaluated[1]), lines_of(tmp_path / str(number))
        assert [line["items"] for line in one] != [line["items"] for line in two]
        for left, right in zip(one, two):
            assert [draft["item"] for draft in left["drafts"]] == [draft["item"] for draft in right["drafts"]]
        assert other["reflection"]["called_right"] == evaluated[0]["reflection"]["called_right"]
    assert other["reflection"]["kept"] == 0


def test_the_best_drafts_alone_are_reflected_on(evaluated, folders, tmp_path):
    some = evaluate(config(folders, tmp_path / "some", reflect_on=2))["reflection"]
    for line, whole in zip(lines_of(tmp_path / "some"), lines_of(evaluated[1]), strict=True):
        assert [one["item"] for one in line["drafts"]] == [one["item"] for one in whole["drafts"]]
        assert [one["loc"] for one in line["drafts"][:2]] == [one["loc"] for one in whole["drafts"][:2]]
        assert not any("loc" in one or "same" in one for one in line["drafts"][2:])
    lines = [one | {"t": line["target"]} for line in lines_of(tmp_path / "some") for one in line["drafts"][:2]]
    assert some["kept"] == some["called_right"] == pytest.approx(sum(one["loc"] == 3 for one in lines) / 60)
    assert some["drafts_right"] == pytest.approx(sum(one["item"] == one["t"] for one in lines) / 60)
    assert some["metrics"]["acc_loc@1"] == evaluated[0]["reflection"]["metrics"]["acc_loc@1"]
    assert some["metrics"]["draft_recall@6"] == evaluated[0]["reflection"]["metrics"]["draft_recall@6"]
    with pytest.raises(UserError, match="reflect_on 7 must be between 1 and the 6 beams"):
        config(folders, "nowhere", reflect_on=7)


def test_the_history_can_be_excluded(folders, tmp_path):
    evaluate(config(folders, tmp_path / "run", exclude_history=True, beams=3))
    for history, line in zip(
        Catalogue.load(folders[0]).targets("test")["history"].to_list(), lines_of(tmp_path / "run")
    ):
        assert not set(history) & set(line["items"])
        assert not set(history) & {one["item"] for one in line["drafts"]}


def test_without_labels_there_is_a_list_and_no_accuracy(tmp_path):
    result = evaluate(config(write_reflecting_model(tmp_path, labels=False), tmp_path / "run"))
    assert not any(name.startswith("acc_") for name in result["reflection"]["metrics"])
    assert result["reflection"]["kept"] == result["reflection"]["entropy_mean"] == 0
    assert result["reflection"]["metrics"]["changed@3"] > 0
    (line, *_) = lines_of(tmp_path / "run")
    assert set(line["drafts"][0]) - {"entropy"} == {"item", "score"}


def test_runs_are_compared_with_their_mode_in_sight(evaluated, folders, tmp_path):
    evaluate(config(folders, tmp_path / "direct", "direct", name="direct"))
    reflects = config(folders, tmp_path / "reflects", name="reflects")
    evaluate(reflects)
    runs = [str(tmp_path / "direct"), str(tmp_path / "reflects")]
    found = compare(CompareConfig(runs, metrics=["recall@3", "ndcg@3"]))
    assert [row.settings["mode"] for row in found.rows] == ["direct", "reflection"]
    assert found.rows[1].cells[0].mean == pytest.approx(evaluated[0]["metrics"]["recall@3"])
    assert "reflection" in render(found, "text")


def test_a_model_that_was_not_taught_and_bad_settings_are_refused(folders, tmp_path):
    path = tmp_path / "untaught"
    path.mkdir()
    for file in folders[1].iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    report = json.loads((path / "recllm.json").read_text())
    del report["reflection"]
    (path / "recllm.json").write_text(json.dumps(report))
    with pytest.raises(UserError, match="was not taught to reflect"):
        evaluate(config((folders[0], path), tmp_path / "run"))
    assert not (tmp_path / "run").exists()
    for weight in (-0.1, float("nan"), float("inf")):
        with pytest.raises(UserError, match="entropy_weight must be a number from 0"):
            config(folders, "nowhere", entropy_weight=weight)
    with pytest.raises(UserError, match="mode reflection has none"):
        config(folders, "nowhere", engine="vllm")
    with pytest.raises(UserError, match="13 beams over 12 items"):
        evaluate(config(folders, tmp_path / "run", beams=13))


# ---- resumed, shared


def assert_same_bytes(one, other):
    for name in ("predictions.jsonl", "metrics.json"):
        assert (one / name).read_bytes() == (other / name).read_bytes()


def test_what_was_begun_is_gone_on_with(folders, tmp_path, monkeypatch):
    """Stopped after two blocks of five, as a kill between blocks leaves it."""
    whole, cut = config(folders, tmp_path / "whole", block=6), config(folders, tmp_path / "cut", block=6)
    evaluate(whole)
    catalogue, asked = Catalogue.load(folders[0]), []
    checkpoint = Checkpoint.load(folders[1], "cpu")
    ranker, truth = ranker_of(cut, checkpoint, catalogue), Truth.of(checkpoint, catalogue)
    plain = type(ranker).rank

    def rank(self, cases, k):
        asked.append(len(cases))
        if len(asked) == 3:
            raise KeyboardInterrupt
        return plain(self, cases, k)

    monkeypatch.setattr(type(ranker), "rank", rank)
    with pytest.raises(KeyboardInterrupt):
        evaluate_ranker("model", ranker, catalogue, cut.protocol(), cut.output, block=6, truth=truth)
    assert not (tmp_path / "cut" / "metrics.json").exists()
    evaluate_ranker("model", ranker, catalogue, cut.protocol(), cut.output, block=6, truth=truth)
    assert asked == [6] * 6  # the two that were done are not asked for again
    assert_same_bytes(tmp_path / "cut", tmp_path / "whole")
    with pytest.raises(UserError, match="holds another evaluation"):
        evaluate(config(folders, tmp_path / "cut", block=6, entropy_weight=0.0))


def test_two_that_share_the_blocks_write_the_file_of_one(folders, tmp_path):
    """Threads in place of processes; each has a model of its own."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    alone, both = config(folders, tmp_path / "alone", block=4), config(folders, tmp_path / "both", block=4)
    evaluate(alone)
    catalogue, meet = Catalogue.load(folders[0]), threading.Barrier(2)
    models = [Checkpoint.load(folders[1], "cpu") for _ in range(2)]

    def share(index: int):
        return evaluate_ranker(
            "model", ranker_of(both, models[index], catalogue), catalogue, both.protocol(), both.output, block=4,
            group=Processes(index, 2, "cpu", lambda: meet.wait(60)), truth=Truth.of(models[index], catalogue),
        )  # fmt: skip

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(share, range(2))
    torch.set_num_threads(threads)
    assert second is None
    assert first["reflection"]["drafts"] == 6
    assert_same_bytes(tmp_path / "both", tmp_path / "alone")
