"""Our own format: what is written comes back, in both shapes and both containers."""

import datetime
import gzip
import json

import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from recllm import formats
from recllm.errors import UserError
from recllm.formats import EVENT_COLUMNS, BadLines, records

NAMES = st.text(min_size=1, max_size=6).filter(str.strip)
EVENTS = st.fixed_dictionaries(
    {"user": NAMES, "item": NAMES},
    optional={
        "behaviour": NAMES,
        "timestamp": st.floats(allow_nan=False, allow_infinity=False),
        "split": st.sampled_from(["train", "valid", "test"]),
        "review": NAMES.map(str.strip),
        "helpful": st.floats(0, 1e6),
        "rating": st.floats(0, 5),
    },
)


def expected(rows: list[dict]) -> list[dict]:
    return [
        {"line": line} | {name: row.get(name) for name in EVENT_COLUMNS if name != "line"}
        | {"behaviour": row.get("behaviour", "interaction")}
        for line, row in enumerate(rows, start=1)
    ]  # fmt: skip


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(EVENTS, min_size=1, max_size=8))
def test_events_come_back_from_json_lines_and_from_parquet(rows, write, events):
    path = write("events.jsonl.gz", [json.dumps(row, ensure_ascii=len(rows) % 2 == 0) for row in rows])
    assert events("jsonl", path).to_dicts() == expected(rows)
    columns = {name: dtype for name, dtype in EVENT_COLUMNS.items() if name != "line"}
    path = write("events.parquet", b"")
    pl.DataFrame([{name: row.get(name) for name in columns} for row in rows], schema=columns).write_parquet(path)
    assert events("parquet", path).to_dicts() == expected(rows)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sequences=st.lists(st.tuples(NAMES, st.lists(EVENTS, min_size=1, max_size=4)), min_size=1, max_size=4))
def test_a_user_a_line_is_the_same_as_an_event_a_line(sequences, write, events):
    lines = [
        {
            "user": user,
            "items": [event["item"] for event in own],
            "behaviours": [event.get("behaviour") for event in own],
            "timestamps": [event.get("timestamp") for event in own],
            "splits": [event.get("split") for event in own],
        }
        for user, own in sequences
    ]
    flat = [event | {"user": user} for user, own in sequences for event in own]
    shared = ["user", "item", "behaviour", "timestamp", "split"]
    want = events("jsonl", write("events.jsonl", [json.dumps(event) for event in flat])).select(shared)
    got = events("jsonl", write("users.jsonl", [json.dumps(line) for line in lines]))
    assert got.select(shared).equals(want)
    assert got["line"].to_list() == [n for n, (_, own) in enumerate(sequences, start=1) for _ in own]
    path = write("users.parquet", b"")
    pl.DataFrame(lines, infer_schema_length=None).write_parquet(path)
    assert events("parquet", path).select(shared).equals(want)


def test_both_spellings_and_whole_numbers_and_unknown_fields(write, events):
    path = write(
        "users.jsonl", ['{"user": 1, "items": [2, "3"], "behaviors": ["cart", null], "part": "x", "ratings": 0}']
    )
    assert events("jsonl", path).select("user", "item", "behaviour").rows() == [
        ("1", "2", "cart"),
        ("1", "3", "interaction"),
    ]


@pytest.mark.parametrize("first", ['{"usr": "u", "item": "i"}', '{"user": "u", "product": "i"}', "{}"])
def test_a_wrong_column_names_what_is_there(first, write, events):
    with pytest.raises(UserError, match='needs "user" and "item"') as error:
        events("jsonl", write("events.jsonl", [first]))
    assert error.value.line == 1
    assert ", ".join(json.loads(first)) in error.value.problem


def test_a_first_line_that_is_skipped_does_not_decide_the_shape(write, events):
    path, bad = write("events.jsonl", ['{"itm": 1}', '{"user": "u", "items": ["i", "j"]}']), BadLines("skip")
    assert events("jsonl", path, bad)["item"].to_list() == ["i", "j"]
    assert bad.count == 1


