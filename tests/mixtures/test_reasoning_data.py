import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from helpers import write_catalogue

from recllm.errors import UserError
from recllm.mixtures.item_facts import Facts, item_facts, speaking_columns
from recllm.mixtures.offline_chains import NOTHING, evidence, intent, noise, preferences
from recllm.mixtures.reasoning import ReasoningConfig, build_reasoning, find_cases
from recllm.mixtures.teacher_answers import DROPS, Answer, Composer, Dropped, parse_answer, question
from recllm.prompting import PromptStyle
from recllm.reasoning import SHORT_TEMPLATE, TEMPLATE, Chain
from recllm.semantic_ids import SemanticIdTable
from recllm.teacher import TeacherConfig

KINDS = (("Music", "Guitars"), ("Music", "Strings"), ("Kitchen", "Cups"), ("Kitchen", "Pots"), ("Garden", "Hoses"))
BRANDS = ("Acme", "Bolt", "Cora")
ROWS = [
    {
        "item": f"i{n:02d}",
        "title": f"{BRANDS[n % 3]} number {n} of the {('red', 'blue')[n % 2]} series",
        "brand": BRANDS[n % 3],
        "categories": list(KINDS[n % 5]),
        "tier": ("low", "high")[n // 5 % 2],
        "colour": ("red", "blue")[n % 2],
    }
    for n in range(30)
]
ITEMS = [row["item"] for row in ROWS]


def write_index(folder, catalogue, pattern="<|{level}_{code}|>"):
    count = len(catalogue.item_ids)
    codes = np.array([[number // 4, number % 4] for number in range(count)], np.int32)
    fingerprint = catalogue.items_fingerprint
    table = SemanticIdTable(tuple(catalogue.item_ids), codes, (8, 4), pattern, items_fingerprint=fingerprint)
    table.save(folder / "semantic_ids.json")
    return table


def write_data(folder, rows=ROWS, sequences=None, seed=0):
    random, items = np.random.default_rng(seed), [row["item"] for row in rows]
    if sequences is None:
        sequences = {
            f"u{user:02d}": random.choice(items, random.integers(3, 11), replace=False).tolist() for user in range(40)
        }
    catalogue = write_catalogue(folder, rows, sequences)
    return catalogue, write_index(folder, catalogue)


@pytest.fixture
def shop(tmp_path):
    return write_data(tmp_path)


def settings(folder, **changed):
    return ReasoningConfig(str(folder), **changed)


# ---- which events are used


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("targets", ["last", "all"])
def test_no_event_of_valid_or_test_is_in_any_example(tmp_path, seed, targets):
    catalogue, table = write_data(tmp_path, seed=seed)
    made = build_reasoning(settings(tmp_path, targets=targets, min_history=1, max_history=4), TeacherConfig())
    held_out = {split: catalogue.targets(split).select("user", "item").rows() for split in ("valid", "test")}
    forbidden = {(user, item) for rows in held_out.values() for user, item in rows}
    trained = {user: items for user, items, _ in catalogue.training_sequences().rows()}
    for example in made.examples:
        chain = Chain.parse(example["completion"], table)
        seen = {*example["history"], *chain.history, chain.item, example["item"]}
        shown = {table.item_of(codes) for codes in table.parse(example["prompt"] + example["completion"])}
        assert not {(example["user"], item) for item in seen | shown} & forbidden  # no user meets an item twice here
        items = trained[example["user"]]
        place = items.index(example["item"])
        assert example["history"] == items[max(0, place - 4) : place]
    expected = {"last": 1, "all": None}[targets]
    counted = {user: expected or len(items) - 1 for user, items in trained.items() if len(items) > 1}
    dropped = sum(made.report["dropped"].values())
    assert len(made.examples) + dropped == sum(counted.values())


def test_a_draw_of_users_is_of_the_seed_and_a_part_of_all(shop, tmp_path):
    everything = find_cases(settings(tmp_path), shop[0])
    drawn = [find_cases(settings(tmp_path, users=7, seed=seed), shop[0]) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(drawn[0]) == 7
    assert [case for case in everything if case in set(drawn[0])] == drawn[0]  # in the order of users
    assert find_cases(settings(tmp_path, users=10_000), shop[0]) == everything


# ---- the offline writer


def test_chains_are_written_as_the_docs_show(tmp_path):
    sequences = {"u": ["i00", "i05", "i04", "i10", "i03", "i01"], "v": ["i01", "i02", "i03"]}
    table = write_data(tmp_path, sequences=sequences)[1]
    made = build_reasoning(settings(tmp_path, template="short", separator=" "), TeacherConfig())
    assert len(made.examples) == 1
    example = made.examples[0]
    shown = " ".join(map(table.text_of, ["i00", "i05", "i04"]))
    assert example["prompt"] == SHORT_TEMPLATE.replace("{history}", shown)
    assert example["completion"] == (
        "<think>\n"
        "Step 1: Extraction of Behavioral Evidence: The last items were Guitars by Acme; Guitars by Cora; "
        "Hoses by Bolt.\n"
        "Step 2: Modeling of Latent Preferences: Most often Music, Guitars.\n"
        "Step 3: Inference of User Intent and Goal Formulation: Comes back to Guitars by Bolt.\n"
        "</think>\n"
        f"Let's rewrite user's purchase history: {shown}\n"  # the hoses are of the brand of what followed
        "It is what is looked for: Guitars by Bolt.\n"
        f"Based on the above analysis, the recommended product is <answer>{table.text_of('i10')}</answer>"
    )
    assert {name: example[name] for name in ("task", "user", "item", "history")} == {
        "task": "reasoning", "user": "u", "item": "i10", "history": ["i00", "i05", "i04"],
    }  # fmt: skip


def test_every_statement_is_true_and_no_title_is_told(shop, tmp_path):
    table = shop[1]
    columns = ["categories", "brand", "tier"]
    made = build_reasoning(settings(tmp_path, targets="all", columns=columns), TeacherConfig())
    rows = {row["item"]: row for row in ROWS}
    assert len(made.examples) > 50

    def said(row):
        return f"{row['categories'][-1]} by {row['brand']}, tier {row['tier']}"

    for example in made.examples:
        chain = Chain.parse(example["completion"], table)
        history, target = [rows[item] for item in example["history"]], rows[example["item"]]
        assert chain.item == target["item"]
        assert chain.evidence == f"The last items were {'; '.join(said(row) for row in history[-4:])}."
        assert chain.intent.endswith(f" {said(target)}.")
        for named, values in (
            (BRANDS, [row["brand"] for row in history]),
            ([kind for _, kind in KINDS], [row["categories"][1] for row in history]),
            ([kind for kind, _ in KINDS], [row["categories"][0] for row in history]),
        ):
            for value in named:
                if value in chain.preferences:
                    assert values.count(value) == max(map(values.count, values)) > 1
        relation = chain.intent.split()[0]
        kinds = [row["categories"] for row in history]
        assert (relation == "Goes") == (kinds[-1] == target["categories"])
        assert (relation == "Comes") == (kinds[-1] != target["categories"] in kinds)
        if relation == "Stays":
            assert target["categories"][0] in {kind for kind, _ in kinds}
        assert not [row["title"] for row in ROWS if row["title"] in example["completion"]]


def test_what_goes_with_the_last_items():
    guitar, strings, cup = (Facts(kinds) for kinds in KINDS[:3])
    assert intent([cup, guitar], guitar) == "Goes on with Guitars."
    assert intent([guitar, cup], guitar) == "Comes back to Guitars."
    assert intent([strings, cup], guitar) == "Stays with Music and turns to Guitars."
    assert intent([cup], guitar) == "Turns to Music: Guitars."
    assert intent([cup], Facts(("Music",))) == "Turns to Music."
    assert intent([cup], Facts(values=(("brand", "Acme"),))) == "Looks for an item by Acme."
    assert preferences([guitar, strings, cup, cup]) == "Most often Kitchen, Cups."  # of equals the last
    assert preferences([guitar, cup]) == "Nothing came twice."
    assert preferences([Facts()]) == evidence([Facts()]) == NOTHING


def test_noise_shares_nothing_with_what_followed_and_with_most_of_the_others():
    guitar, strings, cup, hose = (Facts(KINDS[n]) for n in (0, 1, 2, 4))
    assert noise([guitar, strings, cup, guitar], strings) == [3]
    assert noise([guitar, strings, cup, guitar], cup) == []  # the cup is what followed, the rest are most
    assert noise([guitar, strings, Facts(), guitar], strings) == []  # nothing is known of it
    assert noise([Facts(("Kitchen",), (("brand", "Acme"),)), strings, strings], Facts((), (("brand", "Acme"),))) == []
    assert noise([guitar, cup, hose], Facts(("Sports",))) == [1, 2]  # one stays, the last
    assert noise([guitar, cup], guitar) == [2]
    assert noise([guitar], cup) == []
    guessed = [Facts((word,), guessed=True) for word in ("strings", "cups", "hoses")]
    assert noise(guessed, guessed[0]) == []


def test_denoising_keeps_the_order_and_a_plain_copy_is_a_setting(shop, tmp_path):
    table = shop[1]
    made = build_reasoning(settings(tmp_path, targets="all"), TeacherConfig())
    copied = build_reasoning(settings(tmp_path, targets="all", denoise="copy", output=f"{tmp_path}/c"), TeacherConfig())
    lost = []
    for one, other in zip(made.examples, copied.examples, strict=True):
        kept = Chain.parse(one["completion"], table).history
        rest = iter(one["history"])
        assert all(item in rest for item in kept)  # a part, in order
        assert len(kept) >= 1
        lost.append(len(one["history"]) - len(kept))
        assert Chain.parse(other["completion"], table).history == tuple(other["history"])
    assert 0 < made.report["denoised"] == sum(lost) / sum(map(len, made.examples["history"]))
    assert copied.report["denoised"] == 0


def test_facts_are_shared_by_some_and_not_by_nearly_all(tmp_path):
    rows = [{"item": f"i{n}", "categories": ["Shop", "AB"[n % 2]], "brand": f"b{n // 2}"} for n in range(10)]
    rows[8]["brand"], rows[9]["brand"] = "unique", "Unknown"
    facts = item_facts(write_catalogue(tmp_path, rows, {"u": ["i0"]}), ["categories", "brand"])
    assert facts["i0"] == Facts(("A",), (("brand", "b0"),))
    assert facts["i8"] == Facts(("A",)) == Facts(facts["i8"].kinds)
    assert facts["i9"].said() == "B"


def test_columns_are_chosen_that_tell_what_follows(tmp_path):
    """Customers stay in a tier and do not care for colours; a code of its own for each item is no fact."""
    rows = [dict(row, code=f"c{n}", note="long " * 9) for n, row in enumerate(ROWS)]
    random, tiers = np.random.default_rng(0), {}
    for row in rows:
        tiers.setdefault(row["tier"], []).append(row["item"])
    sequences = {f"u{n}": random.choice(tiers["low" if n % 2 else "high"], 9, replace=False) for n in range(40)}
    catalogue = write_catalogue(tmp_path, rows, {user: items.tolist() for user, items in sequences.items()})
    assert speaking_columns(catalogue) == ["title", "categories", "brand", "tier"]


def test_titles_alone_give_the_words_that_tell_what_follows(tmp_path):
    titles = [
        "Old strings set",
        "New strings pack",
        "Big strings pack",
        "Blue cups set",
        "Red cups pack",
        "My cups set",
    ]
    rows = [{"item": f"i{n}", "title": title} for n, title in enumerate(titles)]
    sequences = {f"u{n}": (["i0", "i1", "i2"] if n % 2 else ["i3", "i4", "i5"]) * 2 for n in range(4)}
    catalogue = write_data(tmp_path, rows, sequences)[0]
    facts = item_facts(catalogue, ["title", "categories", "brand"])
    assert {item: known.kinds for item, known in facts.items()} == {  # what one title alone has is no fact
        "i0": ("strings",), "i1": ("pack", "strings"), "i2": ("pack", "strings"),
        "i3": ("cups",), "i4": ("cups", "pack"), "i5": ("cups",),
    }  # fmt: skip
    made = build_reasoning(settings(tmp_path), TeacherConfig())
    assert len(made.examples) == 4
    assert made.report["denoised"] == 0  # words of titles are too little to call an item noise


@pytest.mark.parametrize("row", [{}, {"title": "Same"}])
def test_of_items_without_any_text_nothing_can_be_said(tmp_path, row):
    write_data(tmp_path, [{"item": item} | row for item in ITEMS])
    with pytest.raises(UserError, match=r"nothing is known of any next item.*--columns"):
        build_reasoning(settings(tmp_path), TeacherConfig())
    assert not (tmp_path / "reasoning").exists()


# ---- what a teacher may say

ANSWER = Answer("Red items.", "The red series.", "More of the red.", "It is red.", ((2, "blue"),))
TITLES = {
    "i0": "Red Cup",
    "i1": "The blue pot of 1990 by hand",
    "i2": "The great red kettle of 1990",
    "i3": "猫のための青い小さな柔らかいベッド",
}
SMALL = SemanticIdTable(tuple(TITLES), np.array([[0, 0], [0, 1], [1, 0], [1, 1]]), (2, 2))
COMPOSER = Composer(SMALL, TITLES, {"i0": ["Cups"], "i1": [], "i2": ["red kettle of honour"], "i3": []})


def dropped_as(answer, history=("i0", "i1"), target="i2", composer=COMPOSER):
    with pytest.raises(Dropped) as caught:
        composer.chain(answer, history, target)
    assert caught.value.reason in DROPS
    return caught.value.reason


def but(**changed):
    return Answer(**{**vars(ANSWER), **changed})


def test_an_answer_becomes_a_chain():
    chain = COMPOSER.chain(ANSWER, ("i0", "i1", "i0"), "i2")
    assert chain == Chain("Red items.", "The red series.", "More of the red.", ("i0", "i0"), "i2", "It is red.")
    bare = Composer(SMALL, TITLES, COMPOSER.shared, denoise=False, justify=False)
    assert bare.chain(ANSWER, ("i0", "i1"), "i2").history == ("i0", "i1")
    assert bare.chain(but(dropped=((7, ""),)), ("i0",), "i2").justification == ""


@pytest.mark.parametrize("stage", ["evidence", "preferences", "intent"])
@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("They look for the GREAT, red kettle", "i2"),  # four words in a row, however written
        ("It is a great red kettle of some kind", "i2"),
        ("A red cup.", "i0"),  # a short title: all of it
        ("小さな柔らかいベッドが欲しい", "i3"),
    ],
)
def test_the_title_of_the_target_is_not_told_before_the_recommendation(stage, text, target):
    history = tuple(item for item in TITLES if item != target)
    assert dropped_as(but(**{stage: text}), history, target) == "target_title"


@pytest.mark.parametrize(
    ("text", "history", "target"),
    [
        ("A great red pot.", ("i0", "i1"), "i2"),  # three words
        ("The great red kettle of 1990 again.", ("i2", "i1"), "i2"),  # it is in the history
        ("Another red kettle of honour.", ("i0", "i1"), "i2"),  # others have it too
        ("Something for red wine in a cup.", ("i1", "i2"), "i0"),
        ("猫のベッド。", ("i1", "i2"), "i3"),
        ("The blue pot of 1990 by hand.", ("i0", "i1"), "i2"),  # of the history
    ],
)
def test_what_gives_nothing_away_may_be_said(text, history, target):
    assert COMPOSER.chain(but(intent=text), history, target).intent == text


def test_the_justification_may_name_the_target():
    assert COMPOSER.chain(but(justification=TITLES["i2"]), ("i0", "i1"), "i2").justification == TITLES["i2"]


@pytest.mark.parametrize("stage", ["evidence", "preferences", "intent", "justification"])
def test_indices_of_the_history_alone_may_be_named(stage):
    own, other, target = map(SMALL.text_of, ("i0", "i3", "i2"))
    assert getattr(COMPOSER.chain(but(**{stage: f"As {own}."}), ("i0", "i1"), "i2"), stage) == f"As {own}."
    for text in (target, other, SMALL.token(0, 1), own + SMALL.token(1, 1)):  # parts of an index, too
        assert dropped_as(but(**{stage: f"As {text}."})) == "foreign_index"
    assert COMPOSER.chain(but(intent=f"Again {target}."), ("i0", "i2"), "i2").item == "i2"


def test_tokens_that_look_like_tags_are_found_as_well():
    table = SemanticIdTable(SMALL.items, SMALL.codes, SMALL.sizes, "<{level}_{code}>")
    composer = Composer(table, TITLES, COMPOSER.shared)
    said = parse_answer(but(evidence="As <a_1><b_0>.").text())
    assert dropped_as(said, composer=composer) == "foreign_index"


@pytest.mark.parametrize(
    ("numbers", "reason"),
    [((3,), "unknown_number"), ((0,), "unknown_number"), ((1, 1), "repeated_number"), ((2, 1), "nothing_left")],
)
def test_what_cannot_be_dropped(numbers, reason):
    assert dropped_as(but(dropped=tuple((number, "why") for number in numbers))) == reason


@pytest.mark.parametrize("mark", ["</think>", "<answer>", "Step 2: Modeling of Latent Preferences:"])
@pytest.mark.parametrize("stage", ["evidence", "justification"])
def test_marks_of_the_form_are_not_said(stage, mark):
    assert dropped_as(but(**{stage: f"So {mark} x"})) == "form_mark"


def test_an_answer_reads_back_whatever_surrounds_it():
    text = ANSWER.text()
    for answer in (text, f"```json\n{text}\n```", f"<think>{{no}}</think>\n{text}", f"hm</think>{text}"):
        assert parse_answer(answer) == ANSWER
    lines = parse_answer(but(evidence="- red\n\n  - \tblue ", justification="it\nis").text())
    assert (lines.evidence, lines.justification) == ("- red\n- blue", "it is")
    assert parse_answer(but(evidence="a\u200bb\x07\u2028c").text()).evidence == "a b\nc"
    assert parse_answer(text.replace("Red items.", "Red\nitems.")).evidence == "Red\nitems."


@pytest.mark.parametrize(
    "answer",
    [
        "", "No.", "{}", "[]", "{", f"<think>{ANSWER.text()}", ANSWER.text()[:-20],
        but(intent=" ").text(), but(justification="").text(),
        ANSWER.text().replace('"dropped"', '"noise"'), ANSWER.text().replace('"number": 2', '"number": "2"'),
        ANSWER.text().replace('"number": 2', '"number": true'), ANSWER.text().replace('"Red items."', "3"),
        ANSWER.text().replace('[{"number"', '{"number"').replace("}]", "}"),
    ],
)  # fmt: skip
def test_what_has_not_the_form_is_no_answer(answer):
    assert parse_answer(answer) is None


def test_a_teacher_sees_notes_and_numbers_and_no_index():
    system, user = question(["a cup", ""], "a pot")
    assert user["content"] == "The history:\n1. a cup\n2. nothing is known of it\n\nThe next item:\na pot"
    assert "name the next item" in system["content"]


# ---- through a server


class Server(ThreadingHTTPServer):
    """`answer(body of the request)` → text."""

    def __init__(self, answer):
        super().__init__(("127.0.0.1", 0), Handler)
        self.answer, self.seen = answer, []
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def teacher(self, **settings):
        url = f"http://127.0.0.1:{self.server_port}/v1"
        return TeacherConfig("openai", teacher_model="m", base_url=url, concurrency=4, **settings)


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.seen.append(body)
        message = {"role": "assistant", "content": self.server.answer(body["messages"][-1]["content"])}
        choice = {"index": 0, "finish_reason": "stop", "message": message}
        value = {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}
        data = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        pass


@pytest.fixture
def serve():
    running = []

    def start(answer):
        running.append(Server(answer))
        return running[-1]

    yield start
    for server in running:
        server.shutdown()
        server.server_close()


def test_answers_are_checked_counted_and_only_the_missing_asked_again(serve, tmp_path, capfd):
    """Six users, told apart by their target; each gets another kind of answer."""
    sequences = {f"u{n}": ["i10", "i11", f"i0{n}", "i20", "i21"] for n in range(6)}
    table = write_data(tmp_path, sequences=sequences)[1]
    good = Answer("Numbers.", "Some series.", "One more.", "It goes on.", ((2, "by chance"),))
    answers = [
        good.text(),
        "I cannot do that",
        Answer("Numbers.", "Series.", f"Next {ROWS[2]['title']}.", "So.").text(),
        Answer("Numbers.", "Series.", "More.", "So.", ((9, "why"),)).text(),
        Answer("Numbers.", "Series.", f"Next {table.text_of('i04')}.", "So.").text(),
        Answer("<answer>", "Series.", "More.", "So.").text(),
    ]

    def answer(text):
        target = text.rpartition("The next item:\n")[2]
        return next(said for row, said in zip(ROWS, answers) if row["title"] in target)

    server = serve(answer)
    config = settings(tmp_path)
    assert build_reasoning(config, server.teacher(estimate_only=True)) is None
    assert not server.seen
    assert sorted(path.name for path in tmp_path.glob("reasoning*")) == []
    made = build_reasoning(config, server.teacher())
    assert len(server.seen) == 6
    assert ROWS[10]["title"] in server.seen[0]["messages"][1]["content"]
    assert "<|" not in server.seen[0]["messages"][1]["content"]
    assert made.report["dropped"] == {
        "no_answer": 1, "unknown_number": 1, "form_mark": 1, "foreign_index": 1, "target_title": 1,
    }  # fmt: skip
    assert made.examples["user"] == ["u0"]
    assert Chain.parse(made.examples[0]["completion"], table).history == ("i10",)
    assert "6 requests" in capfd.readouterr().err

    build_reasoning(config, server.teacher())  # the one that did not parse is asked again
    assert len(server.seen) == 7
    answers[1] = good.text()
    made = build_reasoning(config, server.teacher())
    assert len(server.seen) == 8
    assert made.examples["user"] == ["u0", "u1"]
    assert "no_answer" not in made.report["dropped"]
    build_reasoning(config, server.teacher())
    build_reasoning(settings(tmp_path, denoise="copy", overwrite=True), server.teacher())  # of the same answers
    assert len(server.seen) == 8


def test_if_nothing_is_left_the_reasons_are_said(serve, tmp_path):
    write_data(tmp_path)
    server = serve(
        lambda text: (
            Answer("<answer>", "b", "c", "d").text() if "number 1 " in text.rpartition("next item")[2] else "no"
        )
    )
    with pytest.raises(UserError, match=r"all were dropped: .* no_answer \(.*form_mark \(.*--teacher_model"):
        build_reasoning(settings(tmp_path), server.teacher())
    assert not (tmp_path / "reasoning").exists()
    assert (tmp_path / "reasoning.cache.jsonl").exists()


class Mine:
    """A teacher of one's own: it says the number of items that it was shown."""

    def cache_key(self, request):
        return request.messages[-1]["content"]

    def write(self, requests):
        for request in reversed(list(requests)):  # in any order
            count = request.messages[-1]["content"].count(" number ") - 1
            yield request, Answer(f"{count} items.", "Some.", "More.", "So.").text()


class MineConfig(TeacherConfig):
    def make(self):
        return Mine()


def test_a_teacher_of_ones_own(shop, tmp_path):
    made = build_reasoning(settings(tmp_path), MineConfig("openai", teacher_model="mine"))
    for example in made.examples:
        assert Chain.parse(example["completion"], shop[1]).evidence == f"{len(example['history'])} items."


# ---- the stage


def test_what_is_made_stays_and_other_settings_need_overwrite(shop, tmp_path, capfd):
    made = build_reasoning(settings(tmp_path), TeacherConfig())
    before = {path.name: path.read_bytes() for path in (tmp_path / "reasoning").iterdir()}
    again = build_reasoning(settings(tmp_path), TeacherConfig())
    assert "is made already" in " ".join(capfd.readouterr().err.split())
    assert again.examples.to_list() == made.examples.to_list()
    with pytest.raises(UserError, match="--overwrite"):
        build_reasoning(settings(tmp_path, max_history=3), TeacherConfig())
    with pytest.raises(UserError, match="--overwrite"):
        build_reasoning(settings(tmp_path, columns=["brand"]), TeacherConfig())
    assert {path.name: path.read_bytes() for path in (tmp_path / "reasoning").iterdir()} == before
    elsewhere = build_reasoning(settings(tmp_path, output=f"{tmp_path}/other"), TeacherConfig())
    assert elsewhere.examples.to_list() == made.examples.to_list()
    assert elsewhere.report == made.report


def test_the_report_says_how_a_model_of_it_is_asked(shop, tmp_path):
    made = build_reasoning(settings(tmp_path, chat=True, separator=", ", max_history=3), TeacherConfig())
    assert made.style == PromptStyle(TEMPLATE, ", ", True, 3)
    report = made.report
    assert (report["kind"], report["semantic_ids"], report["catalogue"]) == (
        "reasoning", shop[1].fingerprint, shop[0].fingerprint,
    )  # fmt: skip
    assert report["tasks"] == {"reasoning": len(made.examples)}
    assert 10 < report["mean_words"] < 60
    for example in made.examples:  # plain content: what a chat template adds comes later
        shown = ", ".join(map(shop[1].text_of, example["history"]))
        assert example["prompt"] == TEMPLATE.replace("{history}", shown)


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"min_history": 0}, "min_history is 0"),
        ({"max_history": 1}, "max_history 1"),
        ({"users": 0}, "users is 0"),
        ({"separator": " -> "}, "would not read back"),
        ({"separator": "\n"}, "would not read back"),
        ({"template": "Next?"}, "has {history} once"),
    ],
)
def test_settings_that_cannot_be(changed, sentence):
    with pytest.raises(UserError, match=sentence):
        ReasoningConfig("data", **changed)


def test_data_that_cannot_be_used(shop, tmp_path):
    with pytest.raises(UserError, match="column 'size' is missing"):
        build_reasoning(settings(tmp_path, columns=["size"]), TeacherConfig())
    with pytest.raises(UserError, match=r"no user has a training event after 20 others.*--min_history"):
        build_reasoning(settings(tmp_path, min_history=20), TeacherConfig())
    write_catalogue(tmp_path, ROWS[1:], {"u": ITEMS[1:]})
    with pytest.raises(UserError, match="from another catalogue"):
        build_reasoning(settings(tmp_path), TeacherConfig())
