"""prepare() as users meet it: files in, four files out, one sentence for what is wrong."""

import gzip
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from recllm.catalogue import Catalogue
from recllm.errors import UserError
from recllm.preparation import PrepareConfig, prepare

SCRIPT = Path(__file__).parents[2] / "data_prep" / "prepare.py"


def write_log(path: Path, rows: list[dict]) -> str:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return str(path)


def made(tmp_path: Path, rows: list[dict], items: list[dict] | None = None, **settings) -> Catalogue:
    log = write_log(tmp_path / "log.jsonl", rows)
    files = [write_log(tmp_path / "items.jsonl", items)] if items is not None else []
    defaults = {"user_core": 1, "item_core": 1, "output": str(tmp_path / "out")}
    return prepare(PrepareConfig(**defaults | settings, interactions=[log], items=files))


def a_user(user: str, *items: str, **more) -> dict:
    return {"user": user, "items": list(items), **more}


def random_log(users: int, items: int, seed: int = 0) -> list[dict]:
    generator = random.Random(seed)
    rows = []
    for line in range(users * 8):
        row = {"user": f"u{generator.randrange(users)}", "item": f"i{generator.randrange(items)}"}
        row |= {"timestamp": generator.randrange(50), "behaviour": generator.choice(["click", "pay"])}
        if line % 3 == 0:
            row |= {"review": f"Review number {line} says that the thing is sound", "helpful": generator.randrange(5)}
        rows.append(row)
    return rows


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


# ---- what comes out


def test_events_positions_splits_and_targets(tmp_path):
    catalogue = made(tmp_path, [a_user("u", "a", "b", "c", "d"), a_user("v", "c", "a")])
    events = catalogue.interactions
    assert events.select("user", "item", "position", "split").rows() == [
        ("u", "a", 0, "train"),
        ("u", "b", 1, "train"),
        ("u", "c", 2, "valid"),
        ("u", "d", 3, "test"),
        ("v", "c", 0, "train"),
        ("v", "a", 1, "train"),
    ]
    test = catalogue.targets("test", max_history=2)
    assert test.select("user", "item", "history").rows() == [("u", "d", ["b", "c"])]
    assert catalogue.targets("test")["history"].to_list() == [["a", "b", "c"]]
    assert catalogue.targets("train")["history"].to_list() == [[], ["a"], [], ["c"]]
    assert catalogue.training_sequences().select("user", "items").rows() == [("u", ["a", "b"]), ("v", ["c", "a"])]
    assert (catalogue.report["users"], catalogue.report["items"]) == (2, 4)


def test_ids_are_in_order_of_size_not_of_spelling(tmp_path):
    catalogue = made(tmp_path, [a_user("10", "2", "10", "1"), a_user("9", "1", "2", "3")])
    assert catalogue.item_ids == ["1", "2", "3", "10"]
    assert catalogue.interactions["user"].unique(maintain_order=True).to_list() == ["9", "10"]


def test_time_orders_events_and_ties_are_said(tmp_path):
    rows = [a_user("u", "late", "tie1", "tie2", "early", timestamps=[9, 5, 5, 1])]
    catalogue = made(tmp_path, rows)
    assert catalogue.interactions["item"].to_list() == ["early", "tie1", "tie2", "late"]
    assert catalogue.report["same_timestamp"]["events"] == 1


def test_behaviours_are_renamed_and_filtered(tmp_path):
    rows = [a_user("u", "a", "b", "c", "d", behaviours=["view", "buy", "view", "cart"])]
    catalogue = made(tmp_path, rows, rename=["buy=pay"], behaviours=["view", "pay"])
    assert catalogue.interactions["behaviour"].to_list() == ["view", "pay", "view"]
    assert catalogue.behaviours == ["view", "pay"]


