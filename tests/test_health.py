"""What is logged of groups, what a run's folder says of them, and what a reader is told."""

import csv
import json
import math
import os
import random
import sys
import xml.etree.ElementTree as xml

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import TrainerState

from recllm import cli
from recllm.errors import UserError
from recllm.files import write_json
from recllm.health import RunLog, distinct_share, group_figures, model_flops, peak_flops, read_log
from recllm.health.checks import warnings_of
from recllm.health.report import blocks, change_table, cost_table, health, names_of, thinned


def cells(table) -> dict[str, list[str]]:
    """Of each row by its first cell."""
    columns = [list(column.cells) for column in table.columns]
    return {row[0]: list(row[1:]) for row in zip(*columns, strict=True)}


def log_of(finished=True, broken=None, **metrics) -> RunLog:
    """`reward=[…]` logged at steps 1, 2, …; "/" of a name is written "__", "eval" is eval_recall@10."""
    names = {name: name.replace("__", "/") for name in metrics} | {"eval": "eval_recall@10"}
    curves = {names[name]: list(enumerate(map(float, values), 1)) for name, values in metrics.items()}
    return RunLog("run", "grpo", finished, curves, broken or {})


def save_steps(folder, step, entries):
    """As transformers' Trainer does."""
    folder = folder / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    TrainerState(global_step=step, log_history=entries).save_to_json(str(folder / "trainer_state.json"))
    return folder / "trainer_state.json"


def age(path, seconds):
    os.utime(path, (path.stat().st_atime, path.stat().st_mtime - seconds))


ENTRIES = [
    {"step": 1, "epoch": 0.5, "reward": 0.25, "loss": 1.0},
    {"step": 2, "epoch": 1.0, "reward": 0.5, "loss": math.nan},
    {"step": 2, "epoch": 1.0, "eval_recall@10": 0.1},
]


# ---- figures


def test_figures_of_four_groups_by_hand():
    """Of 4 answers each: no hit and no reward; one hit; all hits; no hit but near ones. One answer names no item."""
    rewards = torch.tensor([[0, 0, 0, 0], [0, 1, 0, 0], [1, 1, 1, 1], [0, 0.5, 0, 0.5]])
    hits = rewards == 1
    named = torch.ones(4, 4, dtype=torch.bool)
    named[0, 3] = False
    codes = torch.tensor(
        [
            [[1, 2], [1, 3], [1, 2], [-1, -1]],  # 2 different items
            [[1, 2], [1, 4], [2, 2], [2, 3]],  # 4
            [[1, 2], [1, 2], [1, 2], [1, 2]],  # 1
            [[3, 1], [1, 1], [3, 1], [1, -1]],  # 3: (1) alone is another item than (1, 1)
        ]
    )
    assert group_figures(rewards, hits, named, codes) == {
        "group/all_zero": (2, 4),
        "group/single_hit": (1, 4),
        "group/richer": (1, 4),
        "group/trainable": (2, 4),
        "rollout/distinct": ((2 + 4 + 1 + 3) / 4, 4),
        "group/zero_reward": (4 + 3 + 0 + 2, 16),
        "rollout/validity": (15, 16),
    }


def test_a_sum_of_floats_that_differs_in_its_last_bit_is_no_signal():
    rewards = torch.tensor([[0.1 + 0.2, 0.3, 0.3, 0.1 + 0.2]], dtype=torch.float64)
    assert rewards.std() > 0
    figures = group_figures(rewards, rewards > 1, rewards > 0, torch.zeros(1, 4, 2, dtype=torch.long))
    assert figures["group/trainable"] == (0, 1)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.integers(2, 6), st.integers(1, 5))
