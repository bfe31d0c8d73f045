"""Mode conversion: the lists are those after the whole text, repeats and new items apart, what cannot be is refused."""

import dataclasses
import json

import pytest
import torch
from conversions_for_tests import STYLE, say, write_stage_1, write_stage_2
from events_for_tests import random_shop, write_events
from helpers import write_small_model

from recllm import metrics
from recllm.catalogue import Catalogue
from recllm.checkpoint import Checkpoint
from recllm.decoding import Decoder
from recllm.errors import UserError
from recllm.evaluation import predictions
from recllm.evaluation.comparison import CompareConfig, compare
from recllm.evaluation.comparison_tables import render
from recllm.evaluation.conversion import ConversionRanker
from recllm.evaluation.repeats import kinds_of, slice_of
from recllm.evaluation.scoring import score, score_tables
from recllm.evaluation.stage import EvaluateConfig, evaluate
from recllm.event_prompts import EventWriter
from recllm.mixtures.conversion_cases import cases, histories_of
from recllm.prompting import PromptStyle


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """(data, stage 1, stage 2 with a learned selection)"""
    folder = tmp_path_factory.mktemp("conversions")
    data, stage_1 = write_stage_1(folder)
    return data, stage_1, write_stage_2(stage_1, folder / "learned")


@pytest.fixture(scope="module")
def evaluated(folders, tmp_path_factory):
    """folder name -> (metrics.json, predictions)"""
    output = tmp_path_factory.mktemp("evaluated")
    found = {model.name: evaluate(config(folders[0], model, output / model.name)) for model in folders[1:]}
    return output, {name: (result, lines_of(output / name)) for name, result in found.items()}


def config(data, model, output, **settings) -> EvaluateConfig:
    settings = {"mode": "conversion", "beams": 8, "k": [1, 5]} | settings
    return EvaluateConfig(model=str(model), data=str(data), output=str(output), **settings)


def lines_of(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]


@torch.no_grad()
def relevance_of(checkpoint: Checkpoint, history, user: str) -> torch.Tensor:
    """From one plain forward pass over the prompt alone. -> (J,)"""
    writer = EventWriter(STYLE, checkpoint.table, checkpoint.tokenizer)
    states = checkpoint.model.model(input_ids=torch.tensor(writer.ids([history]))).last_hidden_state
    ends = states[:, writer.ends([history])[0]]
    module, pay = checkpoint.conversion.module, checkpoint.model.get_input_embeddings().weight[writer.opening("pay")]
    users = module.user_rows([user])
    return module.relevance(ends, torch.ones(ends.shape[:2], dtype=torch.bool), states[:, -1], pay, users)[0]


@pytest.mark.parametrize("name", ["stage_1", "learned"])
def test_the_lists_are_those_after_the_whole_text(folders, evaluated, name):
    checkpoint, lines = Checkpoint.load(folders[0].parent.parent / name, "cpu"), evaluated[1][name][1]
    found = cases(Catalogue.load(folders[0]), "test")
    assert [line["target"] for line in lines] == found["item"].to_list()
    assert [line["repeat"] for line in lines] == found["repeat"].to_list()
    decoder = Decoder(checkpoint.model, checkpoint.tokens)
    for history, line in zip(histories_of(found), lines):
        shown = history[-4:]
        text = "A user's events, oldest first: " + "".join(
            f"<|{kind}|>{text_of(checkpoint, item)}" for item, kind in shown
        )
        evidence = [(one["item"], one["behaviour"]) for one in line.get("evidence", [])]
        text += "<|pay|>" + "".join(text_of(checkpoint, item) for item, _ in evidence)
        slow = decoder.beams(checkpoint.tokenizer([text], add_special_tokens=False)["input_ids"], 8)
        assert line["items"] == [checkpoint.table.items[row] for row in slow.rows[0]]
        assert line["scores"] == pytest.approx(slow.scores[0].tolist(), abs=2e-5)  # six digits are written
        if name == "stage_1":
            assert evidence == []
            continue
        relevance = relevance_of(checkpoint, history, line["user"])
        best = relevance.argsort(stable=True)[-2:].tolist()
        assert evidence == [shown[place] for place in best]
        assert [one["relevance"] for one in line["evidence"]] == pytest.approx(relevance[best].tolist(), abs=1e-4)


def text_of(checkpoint, item: str) -> str:
    return checkpoint.table.text_of(item)


