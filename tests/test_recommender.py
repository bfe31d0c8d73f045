"""A checkpoint recommends: the engine's order, with titles, filters, exclusions and clear refusals."""

import json
import shutil

import numpy as np
import polars as pl
import pytest
import torch
from helpers import write_small_model
from taught import chain_of, write_reasoning_model

from recllm import Recommender, SemanticIdTable, cli
from recllm.checkpoint import Checkpoint
from recllm.decoding import Decoder
from recllm.decoding.chains import Sampling
from recllm.errors import UserError
from recllm.reasoning import Chain


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return write_small_model(tmp_path_factory.mktemp("recommend"))


@pytest.fixture(scope="module")
def recommender(folders) -> Recommender:
    return Recommender.from_pretrained(folders[1], device="cpu")


def test_all_items_in_the_order_of_their_probability(recommender):
    found = recommender.recommend(["i1", "i2"], k=12)
    checkpoint = recommender.checkpoint
    (prompt,) = checkpoint.writer.ids([["i1", "i2"]])
    scores = []
    for item in checkpoint.table.items:  # over each level's codes, by plain forward passes
        ids, score = list(prompt), 0.0
        for level, token in enumerate(checkpoint.tokens.ids_of(item)):
            with torch.no_grad():
                logits = checkpoint.model(torch.tensor([ids])).logits[0, -1]
            score += float(logits[token] - logits[checkpoint.tokens.levels[level]].logsumexp(0))
            ids.append(token)
        scores.append(score)
    order = np.argsort(scores)[::-1]
    assert [one.item for one in found] == [checkpoint.table.items[row] for row in order]
    assert [one.score for one in found] == pytest.approx(sorted(scores, reverse=True), abs=1e-4)
    assert found[0].title == f"Thing {order[0]}"


def test_several_histories_give_the_lists_of_each(recommender):
    one, two = recommender.recommend([["i1", "i2"], ["i5"]], k=4)
    assert [r.item for r in one] == [r.item for r in recommender.recommend(["i1", "i2"], k=4)]
    assert [r.item for r in two] == [r.item for r in recommender.recommend(["i5"], k=4)]


def test_filters_by_column_list_and_expression(recommender):
    everything = [one.item for one in recommender.recommend(["i1"], k=12)]

    def items(**settings):
        return [one.item for one in recommender.recommend(["i1"], **settings)]

    brand_a = [item for item in everything if int(item[1:]) % 2 == 0]
    assert items(k=6, filter={"brand": "A"}) == brand_a
    assert items(k=12, filter={"brand": ["A", "B"]}) == everything
    assert items(k=4, filter={"categories": "y"}) == [item for item in everything if int(item[1:]) % 3 > 1]
    assert items(k=6, filter=pl.col("brand") == "A") == brand_a
    assert items(k=2, filter={"brand": "A", "categories": ["y"]}) == [i for i in brand_a if int(i[1:]) % 3 > 1]


def test_filters_by_stock_and_price(folders, tmp_path):
    shutil.copytree(folders[1], tmp_path / "model")
    path = tmp_path / "model" / "items.parquet"
    number = pl.col("item").str.slice(1).cast(pl.Float64)
    pl.read_parquet(path).with_columns(stock=number < 3, price=number).write_parquet(path)
    recommender = Recommender.from_pretrained(tmp_path / "model")
    for yes in (True, "true"):
        assert {one.item for one in recommender.recommend(["i9"], k=3, filter={"stock": yes})} == {"i0", "i1", "i2"}
    for three in (3, "3", 3.0):
        assert [one.item for one in recommender.recommend(["i9"], k=1, filter={"price": three})] == ["i3"]
    for column, value in (("stock", "maybe"), ("price", "cheap")):
        with pytest.raises(UserError, match=f"filter {column}: '{value}' is no value"):
            recommender.recommend(["i9"], k=1, filter={column: value})


