"""The console script and the README's commands, as a user types them."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from recllm import demo as demos
from recllm.catalogue import Catalogue
from recllm.demo import DemoConfig, demo
from recllm.errors import UserError

ROOT = Path(__file__).parents[1]


def recllm(*arguments, cwd=None) -> subprocess.CompletedProcess:
    code = "from recllm.cli import main; main()"
    return subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, cwd=cwd)


def test_the_demo_goes_from_a_log_to_a_model_and_says_what_it_made(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(demos.SFT, "num_train_epochs", 1)  # what it says is asked, not what it learns
    monkeypatch.setitem(demos.RL, "max_steps", 2)
    monkeypatch.setattr(demos, "REASONED", 5)
    demo(DemoConfig(output=str(tmp_path / "demo"), items=80, users=60))
    said = capsys.readouterr().out
    lines = ("users / items / events", "knowing the history alone", "distinct", "rows", "is now <|a_", "Next,")
    for line in (*lines, "sft, direct", "srpo, direct", "the same model by reasoning", "pass@10", "reasoning"):
        assert line in said
    inspected = recllm("inspect", tmp_path / "demo" / "model")
    assert "semantic IDs" in inspected.stdout
    assert "tiny" in inspected.stdout
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "demo").rglob("*") if path.is_file()}
    demo(DemoConfig(output=str(tmp_path / "demo"), items=80, users=60))
    assert files == {path: path.stat().st_mtime_ns for path in (tmp_path / "demo").rglob("*") if path.is_file()}


def test_a_shop_too_small_to_show_anything_is_refused():
    with pytest.raises(UserError, match="too small"):
        DemoConfig(items=3)


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["help"], 0, "recllm demo"),
        (["version"], 0, "recllm 0."),
        (["dmeo"], 2, "error: 'dmeo' is not a command. Fix: recllm demo"),
        (["inspect", "nowhere"], 2, "error: nowhere: the folder holds no prepared data"),
    ],
)
def test_exit_codes_and_words(arguments, code, said):
    ran = recllm(*arguments)
    assert ran.returncode == code
    assert said in ran.stdout + ran.stderr
    assert "Traceback" not in ran.stderr


def test_the_readmes_own_data_example_runs_as_it_stands(tmp_path):
    """Its block of commands, on its two files with more lines of the same shape."""
    commands = re.search(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1].strip().splitlines()
    assert len(commands) == 4
    items = [f"B{n:04d}" for n in range(40)]
    with open(tmp_path / "log.jsonl", "w") as log:
        for user in range(60):
            for step in range(8):
                event = {"user": f"u{user}", "item": items[(7 * user + step) % 40], "behaviour": "click"}
                log.write(json.dumps(event | {"timestamp": 1_700_000_000 + step}) + "\n")
    with open(tmp_path / "items.jsonl", "w") as catalogue:
        for number, item in enumerate(items):
            about = {"title": f"Trail shoes {number}", "brand": "Nord", "categories": ["Shoes"], "description": "Dry."}
            catalogue.write(json.dumps({"item": item} | about) + "\n")
    for command in commands:
        words = command.replace(".gz", "").split()
        ran = subprocess.run(
            [sys.executable, ROOT / words[1], *words[2:]], cwd=tmp_path, capture_output=True, text=True
        )
        assert ran.returncode == 0, ran.stderr
    assert len(Catalogue.load(tmp_path / "runs" / "mine").items) == 40
    assert (tmp_path / "runs" / "mine" / "model" / "semantic_ids.json").exists()