def test_repeats_and_new_items_are_counted_apart(evaluated):
    for result, lines in evaluated[1].values():
        parts = result["conversion"]
        for kind, wanted in (("repeat", True), ("new", False)):
            some = [line for line in lines if bool(line["repeat"]) == wanted]
            assert parts[kind]["targets"] == len(some) > 3
            ranks = torch.tensor(
                [line["items"].index(line["target"]) if line["target"] in line["items"] else 10**6 for line in some]
            )
            for name, figure in (("recall", metrics.recall_at_k), ("ndcg", metrics.ndcg_at_k)):
                for k in (1, 5):
                    assert parts[kind]["metrics"][f"{name}@{k}"] == pytest.approx(float(figure(ranks, k).mean()))
            low, high = parts[kind]["intervals"]["recall@5"]
            assert low <= parts[kind]["metrics"]["recall@5"] <= high
        assert parts["repeat"]["targets"] + parts["new"]["targets"] == result["targets"] == result["users"]
        assert result["run"]["protocol"]["target_behaviour"] == "pay"
        by = result["slices"]["target met by"]
        assert {"nothing: a new item", "click", "cart + click"} <= by.keys()
        assert sum(part["targets"] for part in by.values()) == result["targets"]
        assert by["nothing: a new item"]["targets"] == parts["new"]["targets"]
        titles = [table.title for table in score_tables(result)]
        assert "targets that the user had met before, and new ones" in titles


def test_the_evidence_is_measured(evaluated):
    result, lines = evaluated[1]["learned"]
    evidence = [[one["item"] for one in line["evidence"]] for line in lines]
    assert result["conversion"]["evidence"]["events"] == pytest.approx(sum(map(len, evidence)) / len(lines), abs=1e-6)
    own = [line["target"] in items for line, items in zip(lines, evidence) if line["repeat"]]
    assert result["conversion"]["evidence"]["repeats_with_target"] == pytest.approx(sum(own) / len(own))
    assert "evidence" not in evaluated[1]["stage_1"][0]["conversion"]


def test_the_slice_names_what_was_met():
    import polars as pl

    found = slice_of(pl.Series([["click"], [], ["cart", "click"], ["click"]], dtype=pl.List(pl.String)))
    assert found.labels == ("click", "cart + click", "nothing: a new item")
    assert found.member.tolist() == [0, 2, 1, 0]


def test_what_the_module_knows_of_a_user_counts(folders):
    checkpoint = Checkpoint.load(folders[2], "cpu")
    ranker = ConversionRanker(checkpoint, Catalogue.load(folders[0]), beams=8)
    history = [("i01", "click"), ("i02", "cart"), ("i03", "click"), ("i04", "click")]
    ours, nobody = ranker.converter.beams([history] * 3, 8, ["u05", "u01", None]), ranker.converter.beams([history], 8)
    assert ours.relevance[0].tolist() != ours.relevance[1].tolist()
    torch.testing.assert_close(ours.relevance[2:], nobody.relevance, atol=1e-5, rtol=0)


@pytest.mark.parametrize("selection", ["recent", "random", "none"])
def test_the_ablations_choose_without_a_query(folders, tmp_path, selection):
    model = write_stage_2(folders[1], tmp_path / "model", selection=selection)
    result = evaluate(config(folders[0], model, tmp_path / "run"))
    assert result["run"]["ranker"]["selection"] == selection
    found = histories_of(cases(Catalogue.load(folders[0]), "test"))
    places = set()
    for history, line in zip(found, lines_of(tmp_path / "run")):
        evidence = [(one["item"], one["behaviour"]) for one in line.get("evidence", [])]
        assert all("relevance" not in one for one in line.get("evidence", []))
        if selection == "recent":
            assert evidence == history[-2:]
        elif selection == "none":
            assert evidence == []
        else:
            assert all(event in history[-4:] for event in evidence)
            places |= {history[-4:].index(event) for event in evidence}
    if selection != "random":
        return
    assert places == {0, 1, 2, 3}
    again = evaluate(config(folders[0], model, tmp_path / "again", batch_size=2, block=3))
    assert again["metrics"] == result["metrics"]
    for ours, theirs in zip(lines_of(tmp_path / "run"), lines_of(tmp_path / "again")):
        assert ours.get("evidence") == theirs.get("evidence")


