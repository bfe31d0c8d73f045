"""MiniOneRec's windows: whatever the sequences were, laying the windows over one another gives them back."""

import csv
import io
import json
import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from recllm import formats
from recllm.errors import UserError
from recllm.formats import BadLines

HEADER = "user_id,history_item_title,item_title,history_item_id,item_id,history_item_sid,item_sid"
STAMPED = ["user_id", "history_item_id", "item_id", "history_rating", "rating", "history_timestamp", "timestamp"]


def table(header: list[str], rows: list[list]) -> str:
    text = io.StringIO()
    csv.writer(text).writerows([header, *rows])
    return text.getvalue()


def windows(sequences: dict[str, list[int]], width: int, first: int = 1) -> list[list]:
    """(user, window, target) of each position from `first` on, users one after the other."""
    return [
        [user, items[max(0, place - width) : place], items[place]]
        for user, items in sequences.items()
        for place in range(min(first, len(items) - 1), len(items))
    ]


def sequences_of(got) -> dict[str, list[int]]:
    return {user: [int(item) for item in items] for user, items in got.group_by("user").agg("item").iter_rows()}


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sequences=st.dictionaries(st.sampled_from("abc"), st.lists(st.integers(0, 2), min_size=2, max_size=12), min_size=1),
    width=st.integers(1, 4),
    first=st.sampled_from([1, 10]),  # 10: a user's first row may have a long window (D3)
    cuts=st.tuples(st.floats(0, 1), st.floats(0, 1)).map(sorted),
)
def test_sequences_come_back_with_their_splits(sequences, width, first, cuts, write, events):
    first = min(first, width)
    rows = windows(sequences, width, first)
    at = [int(cut * len(rows)) for cut in cuts]
    parts = {"train": rows[: at[0]], "valid": rows[at[0] : at[1]], "test": rows[at[1] :]}
    for split, part in parts.items():
        write(f"data/{split}/x.csv", table(["user_id", "history_item_id", "item_id"], part))
    folder = write("data/note.txt", "").parent
    got = events("minionerec", folder)
    assert sequences_of(got) == sequences
    targets = [split for split, part in parts.items() for _ in part]
    assert got["split"].value_counts().sort("split").rows() == sorted(
        (split, count)
        for split in ("train", "valid", "test")
        if (count := targets.count(split) + (len(got) - len(rows)) * (split == "train"))
    )


@given(seed=st.integers(0, 1000), width=st.integers(2, 4))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_rows_may_stand_in_any_order(seed, width, write, events):
    """Files are sorted by time, and events of one time in no particular order. (Windows of one item would not do.)"""
    sequences = {"a": list(range(10)), "b": [5, 3, 1], "c": [9, 8, 7, 6, 5]}
    rows = windows(sequences, width)
    random.Random(seed).shuffle(rows)
    assert sequences_of(events("minionerec", write("train.csv", table(STAMPED[:3], rows)))) == sequences


def test_the_published_layout(write, events, items):
    title = '"[\'Gorilla ""Glue""\', \'a\nb\']"'
    row = f'A22,{title},"Grizzly, G9849","[117, 3]",118,"[\'<a_1>\', \'<a_2>\']",<a_3>'
    write("Amazon/train/Office.csv", f"{HEADER}\n{row}\n")
    write("Amazon/valid/Office.csv", f'{HEADER}\nA22,[],x,"[117, 3, 118]",4,[],x\n')
    path = write("Amazon/test/Office.csv", f"{HEADER}\nA22,[],x,\"['117', '3', '118', '4']\",5,[],x\n")
    reader = formats.by_name("minionerec")
    assert [file.parent.name for file in reader.files(path)] == ["train", "valid", "test"]
    want = [(2, "117", "train"), (2, "3", "train"), (2, "118", "train"), (2, "4", "valid"), (2, "5", "test")]
    for given_path in (path, path.parent.parent, path.parent.parent / "train" / "Office.csv"):
        assert events("minionerec", given_path).select("line", "item", "split").rows() == want
    item_file = write("Amazon/index/Office.item.json", json.dumps({"117": {"title": "Glue"}}))
    for given_path in (item_file, path.parent.parent):
        assert [record["title"] for record in items("minionerec", given_path)] == ["Glue"]


