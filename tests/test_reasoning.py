import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recllm.errors import UserError
from recllm.reasoning import MARKS, REASONS, RECOMMEND, REWRITE, Chain, NotAChain
from recllm.semantic_ids import SemanticIdTable

ITEMS = ("a", "b", "c", "d", "e")  # the last one is less deep than the others
TABLE = SemanticIdTable(ITEMS, np.array([[0, 0, 0], [0, 0, 1], [0, 1, 0], [12, 1, 2], [3, 4, -1]]), (13, 5, 3))
CHAIN = Chain("Two cups.", "Cups.", "Looks for a cup.", ("a", "c"), "b", "A cup.")
TEXT = """<think>
Step 1: Extraction of Behavioral Evidence: Two cups.
Step 2: Modeling of Latent Preferences: Cups.
Step 3: Inference of User Intent and Goal Formulation: Looks for a cup.
</think>
Let's rewrite user's purchase history: <|a_0|><|b_0|><|c_0|><|a_0|><|b_1|><|c_0|>
A cup.
Based on the above analysis, the recommended product is <answer><|a_0|><|b_0|><|c_1|></answer>"""


def test_the_form_is_written_as_the_paper_shows_it_and_read_back():
    assert CHAIN.text(TABLE) == TEXT
    assert Chain.parse(TEXT, TABLE) == CHAIN
    without = dataclasses.replace(CHAIN, justification="")
    assert without.text(TABLE) == TEXT.replace("A cup.\n", "")
    assert Chain.parse(without.text(TABLE), TABLE) == without


def no_mark(text: str) -> bool:
    return not any(mark in text for mark in MARKS)


line = st.text(st.characters(exclude_categories=["C", "Z"]) | st.just(" "), max_size=30).map(str.strip).filter(no_mark)
stage = st.lists(line.filter(bool), min_size=1, max_size=3).map("\n".join)
chains = st.builds(
    Chain, stage, stage, stage, st.lists(st.sampled_from(ITEMS), min_size=1, max_size=6).map(tuple),
    st.sampled_from(ITEMS), line,
)  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(chains, st.sampled_from(["", " ", ", ", ". "]))
def test_every_chain_reads_back(chain, separator):
    assert Chain.parse(chain.text(TABLE, separator), TABLE) == chain


def reason_of(text: str) -> str | None:
    """Why it is no chain; None if it is one."""
    try:
        chain = Chain.parse(text, TABLE)
    except NotAChain as error:
        return error.reason
    assert Chain.parse(chain.text(TABLE), TABLE) == chain
    return None


pieces = st.sampled_from([*MARKS, "<|a_0|><|b_0|><|c_0|>", "\n", " ", "", "well"])


@settings(max_examples=200, deadline=None)
@given(st.integers(0, len(TEXT)), st.integers(0, 60), pieces)
def test_a_chain_with_a_piece_replaced_is_a_chain_or_none_and_nothing_else(start, length, piece):
    assert reason_of(TEXT[:start] + piece + TEXT[start + length :]) in (None, *REASONS)


BROKEN = {
    "no_think": [TEXT.replace("<think>", ""), TEXT.replace("</think>", ""), "", "<|a_0|><|b_0|><|c_1|>"],
    "steps": [
        TEXT.replace("Step 2: Modeling of Latent Preferences:", "Step 2:"),
        TEXT.replace("Step 2: Modeling of Latent Preferences:", "Step 1: Extraction of Behavioral Evidence:"),
        TEXT.replace("<think>\n", "<think>\nWell. "),
        TEXT.replace("Two cups.", "Two</think>"),
    ],
    "empty_step": [TEXT.replace("Two cups.", ""), TEXT.replace("Looks for a cup.", " ")],
    "no_rewrite": [TEXT.replace(REWRITE, "History:"), TEXT.replace("<|a_0|><|b_0|><|c_0|><|a_0|><|b_1|><|c_0|>", "")],
    "unknown_item": [
        TEXT.replace("<|c_1|></answer>", "<|c_2|></answer>"),
        TEXT.replace("<|a_0|><|b_1|><|c_0|>\n", "<|a_0|><|b_1|>\n"),  # a beginning
        TEXT.replace("<answer>", "<answer>the cup "),
        TEXT.replace("<|a_0|><|b_1|><|c_0|>\n", "<|a_99|><|b_1|><|c_0|>\n"),
    ],
    "no_answer": [TEXT.replace("</answer>", ""), TEXT.replace("<answer>", ""), TEXT.replace(RECOMMEND, "So")],
    "not_one_item": [
        TEXT.replace("<|a_0|><|b_0|><|c_1|></answer>", "</answer>"),
        TEXT.replace("</answer>", "<|a_3|><|b_4|></answer>"),
    ],
    "rest": [
        TEXT + " Enjoy!",
        TEXT.replace("A cup.\n", "A cup.\nA good one.\n"),
        TEXT.replace("</answer>", "</answer> or <answer><|a_3|><|b_4|></answer>"),
        TEXT.replace("Two cups.", "Two <answer>cups."),
        TEXT.replace("</think>\n", "</think>\nSo: "),
    ],
}


@pytest.mark.parametrize(("reason", "text"), [(reason, text) for reason, texts in BROKEN.items() for text in texts])
def test_what_is_no_chain_says_why(reason, text):
    assert reason_of(text) == reason


def test_every_reason_has_an_example():
    assert set(BROKEN) == set(REASONS)


def test_white_space_around_the_parts_is_forgiven():
    loose = (
        "\n "
        + TEXT.replace("<|b_0|>", " <|b_0|>")
        .replace("Two cups.", "\nTwo cups.\n")
        .replace("\nBased", "\n\nBased")
        .replace("is <answer>", "is\n<answer> ")
        + " \n"
    )
    assert Chain.parse(loose, TABLE) == CHAIN


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"evidence": " "}, "'evidence' of a chain is empty"),
        ({"intent": "so <answer>"}, "'intent' of a chain holds a mark"),
        ({"preferences": "Step 1: Extraction of Behavioral Evidence: no"}, "'preferences' of a chain holds a mark"),
        ({"justification": RECOMMEND}, "'justification' of a chain holds a mark"),
        ({"history": ()}, "at least one item"),
        ({"justification": "a\nb"}, "one line"),
    ],
)
def test_what_would_not_read_back_cannot_be_made(change, sentence):
    with pytest.raises(UserError, match=sentence):
        dataclasses.replace(CHAIN, **change)


def test_an_item_without_an_index_cannot_be_written():
    with pytest.raises(UserError, match="'z' has no semantic ID"):
        dataclasses.replace(CHAIN, item="z").text(TABLE)
