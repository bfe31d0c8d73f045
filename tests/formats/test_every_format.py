"""What holds for each format: a good file, compressed or not, in any batches; and every way in which one can be bad."""

import json
from dataclasses import dataclass
from pathlib import Path

import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from recllm import formats
from recllm.errors import UserError
from recllm.formats import EVENT_COLUMNS, BadLines, records


@dataclass(frozen=True)
class Case:
    """Five good lines of one event each (u1…u5 with i1…i5), the header before them, and lines that are bad."""

    format: str
    file: str
    header: list[str]
    lines: list[str]
    bad: dict[str, str | bytes]  # part of the reason → the line
    time: float | None = 7.0


def line(**fields) -> str:
    return json.dumps(fields)


def review_2014(user, item, time=7, **more) -> str:
    return line(reviewerID=user, asin=item, unixReviewTime=time, overall=4.0, **more)


def review_2023(user, item, time=7000, **more) -> str:
    return line(user_id=user, parent_asin=item, timestamp=time, rating=4.0, **more)


NAN = float("nan")
FIVE = [(f"u{n}", f"i{n}") for n in range(1, 6)]
NOT_TEXT = b'{"user": "\xff\xfe", "item": "i"}'
AMAZON_BAD = {
    "timestamp is not a finite number: nan": review_2014("u", "i", NAN),
    "timestamp is not a finite number: inf": review_2014("u", "i", float("inf")),
    "timestamp is not a number: 'May'": review_2014("u", "i", "May"),
    "timestamp is missing": line(reviewerID="u", asin="i"),
    "user is empty": review_2014("", "i"),
    "user is missing": line(asin="i", unixReviewTime=7),
    "item is empty": review_2014("u", " "),
    "item is neither text nor a whole number: ['i']": review_2014("u", ["i"]),
    "not valid JSON": '{"reviewerID": "u", ',
    "not a JSON object": "[1, 2]",
    "not a Python literal": "{'reviewerID': open('x')}",
    "not UTF-8 text": b'{"reviewerID": "\xff", "asin": "i"}',
    "not valid Unicode": '{"reviewerID": "\\ud800", "asin": "i", "unixReviewTime": 7}',
}
CASES = [
    Case(
        "jsonl",
        "events.jsonl",
        [],
        [line(user=user, item=item, timestamp=7) for user, item in FIVE],
        {
            "timestamp is not a finite number: nan": line(user="u", item="i", timestamp=NAN),
            "timestamp is not a finite number: -inf": line(user="u", item="i", timestamp=-float("inf")),
            "timestamp is not a number: 'noon'": line(user="u", item="i", timestamp="noon"),
            "timestamp is not a number: True": line(user="u", item="i", timestamp=True),
            "rating is not a number: [1]": line(user="u", item="i", rating=[1]),
            "user is empty": line(user="", item="i"),
            "item is empty": line(user="u", item="  "),
            "item is missing": line(user="u", item=None),
            "user is missing": line(item="i"),
            "item is neither text nor a whole number: 1.5": line(user="u", item=1.5),
            "item is neither text nor a whole number: True": line(user="u", item=True),
            "behaviour is empty": line(user="u", item="i", behaviour=""),
            "split is none of train, valid, test: 'dev'": line(user="u", item="i", split="dev"),
            "not valid JSON": "{",
            "brackets too deep": "[" * 100_000,
            "not a JSON object": '"text"',
            "not UTF-8 text (byte 0xff at column 11)": NOT_TEXT,
            "not valid Unicode": '{"user": "\\udc00", "item": "i"}',
        },
    ),
    Case(
        "jsonl",
        "users.jsonl",
        [],
        [line(user=user, items=[item], timestamps=[7]) for user, item in FIVE],
        {
            "user has no items": line(user="u", items=[]),
            "items is not a list: 'i'": line(user="u", items="i"),
            "items has 2 entries and timestamps has 1": line(user="u", items=["i", "j"], timestamps=[1]),
            "items has 1 entries and behaviours has 2": line(user="u", items=["i"], behaviors=["a", "b"]),
            "items has 1 entries and splits has 0": line(user="u", items=["i"], splits=[]),
            "item is missing": line(user="u", items=["i", None]),
            "timestamp is not a finite number": line(user="u", items=["i"], timestamps=[NAN]),
            "user is empty": line(user="", items=["i"]),
            "not UTF-8 text": NOT_TEXT,
        },
    ),
    Case("amazon2014", "reviews.json", [], [review_2014(*pair) for pair in FIVE], AMAZON_BAD),
    Case("amazon2018", "reviews.json", [], [review_2014(*pair) for pair in FIVE], AMAZON_BAD),
    Case(
        "amazon2023",
        "reviews.jsonl",
        [],
        [review_2023(*pair) for pair in FIVE],
        {
            "timestamp is not a finite number: nan": review_2023("u", "i", NAN),
            "timestamp is not a number: 'May'": review_2023("u", "i", "May"),
            "timestamp is missing": review_2023("u", "i", None),
            "user is empty": review_2023("", "i"),
            "item is missing": line(user_id="u", timestamp=7),
            "helpful is not a number: {'a': 1}": review_2023("u", "i", helpful_vote={"a": 1}),
        },
    ),
    Case(
        "recbole",
        "data.inter",
        ["user_id:token\titem_id:token\ttimestamp:float"],
        [f"{user}\t{item}\t7.0" for user, item in FIVE],
        {
            "timestamp is not a finite number: 'nan'": "u\ti\tnan",
            "timestamp is not a number: 'x'": "u\ti\tx",
            "timestamp is not a number: '1_0'": "u\ti\t1_0",
            "timestamp is missing": "u\ti\t",
            "user is missing": "\ti\t7",
            "item is missing": "u\t \t7",
            "has 2 fields, the header 3": "u\ti",
            "has 4 fields, the header 3": "u\ti\t7\t8",
            "not UTF-8 text": b"u\t\xff\t7",
        },
    ),
    Case(
        "s3rec",
        "data.txt",
        [],
        [f"{user} {item}" for user, item in FIVE],
        {"user has no items": "u", "not UTF-8 text": b"u \xff"},
        time=None,
    ),
    Case(
        "amazon_ratings",
        "ratings.csv",
        [],
        [f"{user},B00000000{item[1]},4.0,7" for user, item in FIVE],
        {
            "timestamp is not a finite number: 'nan'": "u,B000000009,4.0,nan",
            "timestamp is not a number: ''": "u,i,4.0,",
            "user is empty": ",i,4.0,7",
            "item is empty": "u,,4.0,7",
            "has 2 of the 4 fields": "u,i",
            "not UTF-8 text": b"u,\xff,4,7",
        },
    ),
    Case(
        "retailrocket",
        "events.csv",
        ["timestamp,visitorid,event,itemid,transactionid"],
        [f"7000,{user},view,{item}," for user, item in FIVE],
        {
            "event is none of view, addtocart, transaction: 'click'": "7000,u,click,i,",
            "timestamp is missing": ",u,view,i,",
            "timestamp is not a number: 'x'": "x,u,view,i,",
            "timestamp is not a finite number: 'inf'": "inf,u,view,i,",
            "user is empty": "7000,,view,i,",
            "item is empty": "7000,u,view,,",
            "has 4 fields, and there are 5 columns": "7000,u,view,i",
            "not UTF-8 text": b"7000,\xff,view,i,",
        },
    ),
    Case(
        "tmall",
        "user_log_format1.csv",
        ["user_id,item_id,cat_id,seller_id,brand_id,time_stamp,action_type"],
        [f"{user},{item},833,2882,2660,829,0" for user, item in FIVE],
        {
            "action_type is none of 0, 1, 2, 3: '4'": "u,i,833,2882,2660,829,4",
            "timestamp is no day as month and day (1111): '831st'": "u,i,833,2882,2660,831st,0",
            "timestamp is no day as month and day (1111): '931'": "u,i,833,2882,2660,931,0",
            "timestamp is no day as month and day (1111): ''": "u,i,833,2882,2660,,0",
            "user is empty": ",i,833,2882,2660,829,0",
            "has 3 fields, and there are 7 columns": "u,i,833",
        },
        time=1409270400.0,  # 29 August 2014
    ),
    Case(
        "taobao",
        "UserBehavior.csv",
        [],
        [f"{user},{item},2520771,pv,7" for user, item in FIVE],
        {
            "behaviour is none of pv, fav, cart, buy: 'PV'": "u,i,1,PV,7",
            "timestamp is missing": "u,i,1,pv,",
            "timestamp is not a number: '1_0'": "u,i,1,pv,1_0",
            "item is empty": "u,,1,pv,7",
            "has 2 fields, and there are 5 columns": "u,i",
        },
    ),
    Case(
        "jdata",
        "jdata_action.csv",
        ["user_id,sku_id,action_time,module_id,type"],
        [f"{user},{item},1970-01-01 00:00:07,8107857,1" for user, item in FIVE],
        {
            "type is none of 1, 2, 3, 4, 5: '6'": "u,i,1970-01-01 00:00:07,8107857,6",
            "timestamp is no date and time (2018-03-01 09:30:00): '7'": "u,i,7,8107857,1",
            "timestamp is no date and time (2018-03-01 09:30:00): ''": "u,i,,8107857,1",
            "user is empty": " ,i,1970-01-01 00:00:07,8107857,1",
            "has 4 fields, and there are 5 columns": "u,i,1970-01-01 00:00:07,1",
        },
    ),
]
each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.format}-{case.file}")
each_bad_line = pytest.mark.parametrize(
    ("case", "reason"),
    [pytest.param(case, reason, id=f"{case.format}-{reason}") for case in CASES for reason in case.bad],
)


