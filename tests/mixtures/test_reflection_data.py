"""Reflection data: drafts and labels against a slow reference, the policy, counts, a second run, broken inputs."""

import dataclasses
import importlib.util
import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from helpers import write_catalogue, write_small_model
from hypothesis import given, settings
from hypothesis import strategies as st

from recllm import launch
from recllm.attributes import attributes_of
from recllm.catalogue import ITEM_COLUMNS, Catalogue
from recllm.checkpoint import Checkpoint
from recllm.decoding import Decoder
from recllm.errors import UserError
from recllm.files import sha256_file
from recllm.mixtures.reflection import ReflectionConfig, ReflectionData, balanced_ranks, build_reflection
from recllm.mixtures.reflection_summary import reflection_notes, reflection_table
from recllm.semantic_ids import SemanticIdTable

SCRIPT = Path(__file__).parents[2] / "data_prep" / "build_reflection.py"


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """16 items of two levels, the last of unknown category; an untrained checkpoint of them."""
    folder = tmp_path_factory.mktemp("reflection")
    data, model = write_small_model(folder, items=16, users=40)
    items = pl.read_parquet(model / "items.parquet")
    lost = pl.when(pl.col("item") == "i15").then(pl.lit([], pl.List(pl.String))).otherwise(pl.col("categories"))
    items.with_columns(categories=lost).write_parquet(model / "items.parquet")
    return data, model


def config_of(small, output, **changed) -> ReflectionConfig:
    settings_ = {"attributes": ["categories", "brand"], "drafts": 7, "keep": 3, "rl_targets": "all", "device": "cpu"}
    return ReflectionConfig(str(small[0]), str(small[1]), str(output), **(settings_ | changed))


def slow_rounds(loc: list[int], levels: int, keep: int) -> list[int]:
    """Which drafts, in order: one of each label in turn, the deepest first, until so many are kept."""
    waiting = {label: [place for place, own in enumerate(loc) if own == label] for label in range(levels + 1, 0, -1)}
    chosen = []
    while len(chosen) < keep and any(waiting.values()):
        for places in waiting.values():
            if places and len(chosen) < keep:
                chosen.append(places.pop(0))
    return chosen


@pytest.mark.parametrize(("policy", "limit"), [("balanced", None), ("all", 12)])
def test_rows_and_counts_equal_a_slow_reference(small, tmp_path, policy, limit):
    config = config_of(small, tmp_path / "out", policy=policy, limit=limit, seed=3)
    data = build_reflection(config)
    checkpoint, table = Checkpoint.load(small[1], "cpu"), SemanticIdTable.load(small[0] / "semantic_ids.json")
    decoder = Decoder(checkpoint.model, checkpoint.tokens)
    cases = {(row["user"], row["position"]): row for row in Catalogue.load(small[0]).rl_targets(None).to_dicts()}
    facts = {row["item"]: row for row in checkpoint.items.to_dicts()}
    assert len(data.examples) == (limit or len(cases)) > 10
    found_counts, kept_counts, correct = {}, {}, 0
    for row in data.examples:
        case = cases[row["user"], row["position"]]
        assert row["prompt_ids"] == checkpoint.writer.ids([case["history"]])[0]
        target = list(table.codes_of(case["item"]))
        assert row["target"] == target
        found = decoder.beams([row["prompt_ids"]], config.drafts)
        drafts, loc, same = found.codes[0].tolist(), [], []
        for draft in drafts:
            loc.append(next((n for n, (a, b) in enumerate(zip(draft, target), 1) if a != b), len(target) + 1))
            mine, own = facts[table.item_of(draft)], facts[case["item"]]
            leaf = [(one["categories"] or [None])[-1] for one in (mine, own)]
            same.append([-1 if leaf[1] is None else int(leaf[0] == leaf[1]), int(mine["brand"] == own["brand"])])
        kept = [drafts.index(draft) for draft in row["drafts"]]
        if policy == "balanced":  # of a label the draws decide
            assert sorted(loc[place] for place in kept) == sorted(loc[place] for place in slow_rounds(loc, 2, 3))
        else:
            assert kept == list(range(config.drafts))
        assert row["loc"] == [loc[place] for place in kept]
        assert row["same"] == [same[place] for place in kept]
        assert row["score"] == pytest.approx([found.scores[0, place].item() for place in kept], abs=1e-4)
        assert row["score"] == sorted(row["score"], reverse=True)
        correct += 3 in loc
        for counts, places in ((found_counts, range(config.drafts)), (kept_counts, kept)):
            for place in places:
                said = ("loc", loc[place]), ("categories", same[place][0]), ("brand", same[place][1])
                for label in said:
                    counts[label] = counts.get(label, 0) + 1
    report = json.loads((config.folder / "mixture.json").read_text())
    assert report == data.report

    def both(slot, label):
        return [found_counts.get((slot, label), 0), kept_counts.get((slot, label), 0)]

    assert report["labels"] == {str(label): both("loc", label) for label in (1, 2, 3)}
    assert report["attribute_labels"] == {
        name: {"same": both(name, 1), "other": both(name, 0), "unknown": both(name, -1)}
        for name in ("categories", "brand")
    }
    assert report["drafts"] == [sum(pair[place] for pair in report["labels"].values()) for place in (0, 1)]
    assert (report["targets"], report["with_target"]) == (len(data.examples), correct)
    assert report["missing"] == {"categories": 1, "brand": 0}
    assert report["start"] == {"name": "model", "weights": checkpoint.weights}
    assert min(min(pair) for pair in report["labels"].values()) > 0, "every label is there to look at"
    if policy == "balanced":
        assert report["attribute_labels"]["categories"]["unknown"][0] > 0