def test_the_k_core_is_iterated(tmp_path):
    # Item z has one event. Without it user w has one event, and without w item y has one, and so v has one.
    rows = [a_user("u", "a", "b"), a_user("t", "a", "b"), a_user("v", "a", "y"), a_user("w", "y", "z")]
    catalogue = made(tmp_path, rows, user_core=2, item_core=2)
    assert catalogue.item_ids == ["a", "b"]
    assert len(catalogue.report["dropped"]["k_core_rounds"]) == 4
    assert catalogue.report["interactions"] == 4


def test_time_split_by_shares_and_by_dates(tmp_path):
    rows = [a_user(f"u{n}", *"abcdefghij", timestamps=[10 * n + k for k in range(10)]) for n in range(10)]
    catalogue = made(tmp_path, rows, split="time", valid_share=0.1, test_share=0.2)
    assert catalogue.report["splits"] == {
        # Of 90 events with a history 63, 9 and 18: timestamps up to 70, from 71, and from 81. The first events of users
        # 0 … 7 train as well; user 8's falls into validation (80) and user 9's into test (90), without a history.
        "train": 71,
        "valid": 9,
        "test": 18,
        "none": 2,
    }
    other = made(tmp_path, rows, split="time", valid_from=50, test_from=80, overwrite=True)
    assert other.report["splits"] == {"train": 50, "valid": 27, "test": 18, "none": 5}
    assert other.targets("valid")["history"].list.len().min() > 0, "an event without a history is no target"


def test_official_splits_are_taken_as_they_are(tmp_path):
    rows = [a_user("u", "a", "b", "c", splits=["train", "valid", "test"])]
    assert made(tmp_path, rows, split="official").interactions["split"].to_list() == ["train", "valid", "test"]


def test_nothing_is_learnt_from_after_a_held_out_event(tmp_path):
    parts = ["train", "train", "valid", "train", "test", "train"]
    rows = [a_user("u", *"abcdef", splits=parts), a_user("v", "a", splits=["train"])]
    split = made(tmp_path, rows, split="official").interactions["split"].to_list()
    assert split == ["train", "train", "valid", "none", "test", "none", "train"]


def test_the_history_is_as_long_as_was_set(tmp_path):
    catalogue = made(tmp_path, [a_user("u", *"abcdef")], max_history=2)
    assert catalogue.targets("test")["history"].to_list() == [["d", "e"]]
    assert catalogue.targets("test", max_history=99)["history"].to_list() == [["a", "b", "c", "d", "e"]]


def test_reviews_come_from_training_events_only_and_the_best_first(tmp_path):
    def event(user, item, timestamp, review, helpful=0):
        return {"user": user, "item": item, "timestamp": timestamp, "review": review, "helpful": helpful}

    good, better, secret = (f"This {word} phone case has lasted two years" for word in ("good", "better", "secret"))
    rows = [event("u", "a", 1, good), event("v", "a", 1, better, helpful=9)]
    rows += [event(user, item, 2 + n, "") for user in "uv" for n, item in enumerate("bcd")]
    rows += [event("u", "a", 9, secret, helpful=99)]  # the test target of u
    catalogue = made(tmp_path, rows)
    assert catalogue.items["reviews"].to_list()[0] == [better, good]
    assert secret not in str(catalogue.items.rows())


def test_reviews_of_the_item_file_serve_where_no_event_has_one(tmp_path):
    items = [{"item": "a", "reviews": ["a from the file"]}, {"item": "b", "reviews": ["b from the file"]}]
    rows = [{"user": "u", "item": "a", "review": "This event says something of a"}, {"user": "u", "item": "b"}]
    catalogue = made(tmp_path, rows, items)
    assert catalogue.items["reviews"].to_list() == [["This event says something of a"], ["b from the file"]]


def test_own_columns_travel_and_cold_items_are_a_setting(tmp_path):
    items = [
        {"item": "a", "title": "A", "color": "red"},
        {"item": "b", "tags": ["x", "y"]},
        {"item": "z", "title": "Z"},
    ]
    rows = [a_user("u", "a", "b")]
    catalogue = made(tmp_path, rows, items)
    assert catalogue.items.select("item", "title", "color", "tags").rows() == [
        ("a", "A", "red", None),
        ("b", None, None, ["x", "y"]),
    ]
    assert made(tmp_path, rows, items, cold_items=True, overwrite=True).item_ids == ["a", "b", "z"]


