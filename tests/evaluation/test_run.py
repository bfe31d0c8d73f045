"""An evaluation ends in the same bytes however often it was killed and however many processes did it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import torchrun, write_catalogue, write_small_model

from recllm.errors import UserError
from recllm.evaluation.ranking import Ranking
from recllm.evaluation.run import Protocol, evaluate_ranker
from recllm.evaluation.stage import EvaluateConfig, evaluate

ROOT = Path(__file__).parents[2]
PROTOCOL = Protocol(k=(1, 2), length=3)


class FirstItems:
    """Ranks the first rows for everybody, and counts how many it was asked about."""

    def __init__(self, fail_after: int | None = None):
        self.asked, self.fail_after = 0, fail_after

    def describe(self) -> dict:
        return {"ranker": "first"}

    def rank(self, cases, k):
        if self.fail_after is not None and self.asked >= self.fail_after:
            raise KeyboardInterrupt
        self.asked += len(cases)
        rows = torch.arange(k).expand(len(cases), -1)
        return Ranking(rows, -rows.double() / 3)


@pytest.fixture
def catalogue(tmp_path):
    items = [f"i{n}" for n in range(5)]
    return write_catalogue(
        tmp_path / "data", items, {f"u{n}": ["i3", "i4", items[n % 4], items[n % 5]] for n in range(9)}
    )


def test_the_figures_by_hand(catalogue, tmp_path):
    """u0 … u8 took i0, i1, i2, i3, i4, i0, i1, i2, i3 last; everybody is shown i0, i1, i2."""
    result = evaluate_ranker("first", FirstItems(), catalogue, PROTOCOL, tmp_path / "run", seed=7)
    assert result["metrics"]["recall@1"] == pytest.approx(2 / 9)
    assert result["metrics"]["recall@2"] == pytest.approx(4 / 9)
    assert result["users"] == 9
    run = result["run"]
    assert (run["name"], run["split"], run["seed"], run["ranker"]) == ("first", "test", 7, {"ranker": "first"})
    assert run["catalogue"]["fingerprint"] == catalogue.fingerprint
    assert {"torch", "transformers", "recllm"} <= set(run["versions"])
    assert json.loads((tmp_path / "run" / "metrics.json").read_text()) == result
    lines = (tmp_path / "run" / "predictions.jsonl").read_text().splitlines()
    assert json.loads(lines[3]) == {
        "user": "u3", "position": 3, "target": "i3", "items": ["i0", "i1", "i2"], "scores": [0.0, -0.333333, -0.666667],
    }  # fmt: skip
    assert not (tmp_path / "run" / "parts").exists()


def test_interrupted_and_resumed(catalogue, tmp_path):
    evaluate_ranker("first", FirstItems(), catalogue, PROTOCOL, tmp_path / "whole", block=2)
    with pytest.raises(KeyboardInterrupt):
        evaluate_ranker("first", FirstItems(fail_after=5), catalogue, PROTOCOL, tmp_path / "run", block=2)
    assert not (tmp_path / "run" / "predictions.jsonl").exists()
    with pytest.raises(UserError, match="was begun in this folder"):  # other blocks would not fit those that are done
        evaluate_ranker("first", FirstItems(), catalogue, PROTOCOL, tmp_path / "run", block=3)
    rest = FirstItems()
    evaluate_ranker("first", rest, catalogue, PROTOCOL, tmp_path / "run", block=2)
    assert rest.asked == 9 - 6  # blocks of two: three of them were done
    for name in ("predictions.jsonl", "metrics.json"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_the_same_run_returns_at_once_and_another_is_refused(catalogue, tmp_path):
    first = evaluate_ranker("first", FirstItems(), catalogue, PROTOCOL, tmp_path / "run")
    again = FirstItems()
    assert evaluate_ranker("first", again, catalogue, PROTOCOL, tmp_path / "run") == first
    assert again.asked == 0
    with pytest.raises(UserError, match="holds another evaluation"):
        evaluate_ranker("first", again, catalogue, Protocol(k=(1,), length=3), tmp_path / "run")
    other = evaluate_ranker("first", again, catalogue, Protocol(k=(1,), length=3), tmp_path / "run", overwrite=True)
    assert list(other["metrics"]) == ["recall@1", "ndcg@1", "mrr@1", "recall@3"]


def test_one_begun_with_other_settings_is_refused(catalogue, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        evaluate_ranker("first", FirstItems(fail_after=0), catalogue, PROTOCOL, tmp_path / "run")
    with pytest.raises(UserError, match="was begun in this folder"):
        evaluate_ranker("first", FirstItems(), catalogue, PROTOCOL, tmp_path / "run", seed=1)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"k": ()}, "no list of different"),
        ({"k": (0,)}, "no list"),
        ({"k": (5, 30)}, "lists of 20 items are too short"),
    ],
)
def test_bad_protocols_fail_at_construction(settings, sentence):
    with pytest.raises(UserError, match=sentence):
        Protocol(**settings)


def test_longer_lists_than_the_catalogue_are_refused(catalogue, tmp_path):
    with pytest.raises(UserError, match="lists of 6 items from 5"):
        evaluate_ranker("first", FirstItems(), catalogue, Protocol(k=(1,), length=6), tmp_path / "run")


def test_a_split_without_targets_is_refused(tmp_path):
    catalogue = write_catalogue(tmp_path / "data", ["a", "b", "c"], {"u": ["a", "b", "c"]}, split="train")
    with pytest.raises(UserError, match="'test' has no target"):
        evaluate_ranker("first", FirstItems(), catalogue, PROTOCOL, tmp_path / "run")


# ---- a checkpoint


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return write_small_model(tmp_path_factory.mktemp("evaluate"), users=60)


def config(folders, output, **settings) -> EvaluateConfig:
    data, model = map(str, folders)
    return EvaluateConfig(model=model, data=data, output=str(output), beams=5, k=[1, 3], **settings)


def test_a_checkpoint_is_evaluated_on_every_user(folders, tmp_path):
    result = evaluate(config(folders, tmp_path / "run"))
    lines = [json.loads(line) for line in (tmp_path / "run" / "predictions.jsonl").read_text().splitlines()]
    assert result["users"] == len(lines) == 60
    assert all(len(set(line["items"])) == 5 for line in lines)
    assert result["lists"]["validity"] == 1
    hits = sum(line["target"] in line["items"][:3] for line in lines)
    assert result["metrics"]["recall@3"] == pytest.approx(hits / 60)
    assert result["run"]["ranker"]["normaliser"] == "level"
    assert result["run"]["ranker"]["beams"] == 5


def test_the_history_can_be_excluded(folders, tmp_path):
    evaluate(config(folders, tmp_path / "run", exclude_history=True))
    from recllm.catalogue import Catalogue

    cases = Catalogue.load(folders[0]).targets("test")
    lines = [json.loads(line) for line in (tmp_path / "run" / "predictions.jsonl").read_text().splitlines()]
    for history, line in zip(cases["history"].to_list(), lines):
        assert not set(history) & set(line["items"])


def test_data_of_other_items_are_refused(folders, tmp_path):
    write_catalogue(tmp_path / "other", ["x", "i1", "i2"], {"u": ["x", "i1", "i2"]})
    with pytest.raises(UserError, match="1 items of the data have no semantic ID in the model, 'x' first"):
        evaluate(config((tmp_path / "other", folders[1]), tmp_path / "run"))


def test_a_longer_history_than_the_model_reads_is_refused(folders, tmp_path):
    with pytest.raises(UserError, match="max_history 51: the model reads the last 50 items"):
        evaluate(config(folders, tmp_path / "run", max_history=51))


def test_more_beams_than_items_are_refused(folders, tmp_path):
    with pytest.raises(UserError, match="40 beams over 12 items"):
        evaluate(EvaluateConfig(model=str(folders[1]), data=str(folders[0]), output=str(tmp_path), beams=40))


def command(folders, output, block) -> list[str]:
    data, model = map(str, folders)
    script = [str(ROOT / "eval" / "evaluate.py"), "--model", model, "--data", data, "--output", str(output)]
    return [*script, "--beams", "5", "--k", "1", "3", "--block", block]


def test_two_processes_write_the_file_of_one(folders, tmp_path):
    """Three blocks for two processes, on one thread each."""
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    alone = subprocess.run(
        [sys.executable, *command(folders, tmp_path / "one", "16")], env=environment, capture_output=True
    )
    assert alone.returncode == 0, alone.stderr.decode()
    both = torchrun(2, *command(folders, tmp_path / "two", "16"))
    both = subprocess.run(both, env=environment, capture_output=True)
    assert both.returncode == 0, both.stderr.decode()
    assert b"process 0 of 2" in both.stderr or b"recall@3" in both.stdout
    for name in ("predictions.jsonl", "metrics.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_killed_with_sigkill_and_resumed(folders, tmp_path):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, *command(folders, tmp_path / "killed", "4")], env=environment)
    parts = tmp_path / "killed" / "parts"
    deadline = time.monotonic() + 120
    while len(list(parts.glob("0*.jsonl"))) < 3 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = len(list(parts.glob("0*.jsonl")))
    assert 3 <= done < 15, "killed too early or too late to show anything"
    for output in ("killed", "whole"):
        again = subprocess.run([sys.executable, *command(folders, tmp_path / output, "4")], env=environment)
        assert again.returncode == 0
    for name in ("predictions.jsonl", "metrics.json"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
