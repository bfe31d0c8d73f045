"""Evaluations of five items side by side: hand arithmetic, the tests' p-values, the three formats, what is refused."""

import json
import re
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
import torch
from helpers import write_catalogue

from recllm import metrics
from recllm.errors import UserError
from recllm.evaluation.comparison import Cell, CompareConfig, compare, holm
from recllm.evaluation.comparison_tables import BEST, OTHER, SECOND, escape_latex, places, render
from recllm.evaluation.predictions import Prediction
from recllm.evaluation.scoring import score

ITEMS = ["i1", "i2", "i3", "i4", "i5"]
PROTOCOL = {"k": [1, 2], "max_history": 50, "exclude_history": False, "beams": 20}
COMPARE = Path(__file__).parents[2] / "eval" / "compare.py"


@pytest.fixture
def shop(tmp_path):
    """Four users who all take i1 in the end."""
    return write_catalogue(tmp_path / "shop", ITEMS, {f"u{n}": ["i2", "i3", "i1"] for n in range(1, 5)})


def write_run(folder, catalogue, places, name=None, seed=0, split="test", run=None, **protocol) -> str:
    """An evaluation in which each target stands at the given place (1, 2, …; 0: not in the list)."""
    others = ITEMS[1:]
    cases = list(catalogue.targets(split).select("user", "position", "item").iter_rows())
    found = []
    for (user, position, target), place in zip(cases, places, strict=True):
        items = [*others[: place - 1], target, *others[place - 1 :]][:3] if place else others[:3]
        found.append(Prediction(user, position, target, items, [0.0] * 3))
    about = {
        "name": name or folder.name,
        "ranker": {"ranker": "semantic-ids"},
        "catalogue": {"name": catalogue.name, "fingerprint": catalogue.fingerprint},
        "split": split,
        "protocol": PROTOCOL | protocol,
        "seed": seed,
        "versions": {"torch": "2"},
    } | (run or {})
    folder.mkdir()
    result = {"run": about, **score(found, catalogue, split, PROTOCOL["k"])}
    (folder / "metrics.json").write_text(json.dumps(result))
    (folder / "predictions.jsonl").write_bytes(b"".join(msgspec.json.encode(line) + b"\n" for line in found))
    return str(folder)


def side_by_side(*runs, metrics=("recall@1", "recall@2"), **settings):
    return compare(CompareConfig(runs=list(runs), metrics=list(metrics), **settings))


def test_by_hand(shop, tmp_path):
    first = write_run(tmp_path / "first", shop, [1, 2, 0, 0])
    again = write_run(tmp_path / "again", shop, [1, 1, 2, 0], name="mine", seed=0)
    third = write_run(tmp_path / "third", shop, [1, 2, 1, 1], name="mine", seed=7)
    table = side_by_side(first, again, third)
    assert (table.baseline, table.users, table.split, table.data) == ("first", 4, "test", "tiny")
    one, both = table.rows
    assert (one.name, one.seeds, both.name, both.seeds) == ("first", (0,), "mine", (0, 7))
    assert [cell.mean for cell in one.cells] == [1 / 4, 2 / 4]
    assert [cell.mean for cell in both.cells] == pytest.approx([(2 / 4 + 3 / 4) / 2, (3 / 4 + 4 / 4) / 2])
    deviation = (1 / 4) / 2**0.5  # of two values a quarter apart
    assert [cell.deviation for cell in both.cells] == pytest.approx([deviation] * 2)
    assert [cell.deviation for cell in one.cells] == [cell.p for cell in one.cells] == [None] * 2
    # recall@1 of mine, averaged over seeds: 1, 1/2, 1/2, 1/2; of first: 1, 0, 0, 0
    expected = metrics.paired_p_value(torch.tensor([1, 0.5, 0.5, 0.5]), torch.tensor([1.0, 0, 0, 0]))
    assert both.cells[0].p == expected
    assert expected == pytest.approx(2 / 2**3, abs=0.02), "of the 8 signs of three users, 2 are as far out"


