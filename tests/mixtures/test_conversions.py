"""Conversion data: what is written, what never is, where each item ends in its prompt, who met the target before."""

import json
from collections import Counter

import pytest
from events_for_tests import random_shop, write_events
from helpers import write_catalogue
from transformers import AutoTokenizer

from recllm.catalogue import Catalogue
from recllm.errors import UserError
from recllm.event_prompts import EventWriter
from recllm.mixtures.conversion_cases import ConversionEvents, cases, histories_of
from recllm.mixtures.conversions import COMMAND, Conversions, ConversionsConfig, build_conversions
from recllm.mixtures.conversions_summary import conversions_table
from recllm.mixtures.encoding import IGNORED, encode
from recllm.models.build import BuildModelConfig, build_model
from recllm.prompting import PromptStyle
from recllm.semantic_ids import SemanticIdTable
from recllm.tokenization import behaviour_token

ASK = "A user's events, oldest first: "


def build(catalogue: Catalogue, stage="all", **settings) -> tuple[Conversions, SemanticIdTable]:
    table = SemanticIdTable.load(catalogue.folder / "semantic_ids.json")
    output = str(catalogue.folder / "-".join([stage, *map(str, settings.values())]).replace("/", ""))
    config = ConversionsConfig(str(catalogue.folder), stage, **{"output": output, **settings})
    return build_conversions(config), table


def written(table, *events) -> str:
    return "".join(behaviour_token(kind) + table.text_of(item) for item, kind in events)


def held_out(events) -> list[int]:
    """The positions of a user's last two payments."""
    return [place for place, (_, kind) in enumerate(events) if kind == "pay"][-2:]


def training_part(events) -> list[tuple[str, str]]:
    places = held_out(events)
    return events[: places[0]] if places else events


# ---- what is written


def test_by_hand(tmp_path):
    sequences = {
        "u": [("a", "click"), ("b", "cart"), ("b", "pay"), ("a", "cart"), ("a", "pay"), ("c", "pay")],
        "v": [("c", "click"), ("a", "cart")],
    }
    catalogue = write_events(tmp_path, sequences)
    mixture, table = build(catalogue)
    rows = list(mixture.examples)
    assert [(row["user"], row["position"], row["item"], row["behaviour"]) for row in rows] == [
        ("u", 1, "b", "cart"), ("u", 2, "b", "pay"), ("u", 3, "a", "cart"), ("v", 1, "a", "cart")
    ]  # fmt: skip
    assert [row["prompt"] for row in rows[:2]] == [
        ASK + written(table, ("a", "click")),
        ASK + written(table, ("a", "click"), ("b", "cart")),
    ]
    assert rows[1]["completion"] == "<|pay|>" + table.text_of("b")
    assert [row["repeat"] for row in rows] == [[], ["cart"], ["click"], []]
    assert {row["task"] for row in rows} == {"next_event"}
    conversions, _ = build(catalogue, "target")
    assert [(row["task"], row["item"]) for row in conversions.examples] == [("conversion", "b")]
    assert mixture.report["targets"] == {"cart": 3, "pay": 1}
    assert mixture.report["dropped"] == {"no_history": 2}
    assert conversions.report["dropped"] == {"other_behaviour": 5}
    assert mixture.report["users"] == {"all": 2, "with_conversions": 1, "held_out": 1}
    one = {"targets": 1, "repeat_not_shown": 0}
    assert mixture.report["conversions"] == {
        "train": one | {"new": 0, "repeat": 1, "repeat_by": {"cart": 1}},
        "valid": one | {"new": 0, "repeat": 1, "repeat_by": {"cart": 1, "click": 1}},
        "test": one | {"new": 1, "repeat": 0, "repeat_by": {}},
    }


@pytest.mark.parametrize("stage", ["all", "target"])
@pytest.mark.parametrize("settings", [{}, {"max_history": 3}, {"max_targets": 2}, {"windows": "last"}])
def test_examples_equal_a_slow_reference(tmp_path, stage, settings):
    sequences = random_shop(seed=1)
    mixture, table = build(write_events(tmp_path, sequences), stage, **settings)
    longest = settings.get("max_history", 50)
    latest = 1 if "windows" in settings else settings.get("max_targets", 99)
    expected = []
    for user, events in sequences.items():
        train = training_part(events)
        places = [place for place in range(1, len(train)) if stage == "all" or train[place][1] == "pay"]
        for place in places[-latest:]:
            history = train[max(0, place - longest) : place]
            item, kind = train[place]
            repeat = sorted({how for other, how in train[:place] if other == item})
            expected.append((user, place, item, kind, ASK + written(table, *history), repeat))
    names = "user", "position", "item", "behaviour", "prompt", "repeat"
    assert [tuple(row[name] for name in names) for row in mixture.examples] == expected
    assert len(expected) > 5
    assert mixture.report["tasks"] == {"next_event" if stage == "all" else "conversion": len(expected)}