def test_interrupted_and_resumed_it_ends_in_the_same_bytes(folders, evaluated, tmp_path, monkeypatch):
    settings = config(folders[0], folders[2], tmp_path / "run", block=5)
    whole = config(folders[0], folders[2], tmp_path / "whole", block=5)
    rank, asked = ConversionRanker.rank, []  # the third block of five is where it ends

    def until_the_third(self, some, k):
        asked.append(len(some))
        if len(asked) == 3:
            raise KeyboardInterrupt
        return rank(self, some, k)

    monkeypatch.setattr(ConversionRanker, "rank", until_the_third)
    with pytest.raises(KeyboardInterrupt):
        evaluate(settings)
    monkeypatch.undo()
    assert not (tmp_path / "run" / "predictions.jsonl").exists()
    evaluate(settings)
    evaluate(whole)
    for name in ("predictions.jsonl", "metrics.json"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    ours = [line["items"] for line in lines_of(tmp_path / "run")]
    assert ours == [line["items"] for line in evaluated[1]["learned"][1]]


def test_the_history_is_left_out_when_asked(folders, tmp_path):
    evaluate(config(folders[0], folders[2], tmp_path / "run", exclude_history=True))
    found = cases(Catalogue.load(folders[0]), "test")
    for history, line in zip(found["history"].to_list(), lines_of(tmp_path / "run")):
        assert not set(history) & set(line["items"])


def test_every_conversion_is_predicted_or_nothing_is_scored(folders, evaluated):
    lines = predictions.read(evaluated[0] / "learned" / "predictions.jsonl")
    catalogue = Catalogue.load(folders[0])
    with pytest.raises(UserError, match=r"1 of the \d+ targets of the test split have no prediction"):
        score(lines[1:], catalogue, "test", target_behaviour="pay")


def test_evaluations_are_laid_side_by_side_by_kind(evaluated, folders, tmp_path):
    runs = [str(evaluated[0] / name) for name in ("stage_1", "learned")]
    result, _ = evaluated[1]["learned"]
    assert kinds_of(result) == ["repeat", "new"]
    for kind in ("repeat", "new"):
        found = compare(CompareConfig(runs=runs, metrics=["recall@5", "ndcg@1"], cases=kind))
        assert found.targets == result["conversion"][kind]["targets"]
        row = found.rows[1]
        assert row.name == "learned"
        assert row.cells[0].mean == pytest.approx(result["conversion"][kind]["metrics"]["recall@5"])
        assert {"repeat": ", items met before", "new": ", items not met before"}[kind] in render(found, "text")
    assert compare(CompareConfig(runs=runs, metrics=["recall@5"])).targets == result["targets"]
    data, model = write_small_model(tmp_path)
    evaluate(EvaluateConfig(model=str(model), data=str(data), output=str(tmp_path / "run"), beams=5, k=[1]))
    with pytest.raises(UserError, match="was not evaluated on conversions"):
        compare(CompareConfig(runs=[str(tmp_path / "run")], metrics=["recall@1"], cases="new"))


# ---- what does not fit


def test_models_and_data_that_do_not_fit_are_refused(folders, tmp_path):
    data, stage_1, learned = folders
    with pytest.raises(UserError, match="the data hold out conversions of 'pay', not of 'cart'"):
        evaluate(config(data, stage_1, tmp_path / "run", target_behaviour="cart"))
    with pytest.raises(UserError, match="target_behaviour has no meaning in mode direct"):
        config(data, stage_1, tmp_path / "run", mode="direct", target_behaviour="pay")
    with pytest.raises(UserError, match="max_history 5: the model reads the last 4 items"):
        evaluate(config(data, learned, tmp_path / "run", max_history=5))
    other = write_events(tmp_path / "carts", random_shop(30), target_behaviour="cart").folder
    with pytest.raises(UserError, match="the model was trained for 'pay', not 'cart'"):
        evaluate(config(other, learned, tmp_path / "run"))
    data, model = write_small_model(tmp_path / "items")
    with pytest.raises(UserError, match="the data have no behaviours to tell conversions by"):
        evaluate(config(data, model, tmp_path / "run"))
    with pytest.raises(UserError, match="was not trained for conversions"):
        _ = Checkpoint.load(model, "cpu").conversion


def test_a_model_of_items_alone_is_refused(folders, tmp_path):
    import shutil

    shutil.copytree(folders[1], tmp_path / "model")
    say(tmp_path / "model", prompt=dataclasses.asdict(PromptStyle()))
    with pytest.raises(UserError, match="was not trained on behaviours"):
        evaluate(config(folders[0], tmp_path / "model", tmp_path / "run"))


def test_a_module_that_is_not_the_models_is_refused(folders, tmp_path):
    model = write_stage_2(folders[1], tmp_path / "model")
    write_stage_2(folders[1], tmp_path / "other", k=3)
    for name in ("prefix_module.json", "prefix_module.safetensors"):
        (model / name).write_bytes((tmp_path / "other" / name).read_bytes())
    with pytest.raises(UserError, match="is not the one that the model was trained with"):
        evaluate(config(folders[0], model, tmp_path / "run"))
    (model / "prefix_module.safetensors").unlink()
    with pytest.raises(UserError, match=r"prefix_module.safetensors"):
        evaluate(config(folders[0], model, tmp_path / "run"))
    say(model, conversion={"settings": {}})
    with pytest.raises(UserError, match="says not how the model is asked"):
        evaluate(config(folders[0], model, tmp_path / "run"))