@each_case
@pytest.mark.parametrize("end", ["", ".gz"])
def test_a_good_file(case, end, write, events):
    got = events(case.format, write(case.file + end, case.header + case.lines))
    assert dict(got.schema) == EVENT_COLUMNS
    first = len(case.header) + 1
    assert got["line"].to_list() == [*range(first, first + 5)]
    assert got["user"].to_list() == ["u1", "u2", "u3", "u4", "u5"]
    assert [item[-1] for item in got["item"]] == ["1", "2", "3", "4", "5"]
    assert got["behaviour"].null_count() == 0
    assert got["timestamp"].to_list() == [case.time] * 5


@each_bad_line
def test_a_bad_line_stops(case, reason, write, events):
    path = write(case.file, case.header + case.lines[:2] + [case.bad[reason]] + case.lines[2:4])
    with pytest.raises(UserError) as error:
        events(case.format, path)
    assert reason in error.value.problem
    assert error.value.file == path
    assert error.value.line == len(case.header) + 3
    assert "--on_bad_line skip" in error.value.fix


@each_bad_line
def test_a_bad_line_is_skipped_and_listed(case, reason, write, events):
    path, bad = write(case.file, case.header + case.lines[:2] + [case.bad[reason]] + case.lines[2:4]), BadLines("skip")
    assert events(case.format, path, bad)["user"].to_list() == ["u1", "u2", "u3", "u4"]
    assert bad.count == 1
    [entry] = bad.listed
    assert entry["file"] == case.file
    assert entry["line"] == len(case.header) + 3
    assert reason in entry["reason"]