def test_items_with_their_own_columns(write, items):
    lines = [
        '{"item": "1", "asin": "B1", "title": "A", "categories": ["x", null, "y"], "attributes": [3, null, 1]}',
        '{"item": 2, "description": ["a", "b"], "brand": "", "related": {"bought": ["1"]}, "generated_tags": "soft"}',
    ]
    plain = {"title": None, "description": None, "brand": None, "categories": []}
    assert items("jsonl", write("items.jsonl.gz", lines)) == [
        plain | {"item": "1", "title": "A", "categories": ["x", "y"], "asin": "B1", "attributes": ["3", "1"]},
        plain | {"item": "2", "description": "a b", "generated_tags": "soft"},
    ]


@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_a_duplicate_item(policy, write, items):
    path, bad = (
        write("items.jsonl", ['{"item": "1"}', '{"item": "2"}', '{"item": 1}', '{"item": "3"}']),
        BadLines(policy),
    )
    if policy == "stop":
        with pytest.raises(UserError, match="line 3: item '1' was already on line 1"):
            items("jsonl", path, bad)
    else:
        assert [record["item"] for record in items("jsonl", path, bad)] == ["1", "2", "3"]
        assert bad.listed[0]["line"] == 3


def test_items_without_item(write, items):
    with pytest.raises(UserError, match=r'line 1: needs "item"; it has id, title'):
        items("jsonl", write("items.jsonl", ['{"id": 1, "title": "x"}']))


def test_parquet_instants_become_seconds(write, events):
    path = write("events.parquet", b"")
    noon = datetime.datetime(2020, 1, 1, 12, tzinfo=datetime.UTC)
    pl.DataFrame({"user": ["u"], "item": [5], "timestamp": [noon]}).write_parquet(path)
    assert events("parquet", path).select("item", "timestamp").rows() == [("5", noon.timestamp())]


def test_parquet_bad_rows(write, events):
    path, bad = write("events.parquet", b""), BadLines("skip")
    users, times = ["u", "", None, "u", "u"], [1.0, 2.0, 3.0, float("nan"), None]
    pl.DataFrame({"user": users, "item": ["i"] * 5, "timestamp": times}).write_parquet(path)
    assert events("parquet", path, bad)["line"].to_list() == [1, 5]
    assert [(entry["line"], entry["reason"]) for entry in bad.listed] == [
        (2, "user is empty"),
        (3, "user is missing"),
        (4, "timestamp is not a finite number: nan"),
    ]
    with pytest.raises(UserError, match=r"events\.parquet, line 2: user is empty"):
        events("parquet", path)


def test_parquet_columns_and_damage(write, events, items):
    path = write("events.parquet", b"")
    pl.DataFrame({"usr": ["u"], "item": ["i"]}).write_parquet(path)
    with pytest.raises(UserError, match="it has usr, item"):
        events("parquet", path, BadLines("skip"))
    pl.DataFrame({"user": ["u"], "asin": ["i"]}).write_parquet(path)
    with pytest.raises(UserError, match=r'needs "item"; it has user, asin'):
        items("parquet", path)
    whole = path.read_bytes()
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match="not a readable parquet file"):
            events("parquet", path)


def test_parquet_items_and_many_row_groups(write, items, events):
    path = write("items.parquet", b"")
    table = pl.DataFrame({"item": [1, 2, 1], "title": ["a", None, "c"], "tags": [["x", None], [], None]})
    table.write_parquet(path, row_group_size=1)
    bad = BadLines("skip")
    got = items("parquet", path, bad)
    assert [(record["item"], record["title"], record.get("tags")) for record in got] == [
        ("1", "a", ["x"]),
        ("2", None, None),
    ]
    assert bad.listed[0]["reason"] == "item '1' was already on line 1"


def test_reading_is_lazy(write, monkeypatch):
    """The first batches come before the file's damaged end is reached."""
    monkeypatch.setattr(records, "BATCH", 10_000)
    lines = "".join(f'{{"user": "u{n}", "item": "i"}}\n' for n in range(25_000)).encode()
    path = write("events.jsonl.gz", b"")
    path.write_bytes(gzip.compress(lines)[:-5])
    batches = formats.by_name("jsonl").events(path, BadLines())
    assert [len(next(batches)), len(next(batches))] == [10_000, 10_000]
    with pytest.raises(UserError, match="truncated"):
        next(batches)