@given(st.lists(st.lists(st.integers(0, 4), min_size=6, max_size=6), min_size=1, max_size=3), st.integers(1, 6))
@settings(max_examples=60)
def test_the_policy_goes_round_the_labels(loc, keep):
    """0 stands for no draft."""
    draws = torch.rand(len(loc), 6, generator=torch.Generator().manual_seed(keep))
    ranks = balanced_ranks(torch.tensor(loc, dtype=torch.int8), 3, draws)
    for row, draw, found in zip(loc, draws.tolist(), ranks.tolist()):
        assert sorted(found) == list(range(6))
        chosen = sorted((place for place in range(6) if found[place] < keep and row[place]), key=found.__getitem__)
        order = sorted(range(6), key=draw.__getitem__)
        assert chosen == [order[place] for place in slow_rounds([row[place] for place in order], 3, keep)]


def test_the_policy_by_hand():
    assert balanced_ranks(torch.tensor([[1, 1, 3, 1, 2, 3]]), 2, torch.arange(6)[None] / 6).tolist() == [
        [2, 4, 0, 5, 1, 3]
    ]


def test_no_label_crowds_out_the_others(small, tmp_path):
    """Of all drafts nearly all go wrong at once; of those that train no more than is needed."""
    report = build_reflection(config_of(small, tmp_path / "out", drafts=16, keep=3)).report
    targets = report["targets"]
    assert report["labels"] == {"1": [12 * targets, targets], "2": [3 * targets, targets], "3": [targets, targets]}


def test_a_second_run_changes_nothing_and_other_settings_are_refused(small, tmp_path, monkeypatch):
    config = config_of(small, tmp_path / "out")
    made = build_reflection(config)
    files = {path: (sha256_file(path), path.stat().st_mtime_ns) for path in config.folder.iterdir()}
    with monkeypatch.context() as patched:
        patched.setattr("recllm.mixtures.reflection.find_drafts", lambda *_: pytest.fail("drafts are sought again"))
        again = build_reflection(dataclasses.replace(config, batch_size=3))
    assert {path: (sha256_file(path), path.stat().st_mtime_ns) for path in config.folder.iterdir()} == files
    assert again.examples.to_list() == made.examples.to_list()
    for change in ({"drafts": 6}, {"keep": 2}, {"policy": "all"}, {"attributes": ["brand"]}, {"limit": 9}, {"seed": 9}):
        with pytest.raises(UserError, match=r"other data or settings.*--overwrite"):
            build_reflection(dataclasses.replace(config, **change))
    changed = build_reflection(dataclasses.replace(config, keep=2, overwrite=True))
    assert {len(row["drafts"]) for row in changed.examples} == {2}