@each_case
def test_blank_lines_marks_and_windows_line_ends_change_nothing_but_numbers(case, write, events):
    lines = case.header + case.lines
    usual = events(case.format, write(case.file, lines)).drop("line")
    odd = "\ufeff" + "\r\n".join([*lines[:2], "", "  ", *lines[2:]])
    assert events(case.format, write("odd" + case.file, odd)).drop("line").equals(usual)


@each_case
def test_batches_of_any_size_hold_the_same_rows(case, write, events, monkeypatch):
    path = write(case.file, case.header + case.lines)
    whole = events(case.format, path)
    for size in (1, 2, 5, 6):
        monkeypatch.setattr(records, "BATCH", size)
        batches = list(formats.by_name(case.format).events(path, BadLines()))
        assert max(map(len, batches)) <= size
        assert pl.concat(batches).equals(whole)


@each_case
def test_a_gzip_file_cut_at_any_byte_is_refused(case, write, events):
    path = write(case.file + ".gz", case.header + case.lines)
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError) as error:
            events(case.format, path, BadLines("skip"))
        assert error.value.file == path


@each_case
def test_a_file_of_nothing_or_of_nothing_good_is_refused(case, write, events):
    with pytest.raises(UserError, match="holds no interactions"):
        events(case.format, write(case.file, case.header))
    reason, bad_line = next(iter(case.bad.items()))
    with pytest.raises(UserError) as error:
        events(case.format, write(case.file, case.header + [bad_line] * 3), BadLines("skip"))
    assert "none of its 3 lines" in error.value.problem
    assert reason in error.value.problem