def test_several_kinds_of_sequence_are_a_history(recommender):
    expected = recommender.recommend(["i1", "i2"], k=3)
    assert recommender.recommend(("i1", "i2"), k=3) == expected
    assert recommender.recommend(pl.Series(["i1", "i2"]), k=3) == expected


def test_exclusions(recommender):
    everything = [one.item for one in recommender.recommend(["i1", "i2"], k=12)]
    found = recommender.recommend(["i1", "i2"], k=10, exclude="history")
    assert [one.item for one in found] == [item for item in everything if item not in ("i1", "i2")]
    found = recommender.recommend(["i1", "i2"], k=9, exclude=everything[:3])
    assert [one.item for one in found] == everything[3:]


@pytest.mark.parametrize(
    ("history", "settings", "sentence"),
    [
        (["i1", "unheard"], {}, "knows no item 'unheard'"),
        ([], {}, "the history is empty"),
        (["i1"], {"k": 13}, "k = 13, and there are 12 items"),
        (["i1"], {"k": 0}, "k = 0"),
        (["i1"], {"k": 7, "filter": {"brand": "A"}}, "k = 7, and the filter leaves 6 items"),
        (["i1"], {"k": 5, "beams": 3}, "3 beams cannot give 5 items"),
        (["i1"], {"filter": {"brand": "Z"}}, "leaves no item"),
        (["i1"], {"filter": {"brnd": "A"}}, "did you mean 'brand'"),
        (["i1"], {"filter": pl.col("price") > 3}, "the filter does not fit the items"),
        (["i1"], {"exclude": ["unheard"]}, "no item 'unheard' to exclude"),
        (["i1"], {"mode": "think"}, "mode 'think'"),
        (["i1"], {"exclude": "i2"}, "exclude is a list"),
        (["i1"], {"k": 2.5}, "k = 2.5"),
        ([1, 2], {}, "knows no item 1"),
        (["i1"], {"filter": pl.col("title").str.len_chars()}, "neither yes nor no"),
    ],
)
def test_bad_input_is_one_sentence(recommender, history, settings, sentence):
    with pytest.raises(UserError, match=sentence):
        recommender.recommend(history, **{"k": 3} | settings)


def test_a_history_beyond_the_context_is_said(folders, tmp_path):
    """The style's max_history cuts histories; one that cuts too late meets the model's own limit."""
    shutil.copytree(folders[1], tmp_path / "model")
    report = json.loads((tmp_path / "model" / "recllm.json").read_text())
    report["prompt"] = {"template": "{history}", "max_history": 5000}
    (tmp_path / "model" / "recllm.json").write_text(json.dumps(report))
    patient = Recommender.from_pretrained(tmp_path / "model")
    assert len(patient.recommend(["i1"] * 2000, k=3)) == 3
    with pytest.raises(UserError, match=r"5,000 tokens .* do not fit the model's context of 4,096"):
        patient.recommend(["i1"] * 2500, k=3)


def test_an_index_that_is_not_the_models_is_refused(folders, tmp_path):
    shutil.copytree(folders[1], tmp_path / "model")
    path = tmp_path / "model" / "semantic_ids.json"
    table = SemanticIdTable.load(path)
    SemanticIdTable(table.items, table.codes[::-1].copy(), table.sizes).save(path)
    with pytest.raises(UserError, match="is not the index that the model was made with"):
        Recommender.from_pretrained(tmp_path / "model")


