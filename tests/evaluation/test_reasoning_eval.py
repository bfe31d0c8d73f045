"""Reasoned answers are measured on all users, by the figures' own definitions, in the same bytes however it was run."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import pytest
import torch
from helpers import write_catalogue
from taught import chain_of, write_reasoning_model

from recllm import launch, metrics
from recllm.catalogue import Catalogue
from recllm.checkpoint import Checkpoint
from recllm.decoding.chains import Sampling, WrittenChain
from recllm.errors import UserError
from recllm.evaluation.comparison import CompareConfig, compare
from recllm.evaluation.comparison_tables import render
from recllm.evaluation.predictions import Prediction, SampleLine
from recllm.evaluation.ranking import Sample
from recllm.evaluation.reasoning import different
from recllm.evaluation.run import evaluate_ranker
from recllm.evaluation.scoring import score, score_tables
from recllm.evaluation.stage import EvaluateConfig, evaluate, ranker_of
from recllm.processes import Processes
from recllm.reasoner import Reasoner, opened
from recllm.reasoning import OPENING
from recllm.vllm_chains import VLLMChains

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return write_reasoning_model(tmp_path_factory.mktemp("reasoning"))


@pytest.fixture(scope="module")
def checkpoint(folders):
    return Checkpoint.load(folders[1], "cpu")


def config(folders, output, mode="reasoning", **settings) -> EvaluateConfig:
    data, model = map(str, folders)
    given = {"beams": 5, "k": [1, 3], "samples": 4, "max_new_tokens": 60, "temperature": 1.0, "top_p": 1.0} | settings
    return EvaluateConfig(model=model, data=data, output=str(output), mode=mode, **given)


def lines_of(output) -> list[dict]:
    return [json.loads(line) for line in (output / "predictions.jsonl").read_text().splitlines()]


# ---- figures by hand


def sample(item, score=None, tokens=3, parsed=True):
    return SampleLine(item, score, -1.5, tokens, parsed)


def test_the_figures_of_samples_by_hand(tmp_path):
    """Three users took a, b, c last. Four samples each: of the first, two are right but not the best-scored."""
    catalogue = write_catalogue(
        tmp_path, ["a", "b", "c", "d"], {u: ["d", "d", t] for u, t in (("u", "a"), ("v", "b"), ("w", "c"))}
    )
    four = [sample("d", -1.0), sample("a", -2.0), sample("a", -3.0, 5), sample(None, parsed=False, tokens=9)]
    given = [
        Prediction("u", 2, "a", ["d", "a"], [-1.0, -2.0], four),
        Prediction("v", 2, "b", ["b"], [-0.5], [sample("b", -0.5)] * 4),
        Prediction("w", 2, "c", [], [], [sample(None, parsed=False)] * 4),
    ]
    scores = score(given, catalogue, "test", (1, 2), length=4, pass_ks=(1, 2, 4))
    found = scores["reasoning"]
    # Of four samples two are right: two drawn of them hold a right one unless both are of the other two, 1 - 1/6.
    wanted = {"pass@1": (2 / 4 + 1) / 3, "pass@2": (5 / 6 + 1) / 3, "pass@4": 2 / 3}
    assert {name: found["metrics"][name] for name in wanted} == pytest.approx(wanted)
    assert found["metrics"]["ranked_hit@1"] == pytest.approx(1 / 3)
    assert found["metrics"]["ranked_hit@2"] == pytest.approx(2 / 3)
    for k in (1, 2):
        assert found["metrics"][f"ranked_hit@{k}"] == scores["metrics"][f"recall@{k}"]
    assert set(found["intervals"]) == set(found["metrics"])
    assert found["samples"] == 4
    assert found["format_validity"] == pytest.approx(7 / 12)
    assert found["answered"] == pytest.approx(7 / 12)
    assert found["distinct_share"] == pytest.approx((2 / 4 + 1 / 4 + 0) / 3)
    assert found["tokens_mean"] == pytest.approx((3 + 3 + 5 + 9 + 8 * 3) / 12)
    assert found["tokens_median"] == 3
    backwards = score(given[::-1], catalogue, "test", (1, 2), length=4, pass_ks=(1, 2, 4))
    assert backwards == scores
    printed = [table.title for table in score_tables(scores)]
    assert "reasoning, 4 samples a target" in printed


def test_different_items_by_their_best_score():
    some = [Sample(row, value, -1.0, 3, True) for row, value in ((4, -2.0), (1, -3.0), (4, -1.0), (2, -3.0))]
    some.append(Sample(-1, float("-inf"), -1.0, 3, False))
    rows, scores = different([some], 4)
    assert rows.tolist() == [[4, 1, 2, -1]]
    assert scores.tolist() == [[-1.0, -3.0, -3.0, float("-inf")]]


@pytest.mark.parametrize(
    ("samples", "sentence"),
    [([sample("b")], "1 samples, and 2 in the first line"), ([sample("zz"), sample("a")], "a sample is 'zz'")],
)
def test_samples_of_another_file_are_refused(tmp_path, samples, sentence):
    catalogue = write_catalogue(tmp_path, ["a", "b"], {"u": ["a", "b", "a"], "v": ["a", "a", "b"]})
    given = [
        Prediction("u", 2, "a", ["a"], [0.0], [sample("a"), sample("b")]),
        Prediction("v", 2, "b", ["b"], [0.0], samples),
    ]
    with pytest.raises(UserError, match=sentence):
        score(given, catalogue, "test", (1,), pass_ks=(1,))


def test_a_direct_prediction_has_the_bytes_it_had():
    assert msgspec.json.encode(Prediction("u", 2, "a", ["a"], [0.5])) == (
        b'{"user":"u","position":2,"target":"a","items":["a"],"scores":[0.5]}'
    )


# ---- a model that reasons


def test_the_model_of_these_tests_reasons(checkpoint):
    reasoner = Reasoner.of(checkpoint, Sampling(0, 1.0, 60))
    (prompt,) = reasoner.writer.ids([["i1", "i2", "i5"]])
    ((chain,),) = reasoner.chains([prompt])
    said = reasoner.parsed(chain, "i5")
    assert (said.evidence, said.item) == (chain_of(["i1", "i2"]).evidence, "i5")
    assert reasoner.text(chain).endswith(OPENING)
    assert reasoner.parsed(chain, None) is None
    cut = WrittenChain(chain.ids[:-1], chain.logps[:-1], False)
    assert reasoner.parsed(cut, "i5") is None
    assert opened(cut, reasoner.openings[0], 2) == chain
    ended = WrittenChain((*cut.ids, 2), (*cut.logps, -1.0), False)
    assert opened(ended, reasoner.openings[0], 2).ids == chain.ids
    assert reasoner.text(ended) == reasoner.text(cut)


def test_scores_are_those_of_the_codes_after_the_chain(checkpoint):
    """Against a plain forward pass over prompt, chain and item."""
    reasoner = Reasoner.of(checkpoint, Sampling(1.0, 1.0, 60))
    prompts = reasoner.writer.ids([["i1", "i2"], ["i7", "i3", "i4"]])
    chains = reasoner.chains(prompts, 3)
    for case, some in enumerate(chains):
        chains[case][1] = WrittenChain(some[1].ids[:5], some[1].logps[:5], False)
    found = reasoner.one_answer_each(prompts, chains)
    beams = reasoner.beams(prompts, chains, 3)
    assert found.rows.shape == (2, 3)
    assert (found.rows[:, 1] == -1).all()
    assert torch.isneginf(found.scores[:, 1]).all()
    for case, place in ((0, 0), (0, 2), (1, 0), (1, 2)):
        own = after(checkpoint, [*prompts[case], *chains[case][place].ids], int(found.rows[case, place]))
        assert float(found.scores[case, place]) == pytest.approx(own, abs=1e-4)
    for case in range(2):
        own = after(checkpoint, [*prompts[case], *chains[case][0].ids], int(beams.rows[case, 0]))
        assert float(beams.scores[case, 0]) == pytest.approx(own, abs=1e-4)


def after(checkpoint, ids: list[int], row: int) -> float:
    """log-probability of an item's codes, over each level's."""
    total = 0.0
    for level, token in enumerate(checkpoint.tokens.ids_of(checkpoint.table.items[row])):
        with torch.no_grad():
            logits = checkpoint.model(torch.tensor([ids])).logits[0, -1]
        total += float(logits[token] - logits[checkpoint.tokens.levels[level]].logsumexp(0))
        ids = [*ids, token]
    return total


def test_every_user_is_sampled_and_scored(folders, tmp_path):
    result = evaluate(config(folders, tmp_path / "run", keep_chains=True))
    lines = lines_of(tmp_path / "run")
    assert len(lines) == result["users"] == 30
    assert all(len(line["samples"]) == 4 for line in lines)
    found, answers = result["reasoning"], [sample for line in lines for sample in line["samples"]]
    right = [sum(sample["item"] == line["target"] for sample in line["samples"]) for line in lines]
    for k in (1, 4):
        if f"pass@{k}" in found["metrics"]:
            wanted = float(metrics.pass_at_k(4, torch.tensor(right), k).mean())
            assert found["metrics"][f"pass@{k}"] == pytest.approx(wanted)
    assert list(found["metrics"]) == ["pass@1", "ranked_hit@1", "ranked_hit@3"]
    assert found["metrics"]["ranked_hit@3"] == result["metrics"]["recall@3"]
    assert found["format_validity"] == pytest.approx(sum(one["parsed"] for one in answers) / 120)
    assert found["answered"] == pytest.approx(sum(one["item"] is not None for one in answers) / 120)
    assert 0.5 < found["format_validity"] <= found["answered"] <= 1
    assert all(one["chain"].startswith("<think>") for one in answers if one["parsed"])
    for line in lines:
        best = {}
        for one in line["samples"]:
            if one["item"] is not None:
                best[one["item"]] = max(best.get(one["item"], -1e9), one["score"])
        assert sorted(best, key=lambda item: -best[item]) == line["items"]
    assert len({repr(line["samples"]) for line in lines}) == 30, "users draw differently"
    about = result["run"]
    assert about["ranker"]["mode"] == "reasoning"
    assert (about["ranker"]["temperature"], about["ranker"]["samples"]) == (1.0, 4)
    assert about["protocol"]["pass_k"] == [1]
    assert "users" not in about["protocol"]
    other = evaluate(config(folders, tmp_path / "other", seed=1))
    assert [line["samples"] for line in lines_of(tmp_path / "other")] != [line["samples"] for line in lines]
    assert other["reasoning"]["samples"] == 4


def test_one_chain_then_beams(folders, tmp_path):
    result = evaluate(config(folders, tmp_path / "run", mode="reason_then_beam", temperature=None))
    lines = lines_of(tmp_path / "run")
    assert result["run"]["ranker"]["temperature"] == 0
    assert result["reasoning"]["samples"] == 1
    assert result["reasoning"]["metrics"] == {}
    for line in lines:
        (one,) = line["samples"]
        if one["item"] is not None:
            assert len(set(line["items"])) == 5
            assert (one["item"], one["score"]) == (line["items"][0], line["scores"][0])
        else:
            assert line["items"] == []
    assert result["lists"]["validity"] == pytest.approx(sum(len(line["items"]) for line in lines) / 150)
    assert result["reasoning"]["answered"] > 0.5


@pytest.mark.parametrize("mode", ["reasoning", "reason_then_beam"])
def test_the_history_can_be_excluded(folders, tmp_path, mode):
    evaluate(config(folders, tmp_path / "run", mode, exclude_history=True))
    histories = Catalogue.load(folders[0]).targets("test")["history"].to_list()
    shown = 0
    for history, line in zip(histories, lines_of(tmp_path / "run")):
        assert not set(history) & set(line["items"])
        assert not set(history) & {one["item"] for one in line["samples"]}
        shown += len(line["items"])
    assert shown > 30


def test_a_chain_without_an_answer_recommends_nothing(folders, tmp_path):
    for mode in ("reasoning", "reason_then_beam"):
        result = evaluate(config(folders, tmp_path / mode, mode, max_new_tokens=4))
        assert result["metrics"]["recall@3"] == 0
        assert result["reasoning"]["answered"] == result["reasoning"]["format_validity"] == 0
        assert result["reasoning"]["tokens_mean"] == 4
        assert lines_of(tmp_path / mode)[0]["samples"][0]["score"] is None


def test_some_users_are_a_protocol_of_their_own(folders, tmp_path):
    some = evaluate(config(folders, tmp_path / "some", users=7))
    more = evaluate(config(folders, tmp_path / "more", users=12, block=5))
    assert (some["users"], more["users"]) == (7, 12)
    assert some["run"]["protocol"]["users"] == 7
    few, many = ({line["user"]: line for line in lines_of(tmp_path / name)} for name in ("some", "more"))
    assert set(few) < set(many)
    assert all(line["items"] == many[user]["items"] for user, line in few.items()), "a case's draws are its own"
    lengths = [line["position"] for line in few.values()]
    wanted = {"1-4": sum(n < 5 for n in lengths), "5-9": sum(n >= 5 for n in lengths)}
    found = {label: part["users"] for label, part in some["slices"]["history length"].items()}
    assert found == {label: count for label, count in wanted.items() if count}
    other = evaluate(config(folders, tmp_path / "other", users=7, users_seed=1))
    assert {line["user"] for line in lines_of(tmp_path / "other")} != set(few)
    assert other["run"]["protocol"]["users_seed"] == 1
    assert score_tables(some)[0].title == "7 users, 7 targets, a part of the split"
    alone = compare(CompareConfig([str(tmp_path / "some")], metrics=["recall@3"]))
    assert "7 users (a part of the split)" in render(alone, "text")
    with pytest.raises(UserError, match=r"has users 7, and .*more has 12"):
        compare(CompareConfig([str(tmp_path / "more"), str(tmp_path / "some")], metrics=["recall@3"]))
    with pytest.raises(UserError, match="there are 30 users to measure, not 31"):
        evaluate(config(folders, tmp_path / "none", users=31))
    # Of the subset every target counts, as of the whole.
    path = tmp_path / "some" / "predictions.jsonl"
    given = [msgspec.json.decode(line, type=Prediction) for line in path.read_text().splitlines()]
    catalogue = Catalogue.load(folders[0])
    with pytest.raises(UserError, match="1 of the 7 targets of the test split have no prediction"):
        score(given[1:], catalogue, "test", (1,), users=7)
    with pytest.raises(UserError, match="23 of the 30 targets"):
        score(given, catalogue, "test", (1,))


def test_runs_are_compared_with_their_mode_in_sight(folders, tmp_path):
    common = {"k": [1, 3], "max_new_tokens": 60}
    evaluate(config(folders, tmp_path / "direct", "direct", name="direct", **common))
    for seed in (0, 1):
        evaluate(config(folders, tmp_path / f"sampled{seed}", name="sampled", pass_k=[1, 4], seed=seed, **common))
    runs = [str(tmp_path / name) for name in ("direct", "sampled0", "sampled1")]
    found = compare(CompareConfig(runs, metrics=["recall@1", "recall@3"]))
    assert [row.settings["mode"] for row in found.rows] == ["direct", "reasoning"]
    assert "reasoning" in render(found, "text")
    passed = compare(CompareConfig(runs[1:], metrics=["pass@4", "recall@3"]))
    figures = [json.loads((tmp_path / f"sampled{seed}" / "metrics.json").read_text()) for seed in (0, 1)]
    wanted = sum(one["reasoning"]["metrics"]["pass@4"] for one in figures) / 2
    assert passed.rows[0].cells[0].mean == pytest.approx(wanted)
    assert "Pass@4" in render(passed, "latex")
    with pytest.raises(UserError, match="'pass@4' is not a metric of all these runs"):
        compare(CompareConfig(runs, metrics=["pass@4"]))


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"pass_k": [1, 8]}, "pass@8 needs as many samples, not 4"),
        ({"pass_k": [1, 1]}, "pass_k"),
        ({"k": [1, 5]}, "lists of 4 items are too short"),
        ({"temperature": -1.0}, "temperature"),
        ({"users": 0}, "users must be at least 1"),
        ({"block": 0}, "block"),
        ({"samples": 0, "k": [1]}, "lists of 0 items"),
    ],
)
def test_bad_settings_fail_before_anything_is_loaded(settings, sentence):
    with pytest.raises(UserError, match=sentence):
        config(("nowhere", "nowhere"), "nowhere", **settings)


def test_vllm_is_asked_for_where_it_is(folders, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="mode direct has none"):
        config(folders, tmp_path, "direct", engine="vllm")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="vLLM is not installed"):
        VLLMChains("nowhere")


def test_a_model_that_was_not_taught_is_refused(folders, tmp_path):
    untaught = folders[0].parent / "model"
    with pytest.raises(UserError, match="was not taught to reason"):
        evaluate(config((folders[0], untaught), tmp_path / "run"))


# ---- killed, resumed, shared


def settings_of(folders, output) -> list[str]:
    data, model = map(str, folders)
    given = {"mode": "reasoning", "samples": 3, "temperature": 1.0, "max_new_tokens": 50, "block": 2, "k": 1}
    settings = given | {"model": model, "data": data, "output": output}
    return ["--keep_chains", *(str(part) for name, value in settings.items() for part in (f"--{name}", value))]


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def whole(folders, tmp_path, one_thread):
    launch.run(evaluate, EvaluateConfig, args=settings_of(folders, tmp_path / "whole"))
    return tmp_path / "whole"


def assert_same_bytes(one, other):
    for name in ("predictions.jsonl", "metrics.json"):
        assert (one / name).read_bytes() == (other / name).read_bytes()


def test_killed_with_sigkill_and_resumed(folders, whole, tmp_path):
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "eval" / "evaluate.py"), *settings_of(folders, tmp_path / "killed")]
    process = subprocess.Popen(command, env=environment)
    parts, deadline = tmp_path / "killed" / "parts", time.monotonic() + 120
    while len(list(parts.glob("0*.jsonl"))) < 3 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 3 <= len(list(parts.glob("0*.jsonl"))) < 15, "killed too early or too late to show anything"
    launch.run(evaluate, EvaluateConfig, args=settings_of(folders, tmp_path / "killed"))
    assert_same_bytes(tmp_path / "killed", whole)


def test_two_that_share_the_blocks_write_the_file_of_one(folders, whole, tmp_path):
    """Threads in place of processes, which tests/evaluation/test_run.py starts: each has a model of its own."""
    (config,) = launch.parse(EvaluateConfig, args=settings_of(folders, tmp_path / "two"))
    catalogue, meet = Catalogue.load(folders[0]), threading.Barrier(2)
    rankers = [ranker_of(config, Checkpoint.load(folders[1], "cpu"), catalogue) for _ in range(2)]

    def share(index: int):
        group = Processes(index, 2, "cpu", lambda: meet.wait(60))
        return evaluate_ranker(
            "reasoning", rankers[index], catalogue, config.protocol(), config.output, group=group, block=2
        )

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(share, range(2))
    assert second is None
    assert first["reasoning"]["samples"] == 3
    assert_same_bytes(tmp_path / "two", whole)