def test_the_shop_comes_by_its_name(tmp_path):
    catalogue = prepare(PrepareConfig(output=str(tmp_path / "shop"), format="shop", shop_items=100, shop_users=60))
    assert catalogue.name == "shop"
    assert {"click", "cart", "pay"} <= set(catalogue.behaviours)


# ---- the same result, however it is made


def test_chunked_equals_in_memory(tmp_path, monkeypatch):
    rows = random_log(users=40, items=30)
    whole = made(tmp_path, rows, user_core=3, item_core=3, output=str(tmp_path / "whole"))
    monkeypatch.setattr("recllm.preparation.staging.PART_EVENTS", 7)
    parts = made(tmp_path, rows, user_core=3, item_core=3, output=str(tmp_path / "parts"), bucket_events=11)
    assert parts.fingerprint == whole.fingerprint
    assert parts.interactions.equals(whole.interactions)
    assert parts.items.equals(whole.items)


def test_gzip_and_plain_give_the_same_data(tmp_path):
    rows = random_log(users=10, items=10)
    plain = made(tmp_path, rows)
    log = write_log(tmp_path / "log.jsonl.gz", rows)
    zipped = prepare(PrepareConfig(str(tmp_path / "zipped"), interactions=[log], user_core=1, item_core=1))
    assert zipped.fingerprint == plain.fingerprint


def test_again_is_quick_and_other_settings_need_overwrite(tmp_path):
    rows = random_log(users=10, items=10)
    made(tmp_path, rows)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    made(tmp_path, rows)
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    with pytest.raises(UserError, match="--overwrite"):
        made(tmp_path, rows, repeats="first")
    assert made(tmp_path, rows, repeats="first", overwrite=True).report["dropped"]["repeats"] > 0


def test_killed_anywhere_and_run_again_gives_the_same_bytes(tmp_path):
    """SIGKILL as soon as the first file of each phase lies there; the next run ends with the files of a whole run."""
    log = write_log(tmp_path / "log.jsonl", random_log(users=400, items=60))
    killed_folder = tmp_path / "killed"

    def command(output: Path) -> list[str]:
        settings = ["--user_core", "2", "--item_core", "2", "--bucket_events", "100", "--name", "log"]
        return [sys.executable, str(SCRIPT), "--interactions", log, "--output", str(output), *settings]

    killed = 0
    for sign in (
        ".prepare-staging/part-*",
        ".prepare-staging/bucket-*",
        ".prepare-staging/items.parquet",
        "items.parquet",
    ):
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        process = subprocess.Popen(command(killed_folder), **quiet)
        while process.poll() is None and not list(killed_folder.glob(sign)):
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        killed += process.wait() == -signal.SIGKILL
        if (killed_folder / "catalogue.json").exists():
            Catalogue.load(killed_folder)  # whole, or it would be refused
    subprocess.run(command(tmp_path / "whole"), check=True, capture_output=True)
    subprocess.run(command(killed_folder), check=True, capture_output=True)
    assert killed >= 2
    assert content(killed_folder) == content(tmp_path / "whole")


# ---- what users get wrong