@pytest.mark.parametrize("name", formats.FORMATS)
def test_a_missing_file(name, tmp_path, events, items):
    for read, file in ((events, tmp_path / "none"), (items, tmp_path / "none.item.json")):
        with pytest.raises(UserError, match="does not exist"):
            read(name, file)
        with pytest.raises(UserError):
            read(name, tmp_path)  # a folder


FIELDS = st.sampled_from(["user", "item", "items", "timestamps", "asin", "reviewerID", "title", "categories"])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(FIELDS, inner, max_size=5),
    max_leaves=12,
)
BYTES = st.one_of(
    st.binary(max_size=200),
    st.lists(st.sampled_from(b"\"'{}[],:\\\t\n\r 0123abu\xff\xc3\x00-+.eENnN()"), max_size=80).map(bytes),
    VALUES.map(lambda value: json.dumps(value).encode()),
    VALUES.map(lambda value: repr(value).encode()),
)
HEADERS = [
    b"",
    b'{"user": "u", "item": "i"}\n',
    b"user_id:token\titem_id:token\n",
    b"user_id,history_item_id,item_id\n",
    b"timestamp,visitorid,event,itemid,transactionid",
    b"timestamp,itemid,property,value",
    b"user_id,item_id,cat_id,seller_id,brand_id,time_stamp,action_type",
    b"user_id,sku_id,time,model_id,type,cate,brand",
]


@pytest.mark.parametrize("name", formats.FORMATS)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=BYTES, lead=st.sampled_from(HEADERS))
def test_no_bytes_give_anything_but_rows_or_one_sentence(name, content, lead, tmp_path):
    path = tmp_path / "train.csv"
    path.write_bytes(lead + b"\n" + content)
    sentences = []
    for bad in (BadLines("stop"), BadLines("skip")):
        for read in (formats.by_name(name).events, formats.by_name(name).items):
            try:
                list(read(path, bad))
            except UserError as error:
                sentences.append(str(error))
        sentences += [entry["reason"] for entry in bad.listed]
    for sentence in sentences:
        assert sentence.isprintable(), sentence


def test_an_unknown_format_lists_the_known_ones():
    with pytest.raises(UserError, match="jsonl, parquet, amazon2014"):
        formats.by_name("xml")


def test_names_are_the_keys_and_every_format_is_documented():
    page = (Path(__file__).parents[2] / "docs" / "data_formats.md").read_text(encoding="utf-8")
    for name, reader in formats.FORMATS.items():
        assert reader.name == name
        assert f"--format {name}" in page