def test_marks_say_which_differences_are_no_accident(tmp_path):
    shop = write_catalogue(tmp_path / "shop", ITEMS, {f"u{n:02}": ["i2", "i3", "i1"] for n in range(24)})
    base = write_run(tmp_path / "base", shop, [0] * 24)
    all_right = write_run(tmp_path / "right", shop, [1] * 24)
    some = write_run(tmp_path / "some", shop, [1] * 7 + [0] * 17)  # 2/2⁷ = .016 alone
    one = write_run(tmp_path / "one", shop, [1] + [0] * 23)
    alone = side_by_side(base, some)
    assert [row.cells[0].stars for row in alone.rows] == ["", "*"]
    table = side_by_side(base, some, all_right, one)
    assert [row.cells[0].stars for row in table.rows] == ["", "*", "**", ""], "Holm: some is second of three, .032"
    worse = side_by_side(base, all_right, baseline="right")
    assert [row.cells[0].stars for row in worse.rows] == ["**", ""]


def test_holm_by_hand():
    # ascending .01·3, .03·2, .04·1; the last may not be below the one before it
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1, 1]
    assert holm([]) == []


def test_a_users_targets_are_flipped_together(tmp_path):
    """Two users of twelve targets each: whatever the targets say, two users cannot show a difference."""
    shop = write_catalogue(tmp_path / "shop", ITEMS, {"u1": ["i1"] * 12, "u2": ["i1"] * 12}, split="train")
    base = write_run(tmp_path / "base", shop, [0] * 24, split="train")
    right = write_run(tmp_path / "right", shop, [1] * 24, split="train")
    table = side_by_side(base, right)
    assert table.rows[1].cells[0].p == pytest.approx(2 / 2**2, abs=0.02)
    assert "2 users with 24 targets" in render(table, "text")


