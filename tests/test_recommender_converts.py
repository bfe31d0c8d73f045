"""What a user buys next, and the events that led there: from Python and from the command line."""

import json

import pytest
import torch
from conversions_for_tests import write_stage_1, write_stage_2
from helpers import write_small_model

from recllm import Recommender, cli
from recllm.converter import Converter
from recllm.errors import UserError
from recllm.recommender import Evidence

HISTORY = [("i01", "click"), ("i02", "cart"), ("i01", "cart"), ("i03", "click"), ("i04", "pay")]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("converts")
    _, stage_1 = write_stage_1(folder)
    return stage_1, write_stage_2(stage_1, folder / "learned")


@pytest.fixture(scope="module")
def recommender(folders) -> Recommender:
    return Recommender.from_pretrained(folders[1], device="cpu")


@pytest.fixture(scope="module")
def stage_1(folders) -> Recommender:
    return Recommender.from_pretrained(folders[0], device="cpu")


def test_every_recommendation_has_its_evidence(recommender):
    found = recommender.recommend(HISTORY, k=5, target_behaviour="pay", user="u05")
    said = Converter.of(recommender.checkpoint).beams([HISTORY], 20, ["u05"])
    assert [one.item for one in found] == [recommender.checkpoint.table.items[row] for row in said.found.rows[0, :5]]
    assert [one.score for one in found] == pytest.approx(said.found.scores[0, :5].tolist(), abs=1e-5)
    shown = HISTORY[-4:]  # the model reads no more
    expected = tuple(
        Evidence(*(shown[event][0], "", shown[event][1]), pytest.approx(score, abs=1e-5))
        for event, score in zip(said.events[0].tolist(), said.relevance[0].tolist())
    )
    assert len(expected) == 2
    assert all(one.evidence == expected for one in found)
    assert expected[0].relevance.expected <= expected[1].relevance.expected  # the best stands before the answer


def test_titles_are_those_of_the_items(folders):
    ours = Recommender.from_pretrained(folders[1], device="cpu")
    items = ours.checkpoint.items
    named = items.with_columns(title="Thing " + items["item"])
    object.__setattr__(ours.checkpoint, "items", named)
    (one,) = ours.recommend(HISTORY, k=1, target_behaviour="pay")
    assert one.title == f"Thing {one.item}"
    assert [event.title for event in one.evidence] == [f"Thing {event.item}" for event in one.evidence]


def test_several_histories_are_answered_as_each_alone(recommender):
    histories = [HISTORY, HISTORY[:1], HISTORY[1:4]]
    together = recommender.recommend(histories, k=4, target_behaviour="pay", user=["u01", None, "u05"])
    for history, user, found in zip(histories, ("u01", None, "u05"), together, strict=True):
        alone = recommender.recommend(history, k=4, target_behaviour="pay", user=user)
        assert [one.item for one in found] == [one.item for one in alone]
        assert [one.behaviour for one in found[0].evidence] == [one.behaviour for one in alone[0].evidence]
    assert [len(found[0].evidence) for found in together] == [2, 1, 2]
    lists = recommender.recommend([list(map(list, HISTORY))], k=4, target_behaviour="pay", user="u01")  # as JSON has it
    assert [one.item for one in lists[0]] == [one.item for one in together[0]]


def test_filters_and_exclusions_hold(recommender):
    names = recommender.checkpoint.table.items
    own = {item for item, _ in HISTORY}
    found = recommender.recommend(HISTORY, k=len(names) - len(own), target_behaviour="pay", exclude="history")
    assert {one.item for one in found} == set(names) - own
    found = recommender.recommend(HISTORY, k=2, target_behaviour="pay", filter={"item": ["i07", "i08", "i02"]},
                                  exclude=["i02"])  # fmt: skip
    assert {one.item for one in found} == {"i07", "i08"}
    with pytest.raises(UserError, match="k = 3, and the filter leaves 2 items"):
        recommender.recommend(HISTORY, k=3, target_behaviour="pay", filter={"item": ["i07", "i08"]})


def test_a_model_of_all_behaviours_is_asked_for_any(stage_1):
    found = {kind: stage_1.recommend(HISTORY, k=5, target_behaviour=kind) for kind in ("pay", "click")}
    assert all(one.evidence == () for one in found["pay"])
    scores = {kind: torch.tensor([one.score for one in some]) for kind, some in found.items()}
    assert not torch.allclose(scores["pay"], scores["click"], atol=1e-6)