@pytest.mark.parametrize("size", [1, 2, 3, 50])
def test_a_sequence_answers_every_training_event_from_the_second_on_once(tmp_path, size):
    sequences = random_shop(seed=2)
    mixture, table = build(write_events(tmp_path, sequences), windows="sequence", max_history=size)
    rows = list(mixture.examples)
    for user, events in sequences.items():
        train, own = training_part(events), [row for row in rows if row["user"] == user]
        assert "".join(row["completion"] for row in own) == written(table, *train[1:])
        firsts = [train[place] for place in range(0, len(train) - 1, size)]  # a piece begins with what ended the last
        assert [row["prompt"] for row in own] == [ASK + written(table, first) for first in firsts]
    answers = sum(max(len(training_part(events)) - 1, 0) for events in sequences.values())
    assert sum(mixture.report["targets"].values()) == answers > len(rows) * (size > 1)


# ---- what never is


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("settings", [{}, {"windows": "sequence"}, {"stage": "target"}])
def test_no_held_out_conversion_is_in_any_example(tmp_path, seed, settings):
    """The last two payments are of items that nobody else meets: not a token of them may be there."""
    sequences = random_shop(users=40, seed=seed)
    catalogue = write_events(tmp_path, sequences)
    mixture, table = build(catalogue, **settings)
    secret = [item for item in catalogue.item_ids if not item.startswith("i")]
    assert len(secret) > 10
    text = "".join(row["prompt"] + row["completion"] for row in mixture.examples)
    for item in secret:
        assert table.text_of(item) not in text
        assert table.row_of[item] not in {row for example in mixture.examples for row in example["history_rows"]}
    for row in mixture.examples:
        places = held_out(sequences[row["user"]])
        assert row["position"] < min(places, default=99)
    events, asked = ConversionEvents(catalogue), Counter()
    for split, place in (("test", -1), ("valid", -2)):
        for user, position, item, history in events.cases(split).select("user", "position", "item", "history").rows():
            own = sequences[user]
            assert position == held_out(own)[place]
            assert [item, *history] == [own[position][0], *(name for name, _ in own[:position])]
            asked[split] += item in secret
    assert min(asked.values()) > 3


# ---- cases


def test_a_case_says_how_its_item_was_met_and_whether_that_is_shown(tmp_path):
    events = [("a", "cart"), ("a", "click"), ("b", "click"), ("c", "click"), ("a", "pay")]
    catalogue = write_events(tmp_path, {"u": events})
    [long], [short] = cases(catalogue, "test").to_dicts(), cases(catalogue, "test", 2).to_dicts()
    assert (long["repeat"], long["shown"]) == (["cart", "click"], True)
    assert (short["repeat"], short["shown"]) == (["cart", "click"], False)  # met before, and too long ago
    assert histories_of(cases(catalogue, "test", 2)) == [[("b", "click"), ("c", "click")]]
    mixture, _ = build(catalogue, max_history=2)
    assert mixture.report["conversions"]["test"]["repeat_not_shown"] == 1
    assert cases(catalogue, "valid").is_empty()


def test_a_case_has_the_columns_that_every_ranker_reads(tmp_path):
    catalogue = write_events(tmp_path, random_shop())
    columns = catalogue.targets("test").columns
    assert cases(catalogue, "test").select(columns).equals(catalogue.targets("test"))


# ---- the model's side


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shop")
    catalogue = write_events(folder, random_shop(items=17))
    model = build_model(
        BuildModelConfig(
            str(catalogue.folder), str(folder / "model"), tiny_width=64, tiny_layers=1, tiny_vocabulary=512
        )
    )
    return catalogue, AutoTokenizer.from_pretrained(model)


@pytest.mark.parametrize("style", [{}, {"template": "Events: {history}\nNext: "}, {"max_history": 2}])
def test_ends_are_the_places_of_the_last_codes(shop, style):
    catalogue, tokenizer = shop
    mixture, table = build(catalogue, "target", **style)
    assert table.depths.min() < table.depths.max()  # items of one code and of two
    writer = EventWriter(mixture.style, table, tokenizer)
    last = [tokenizer.convert_tokens_to_ids(table.tokens_of(item)[-1]) for item in table.items]
    for row in mixture.examples:
        history = [(item, mixture.behaviours[kind]) for item, kind in zip(row["history"], row["history_behaviours"])]
        [ids], [ends] = writer.ids([history]), writer.ends([history])
        assert tokenizer.decode(ids) == row["prompt"]
        assert ends == [len(writer.prefix) + end for end in row["ends"]]
        assert [ids[end] for end in ends] == [last[number] for number in row["history_rows"]]
        opens = [ends[0] - table.depth_of(row["history"][0]), *(end + 1 for end in ends[:-1])]
        assert [ids[place] for place in opens] == [writer.opening(kind) for _, kind in history]
        assert table.item_of(row["target"]) == table.items[row["target_row"]] == row["item"]