def test_the_order_of_the_lines_is_no_matter(shop, tmp_path):
    a, b = write_run(tmp_path / "a", shop, [1, 2, 0, 0]), write_run(tmp_path / "b", shop, [1, 1, 1, 0])
    before = side_by_side(a, b)
    lines = (tmp_path / "b" / "predictions.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "b" / "predictions.jsonl").write_bytes(b"".join(lines[::-1]))
    assert side_by_side(a, b) == before


# ---- how it looks


def cell(mean):
    return Cell(mean, None, None)


def test_best_and_second_are_found_among_the_shown_figures():
    assert places([cell(0.1), cell(0.3), cell(0.2)]) == [OTHER, BEST, SECOND]
    assert places([cell(0.30001), cell(0.3), cell(0.2), cell(0.1)]) == [BEST, BEST, SECOND, OTHER]
    assert places([cell(0.3)]) == [OTHER]


@pytest.fixture
def table(tmp_path):
    shop = write_catalogue(tmp_path / "shop", ITEMS, {f"u{n:02}": ["i2", "i3", "i1"] for n in range(24)})
    runs = [
        write_run(tmp_path / "a", shop, [1] * 12 + [0] * 12, name="50% [item]_knn|", beams=None),
        write_run(tmp_path / "b", shop, [1] * 24, name="ours", seed=0),
        write_run(tmp_path / "c", shop, [1] * 23 + [0], name="ours", seed=1),
    ]
    return side_by_side(*runs, metrics=["recall@1", "ndcg@2"])


def test_markdown(table):
    assert render(table, "markdown").splitlines() == [
        "|  | beams | Recall@1 | NDCG@2 |",
        "| --- | ---: | ---: | ---: |",
        r"| 50% \[item\]\_knn\| | – | <u>0.5000</u> | <u>0.5000</u> |",
        r"| ours | 20 | **0.9792** ± 0.0295\*\* | **0.9792** ± 0.0295\*\* |",
        "",
        r"tiny, split test, 24 users. Seeds: 50% \[item\]\_knn\|: 0; ours: 0, 1. "
        r"± is the standard deviation over seeds.<br>"
        r"\* p \< .05, \*\* p \< .01: differs from 50% \[item\]\_knn\|, to either side; paired sign-flip test over "
        "users on values averaged over seeds, Holm-corrected over the rows.",
    ]


def test_latex(table):
    text = render(table, "latex")
    assert r"50\% {[}item]\_knn\textbar{} & -- & \underline{0.5000} & \underline{0.5000} \\" in text
    assert r"ours & 20 & \textbf{0.9792} $\pm$ 0.0295$^{**}$ & \textbf{0.9792} $\pm$ 0.0295$^{**}$ \\" in text
    for word in (r"\toprule", r"\midrule", r"\bottomrule", r"\begin{tabular}{lrrr}"):
        assert word in text
    assert text.count("{") - text.count(r"\{") == text.count("}") - text.count(r"\}")
    assert escape_latex("[*] a&b_c#{x}\\~^$") == (
        r"{[}{*}] a\&b\_c\#\{x\}\textbackslash{}\textasciitilde{}\textasciicircum{}\$"
    )


def test_text_is_plain_and_never_cut(table):
    head, knn, ours, _, data, marks = render(table, "text").splitlines()
    assert head.split() == ["beams", "Recall@1", "NDCG@2"]
    assert knn.split() == ["50%", "[item]_knn|", "–", "0.5000", "0.5000"]
    assert re.split(r"\s{2,}", ours) == ["ours", "20", "0.9792 ± 0.0295**", "0.9792 ± 0.0295**"]
    assert data.startswith("tiny, split test, 24 users. Seeds: 50% [item]_knn|: 0; ours: 0, 1.")
    assert marks.startswith("* p < .05, ** p < .01: differs from 50% [item]_knn|")
    assert "\x1b" not in render(table, "text")
    assert "\x1b[1m0.9792\x1b[0m" in render(table, "text", styled=True)


def test_one_run_alone_is_a_table_without_marks(shop, tmp_path):
    text = render(side_by_side(write_run(tmp_path / "a", shop, [1, 2, 0, 0], seed=None)), "markdown")
    assert "| a | 0.2500 | 0.5000 |" in text
    assert "**" not in text
    assert "±" not in text
    assert "Seeds: a: none." in text


def test_the_script(shop, tmp_path):
    a, b = write_run(tmp_path / "a", shop, [1, 2, 0, 0]), write_run(tmp_path / "b", shop, [0, 1, 1, 2])
    output = tmp_path / "new" / "table.tex"

    def script(*arguments):
        return subprocess.run([sys.executable, str(COMPARE), *map(str, arguments)], capture_output=True, text=True)

    done = script(a, b, "--metrics", "recall@1", "--baseline", "b", "--format", "latex", "--output", output)
    assert (done.returncode, done.stderr) == (0, "")
    expected = side_by_side(a, b, metrics=["recall@1"], baseline="b")
    assert output.read_text() == render(expected, "latex")
    wrong = script(a, tmp_path / "none", "--metrics", "recall@1")
    assert wrong.returncode == 2
    assert wrong.stderr.startswith(f"error: {tmp_path / 'none'}: the evaluation does not exist. Fix: ")


# ---- refused


@pytest.mark.parametrize(
    ("other", "sentence"),
    [
        ({"split": "valid"}, "b: has split 'valid', and .*a has 'test'"),
        ({"max_history": 20}, "b: has max_history 20, and .*a has 50"),
        ({"exclude_history": True}, "b: has exclude_history True, and .*a has False"),
        ({"k": [1]}, r"b: has k \[1\], and .*a has \[1, 2\]"),
        ({"run": {"catalogue": {"name": "tiny", "fingerprint": "f"}}}, "b: has catalogue fingerprint 'f', and .*a has"),
        ({"name": "a"}, "b: is a second run 'a' with seed 0; the first is .*a"),
        ({"name": "a", "seed": 1, "beams": 5}, "b: is named 'a' as .*a is, with beams 5 and not 20"),
        (
            {"name": "a", "seed": 1, "run": {"ranker": {"ranker": "popularity"}}},
            "b: is named 'a' as .*a is, with ranker 'popularity' and not 'semantic-ids'",
        ),
        (
            {"name": "a", "seed": 1, "run": {"ranker": {"ranker": "semantic-ids", "normaliser": "full"}}},
            "b: is named 'a' as .*a is, with normaliser 'full' and not None",
        ),
    ],
)
def test_runs_that_were_not_measured_alike_are_refused(shop, tmp_path, other, sentence):
    a = write_run(tmp_path / "a", shop, [1, 2, 0, 0])
    b = write_run(tmp_path / "b", shop, [1, 2, 0, 0], **other)
    with pytest.raises(UserError, match=sentence) as caught:
        side_by_side(a, b)
    assert "Fix: " in str(caught.value)


def test_other_users_are_refused(tmp_path):
    """The same fingerprint was written by hand into the second: the predictions tell."""
    here = write_catalogue(tmp_path / "here", ITEMS, {"u1": ["i2", "i3", "i1"], "u2": ["i2", "i3", "i1"]})
    there = write_catalogue(tmp_path / "there", ITEMS, {"u1": ["i2", "i3", "i1"], "u3": ["i2", "i3", "i1"]})
    same = {"catalogue": {"name": "tiny", "fingerprint": here.fingerprint}}
    a, b = write_run(tmp_path / "a", here, [1, 1]), write_run(tmp_path / "b", there, [1, 1], run=same)
    with pytest.raises(UserError, match=r"a: has no prediction of 'i1' for user 'u3' at position 2, and .*b has"):
        side_by_side(a, b)


def break_metrics(folder, change):
    path = folder / "metrics.json"
    result = json.loads(path.read_text())
    change(result)
    path.write_text(json.dumps(result))


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda b: (b / "metrics.json").unlink(), r"metrics\.json: the evaluation's result does not exist"),
        (
            lambda b: (b / "predictions.jsonl").unlink(),
            r"predictions\.jsonl: the file of predictions does not exist",
        ),
        (lambda b: (b / "metrics.json").write_text('{\n"run": ,'), r"metrics\.json, line 2: not valid JSON"),
        (lambda b: (b / "metrics.json").write_text("[]"), r"metrics\.json: holds no JSON object"),
        (lambda b: break_metrics(b, lambda r: r.pop("run")), r"metrics\.json: is damaged: .*`run`"),
        (lambda b: break_metrics(b, lambda r: r["run"].update(seed="x")), r"is damaged: .*\$\.run\.seed"),
        (lambda b: break_metrics(b, lambda r: r["metrics"].update({"ndcg@2": 0.9})), "does not give the figures"),
        (lambda b: (b / "predictions.jsonl").write_text(""), "does not give the figures"),
        (lambda b: (b / "predictions.jsonl").write_text("{}\n"), r"predictions\.jsonl, line 1: not a prediction"),
        (
            lambda b: (b / "predictions.jsonl").write_text((b / "predictions.jsonl").read_text().replace("u2", "u1")),
            "does not give the figures",
        ),
    ],
)
def test_damaged_evaluations_are_refused(shop, tmp_path, spoil, sentence):
    a, b = (write_run(tmp_path / name, shop, [1, 2, 0, 0]) for name in "ab")
    spoil(tmp_path / "b")
    with pytest.raises(UserError, match=sentence) as caught:
        side_by_side(a, b)
    assert "Fix: " in str(caught.value) or "line 2" in str(caught.value)


def test_unknown_names_are_refused_with_the_nearest(shop, tmp_path):
    a, b = (write_run(tmp_path / name, shop, [1, 2, 0, 0]) for name in ("sasrec", "tiger"))
    with pytest.raises(UserError, match=r"metrics: 'recal@1' is not a metric of all these.*did you mean `recall@1`"):
        side_by_side(a, b, metrics=["recal@1"])
    with pytest.raises(UserError, match=r"metrics: 'coverage@2' .* there are recall@1, recall@2, "):
        side_by_side(a, b, metrics=["coverage@2"])
    with pytest.raises(UserError, match=r"baseline: 'sasrek' is none of the runs. .*did you mean `sasrec`"):
        side_by_side(a, b, baseline="sasrek")
    with pytest.raises(UserError, match="nothing to compare"):
        CompareConfig()
    with pytest.raises(UserError, match="`metrics` is empty"):
        CompareConfig(runs=[a], metrics=[])