def test_a_killed_run_leaves_nothing(small, tmp_path, monkeypatch):
    config = config_of(small, tmp_path / "out")
    monkeypatch.setattr("recllm.mixtures.reflection.reflection_counts", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        build_reflection(config)
    assert not list(tmp_path.iterdir())


def test_blocks_are_joined_in_order(small, tmp_path, monkeypatch):
    whole = build_reflection(config_of(small, tmp_path / "whole"))
    monkeypatch.setattr("recllm.mixtures.reflection.BLOCK", 7)
    parts = build_reflection(config_of(small, tmp_path / "parts", batch_size=2))
    assert parts.examples.remove_columns("score").to_list() == whole.examples.remove_columns("score").to_list()
    scores = [torch.tensor(data.examples["score"][:]) for data in (whole, parts)]
    assert torch.allclose(*scores, atol=1e-5)
    names = "labels", "attribute_labels", "drafts", "with_target", "made_of"
    assert [parts.report[name] for name in names] == [whole.report[name] for name in names]


def test_items_that_only_the_index_knows_are_no_drafts(small, tmp_path):
    """New items may have codes before the data have them: here the first four of the index are not in the data."""
    table = SemanticIdTable.load(small[0] / "semantic_ids.json")
    rows = [{"item": item, "brand": "AB"[n % 2], "categories": ["xy"[n % 2]]} for n, item in enumerate(table.items)]
    users = {f"u{n}": [f"i{4 + (n + step) % 12}" for step in range(4)] for n in range(12)}
    data = write_catalogue(tmp_path / "data", rows[4:], users, "train")
    of_data = dataclasses.replace(table, items_fingerprint=data.items_fingerprint)
    of_data.save(data.folder / "semantic_ids.json")
    made = build_reflection(config_of((data.folder, small[1]), tmp_path / "out", drafts=12, policy="all"))
    assert len(made.examples) == 36
    for row in made.examples:
        assert sorted(map(table.item_of, row["drafts"])) == sorted(data.item_ids)
    with pytest.raises(UserError, match="13 drafts of 12 items"):
        build_reflection(config_of((data.folder, small[1]), tmp_path / "out", drafts=13))


def test_it_is_loaded_with_its_own_index_and_attributes_alone(small, tmp_path):
    data, model = small
    made = build_reflection(config_of(small, tmp_path / "out", attributes=["categories", "brand"]))
    table, checkpoint = SemanticIdTable.load(data / "semantic_ids.json"), Checkpoint.load(model, "cpu")
    loaded = ReflectionData.load(tmp_path / "out", table)
    assert loaded.examples.to_list() == made.examples.to_list()
    assert loaded.attributes == attributes_of(["categories", "brand"], checkpoint.items)
    other = SemanticIdTable(table.items, table.codes[::-1].copy(), table.sizes)
    with pytest.raises(UserError, match=r"other semantic IDs.*build_reflection.py"):
        ReflectionData.load(tmp_path / "out", other)
    (tmp_path / "out" / "mixture.json").write_text(json.dumps(made.report | {"kind": "alignment"}))
    with pytest.raises(UserError, match="is no reflection data"):
        ReflectionData.load(tmp_path / "out", table)


# ---- broken inputs


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"attributes": []}, "attributes is empty"),
        ({"drafts": 0}, "drafts is 0"),
        ({"keep": 0}, "keep is 0"),
        ({"limit": 0}, "limit is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_settings_that_mean_nothing(changed, said):
    with pytest.raises(UserError, match=said):
        ReflectionConfig("data", "model", **changed)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"attributes": ["colour"]}, r"no column 'colour'.*name some of brand, categories"),
        ({"drafts": 17}, r"17 drafts of 16 items.*--drafts 16"),
        ({"rl_targets": "held_out"}, "kept no target out.*rl_targets: all"),
        ({"device": "nonsense"}, "is no device"),
    ],
)
def test_what_does_not_fit_the_data(small, tmp_path, changed, said):
    with pytest.raises(UserError, match=said):
        build_reflection(config_of(small, tmp_path / "out", **changed))
    assert not list(tmp_path.iterdir())


