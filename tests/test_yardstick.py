"""One command trains and measures every baseline on the same users."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conversions_for_tests import repeating_shop
from events_for_tests import write_events
from helpers import write_small_model

from recllm.errors import UserError
from recllm.yardstick import BaselinesConfig, run_baselines

SCRIPT = Path(__file__).parents[1] / "eval" / "baselines.py"
QUICK = ["tiger.width=64", "tiger.layers=1", "tiger.epochs=1", "tiger.validation_users=10", "sasrec.epochs=1"]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_small_model(tmp_path_factory.mktemp("yardstick"), users=40)[0]


def test_all_of_them_on_the_same_users_in_one_table(data):
    command = [sys.executable, str(SCRIPT), "--data", str(data), "--output", str(data / "baselines"), "--k", "1", "3",
               "--length", "5", "--seeds", "0", "1", "--settings", *QUICK, "--baselines", "popularity", "repeat-last",
               "item-knn", "sasrec", "tiger"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name in ("popularity", "repeat-last", "item-knn", "sasrec", "tiger"):
        assert name in done.stdout
    assert "±" in done.stdout
    runs = sorted((data / "baselines" / "test").iterdir())
    assert [run.name for run in runs] == [
        "item-knn", "popularity", "repeat-last", "sasrec-seed0", "sasrec-seed1", "tiger-seed0", "tiger-seed1",
    ]  # fmt: skip
    figures = [json.loads((run / "metrics.json").read_text()) for run in runs]
    assert {entry["users"] for entry in figures} == {40}
    assert len({entry["run"]["catalogue"]["fingerprint"] for entry in figures}) == 1
    assert figures[1]["metrics"]["recall@5"] > 0
    assert figures[2]["metrics"]["recall@5"] == 0  # nobody takes an item twice here
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.stdout == done.stdout


def test_without_the_history(data):
    config = BaselinesConfig(
        data=str(data), output=str(data / "without"), baselines=["popularity", "item-knn"], k=[1], length=3,
        exclude_history=True,
    )  # fmt: skip
    from recllm.catalogue import Catalogue

    histories = Catalogue.load(data).targets("test")["history"].to_list()
    for folder in run_baselines(config):
        lines = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
        assert not any(set(line["items"]) & set(history) for line, history in zip(lines, histories))


def test_conversions_are_measured_apart(tmp_path):
    data = write_events(tmp_path, repeating_shop(30), target_behaviour="pay").folder
    output = tmp_path / "baselines"
    command = [sys.executable, str(SCRIPT), "--data", str(data), "--output", str(output), "--k", "1", "3", "--length",
               "5", "--protocol", "conversion", "--settings", "sasrec.epochs=1", "sasrec.width=16", "--baselines",
               "popularity", "repeat-last", "item-knn", "sasrec"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    places = [done.stdout.index(f"{said}. Seeds") for said in ("users", "items met before", "items not met before")]
    assert places == sorted(places)
    found = {run.name: json.loads((run / "metrics.json").read_text()) for run in (output / "test-conversion").iterdir()}
    assert found.keys() == {"popularity", "repeat-last", "item-knn", "sasrec-seed0"}
    targets = {kind: {run["conversion"][kind]["targets"] for run in found.values()} for kind in ("repeat", "new")}
    assert len(targets["repeat"]) == len(targets["new"]) == 1
    assert targets["repeat"].pop() + targets["new"].pop() == found["popularity"]["targets"]
    repeats = found["repeat-last"]["conversion"]
    assert repeats["repeat"]["metrics"]["recall@5"] > repeats["new"]["metrics"]["recall@5"] == 0
    assert found["popularity"]["run"]["ranker"]["behaviour"] == "pay"
    assert {run["run"]["protocol"]["target_behaviour"] for run in found.values()} == {"pay"}


def test_conversions_of_other_data_are_refused(data):
    with pytest.raises(UserError, match="no behaviours to tell conversions by"):
        run_baselines(BaselinesConfig(data=str(data), output="o", protocol="conversion", length=10))


def test_settings_of_the_models_are_converted():
    config = BaselinesConfig(data="d", output="o", settings=["tiger.lr=3e-4", "tiger.bf16=false", "sasrec.width=32"])
    assert config.settings_of("tiger") == {"lr": 3e-4, "bf16": False}
    assert config.settings_of("sasrec") == {"width": 32}


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"settings": ["tiger.epoch=3"]}, "'tiger.epoch=3' is no setting"),
        ({"settings": ["tiger.epochs=many"]}, "not a value of int"),
        ({"settings": ["knn.k=3"]}, "is no setting"),
        ({"settings": ["tiger.seed=3"]}, "is no setting"),
        ({"seeds": [0, 0]}, "no list of different"),
        ({"baselines": []}, "no list of different"),
        ({"baselines": ["sasrc"]}, "'sasrc' is not one of popularity"),
        ({"exclude_history": True}, "repeat-last recommends the history"),
        ({"length": 3}, "too short"),
    ],
)
def test_bad_settings_fail_at_construction(settings, sentence):
    with pytest.raises(UserError, match=sentence):
        BaselinesConfig(data="d", output="o", **settings)
