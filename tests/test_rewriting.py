import pytest
from helpers import write_catalogue

from recllm.errors import UserError
from recllm.rewriting import RewriteConfig, describe, impressions, read_answer, rewrite, rewrite_request
from recllm.teacher import TeacherConfig

HOSE = {
    "item": "h",
    "title": "Garden Hose 50 ft",
    "brand": "Acme",
    "categories": ["Garden", "Hoses"],
    "description": "A light hose. Made of rubber with brass ends.",
    "reviews": [
        "I bought it in May. It works great and feels sturdy! Came on time.",
        "Broke after a week, poor quality",
    ],
}


def test_the_offline_description_says_the_facts_and_quotes_the_opinions():
    assert describe(HOSE) == (
        "Garden Hose 50 ft by Acme, listed under Garden, Hoses. A light hose. Made of rubber with brass ends. "
        "People who have it say: It works great and feels sturdy! Broke after a week, poor quality."
    )
    assert (
        describe({"item": "x", "brand": "Acme", "tags": ["matte"]}, ["brand", "tags"])
        == "An item by Acme. Tags: matte."
    )


def test_the_offline_description_invents_nothing():
    frame = ["by", "listed", "under", "People", "who", "have", "it", "say"]
    source = " ".join([HOSE["title"], HOSE["brand"], *HOSE["categories"], HOSE["description"], *HOSE["reviews"]])
    known = {word.strip(".,!:") for word in [*source.split(), *frame]}
    assert {word.strip(".,!:") for word in describe(HOSE).split()} <= known


def test_impressions_skip_sentences_without_an_opinion():
    assert impressions(["It is a hose. I own it."]) == []
    assert impressions(["Nice. " + "very " * 40 + "good."]) == []  # too short, too long


def test_a_request_holds_the_notes_and_an_unknown_item_has_none():
    request = rewrite_request(HOSE)
    assert request.key == "h"
    assert "Made of rubber" in request.messages[-1]["content"]
    assert "works great" in request.messages[-1]["content"]
    assert request.offline == describe(HOSE)
    assert rewrite_request({"item": "x"}) is None


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("<think>hm, a hose\n</think>\n\nA light hose.", "A light hose."),
        ('"A light\nhose."', "A light hose."),
        ("```\nA light hose.\n```", "A light hose."),
        ("<think>only thoughts</think>", ""),
        ("<think>a</think>\n<think>b</think>A hose.", "A hose."),
        ("opened by the chat template</think>A hose.", "A hose."),
        ("<think>hm, a hose, it is", ""),
        ("<think>a</think><think>and then", ""),
    ],
)
def test_read_answer(answer, expected):
    assert read_answer(answer) == expected


def test_rewrite_writes_every_item_in_order_and_again_the_same_bytes(tmp_path):
    catalogue = write_catalogue(tmp_path, [HOSE | {"item": "z"}, "a", HOSE], {"u": ["a"]})
    config = RewriteConfig(str(tmp_path))
    table = rewrite(config, TeacherConfig())
    assert table["item"].to_list() == catalogue.item_ids == ["z", "a", "h"]
    assert table["text"].to_list() == [describe(HOSE), "", describe(HOSE)]
    first = config.path.read_bytes()
    config.path.unlink()
    rewrite(config, TeacherConfig())
    assert config.path.read_bytes() == first


def test_what_is_there_stays_and_something_else_is_not_replaced_unasked(tmp_path):
    write_catalogue(tmp_path, [HOSE, "a"], {"u": ["a"]})
    config, path = RewriteConfig(str(tmp_path)), tmp_path / "texts.parquet"
    first = rewrite(config, TeacherConfig())
    written = path.stat().st_mtime_ns
    assert rewrite(config, TeacherConfig()).equals(first)
    assert path.stat().st_mtime_ns == written

    changed = {"text_columns": ["title", "brand"]}
    with pytest.raises(UserError, match=r"holds texts made in another way\. Fix: --overwrite \(.*cache"):
        rewrite(RewriteConfig(str(tmp_path), **changed), TeacherConfig())
    again = rewrite(RewriteConfig(str(tmp_path), **changed, overwrite=True), TeacherConfig())
    assert again["text"].to_list() == ["Garden Hose 50 ft by Acme.", ""]

    write_catalogue(tmp_path, [HOSE, "a"], {"u": ["a", "h", "a"]})
    with pytest.raises(UserError, match=r"holds texts made from other data.*--overwrite"):
        rewrite(RewriteConfig(str(tmp_path), **changed), TeacherConfig())
    path.write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"is there already: not a readable parquet file.*--overwrite"):
        rewrite(config, TeacherConfig())
    assert path.read_bytes() == b"damaged"
    assert rewrite(RewriteConfig(str(tmp_path), overwrite=True), TeacherConfig()).equals(first)


def test_estimate_only_writes_nothing(tmp_path):
    write_catalogue(tmp_path, [HOSE], {"u": ["h"]})
    before = sorted(tmp_path.iterdir())
    assert rewrite(RewriteConfig(str(tmp_path)), TeacherConfig(estimate_only=True)) is None
    assert sorted(tmp_path.iterdir()) == before


def test_a_catalogue_without_text_is_refused(tmp_path):
    write_catalogue(tmp_path, ["a", "b"], {"u": ["a"]})
    with pytest.raises(UserError, match=r"no item has any text.*collaborative"):
        rewrite(RewriteConfig(str(tmp_path)), TeacherConfig())