@pytest.mark.parametrize(
    ("rows", "settings", "sentence"),
    [
        ([a_user("u", "a", "b")], {"user_core": 3}, "no event is left of 2"),
        ([a_user("u", "a"), a_user("v", "b", timestamps=[1])], {}, "1 of 2 events have no timestamp"),
        (
            [a_user("u", "a", "b")],
            {"behaviours": ["pay"]},
            "no event has the behaviour 'pay'; the data has interaction",
        ),
        ([a_user("u", "a", "b")], {"rename": ["clik=view"]}, "no event has the behaviour 'clik'"),
        (
            [a_user("u", *"abc", timestamps=[1, 2, 3])],
            {"split": "time", "valid_from": 5e3, "test_from": 6e3},
            "no event for",
        ),
        ([a_user("u", "a", "b")], {"split": "time"}, "a time split needs timestamps"),
        ([a_user("u", "a", "b")], {"split": "official"}, "do not say which of train/valid/test"),
        ([a_user("u", "a", "b", timestamps=[1, 1])], {"split": "time"}, "too coarse to split by shares"),
        ([a_user("u", "a", timestamps=[1])], {"split": "time"}, "no user has two events"),
        ([a_user("u", "a"), a_user("v")], {}, r"log\.jsonl, line 2: .*no items"),
    ],
)
def test_one_sentence_and_nothing_left_behind(tmp_path, rows, settings, sentence):
    with pytest.raises(UserError, match=sentence):
        made(tmp_path, rows, **settings)
    assert not any((tmp_path / "out").iterdir()) if (tmp_path / "out").exists() else True


def test_unknown_items_are_refused_with_the_line_dropped_or_kept(tmp_path):
    rows = [a_user("u", "a", "b"), a_user("v", "a", "x", "x")]
    items = [{"item": "a", "title": "A"}, {"item": "b", "title": "B"}]
    with pytest.raises(
        UserError, match=r"log\.jsonl, line 2: item 'x' is not in the item files; 1 items with 2 events"
    ):
        made(tmp_path, rows, items)
    dropped = made(tmp_path, rows, items, unknown_items="drop")
    assert dropped.item_ids == ["a", "b"]
    assert dropped.report["dropped"]["unknown_items"] == {"policy": "drop", "items": 1, "events": 2}
    kept = made(tmp_path, rows, items, unknown_items="keep", overwrite=True)
    assert kept.items.select("item", "title").rows() == [("a", "A"), ("b", "B"), ("x", None)]


def test_an_unknown_item_is_named_with_its_own_file(tmp_path):
    first = write_log(tmp_path / "first.jsonl", [a_user("u", "a", "b")])
    second = write_log(tmp_path / "second.jsonl", [a_user("v", "a"), a_user("w", "x")])
    items = write_log(tmp_path / "items.jsonl", [{"item": "a"}, {"item": "b"}])
    config = PrepareConfig(str(tmp_path / "o"), interactions=[first, second], items=[items], user_core=1, item_core=1)
    with pytest.raises(UserError, match=r"second\.jsonl, line 2: item 'x'"):
        prepare(config)


def test_an_item_of_two_files_is_refused(tmp_path):
    files = [write_log(tmp_path / name, [{"item": "a", "title": name}]) for name in ("x.jsonl", "y.jsonl")]
    log = write_log(tmp_path / "log.jsonl", [a_user("u", "a")])
    with pytest.raises(UserError, match="1 items stand in more than one of the item files, 'a' for one"):
        prepare(PrepareConfig(str(tmp_path / "out"), interactions=[log], items=files, user_core=1, item_core=1))


def test_raw_files_are_never_overwritten(tmp_path):
    catalogue = made(tmp_path, [a_user("u", "a", "b")])
    raw = tmp_path / "raw"
    raw.mkdir()
    catalogue.interactions.select("user", "item").write_parquet(raw / "interactions.parquet")
    before = content(raw)
    with pytest.raises(UserError, match="would be overwritten by its own result"):
        prepare(PrepareConfig(str(raw), "parquet", [str(raw / "interactions.parquet")], user_core=1, item_core=1))
    log = write_log(tmp_path / "log2.jsonl", [a_user("u", "a", "b")])
    with pytest.raises(UserError, match=r"was not made by prepare\.py"):
        prepare(PrepareConfig(str(raw), interactions=[log], user_core=1, item_core=1))
    assert content(raw) == before


def test_a_failed_overwrite_leaves_what_was_there(tmp_path):
    made(tmp_path, [a_user("u", "a", "b")])
    before = content(tmp_path / "out")
    with pytest.raises(UserError, match="no items"):
        made(tmp_path, [a_user("u", "a"), a_user("v")], overwrite=True)
    assert content(tmp_path / "out") == before