@pytest.mark.parametrize("names", ["train valid test", "x.train x.val x.test", "train_5 eval_5 test_5"])
def test_names_of_the_three_files(names, write):
    paths = [write(f"{name}.csv", "") for name in names.split()]
    for path in (*paths, paths[0].parent):
        assert formats.by_name("minionerec").files(path) == paths


def test_timestamps_and_ratings(write, events):
    rows = [["u", [1], 2, [5.0], 4.0, [10], 20], ["u", [1, 2], 3, [5.0, 4.0], 3.0, [10, 20], 30]]
    got = events("minionerec", write("test.csv", table(STAMPED, rows)))
    assert got.select("item", "timestamp", "rating", "split").rows() == [
        ("1", 10.0, 5.0, "train"),
        ("2", 20.0, 4.0, "test"),
        ("3", 30.0, 3.0, "test"),
    ]
    only_targets = [[*row[:3], row[6]] for row in rows]
    got = events("minionerec", write("test.csv", table([*STAMPED[:3], "timestamp"], only_targets)))
    assert got["timestamp"].null_count() == 3


def test_rows_left_out_are_bridged(write, events):
    """Of 1…9 in windows of three, the rows with targets 5, 6 and 7 are missing: what the windows show is kept."""
    rows = [row for row in windows({"u": list(range(1, 10))}, width=3) if row[2] not in (5, 6, 7)]
    got = events("minionerec", write("valid.csv", table(STAMPED[:3], rows)))
    assert got.select("item", "split").rows() == [
        ("1", "train"),
        *((item, "valid") for item in "234"),
        *((item, "train") for item in "567"),
        *((item, "valid") for item in "89"),
    ]


BAD_ROWS = {
    "user is empty": ["", [1], 2],
    "item is empty": ["u", [1], ""],
    "item is missing": ["u", [None], 2],
    "history_item_id is not a list: '3'": ["u", 3, 2],
    "not a Python literal": ["u", "[1, x]", 2],
    "has 2 fields, the header 3": ["u", [1]],
    "are there twice": ["a", [1], 2],
}


@pytest.mark.parametrize("reason", BAD_ROWS)
def test_bad_rows(reason, write, events):
    good = [["a", [1], 2], ["b", [1], 2], ["d", [1], 2], ["e", [1], 2]]
    path, bad = write("train.csv", table(STAMPED[:3], [*good[:2], BAD_ROWS[reason], *good[2:]])), BadLines("skip")
    with pytest.raises(UserError) as error:
        events("minionerec", path)
    assert reason in error.value.problem
    assert error.value.line == 4
    assert sequences_of(events("minionerec", path, bad)) == {user: [1, 2] for user in "abde"}
    assert [entry["line"] for entry in bad.listed] == [4]


def test_bad_bytes_and_quotes(write, events):
    path, bad = (
        write("train.csv", b'user_id,history_item_id,item_id\nu,[1],2\n\xff,[1],2\nv,"[1]"x,2\nw,[1],2\n'),
        BadLines("skip"),
    )
    assert events("minionerec", path, bad)["user"].unique(maintain_order=True).to_list() == ["u", "w"]
    assert [(entry["line"], entry["reason"][:9]) for entry in bad.listed] == [(3, "not UTF-8"), (4, "not a CSV")]


def test_wrong_files(write, events, items):
    with pytest.raises(UserError, match="no history_item_id column; the header has user_id, item_id"):
        events("minionerec", write("a/train.csv", "user_id,item_id\n"))
    with pytest.raises(UserError, match="neither the name nor the folder says"):
        events("minionerec", write("b/data.csv", HEADER))
    with pytest.raises(UserError, match="no train, valid or test CSV"):
        events("minionerec", write("b/data.csv", HEADER).parent)
    write("c/train/one.csv", HEADER)
    with pytest.raises(UserError, match=r"more than one data set: train/one\.csv, train/two\.csv"):
        events("minionerec", write("c/train/two.csv", HEADER).parent.parent)
    with pytest.raises(UserError, match=r"0 files \*\.item\.json"):
        items("minionerec", write("c/train/two.csv", HEADER).parent)
    with pytest.raises(UserError, match="holds no interactions"):
        events("minionerec", write("d/train.csv", HEADER + "\n"))


def test_a_cut_gzip_file(write, events):
    path = write("train.csv.gz", table(STAMPED[:3], [["a", [1], 2]]))
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError):
            events("minionerec", path)
