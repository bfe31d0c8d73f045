"""Recommendations of a model that reflects explain themselves: the draft, what was doubted, the correction."""

import json

import pytest
from helpers import write_small_model
from reflecting_for_tests import write_reflecting_model

from recllm import Recommender, cli
from recllm.decoding.reflecting import Reflector
from recllm.errors import UserError
from recllm.recommender import Correction, Recommendation
from recllm.summary import corrections_table

HISTORY = ["i1", "i2", "i5"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_reflecting_model(tmp_path_factory.mktemp("reflects"))[1]


@pytest.fixture(scope="module")
def recommender(folder) -> Recommender:
    return Recommender.from_pretrained(folder, device="cpu")


def test_each_item_has_the_draft_it_came_from(recommender):
    checkpoint = recommender.checkpoint
    seen = set()
    for history in (HISTORY, ["i7"], ["i3", "i10"], ["i0", "i4", "i8", "i11"]):
        found = recommender.recommend(history, k=6, mode="reflect", beams=8)
        reflected = Reflector(recommender.decoder, checkpoint.reflection.tokens).scheduled(
            checkpoint.writer.ids([history]), 8
        )
        assert [one.item for one in found] == [checkpoint.table.items[row] for row in reflected.found.rows[0, :6]]
        assert [one.score for one in found] == pytest.approx(reflected.found.scores[0, :6].tolist(), abs=1e-5)
        for one, source in zip(found, reflected.source[0].tolist()):
            said, (loc, *same) = one.reflection, reflected.labels[0, source].tolist()
            assert said.draft == checkpoint.table.items[reflected.drafts.rows[0, source]]
            assert said.title == f"Thing {said.draft[1:]}"
            assert said.score == pytest.approx(float(reflected.drafts.scores[0, source]), abs=1e-5)
            assert said.first_wrong == {0: 1, 1: 2, 2: None}[loc]
            assert said.doubted == tuple(name for name, label in zip(("categories", "brand"), same) if label == 0)
            assert said.uncertainty == pytest.approx(float(reflected.entropies[0, source].mean()), abs=1e-5)
            assert said.kept == (loc == 2)
            assert not said.kept or said.draft == one.item
            seen |= {("wrong", said.first_wrong), ("doubted", said.doubted), ("moved", said.draft != one.item)}
    assert {("wrong", None), ("wrong", 1), ("moved", True), ("moved", False)} <= seen
    assert len([kind for kind, _ in seen if kind == "doubted"]) > 1


def test_filters_exclusions_and_several_histories(recommender):
    found = recommender.recommend(HISTORY, k=4, mode="reflect", filter={"brand": "A"}, exclude="history")
    assert len({one.item for one in found}) == 4
    for item in [one.item for one in found] + [one.reflection.draft for one in found]:
        assert int(item[1:]) % 2 == 0
        assert item not in HISTORY
    every = recommender.recommend(HISTORY, k=6, mode="reflect", filter={"brand": "A"})
    assert {one.item for one in every} == {f"i{n}" for n in range(0, 12, 2)}
    both = recommender.recommend([HISTORY, ["i7"]], k=3, mode="reflect")
    for history, found in zip((HISTORY, ["i7"]), both, strict=True):
        alone = recommender.recommend(history, k=3, mode="reflect")
        assert [(one.item, one.reflection.draft) for one in found] == [
            (one.item, one.reflection.draft) for one in alone
        ]
    fillers = [one.reflection.filler for one in recommender.recommend(HISTORY, k=12, mode="reflect")]
    assert fillers == sorted(fillers), "behind what was corrected or kept"
    assert True in fillers
    left = recommender.recommend(HISTORY, k=12, mode="reflect", exclude="history")
    assert len(left) == 9
    assert all(one.reflection for one in left)


def test_settings_of_the_schedule(recommender):
    histories = [HISTORY, ["i7"], ["i3", "i10"], ["i0", "i4", "i8", "i11"]]
    never = [one for found in recommender.recommend(histories, k=12, mode="reflect", skip=False) for one in found]
    assert not any(one.reflection.kept for one in never)
    assert any(one.reflection.first_wrong is None for one in never), "what is said stays"
    doubt = [one.score for one in recommender.recommend(HISTORY, k=3, mode="reflect", entropy_weight=0.0)]
    assert doubt != [one.score for one in recommender.recommend(HISTORY, k=3, mode="reflect", entropy_weight=0.5)]
    with pytest.raises(UserError, match="entropy_weight"):
        recommender.recommend(HISTORY, k=3, mode="reflect", entropy_weight=-1.0)
    assert [one.reflection for one in recommender.recommend(HISTORY, k=2)] == [None, None]


def test_without_labels_nothing_is_doubted(tmp_path):
    plain = Recommender.from_pretrained(write_reflecting_model(tmp_path, labels=False)[1], device="cpu")
    found = plain.recommend(HISTORY, k=5, mode="reflect")
    for one in found:
        said = one.reflection
        assert (said.first_wrong, said.doubted, said.uncertainty, said.kept) == (None, (), 0.0, False)
    assert any(one.reflection.draft != one.item for one in found)


def test_a_model_that_was_not_taught_is_refused(tmp_path):
    untaught = Recommender.from_pretrained(write_small_model(tmp_path)[1], device="cpu")
    with pytest.raises(UserError, match=r"was not taught to reflect .*mode direct"):
        untaught.recommend(["i1"], k=2, mode="reflect")


def test_the_table_says_what_was_doubted():
    def one(item, draft, first_wrong, doubted, kept):
        return Recommendation(
            item, "[b]", -1.0, None, Correction(draft, "[a]", -2.5, first_wrong, doubted, 0.625, kept)
        )

    some = [
        one("i1", "i2", 2, ("brand",), False),
        one("i3", "i3", None, (), True),
        one("i4", "i4", 1, (), False),
        one("i5", "i4", None, ("brand", "price"), False),
    ]
    columns = [[str(cell) for cell in column.cells] for column in corrections_table(some, 3).columns]
    assert columns[1] == ["[a] (i2)", "[a] (i3)", "[a] (i4)", "[a] (i4)"]
    assert columns[2] == ["-2.50"] * 4
    assert columns[3] == ["code 2 of 3, brand", "nothing", "code 1 of 3", "brand, price"]
    assert columns[4] == ["0.62"] * 4
    assert columns[5] == ["→ [b] (i1)", "→ kept", "→ the same", "→ [b] (i5)"]


def test_the_command_prints_drafts_and_corrections(folder, recommender, monkeypatch, capsys):
    command = ["recllm", "recommend", "--model", str(folder), "--mode", "reflect", "--k", "4", "--history", *HISTORY]
    found = recommender.recommend(HISTORY, k=4, mode="reflect")
    monkeypatch.setattr("sys.argv", command)
    cli.main()
    printed = capsys.readouterr().out
    places = [printed.index(said) for said in ("the history", "reflection", "doubted", "recommended")]
    assert places == sorted(places)
    between = printed[places[1] : places[3]]
    assert all(f"({one.reflection.draft})" in between for one in found)
    monkeypatch.setattr("sys.argv", [*command, "--json", "--entropy_weight", "0", "--no_skip"])
    cli.main()
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    other = recommender.recommend(HISTORY, k=4, mode="reflect", entropy_weight=0.0, skip=False)
    assert [line["reflection"]["draft"] for line in lines] == [one.reflection.draft for one in other]
    assert set(lines[0]["reflection"]) == {
        "draft", "title", "score", "first_wrong", "doubted", "uncertainty", "kept", "filler"
    }  # fmt: skip
