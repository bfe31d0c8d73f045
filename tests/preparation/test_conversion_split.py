"""--split conversion: which events are test, validation, training, and which are nothing to learn from."""

import numpy as np
import pytest
from events_for_tests import random_shop, write_events
from hypothesis import given
from hypothesis import strategies as st

from recllm.errors import UserError
from recllm.preparation import PrepareConfig
from recllm.preparation.splitting import by_conversion, held_out_draw
from recllm.preparation.staging import EVENT, SPLITS


def labels(*users: str) -> list[str]:
    """A user is a text such as "cPc": P a conversion that may be held out. The labels, a text a user: r v t -."""
    events = np.zeros(sum(map(len, users)), EVENT)
    events["user"] = np.repeat(np.arange(len(users)), [*map(len, users)])
    split = by_conversion(events, np.array([kind == "P" for kind in "".join(users)], bool))
    said = iter("".join({"train": "r", "valid": "v", "test": "t", "none": "-"}[SPLITS[code]] for code in split))
    return ["".join(next(said) for _ in user) for user in users]


@pytest.mark.parametrize(
    ("user", "expected"),
    [
        ("ccPcPccPc", "rrrrv--t-"),  # three conversions: the first trains
        ("cPccPc", "rv--t-"),  # what lies between validation and test would show the validation target
        ("ccPc", "rrt-"),
        ("ccc", "rrr"),
        ("Pcc", "---"),  # a first event has no history, and what follows would show it
        ("PcP", "--t"),
        ("PP", "-t"),
        ("c", "r"),
    ],
)
def test_by_hand(user, expected):
    assert labels(user) == [expected]


def slow(user: str) -> str:
    places = [place for place, kind in enumerate(user) if kind == "P"]
    held = places[-2:]
    found = ["r" if not held or place < held[0] else "-" for place in range(len(user))]
    for place, name in zip(reversed(held), "tv"):
        found[place] = name if place else "-"
    return "".join(found)


@given(st.lists(st.text("cP", min_size=1, max_size=9), min_size=1, max_size=6))
def test_a_user_is_labelled_whoever_stands_beside(users):
    assert labels(*users) == [slow(user) for user in users]


def test_the_prepared_folder_keeps_to_it(tmp_path):
    """The three ways to ask it for events: what trains, validation and test."""
    sequences = {"u": [("a", "click"), ("a", "pay"), ("b", "click"), ("b", "pay"), ("a", "cart"), ("c", "pay")]}
    catalogue = write_events(tmp_path, sequences)
    assert catalogue.training_sequences()["items"].to_list() == [["a", "a", "b"]]
    assert catalogue.training_sequences()["behaviours"].to_list() == [["click", "pay", "click"]]
    [valid], [test] = catalogue.targets("valid").rows(), catalogue.targets("test").rows()
    assert valid == ("u", 3, "b", "pay", ["a", "a", "b"], ["click", "pay", "click"])
    assert test == ("u", 5, "c", "pay", ["a", "a", "b", "b", "a"], ["click", "pay", "click", "pay", "cart"])


def test_a_share_of_the_users_is_held_out_and_the_others_only_train(tmp_path):
    sequences = random_shop(users=60)
    buyers = {user for user, events in sequences.items() if "pay" in [kind for _, kind in events[1:]]}
    previous = set()
    for share in (0.2, 0.6, 1.0):
        catalogue = write_events(tmp_path / str(share), sequences, held_out_share=share)
        found = set(catalogue.targets("test")["user"])
        assert found == {user for user in buyers if held_out_draw(user) < share} > previous
        assert set(catalogue.targets("valid")["user"]) < found
        previous = found
    assert previous == buyers


def test_the_order_of_lines_and_the_size_of_buckets_change_nothing(tmp_path):
    sequences = random_shop(users=30)
    one = write_events(tmp_path / "one", sequences, held_out_share=0.5)
    other = write_events(tmp_path / "other", dict(reversed(sequences.items())), held_out_share=0.5, bucket_events=7)
    assert one.fingerprint == other.fingerprint


@pytest.mark.parametrize(
    ("kinds", "settings", "sentence"),
    [
        ("cc", {}, "no behaviours to tell conversions by: every event is one of 'click'"),
        ("ck", {}, "no event is a conversion: none has the behaviour 'pay'; the data have cart, click"),
        ("cP", {"target_behaviour": "Pay"}, "none has the behaviour 'Pay'; the data have click, pay"),
        ("Pc", {}, "the conversion split leaves no event for train and test"),
        ("cP", {"held_out_share": 0.0}, "held_out_share is 0.0"),
        ("cP", {"held_out_share": 0.3, "split": "time"}, "held_out_share has no meaning in a time split"),
    ],
)
def test_bad_input_is_one_sentence(tmp_path, kinds, settings, sentence):
    names = {"c": "click", "k": "cart", "P": "pay"}
    with pytest.raises(UserError, match=sentence.replace("(", r"\(")) as error:
        write_events(tmp_path, {"u": [("i", names[kind]) for kind in kinds]}, **settings)
    assert error.value.fix


def test_folders_made_before_there_was_the_split_are_the_same():
    assert not {"target_behaviour", "held_out_share"} & set(PrepareConfig("x", "shop").fingerprinted())
    assert PrepareConfig("x", "shop", split="conversion").fingerprinted()["target_behaviour"] == "pay"