def test_processes_add_up_and_distinct_items_are_a_set(seed, groups, answers):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 3, (groups, answers, 2), generator=generator)
    named = torch.rand(groups, answers, generator=generator) < 0.8
    codes[~named] = -1
    rewards = torch.randint(0, 3, (groups, answers), generator=generator) / 2
    whole = group_figures(rewards, rewards == 1, named, codes)
    halves = [
        group_figures(rewards[at], rewards[at] == 1, named[at], codes[at]) for at in (slice(0, 1), slice(1, None))
    ]
    for name, (total, count) in whole.items():
        assert total == pytest.approx(sum(half[name][0] for half in halves), abs=1e-5)
        assert count == sum(half[name][1] for half in halves)
    assert sum(whole[f"group/{kind}"][0] for kind in ("all_zero", "single_hit", "richer")) == groups
    slow = [
        len({tuple(code) for code, ok in zip(*group, strict=True) if ok}) / answers
        for group in zip(codes.tolist(), named.tolist(), strict=True)
    ]
    assert distinct_share(codes, named).tolist() == pytest.approx(slow)


def test_flops_of_a_training_token_are_three_times_those_of_reading_it():
    assert model_flops(440_000_000, 1000) == 6 * 440_000_000 * 1000
    assert model_flops(440_000_000, 1000, training=False) == 2 * 440_000_000 * 1000


@pytest.mark.parametrize(
    ("name", "tera"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA L40S", 362),
        ("NVIDIA L40", 181),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("cpu", None),
    ],
)
def test_the_peak_of_a_device_is_known_or_said_to_be_unknown(name, tera):
    assert peak_flops(name) == (None if tera is None else tera * 1e12)


# ---- reading


def test_a_run_is_read_while_it_trains_from_its_newest_whole_step(tmp_path):
    steps = tmp_path / "out.work-0123abcd" / "steps"
    age(save_steps(steps, 1, ENTRIES[:1]), 30)
    age(save_steps(steps, 2, ENTRIES), 20)
    cut = save_steps(steps, 3, ENTRIES)
    cut.write_text(cut.read_text()[:50])
    save_steps(tmp_path / "out2.work-0123abcd" / "steps", 9, [{"step": 9, "reward": 9.0}])  # of another run
    log = read_log(tmp_path / "out")
    assert not log.finished
    assert log.curves == {"reward": [(1, 0.25), (2, 0.5)], "loss": [(1, 1.0)], "eval_recall@10": [(2, 0.1)]}
    assert log.broken == {"loss": 2}
    assert log.last_step == 2
    assert cut.exists()  # reading removes nothing: the run may be writing it


def test_a_finished_run_is_read_from_its_checkpoint_until_it_trains_anew(tmp_path):
    out = tmp_path / "out"
    earlier = save_steps(tmp_path / "out.work-0123abcd" / "steps", 7, [{"step": 7, "reward": 7.0}])
    age(earlier, 60)
    rl = {"method": "recast", "sft": {"log": [{"step": 5, "loss": 5.0}]}, "rl": {"log": ENTRIES[:1]}}
    write_json(out / "recllm.json", rl)
    log = read_log(out)
    assert (log.finished, log.method, log.curves) == (True, "recast", {"reward": [(1, 0.25)], "loss": [(1, 1.0)]})
    write_json(out / "recllm.json", rl | {"method": "sft"})
    assert read_log(out).curves == {"loss": [(5, 5.0)]}
    age(earlier, -120)
    assert read_log(out).curves == {"reward": [(7, 7.0)]}


def test_trainers_own_folder_is_read_too(tmp_path, monkeypatch):
    save_steps(tmp_path / "out", 2, ENTRIES)
    assert read_log(tmp_path / "out").values("reward") == [0.25, 0.5]
    assert read_log(tmp_path / "out" / "checkpoint-2").values("reward") == [0.25, 0.5]
    monkeypatch.chdir(tmp_path / "out")
    assert (read_log(".").name, read_log(".").values("reward")) == ("out", [0.25, 0.5])


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "holds no log of a training run: no recllm.json, and no trainer_state.json"),
        ('{"method": "sft"}', "recllm.json: holds no log of a training run"),
        ('{"method": "rl", "rl": {"log": [3]}}', "recllm.json: holds no log of a training run"),
        ('{"method": "rl", "rl": {"log": []}}', "the run has logged nothing yet"),
        ('{"method"', "recllm.json, line 1: not valid JSON"),
        ("[]", "holds no JSON object"),
    ],
)
def test_a_folder_without_a_log_is_one_sentence(tmp_path, content, said):
    if content is not None:
        (tmp_path / "recllm.json").write_text(content)
    with pytest.raises(UserError) as error:
        read_log(tmp_path)
    assert said in str(error.value)
    assert str(tmp_path) in str(error.value)