def test_who_did_nothing_yet_is_answered_without_a_prefix(recommender):
    alone = recommender.recommend([], k=3, target_behaviour="pay")
    assert len(alone) == 3
    assert all(one.evidence == () for one in alone)
    both = recommender.recommend([HISTORY, []], k=3, target_behaviour="pay")
    assert [one.item for one in both[1]] == [one.item for one in alone]
    assert both[0][0].evidence


def test_a_model_of_events_is_not_asked_with_items(recommender, stage_1):
    for one in (recommender, stage_1):
        with pytest.raises(UserError, match="reads events, and was asked with items alone"):
            one.recommend(["i01", "i02"], k=2)


@pytest.mark.parametrize(
    ("history", "settings", "sentence"),
    [
        ([("i01", "view")], {}, "no token for the behaviour 'view'"),
        ([("zz", "click")], {}, "knows no item 'zz'"),
        (HISTORY, {"user": 5}, "a user is a name, got 5"),
        (["i01", "i02"], {}, "holds pairs, got 'i01'"),
        (HISTORY, {"target_behaviour": "cart"}, "was trained for 'pay', not 'cart'"),
        (HISTORY, {"mode": "reason"}, "a target behaviour has no mode reason"),
        ([HISTORY, HISTORY], {"user": ["u01"]}, "1 users of 2 histories"),
        (HISTORY, {"target_behaviour": None}, r"pairs such as \('i01', 'click'\), and no behaviour is asked for"),
    ],
)
def test_what_cannot_be_answered_is_said_in_a_sentence(recommender, history, settings, sentence):
    with pytest.raises(UserError, match=sentence):
        recommender.recommend(history, k=2, **{"target_behaviour": "pay"} | settings)


def test_models_that_know_no_behaviours_say_so(stage_1, tmp_path):
    with pytest.raises(UserError, match="no token for the behaviour 'view'"):
        stage_1.recommend(HISTORY, target_behaviour="view")
    items_alone = Recommender.from_pretrained(write_small_model(tmp_path)[1], device="cpu")
    with pytest.raises(UserError, match="was not trained on behaviours"):
        items_alone.recommend([("i1", "buy")], target_behaviour="buy")
    with pytest.raises(UserError, match="and no behaviour is asked for"):
        items_alone.recommend([("i1", "click")])
    assert len(items_alone.recommend([("i1", "i2")], k=2)) == 1  # a list of one history


# ---- from the command line


def run(monkeypatch, capsys, *arguments) -> str:
    monkeypatch.setattr("sys.argv", ["recllm", "recommend", *map(str, arguments)])
    cli.main()
    return capsys.readouterr().out


def test_the_command_prints_evidence_and_list(folders, recommender, monkeypatch, capsys):
    events = [f"{item}:{kind}" for item, kind in HISTORY]
    command = ["--model", folders[1], "--history", *events, "--k", "3", "--target_behaviour", "pay", "--user", "u05"]
    printed = run(monkeypatch, capsys, *command)
    expected = recommender.recommend(HISTORY, k=3, target_behaviour="pay", user="u05")
    places = [printed.index(said) for said in ("i02 cart", "evidence", "relevance", "recommended")]
    assert places == sorted(places)
    for one in expected:
        assert one.item in printed[places[-1] :]
    for one in expected[0].evidence:
        assert one.item in printed[places[1] : places[-1]]
        assert f"{one.relevance:.2f}" in printed
    lines = [json.loads(line) for line in run(monkeypatch, capsys, *command, "--json").splitlines()]
    assert [line["item"] for line in lines] == [one.item for one in expected]
    assert [one["behaviour"] for one in lines[0]["evidence"]] == [one.behaviour for one in expected[0].evidence]
    left = run(monkeypatch, capsys, *command, "--json", "--exclude_history").splitlines()
    assert not {json.loads(line)["item"] for line in left} & {item for item, _ in HISTORY}


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--history", "i01", "--target_behaviour", "pay"], "event 'i01' is not ITEM:BEHAVIOUR"),
        (["--history", "i01:click", "--target_behaviour", "pay", "--mode", "reason"], "has no mode reason"),
        (["--history", "i01", "--user", "u01"], "user has no meaning without target_behaviour"),
        (["--history", "i01:click"], "knows no item 'i01:click'"),
        (["--history", "i01:view", "--target_behaviour", "pay"], "no token for the behaviour 'view'"),
    ],
)
def test_bad_commands_end_in_a_sentence(folders, monkeypatch, capsys, arguments, sentence):
    monkeypatch.setattr("sys.argv", ["recllm", "recommend", "--model", str(folders[1]), *arguments])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    assert sentence in capsys.readouterr().err.replace("\n", " ")