def test_a_refused_shop_leaves_the_other_shop_alone(tmp_path):
    settings = {"output": str(tmp_path / "shop"), "format": "shop", "shop_items": 100, "shop_users": 60}
    prepare(PrepareConfig(**settings))
    before = content(tmp_path / "shop" / "shop")
    with pytest.raises(UserError, match="made from other files or with other settings"):
        prepare(PrepareConfig(**settings, seed=1))
    assert content(tmp_path / "shop" / "shop") == before
    assert prepare(PrepareConfig(**settings, seed=1, overwrite=True)).report["users"] > 0
    assert content(tmp_path / "shop" / "shop") != before


@pytest.mark.parametrize("bad", ["a file", "below a file", "/proc/nothing"])
def test_an_output_that_cannot_be_is_a_sentence(tmp_path, bad):
    (tmp_path / "file").touch()
    output = {"a file": tmp_path / "file", "below a file": tmp_path / "file" / "x"}.get(bad, bad)
    with pytest.raises(UserError, match="cannot be written"):
        made(tmp_path, [a_user("u", "a", "b")], output=str(output))


def test_a_folder_in_place_of_a_file_is_a_sentence(tmp_path):
    with pytest.raises(UserError, match="is a folder"):
        prepare(PrepareConfig(str(tmp_path / "out"), interactions=[str(tmp_path)]))


@pytest.mark.parametrize("content", ["[]", "null", '{"files": 3}', "{", '{"files": {"none.parquet": "0"}}'])
def test_a_damaged_report_is_a_sentence(tmp_path, content):
    made(tmp_path, [a_user("u", "a", "b")])
    (tmp_path / "out" / "catalogue.json").write_text(content)
    with pytest.raises(UserError):
        Catalogue.load(tmp_path / "out")


def test_skipped_lines_are_counted_and_listed(tmp_path):
    rows = [a_user("u", "a", "b"), a_user("v"), a_user("w", "a", "b", timestamps=[1])]
    catalogue = made(tmp_path, rows, on_bad_line="skip")
    assert catalogue.report["bad_lines"]["count"] == 2
    assert [(bad["file"], bad["line"]) for bad in catalogue.report["bad_lines"]["listed"]] == [
        ("log.jsonl", 2),
        ("log.jsonl", 3),
    ]


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"user_core": 0}, "user_core must be at least 1"),
        ({"rename": ["paypay"]}, "is not old=new"),
        ({"valid_from": 3.0}, "belong together"),
        ({"valid_from": 3.0, "test_from": 2.0, "split": "time"}, "is not before"),
        ({"valid_from": 1.0, "test_from": 2.0}, "no meaning in a leave-one-out split"),
        ({"interactions": []}, "no interactions given"),
    ],
)
def test_bad_settings_are_refused_at_construction(settings, sentence):
    with pytest.raises(UserError, match=sentence):
        PrepareConfig(**{"output": "out", "interactions": ["log.jsonl"]} | settings)


def test_the_command_line_says_it_in_one_line_and_exits_2(tmp_path):
    command = [sys.executable, str(SCRIPT), "--interactions", "nowhere.jsonl", "--output", str(tmp_path / "out")]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert ran.returncode == 2
    assert ran.stderr == "error: nowhere.jsonl: the file does not exist. Fix: check the path\n"
    assert not (tmp_path / "out").exists()


def test_a_folder_of_two_runs_is_refused(tmp_path):
    made(tmp_path, random_log(users=10, items=10))
    other = tmp_path / "other"
    other.mkdir()
    made(other, random_log(users=10, items=10, seed=1))
    os.replace(other / "out" / "items.parquet", tmp_path / "out" / "items.parquet")
    with pytest.raises(UserError, match=r"items\.parquet: the file is not of the same run"):
        Catalogue.load(tmp_path / "out")
    (tmp_path / "out" / "splits.parquet").unlink()
    with pytest.raises(UserError, match=r"splits\.parquet"):
        Catalogue.load(tmp_path / "out")