def test_items_of_fewer_codes_are_refused(tmp_path):
    made = write_small_model(tmp_path, items=13)
    with pytest.raises(UserError, match=r"1 items have fewer than 2 codes, 'i12' first.*extra-level-all"):
        build_reflection(config_of(made, tmp_path / "out"))


def test_a_checkpoint_of_another_index_is_refused(small, tmp_path):
    data, model = small
    table = SemanticIdTable.load(data / "semantic_ids.json")
    other = tmp_path / "semantic_ids.json"
    SemanticIdTable(table.items, table.codes[::-1].copy(), table.sizes, items_fingerprint=table.items_fingerprint).save(
        other
    )
    with pytest.raises(UserError, match="other semantic IDs than the data's"):
        build_reflection(config_of((data, model), tmp_path / "out", semantic_ids=str(other)))


def test_a_column_that_only_the_data_have_is_refused(small, tmp_path):
    data, _ = small
    items = pl.read_parquet(data / "items.parquet").with_columns(tier=pl.Series([1, 2] * 8))
    other = tmp_path / "data"
    other.mkdir()
    for path in data.glob("*.*"):
        if path.name != "items.parquet":
            (other / path.name).write_bytes(path.read_bytes())
    assert set(ITEM_COLUMNS) < set(items.columns)
    items.write_parquet(other / "items.parquet")
    with pytest.raises(UserError, match=r"the data have a column 'tier', and the checkpoint's items.parquet does not"):
        build_reflection(config_of((other, small[1]), tmp_path / "out", attributes=["tier"]))


# ---- the script


def test_the_script_reads_a_yaml_and_says_what_it_made(small, tmp_path, capsys):
    spec = importlib.util.spec_from_file_location("build_reflection", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    config = tmp_path / "settings.yaml"
    config.write_text(f"data: {small[0]}\nmodel: {small[1]}\noutput: {tmp_path}/out\nrl_targets: all\ndrafts: 9\n")
    launch.run(script.main, ReflectionConfig, args=["--config", str(config), "--drafts", "5", "--device", "cpu"])
    said = capsys.readouterr().out
    made = ReflectionData.load(tmp_path / "out", SemanticIdTable.load(small[0] / "semantic_ids.json"))
    assert made.report["drafts"][0] == 5 * len(made.examples)
    for word in ("wrong from level 1", "correct", "categories", "categories of 1 items", f"written to {tmp_path}/out"):
        assert word in said


def test_the_table_tells_the_counts():
    report = {
        "targets": 10, "with_target": 4, "drafts": [200, 40], "missing": {"brand": 3},
        "labels": {"1": [150, 20], "2": [46, 16], "3": [4, 4]},
        "attribute_labels": {"brand": {"same": [50, 10], "other": [130, 20], "unknown": [20, 10]}},
    }  # fmt: skip
    data = ReflectionData(None, report)
    cells = [list(column.cells) for column in reflection_table(data).columns]
    rows = [list(row) for row in np.array(cells, object).T]
    assert rows[0] == ["loc", "wrong from level 1", "150", "75.0%", "20", "50.0%"]
    assert rows[2] == ["", "correct", "4", "2.0%", "4", "10.0%"]
    assert rows[5] == ["", "unknown", "20", "10.0%", "10", "25.0%"]
    assert reflection_notes(data) == [
        "the target is among its own drafts for 4 targets (40.0%)",
        "not known: brand of 3 items",
    ]