def test_a_writer_shows_the_latest_events_and_asks_with_none_too(shop):
    catalogue, tokenizer = shop
    table = SemanticIdTable.load(catalogue.folder / "semantic_ids.json")
    writer = EventWriter(PromptStyle(ASK + "{history}", max_history=2, events=True), table, tokenizer)
    history = [(item, "click") for item in table.items[:4]]
    assert writer.ids([history]) == writer.ids([history[-2:]])
    assert writer.ends([history]) == writer.ends([history[-2:]])
    assert (writer.ids([[]]), writer.ends([[]])) == ([list(writer.prefix)], [[]])
    assert tokenizer.decode(writer.prefix) == ASK
    assert writer.ids([]) == []


@pytest.mark.parametrize(
    ("history", "sentence"),
    [
        (["i01"], r"a history of events holds pairs, got 'i01'"),
        ([("nothing", "click"), ("none", "click")], r"the model knows no item 'nothing' \(and 1 more\)"),
        ([("i01", "gaze")], r"the model has no token for the behaviour 'gaze'"),
    ],
)
def test_a_history_that_the_model_cannot_read_is_refused(shop, history, sentence):
    catalogue, tokenizer = shop
    table = SemanticIdTable.load(catalogue.folder / "semantic_ids.json")
    with pytest.raises(UserError, match=sentence):
        EventWriter(PromptStyle(ASK + "{history}", events=True), table, tokenizer).ids([history])
    with pytest.raises(UserError, match="between events nothing may stand"):
        EventWriter(PromptStyle(separator=", ", events=True), table, tokenizer)


def test_supervised_training_reads_it_as_it_stands(shop):
    """Labels: the behaviour's token, the item's codes, the end; what asks is not trained on."""
    catalogue, tokenizer = shop
    mixture, table = build(catalogue)
    encoded = encode([mixture], [], tokenizer, max_length=512)
    assert (encoded.align, encoded.too_long) == (len(mixture.examples), 0)
    for row, example in zip(encoded.rows, mixture.examples):
        answer = [place for place, label in enumerate(row["labels"]) if label != IGNORED]
        tokens = [behaviour_token(example["behaviour"]), *table.tokens_of(example["item"])]
        assert answer == list(range(len(row["labels"]) - len(tokens) - 1, len(row["labels"])))
        assert tokenizer.convert_ids_to_tokens(row["labels"][answer[0] : -1]) == tokens
        assert row["labels"][-1] == tokenizer.eos_token_id


# ---- again, and bad input


def test_the_same_again_changes_nothing_and_other_settings_are_refused(tmp_path, capsys):
    catalogue = write_events(tmp_path, random_shop())
    table = SemanticIdTable.load(catalogue.folder / "semantic_ids.json")
    config = ConversionsConfig(str(catalogue.folder))
    assert config.folder == catalogue.folder / "conversions_all"
    first = build_conversions(config)
    assert build_conversions(config).examples[:] == first.examples[:]
    assert "is made already" in capsys.readouterr().err
    with pytest.raises(UserError, match="a mixture of other data or settings"):
        build_conversions(ConversionsConfig(str(catalogue.folder), max_history=2))
    again = build_conversions(ConversionsConfig(str(catalogue.folder), max_history=2, overwrite=True))
    loaded = Conversions.load(config.folder, table, COMMAND)
    assert loaded.style.max_history == again.style.max_history == 2
    assert (loaded.target_behaviour, sorted(loaded.behaviours)) == ("pay", ["cart", "click", "pay"])
    assert not [path for path in catalogue.folder.iterdir() if path.suffix == ".arrow"]
    assert json.dumps(loaded.report)
    assert conversions_table(loaded).row_count == 7


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"max_history": 0}, "max_history is 0"),
        ({"max_targets": 0}, "max_targets is 0"),
        ({"max_targets": 3, "windows": "last"}, "max_targets has no meaning with windows last"),
        ({"template": "What next?"}, r"a prompt template has \{history\} once"),
        ({"windows": "sequence", "stage": "target"}, "a sequence answers with events of every behaviour"),
        ({"windows": "sequence", "template": "{history}: "}, "each event answers to those before it"),
    ],
)
def test_bad_settings_are_one_sentence(settings, sentence):
    with pytest.raises(UserError, match=sentence):
        ConversionsConfig("data", **settings)


def test_data_without_conversions_to_learn_are_one_sentence(tmp_path):
    """Of every user both payments are held out."""
    events = [("a", "click"), ("a", "pay"), ("b", "pay")]
    catalogue = write_events(tmp_path, {"u": events, "v": events})
    with pytest.raises(UserError, match="no conversion with a history is left to train on: 4 conversions are held"):
        build(catalogue, "target")
    assert not (catalogue.folder / "target").exists()


def test_data_of_another_split_or_without_behaviours_are_one_sentence(tmp_path):
    other = write_events(tmp_path / "other", random_shop(), split="leave-one-out")
    with pytest.raises(UserError, match="split leave-one-out, so what trains holds conversions") as error:
        build(other)
    assert "--split conversion --target_behaviour X, X one of click, " in error.value.fix
    plain = write_catalogue(tmp_path / "plain", "abcd", {"u": list("abcd")})
    with pytest.raises(
        UserError, match="the data have no behaviours to tell conversions by: every event is one of 'buy'"
    ):
        ConversionEvents(plain)