def test_folders_that_are_no_checkpoint_are_named(folders, tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        Recommender.from_pretrained(tmp_path / "nothing")
    with pytest.raises(UserError, match="prepared data, not a checkpoint"):
        Recommender.from_pretrained(folders[0])
    with pytest.raises(UserError, match=r"no semantic_ids\.json"):
        Recommender.from_pretrained(tmp_path)


@pytest.mark.parametrize("settings", [{"dtype": "foo"}, {"device": "foo"}])
def test_settings_of_loading_are_checked(folders, settings):
    with pytest.raises(UserError, match="'foo' is no"):
        Recommender.from_pretrained(folders[1], **settings)


def test_titles_in_brackets_are_no_markup(folders, tmp_path, monkeypatch, capsys):
    shutil.copytree(folders[1], tmp_path / "model")
    path = tmp_path / "model" / "items.parquet"
    pl.read_parquet(path).with_columns(title=pl.lit("[/b] [pack] of soap")).write_parquet(path)
    monkeypatch.setattr(
        "sys.argv", ["recllm", "recommend", "--model", str(tmp_path / "model"), "--history", "i1", "--k", "1"]
    )
    cli.main()
    assert capsys.readouterr().out.count("[/b] [pack] of soap") == 2


def test_a_checkpoint_without_titles_still_recommends(folders, tmp_path):
    shutil.copytree(folders[1], tmp_path / "model")
    (tmp_path / "model" / "items.parquet").unlink()
    found = Recommender.from_pretrained(tmp_path / "model").recommend(["i1"], k=2)
    assert [one.title for one in found] == ["", ""]


def test_a_checkpoint_carries_what_filters_need_and_no_long_text(folders):
    assert set(Checkpoint.load(folders[1]).items.columns) == {"item", "title", "brand", "categories"}


def test_the_command_prints_a_list(folders, recommender, monkeypatch, capsys):
    best = recommender.recommend(["i1", "i2"], k=2, filter={"brand": "B"})
    command = ["recllm", "recommend", "--model", str(folders[1]), "--history", "i1", "i2", "--k", "2"]
    monkeypatch.setattr("sys.argv", [*command, "--filter", "brand=B"])
    cli.main()
    printed = capsys.readouterr().out
    assert "Thing 1" in printed
    listed = printed[printed.index("recommended") :]  # the history stands above
    assert listed.index(best[0].item) < listed.index(best[1].item)
    monkeypatch.setattr("sys.argv", [*command, "--filter", "brand=B", "--json"])
    cli.main()
    assert [json.loads(line)["item"] for line in capsys.readouterr().out.splitlines()] == [one.item for one in best]


def test_the_command_refuses_in_one_line(folders, monkeypatch, capsys):
    command = ["recllm", "recommend", "--model", str(folders[1]), "--history"]
    for more, sentence in ((["zz"], "knows no item 'zz'"), (["i1", "--filter", "brand"], "is not column=value")):
        monkeypatch.setattr("sys.argv", [*command, *more])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        assert stopped.value.code == 2
        error = capsys.readouterr().err
        assert sentence in error
        assert error.count("\n") == 1


# ---- by reasoning


@pytest.fixture(scope="module")
def reasoning_folder(tmp_path_factory):
    return write_reasoning_model(tmp_path_factory.mktemp("reason"))[1]


@pytest.fixture(scope="module")
def thinker(reasoning_folder) -> Recommender:
    return Recommender.from_pretrained(reasoning_folder, device="cpu")


def test_the_chain_comes_stage_by_stage_with_the_item(thinker):
    found = thinker.recommend(["i1", "i2", "i5"], k=4, mode="reason")
    taught = chain_of(["i1", "i2"])
    assert len({one.item for one in found}) == 4
    for one in found:
        assert isinstance(one.reasoning, Chain)
        assert one.reasoning.item == one.item
        stages = (one.reasoning.evidence, one.reasoning.preferences, one.reasoning.intent, one.reasoning.justification)
        assert stages == (taught.evidence, taught.preferences, taught.intent, taught.justification)
        assert all(item in thinker.checkpoint.table for item in one.reasoning.history)
    assert [one.score for one in found] == sorted((one.score for one in found), reverse=True)
    # The list is that of direct beams after a prompt that goes on with the chain.
    ids = thinker.checkpoint.writer_of(thinker.checkpoint.reasoning).ids([["i1", "i2", "i5"]])[0]
    text = found[0].reasoning.text(thinker.checkpoint.table).partition("<answer>")[0] + "<answer>"
    ids += thinker.checkpoint.tokenizer(text, add_special_tokens=False)["input_ids"]
    rows = Decoder(thinker.checkpoint.model, thinker.checkpoint.tokens).beams([ids], 12).rows[0, :4].tolist()
    assert [one.item for one in found] == [thinker.checkpoint.table.items[row] for row in rows]


def test_reasoning_keeps_filters_and_exclusions(thinker):
    found = thinker.recommend(["i1", "i2"], k=4, mode="reason", filter={"brand": "A"}, exclude="history")
    assert len(found) == 4
    assert all(int(one.item[1:]) % 2 == 0 and one.item not in ("i1", "i2") for one in found)
    for history, found in zip(
        (["i1", "i2"], ["i5"]), thinker.recommend([["i1", "i2"], ["i5"]], k=3, mode="reason"), strict=True
    ):
        alone = thinker.recommend(history, k=3, mode="reason")
        assert [(one.item, one.reasoning) for one in found] == [(one.item, one.reasoning) for one in alone]
        assert [one.score for one in found] == pytest.approx([one.score for one in alone], abs=1e-4)
    with pytest.raises(UserError, match="k = 7, and the filter leaves 6 items"):
        thinker.recommend(["i1"], k=7, mode="reason", filter={"brand": "A"})
    with pytest.raises(UserError, match="knows no item 'unheard'"):
        thinker.recommend(["unheard"], k=1, mode="reason")


def test_a_seed_and_a_temperature_draw_the_chain(thinker):
    def kept(seed):
        drawn = Sampling(1.0, 1.0, 60)
        (first,) = thinker.recommend(["i1", "i2"], k=1, mode="reason", sampling=drawn, seed=seed)
        return first.reasoning if isinstance(first.reasoning, str) else first.reasoning.history

    assert kept(3) == kept(3)
    assert len({str(kept(seed)) for seed in range(6)}) > 1


def test_a_chain_cut_short_still_recommends_and_is_shown_as_it_is(thinker, reasoning_folder):
    found = thinker.recommend(["i1"], k=3, mode="reason", sampling=Sampling(0, 1.0, 5))
    assert len(found) == 3
    assert all(isinstance(one.reasoning, str) for one in found)
    assert found[0].reasoning.startswith("<think>")
    assert found[0].reasoning.endswith("<answer>")


def test_direct_recommendations_have_no_reasoning(thinker, recommender):
    assert [one.reasoning for one in thinker.recommend(["i1"], k=2)] == [None, None]
    with pytest.raises(UserError, match="was not taught to reason"):
        recommender.recommend(["i1"], k=2, mode="reason")


def test_the_command_prints_the_stages_above_the_list(reasoning_folder, monkeypatch, capsys):
    command = ["recllm", "recommend", "--model", str(reasoning_folder), "--history", "i1", "i2", "--k", "2"]
    monkeypatch.setattr("sys.argv", [*command, "--mode", "reason"])
    cli.main()
    printed = capsys.readouterr().out
    taught = chain_of(["i1"])
    places = [printed.index(said) for said in ("evidence", taught.evidence, "preferences", "intent", "history kept")]
    assert places == sorted(places)
    assert places[-1] < printed.index("recommended")
    monkeypatch.setattr("sys.argv", [*command, "--mode", "reason", "--json"])
    cli.main()
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["reasoning"]["item"] for line in lines] == [line["item"] for line in lines]
    monkeypatch.setattr("sys.argv", [*command, "--json"])
    cli.main()
    assert all("reasoning" not in json.loads(line) for line in capsys.readouterr().out.splitlines())
    monkeypatch.setattr("sys.argv", [*command, "--mode", "reason", "--max_new_tokens", "3"])
    cli.main()
    assert "not in the form that was taught" in capsys.readouterr().out
