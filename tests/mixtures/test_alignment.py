from collections import Counter

import numpy as np
import pytest
from helpers import write_catalogue

from recllm.errors import UserError
from recllm.mixtures.alignment import AlignmentConfig, build_alignment
from recllm.mixtures.alignment_facts import ItemFacts, Windows, attribute_columns, price_levels
from recllm.mixtures.alignment_summary import alignment_table
from recllm.mixtures.alignment_tasks import PREFERENCE, SEQUENTIAL, WEIGHTS, Choice
from recllm.mixtures.alignment_texts import common_categories, document_frequency, intend, summarise
from recllm.mixtures.store import Mixture
from recllm.prompting import PromptStyle
from recllm.semantic_ids import SemanticIdTable
from recllm.semantic_ids.of_data import index_of
from recllm.teacher import TeacherConfig

OFFLINE = TeacherConfig()


def write_data(folder, rows, sequences, **more):
    """A prepared folder with semantic IDs of two levels."""
    catalogue = write_catalogue(folder, rows, sequences, **more)
    codes = np.array([[number // 8, number % 8] for number in range(len(rows))], np.int32)
    table = SemanticIdTable(
        tuple(catalogue.item_ids), codes, (len(rows) // 8 + 1, 8), items_fingerprint=catalogue.items_fingerprint
    )
    table.save(folder / "semantic_ids.json")
    return catalogue, table


def shop(folder, users=12, seed=0):
    """Every user's two held-out items are theirs alone, and have titles and words that no other item has."""
    random = np.random.default_rng(seed)
    rows = [
        {
            "item": f"c{n}",
            "title": f"Common [{n:02d}]",
            "brand": "AB"[n % 2],
            "categories": ["all", f"kind {n % 3}"],
            "description": f"Sturdy rubber thing for {'garden' if n % 4 else 'travel'}.",
            "price": str(10 * n + 5),
        }
        for n in range(16)
    ]
    sequences = {}
    for user in range(users):
        held = [f"held{user}a", f"held{user}b"]
        rows += [{"item": item, "title": f"Secret {item}", "categories": ["all"], "brand": "A"} for item in held]
        taken = random.choice(16, size=random.integers(1, 9)).tolist()
        sequences[f"u{user}"] = [f"c{n}" for n in taken] + held
    return write_data(folder, rows, sequences), sequences


def build(folder, *tasks, **settings):
    return build_alignment(AlignmentConfig(str(folder), tasks=list(tasks), **settings), OFFLINE)


def rows_of(mixture, task):
    return [row for row in mixture.examples if row["task"] == task]


@pytest.mark.parametrize(
    ("seed", "windows", "summaries"), [(0, "all", "user"), (1, "all", "window"), (2, "last", "user")]
)
def test_a_user_example_never_holds_what_was_held_out(tmp_path, seed, windows, summaries):
    (_, table), sequences = shop(tmp_path, seed=seed)
    mixture = build(tmp_path, windows=windows, summaries=summaries, seed=seed)
    held = {user: items[-2:] for user, items in sequences.items()}
    seen = Counter()
    for row in mixture.examples:
        said = row["prompt"] + row["completion"]
        if not row["user"]:
            assert row["task"] not in SEQUENTIAL + PREFERENCE
            continue
        seen[row["task"]] += 1
        for item in held[row["user"]]:
            assert item not in [row["item"], *row["history"]]
            assert table.text_of(item) not in said
            assert f"Secret {item}" not in said
        assert "Secret" not in said
    assert set(seen) == {*SEQUENTIAL, *PREFERENCE}  # the loop did look at every kind
    titled = {row["item"] for row in rows_of(mixture, "title_of_item")}
    assert {item for items in held.values() for item in items} <= titled  # the model learns every item's name


@pytest.mark.parametrize("settings", [{}, {"max_history": 3}, {"max_targets": 2}, {"windows": "last"}])
def test_windows_equal_a_slow_reference(tmp_path, settings):
    (_, table), sequences = shop(tmp_path)
    mixture = build(tmp_path, "next_item=1", **settings)
    expected = []
    for user, items in sequences.items():
        items = items[:-2]
        places = range(1, len(items))
        places = places[-1:] if "windows" in settings else places[-settings.get("max_targets", 99) :]
        longest = settings.get("max_history", 20)
        expected += [(user, items[max(0, place - longest) : place], items[place]) for place in places]
    found = [(row["user"], row["history"], row["item"]) for row in mixture.examples]
    assert found == expected
    assert all(row["completion"] == table.text_of(row["item"]) for row in mixture.examples)
    assert mixture.report["windows"]["count"] == len(expected) > 5
    assert mixture.report["windows"]["users_without"] == sum(len(items) == 3 for items in sequences.values()) > 0


@pytest.mark.parametrize("separator", ["", ", "])
def test_the_first_template_writes_what_the_trained_model_will_be_asked(tmp_path, separator):
    (_, table), _ = shop(tmp_path)
    mixture = build(tmp_path, "next_item=4", separator=separator, max_history=4)  # 4 templates: each once
    style = mixture.style
    assert style == PromptStyle(separator=separator, max_history=4)
    prompts = Counter((row["prompt"], row["item"]) for row in mixture.examples)
    asked = Counter((style.text(row["history"], table, None), row["item"]) for row in mixture.examples)
    assert all(prompts[pair] * 4 == count for pair, count in asked.items())
    assert len(mixture.examples) == 4 * mixture.report["windows"]["count"]


def test_a_template_of_ones_own_becomes_the_prompt_of_the_checkpoint(tmp_path):
    shop(tmp_path / "data")
    (tmp_path / "mine.yaml").write_text(
        "replace: [next_item]\nnext_item:\n  - prompt: 'Had {history}, wants '\n    completion: '{item}'\n"
    )
    settings = {"templates": [str(tmp_path / "mine.yaml")], "chat": True}
    mixture = build(tmp_path / "data", "next_item=1", **settings)
    assert mixture.style == PromptStyle("Had {history}, wants ", chat=True, max_history=20)
    assert all(row["prompt"].startswith("Had <|a_") for row in mixture.examples)  # the chat's frame comes later


def test_each_task_asks_and_answers_what_its_name_says(tmp_path):
    (catalogue, table), _ = shop(tmp_path)
    mixture = build(tmp_path)
    rows = {row["item"]: row for row in catalogue.items.to_dicts()}
    for row in mixture.examples:
        index, title = table.text_of(row["item"]) if row["item"] else "", rows.get(row["item"], {}).get("title")
        match row["task"]:
            case "next_item_from_titles":
                assert "; ".join(rows[item]["title"] for item in row["history"]) in row["prompt"]
                assert row["completion"] == index
            case "next_title":
                assert "".join(map(table.text_of, row["history"])) in row["prompt"]
                assert row["completion"] == title
            case "item_from_text":
                assert title in row["prompt"]
                assert row["completion"] == index
            case "title_of_item":
                assert index in row["prompt"]
                assert row["completion"] == title
            case "description_of_item":
                assert index in row["prompt"]
                assert row["completion"] == rows[row["item"]]["description"]
            case "attributes_of_item":
                assert index in row["prompt"]
                assert f"Brand: {rows[row['item']]['brand']}\nCategories: all" in row["completion"]
            case "item_from_intent":
                assert row["completion"] == index
                assert title not in row["prompt"]
            case "items_of_category":
                category = next(name for name in ("kind 0", "kind 1", "kind 2", "all") if name in row["prompt"])
                items = [table.item_of(codes) for codes in table.parse(row["completion"])]
                assert all(category in rows[item]["categories"] for item in items)
                assert 1 <= len(items) == len(set(items)) <= 5
            case "preference_summary":
                assert row["item"] == ""
                assert row["completion"].startswith(f"Of {len(row['history'])} items: ")
            case "item_from_preference":
                assert f"Of {len(row['history'])} items: " in row["prompt"]
                assert row["completion"] == index
    by_default = {task for task, weight in WEIGHTS.items() if weight}
    assert set(mixture.report["tasks"]) == by_default
    assert Counter(mixture.examples["task"]) == mixture.report["tasks"]
    assert "Common [" in str(mixture.examples[0:99]["prompt"])
    assert alignment_table(mixture).row_count == len(by_default)


def test_weights_keep_a_share_or_write_again_with_another_template():
    numbers = np.arange(100, 201)  # 101 of them
    half = Choice.draw(numbers, 0.5, 3, np.random.default_rng(0))
    assert len(half) == 50 == len(set(half.number.tolist()))
    assert set(half.number.tolist()) < set(numbers.tolist())
    twice = Choice.draw(numbers, 2, 3, np.random.default_rng(0))
    assert Counter(twice.number.tolist()) == dict.fromkeys(range(100, 201), 2)
    assert (twice.template[::2] != twice.template[1::2]).all()
    assert set(Counter(twice.template.tolist())) == {0, 1, 2}
    assert len(Choice.draw(numbers, 2.25, 3, np.random.default_rng(0))) == 2 * 101 + 25
    assert len(Choice.draw(numbers[:0], 1, 3, np.random.default_rng(0))) == 0


def test_the_same_seed_writes_the_same_bytes_and_another_does_not(tmp_path):
    shop(tmp_path / "data")
    first, again, other = (
        build(tmp_path / "data", output=str(tmp_path / name), seed=seed) and tmp_path / name
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    content = {path.name: path.read_bytes() for path in first.iterdir()}
    assert {path.name: path.read_bytes() for path in again.iterdir()} == content
    assert "mixture.json" in content
    assert (
        Mixture.load(other, index_of_folder(tmp_path / "data"), "x").examples[:]
        != Mixture.load(first, index_of_folder(tmp_path / "data"), "x").examples[:]
    )
    assert not list(tmp_path.glob(".*"))


def index_of_folder(folder):
    return SemanticIdTable.load(folder / "semantic_ids.json")


def test_a_task_does_not_change_with_which_others_are_made(tmp_path):
    shop(tmp_path)
    alone = build(tmp_path, "next_title=0.5", output=str(tmp_path / "a"))
    among = build(tmp_path, "next_title=0.5", "next_item=2", "items_of_category=1", output=str(tmp_path / "b"))
    assert rows_of(alone, "next_title") == rows_of(among, "next_title") != []


def test_two_tasks_draw_different_halves(tmp_path):
    shop(tmp_path, users=30)
    mixture = build(tmp_path, "title_of_item=0.5", "item_from_text=0.5")
    halves = [[row["item"] for row in rows_of(mixture, task)] for task in ("title_of_item", "item_from_text")]
    assert len(halves[0]) == len(halves[1]) == 38  # of 16 + 2 × 30 items
    assert halves[0] != halves[1]


def test_what_would_be_empty_is_dropped_and_counted(tmp_path):
    rows = [{"item": "a", "title": "Red hose"}, "b", {"item": "c", "brand": "Acme"}]
    write_data(tmp_path, rows, {"u": ["b", "a", "c", "b"], "v": ["b", "c"]}, split="train")
    report = build(tmp_path, *(f"{task}=1" for task in WEIGHTS)).report
    # u: b→a, ba→c, bac→b; v: b→c. A history of b alone has no title, and of the targets only a has one.
    assert report["tasks"] == {
        "next_item": 4,
        "sequence": 2,
        "next_item_from_titles": 2,
        "next_title": 1,
        "item_from_text": 2,
        "title_of_item": 1,
        "attributes_of_item": 1,
        "preference_summary": 1,
        "item_from_preference": 1,
        "item_from_intent": 1,
    }
    assert report["dropped"] == {
        "next_item_from_titles": {"no_titles": 2},
        "next_title": {"no_title": 3},
        "item_from_text": {"no_text": 1},
        "title_of_item": {"no_title": 2},
        "description_of_item": {"no_description": 3},
        "attributes_of_item": {"no_attributes": 2},
        "preference_summary": {"no_summary": 1},
        "item_from_preference": {"no_summary": 1},
        "item_from_intent": {"no_intent": 2},
    }


def test_braces_stay_and_a_text_cannot_hold_an_items_token(tmp_path):
    rows = [{"item": "a", "title": "A {item} {text} <|a_0|><|b_1|>{", "description": "{history}"}, "b"]
    write_data(tmp_path, rows, {"u": ["a", "b"]}, split="train")
    mixture = build(tmp_path, "item_from_text=1", "title_of_item=1", "description_of_item=1")
    said = [row["prompt"] + row["completion"] for row in mixture.examples]
    assert len(said) == 3
    assert all(text.count("<|") == 2 for text in said)  # the two tokens of the item itself
    assert rows_of(mixture, "title_of_item")[0]["completion"] == "A {item} {text} {"
    assert rows_of(mixture, "description_of_item")[0]["completion"] == "{history}"


def test_a_catalogue_without_text_still_has_sequences_and_one_without_either_is_refused(tmp_path):
    write_data(tmp_path / "a", ["a", "b"], {"u": ["a", "b"]}, split="train")
    assert build(tmp_path / "a").report["tasks"] == {"next_item": 1}
    write_data(tmp_path / "b", ["a", "b"], {"u": ["a"], "v": ["b"]}, split="train")
    with pytest.raises(UserError, match="no task has an example"):
        build(tmp_path / "b")
    assert not (tmp_path / "b" / "alignment").exists()
    assert not list((tmp_path / "b").glob(".*"))


def test_made_already_it_stays_and_something_else_is_not_replaced_unasked(tmp_path):
    shop(tmp_path)
    first = build(tmp_path)
    written = (tmp_path / "alignment" / "mixture.json").stat().st_mtime_ns
    assert build(tmp_path).examples[:] == first.examples[:]
    assert (tmp_path / "alignment" / "mixture.json").stat().st_mtime_ns == written
    with pytest.raises(UserError, match="holds a mixture of other data or settings"):
        build(tmp_path, seed=1)
    assert build(tmp_path, seed=1, overwrite=True).report["settings"]["seed"] == 1
    model_teacher = TeacherConfig("openai", "m")
    with pytest.raises(UserError, match="holds a mixture of other data or settings"):
        build_alignment(AlignmentConfig(str(tmp_path), seed=1), model_teacher)


def test_semantic_ids_of_other_data_are_refused(tmp_path):
    (catalogue, table), _ = shop(tmp_path)
    SemanticIdTable(
        table.items, table.codes, table.sizes, items_fingerprint=table.items_fingerprint,
        report={"made_from": {"catalogue": "of yesterday"}},
    ).save(tmp_path / "semantic_ids.json")  # fmt: skip
    with pytest.raises(UserError, match="made before the data were prepared anew"):
        build(tmp_path)
    assert len(index_of(catalogue, tmp_path / "semantic_ids.json")) == len(table)
    write_data(tmp_path / "other", ["x", "y"], {"u": ["x"]})
    with pytest.raises(UserError, match="built from another catalogue"):
        build(tmp_path, semantic_ids=str(tmp_path / "other" / "semantic_ids.json"))


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"tasks": ["next_itm=1"]}, "'next_itm' is no alignment task. Fix: did you mean next_item"),
        ({"tasks": ["next_item"]}, "the weight of next_item is ''"),
        ({"tasks": ["next_item=-1"]}, "the weight of next_item is '-1'"),
        ({"tasks": ["next_item=inf"]}, "the weight of next_item is 'inf'"),
        ({"tasks": ["next_item=0"]}, "none has a weight above 0"),
        ({"tasks": ["next_item=1", "next_item=2"]}, "next_item is named twice"),
        ({"max_history": 0}, "max_history is 0"),
        ({"max_targets": 0}, "max_targets is 0"),
        ({"category_items": 0}, "category_items is 0"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_bad_settings_are_one_sentence(settings, problem):
    with pytest.raises(UserError) as error:
        AlignmentConfig("data", **settings)
    assert problem in str(error.value)


def test_an_unknown_attribute_is_refused(tmp_path):
    shop(tmp_path)
    with pytest.raises(UserError, match="column 'colour' is missing"):
        build(tmp_path, attributes=["colour"])


# ---- what a teacher writes


class Scripted(TeacherConfig):
    """A teacher that gives the answers it is told, and remembers what it was asked."""

    def make(self):
        return self

    def cache_key(self, request):
        return repr(request.messages)

    def write(self, requests):
        for request in requests:
            self.asked.append(request)
            yield request, self.answer(request)


def test_the_teacher_never_sees_what_followed_and_bad_answers_are_replaced(tmp_path):
    rows = [{"item": name, "title": f"Title {name}", "brand": f"Brand {name}"} for name in "abcd"]
    write_data(tmp_path, rows, {"u": ["a", "b", "c"], "v": ["d", "a"]}, split="train")
    answers = {
        "u": "<think>hm</think> Likes\nhoses.",
        "v": " ",
        "a": "I want title A now",
        "b": "something b",
        "c": "",
        "d": "d?",
    }
    teacher = Scripted()
    teacher.asked, teacher.answer = [], lambda request: answers[request.key]
    config = AlignmentConfig(str(tmp_path))
    mixture = build_alignment(config, teacher)
    summaries = {request.key: request.messages[1]["content"] for request in teacher.asked if request.key in "uv"}
    assert {key: [name for name in "abcd" if f"Title {name}" in said] for key, said in summaries.items()} == {
        "u": ["a", "b"],
        "v": ["d"],
    }
    said = {row["user"]: row["completion"] for row in rows_of(mixture, "preference_summary")}
    assert said == {"u": "Likes hoses.", "v": "Of 1 items: brands Brand d (1)."}
    prompts = {row["item"]: row["prompt"] for row in rows_of(mixture, "item_from_intent")}
    assert ["Brand a" in prompts["a"], "something b" in prompts["b"], "Brand c" in prompts["c"]] == [True] * 3
    assert mixture.report["stand_ins"] == {"empty": 2, "quoted_title": 1}

    teacher.asked.clear()
    build_alignment(AlignmentConfig(str(tmp_path), overwrite=True), teacher)
    assert sorted(request.key for request in teacher.asked) == ["c", "v"]  # the others' answers were kept


def test_only_what_is_used_is_asked_for(tmp_path):
    shop(tmp_path)
    teacher = Scripted()
    teacher.asked, teacher.answer = [], lambda request: "text"
    build_alignment(AlignmentConfig(str(tmp_path), tasks=["next_item=1", "preference_summary=0.5"]), teacher)
    windows = Windows.of(shop(tmp_path)[0][0], False, 20)
    assert len(teacher.asked) == round(len(windows) / 2) > 2


def test_estimate_only_writes_nothing(tmp_path, capsys):
    shop(tmp_path)
    before = sorted(tmp_path.iterdir())
    assert build_alignment(AlignmentConfig(str(tmp_path)), TeacherConfig(estimate_only=True)) is None
    assert sorted(tmp_path.iterdir()) == before


def test_attributes_are_the_datas_own_text_and_not_its_codes(tmp_path):
    rows = [
        {"item": f"i{n}", "asin": f"B{n}", "colour": "red" if n % 2 else "blue", "slug": f"hose {n}", "tags": ["x"]}
        for n in range(20)
    ]
    items = write_catalogue(tmp_path, rows, {"u": ["i0"]}).items
    assert attribute_columns(items) == ["brand", "categories", "colour", "slug"]
    assert attribute_columns(items, title="slug") == ["brand", "categories", "colour"]


def test_another_column_can_name_the_items(tmp_path):
    rows = [{"item": "a", "slug": "red hose"}, {"item": "b", "slug": "blue hose"}]
    write_data(tmp_path, rows, {"u": ["a", "b"]}, split="train")
    mixture = build(tmp_path, "next_title=1", "title_of_item=1", title="slug")
    assert mixture.examples["completion"][:] == ["blue hose", "red hose", "blue hose"]
    with pytest.raises(UserError, match="column 'slog' is missing"):
        build(tmp_path, title="slog")


def facts(**columns) -> ItemFacts:
    count = len(next(iter(columns.values())))
    empty = {name: [""] * count for name in ItemFacts.__dataclass_fields__} | {"categories": [[]] * count}
    return ItemFacts(**(empty | columns))


def test_a_summary_is_counts_of_the_history():
    known = facts(
        brand=["Acme", "Acme", "Zed", ""],
        categories=[["All", "Hoses"], ["All", "Hoses"], ["All", "Boots"], ["All"]],
        price=["low-priced", "low-priced", "high-priced", ""],
    )
    common = common_categories(known)
    assert common == {"All"}  # of 4 of 4 items; Hoses are half, which is not more than half
    assert summarise(known, [2, 0, 1, 3, 0], common) == (
        "Of 5 items: Hoses (3), Boots (1); brands Acme (3), Zed (1); mostly low-priced."
    )
    assert summarise(known, [2, 0], common) == "Of 2 items: Boots (1), Hoses (1); brands Acme (1), Zed (1)."
    assert summarise(known, [3], common) == ""
    assert summarise(facts(title=["One", "", "Two"]), [0, 1, 2]) == "Took lately: One; Two."


def test_an_intent_is_the_kind_and_telling_words_without_the_title():
    known = facts(
        title=["Trail Bag", "Nordvik Camera Bags", "Bag"],
        brand=["Nordvik", "Nordvik", ""],
        categories=[["Photo", "Camera Bags"], ["Photo", "Camera Bags"], ["Photo", "Bag"]],
        description=["A padded bag for travel, travel by train.", "Sturdy and padded, for travel.", "Sturdy bag."],
    )
    frequency = document_frequency(known)
    assert frequency["padded"] == frequency["travel"] == frequency["sturdy"] == 2
    # `train` is in one description only: it comes after those that tell several items apart, and still fits.
    assert intend(known, 0, frequency) == "Nordvik camera bags, padded, travel, train"
    assert intend(known, 1, frequency) == "camera bags, sturdy, padded, travel"  # with the brand it were the title
    assert intend(known, 2, frequency) == "sturdy"
    assert intend(facts(title=["Bag"]), 0, Counter()) == ""


def test_offline_texts_are_short_however_long_the_names_are():
    long = "one two three four five six seven eight"
    known = facts(
        title=["A title of one " + long * 3],
        brand=[long],
        categories=[[f"{letter} {long}" for letter in "abcde"]],
        description=["alpha beta gamma delta epsilon zeta"],
        price=["low-priced"],
    )
    assert len(summarise(known, [0] * 20).split()) <= 40
    assert len(intend(known, 0, document_frequency(known)).split()) <= 15
    titles = facts(title=[long * 4] * 5)
    assert len(summarise(titles, range(5)).split()) <= 40


def test_price_levels_are_thirds_of_the_catalogue(tmp_path):
    prices = ["1", "$2.00", "3", "4", "1,500.00", "none", None]
    rows = [{"item": str(number), "price": price} for number, price in enumerate(prices)]
    items = write_catalogue(tmp_path, rows, {"u": ["0"]}).items
    # the thirds of 1, 2, 3, 4, 1500 end at 2.33 and 3.67
    assert [level[:3] for level in price_levels(items)] == ["low", "low", "mid", "hig", "hig", "", ""]
    assert price_levels(items.drop("price")) == [""] * 7


def test_a_sequence_holds_every_target_of_a_user_in_one_row(tmp_path):
    """Prompt and completion together are the asked prompt of all items: what stands before each is its history."""
    (_, table), sequences = shop(tmp_path)
    mixture = build(tmp_path, "sequence=1", max_history=3)
    style = PromptStyle.read(mixture.report["prompt"])
    assert style.template == "A user's history, oldest first: {history}"
    found = {}
    for row in mixture.examples:
        found.setdefault(row["user"], []).append(row["prompt"] + row["completion"])
        assert row["prompt"] == style.text(row["history"][:1], table, None)
    for user, items in sequences.items():
        training, size = items[:-2], 4  # a history of 3 and its target; a piece begins where the last one ended
        pieces = [training[start : start + size] for start in range(0, len(training), size - 1)]
        longer = PromptStyle(style.template, max_history=size)
        assert found.get(user, []) == [longer.text(piece, table, None) for piece in pieces if len(piece) > 1]


def test_a_sequence_wants_nothing_between_items(tmp_path):
    for setting in ({"separator": " "}, {"chat": True}):
        with pytest.raises(UserError, match="nothing may stand between an item and the next"):
            AlignmentConfig(str(tmp_path), tasks=["sequence=1"], **setting)
    (_, _), _ = shop(tmp_path)
    file = tmp_path / "mine.yaml"
    file.write_text('sequence:\n  - prompt: "{history} and then: "\n    completion: "{items}"\n')
    with pytest.raises(UserError, match="nothing may come between"):
        build(tmp_path, "sequence=1", templates=[str(file)])