def test_start_middle_and_end_are_a_fifth_each():
    """Of 0 … 9: the means of 0 and 1, of 4 and 5, of 8 and 9."""
    log = log_of(reward=range(10), kl=[3])
    assert log.fifths("reward") == (0.5, 4.5, 8.5)
    assert log.fifths("kl") == (3, 3, 3)
    assert log.fifths("entropy") is None
    assert (log.mean("reward"), log.mean("entropy")) == (4.5, None)


# ---- tables, curves


def test_repair_recedes_as_in_recasts_table_3():
    """88 % → 61 % → 44 %, and 12 % → 39 % → 56 % of the groups trainable on their own."""
    repaired = [0.9, 0.86, 0.8, 0.7, 0.61, 0.61, 0.5, 0.5, 0.46, 0.42]
    log = log_of(recast__repaired=repaired, group__trainable=[1 - share for share in repaired])
    said = cells(change_table([log, log_of(reward=[1])]))
    assert said["groups repaired"] == ["88.0 → 61.0 → 44.0 %", "–"]
    assert said["groups with a signal of their own"] == ["12.0 → 39.0 → 56.0 %", "–"]
    assert said["reward"] == ["–", "1 → 1 → 1"]


def test_a_step_costs_as_in_recasts_table_4():
    """211.04 s against 12.71 s is 16.60 times less; MFU of .0763 against .0872 is 1.14 times more."""
    first = log_of(time__update=[211.04], time__reference=[47.63], actor__mfu=[0.0763], actor__tokens=[6.93e6])
    other = log_of(time__update=[12.0, 13.42], actor__mfu=[0.0872], actor__tokens=[0.47e6])
    assert cells(cost_table([first, other])) == {
        "reference, s": ["47.63", "–"],
        "update, s": ["211", "12.71 (16.60× less)"],
        "tokens through the update": ["6,930,000", "470,000 (14.74× less)"],
        "MFU": ["0.0763", "0.0872 (1.14× more)"],
    }


def test_a_curve_of_blocks():
    assert blocks([0, 1, 2, 3, 4, 5, 6, 7, 8], 0, 8) == "▁▂▃▄▅▆▇██"
    assert blocks([2, 2], 2, 2) == "▅▅"
    assert thinned([(1, 1.0), (2, 3.0), (3, 5.0), (4, 7.0), (5, 9.0)], 3) == [(1.5, 2.0), (3.5, 6.0), (5, 9.0)]
    assert thinned([], 3) == []


def test_runs_are_named_as_short_as_tells_them_apart():
    assert names_of(["runs/grpo", "runs/recast/"]) == ["grpo", "recast"]
    assert names_of(["a/seed0/grpo", "a/seed1/grpo"]) == ["seed0/grpo", "seed1/grpo"]
    assert names_of(["a/grpo", "a/grpo"]) == ["grpo", "grpo"]


# ---- warnings


def noisy(start, end, seed, steps=100):
    draw = random.Random(seed)
    return [start + (end - start) * step / steps + draw.gauss(0, 0.02) for step in range(steps)]


HEALTHY = {
    "reward": noisy(0.1, 0.3, 1), "eval": [0.05, 0.06, 0.07], "rollout__distinct": [0.9, 0.8, 0.7],
    "group__trainable": [0.1, 0.2, 0.3], "rollout__validity": [1, 1, 1], "rollout__length": [4, 4, 4],
}  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({}, None),
        ({"eval": [0.07, 0.06, 0.05]}, "validation Recall@10 falls from 0.0700 to 0.0500"),
        ({"eval": [0.07, 0.06, 0.05], "reward": noisy(0.1, 0.1, 3)}, None),  # it falls, and no reward tells otherwise
        ({"eval": [0.05, 0.07, 0.06]}, "since the middle the reward rises"),
        ({"eval": [0.0700, 0.0695]}, None),
        ({"eval": [0.05]}, None),
        (
            {"rollout__distinct": [0.9, 0.5, 0.3]},
            "answers repeat each other: 90.0% different items at the start, 30.0%",
        ),
        ({"group__trainable": [0.1, 0.0, 0.0]}, "all answers of a group earn the same"),
        ({"group__trainable": [0.1, 0.0, 0.0], "recast__repaired": [1, 1, 1]}, "repair alone teaches"),
        ({"rollout__validity": [1, 0.98, 1]}, "always names an item, and 98.00% did at the worst step"),
        ({"rollout__validity": [1, 0.98, 1], "rollout__length": [180, 170, 150]}, None),  # a chain may not end
    ],
)
def test_what_is_warned_of(changed, said):
    found = warnings_of(log_of(**(HEALTHY | changed)))
    assert len(found) == (said is not None), found
    assert said is None or said in found[0]


def test_a_figure_that_is_no_number_is_warned_of():
    assert warnings_of(log_of(broken={"loss": 1200}, loss=[1])) == ["loss is no finite number at step 1,200"]
    assert warnings_of(log_of(broken={"rewards/hit/std": 3}, loss=[1])) == []  # of one answer it is none


# ---- the command


def two_runs(folder):
    save_steps(folder / "grpo.work-01" / "steps", 2, ENTRIES)
    write_json(folder / "recast" / "recllm.json", {"method": "recast", "rl": {"log": [ENTRIES[0], ENTRIES[2]]}})


def test_the_command_prints_draws_and_writes(tmp_path, monkeypatch, capsys):
    two_runs(tmp_path)
    monkeypatch.chdir(tmp_path)
    words = ["recllm", "health", "grpo", "recast/", "--output", "h.svg", "--csv", "h.csv"]
    monkeypatch.setattr(sys, "argv", words)
    cli.main()
    said = capsys.readouterr().out
    assert "grpo: 2 steps, not finished: as of its last save" in said
    assert "recast: recast, 2 steps, finished" in said
    assert "0.25 → 0.25 → 0.5   0.25 → 0.25 → 0.25" in said  # however narrow the terminal is
    assert "warning: grpo: loss is no finite number at step 2" in said
    titles = [text.text for text in xml.parse("h.svg").getroot().iter("{http://www.w3.org/2000/svg}text")]
    assert {"Reward", "eval_recall@10", "grpo", "recast"} <= set(titles)
    with open("h.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows == [
        {"run": "grpo", "step": "1", "reward": "0.25", "loss": "1.0", "eval_recall@10": ""},
        {"run": "grpo", "step": "2", "reward": "0.5", "loss": "", "eval_recall@10": "0.1"},
        {"run": "recast", "step": "1", "reward": "0.25", "loss": "1.0", "eval_recall@10": ""},
        {"run": "recast", "step": "2", "reward": "", "loss": "", "eval_recall@10": "0.1"},
    ]
    before = (tmp_path / "h.svg").read_bytes()
    health(["grpo", "recast"], "h.svg")
    assert (tmp_path / "h.svg").read_bytes() == before


def test_a_mistake_is_one_sentence_and_nothing_is_written(tmp_path):
    two_runs(tmp_path)
    with pytest.raises(UserError, match=r"x\.png: is to end in \.svg"):
        health([str(tmp_path / "recast")], "x.png")
    with pytest.raises(UserError, match="nowhere: holds no log"):
        health([str(tmp_path / "recast"), str(tmp_path / "nowhere")], str(tmp_path / "h.svg"))
    with pytest.raises(UserError, match="no run is named"):
        health([])
    write_json(tmp_path / "own" / "recllm.json", {"method": "rl", "rl": {"log": [{"step": 1, "my_metric": 2.0}]}})
    with pytest.raises(UserError, match="logged nothing that is drawn"):
        health([str(tmp_path / "own")], str(tmp_path / "h.svg"))
    assert not list(tmp_path.glob("*.svg"))
    assert json.loads((tmp_path / "own" / "recllm.json").read_text())["method"] == "rl"
