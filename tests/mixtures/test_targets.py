"""Targets of reinforcement learning: what supervised training never sees, and the prompts that ask for it."""

import dataclasses

import numpy as np
import polars as pl
import pytest
from helpers import write_catalogue, write_small_model
from hypothesis import given, settings
from hypothesis import strategies as st

from recllm.catalogue import Catalogue, rl_draw
from recllm.checkpoint import Checkpoint
from recllm.errors import UserError
from recllm.mixtures.alignment import AlignmentConfig, build_alignment
from recllm.mixtures.alignment_tasks import PREFERENCE, SEQUENTIAL, WEIGHTS
from recllm.mixtures.item_facts import item_facts, speaking_columns
from recllm.mixtures.reasoning import ReasoningConfig, build_reasoning
from recllm.mixtures.store import Mixture, rl_share_of
from recllm.mixtures.targets import TargetsConfig, rl_prompts
from recllm.prompting import PromptStyle
from recllm.reasoning import SHORT_TEMPLATE
from recllm.semantic_ids import SemanticIdTable
from recllm.teacher import TeacherConfig

# ---- which events


def events_of(frame: pl.DataFrame) -> list[tuple[str, str]]:
    return [(user, item) for user, items, _ in frame.iter_rows() for item in items]


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 7), min_size=1, max_size=30),
    share=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    split=st.sampled_from(["train", "leave-one-out"]),
    longest=st.sampled_from([None, 1, 2]),
)
def test_what_sft_sees_and_what_is_kept_are_the_training_split(tmp_path_factory, lengths, share, split, longest):
    sequences = {f"u{n}": [f"i{n}-{place}" for place in range(length)] for n, length in enumerate(lengths)}
    items = [item for sequence in sequences.values() for item in sequence]
    catalogue = write_catalogue(tmp_path_factory.mktemp("data"), items, sequences, split=split)
    train = {
        user: sequence[:-2] if split == "leave-one-out" and len(sequence) >= 3 else sequence
        for user, sequence in sequences.items()
    }
    kept = [user for user, sequence in train.items() if rl_draw(user) < share and len(sequence) >= 3]
    seen = events_of(catalogue.training_sequences(share))
    assert seen == [(user, item) for user, own in train.items() for item in (own[:-1] if user in kept else own)]
    targets = catalogue.rl_targets(share, longest)
    assert targets.columns == catalogue.targets("test").columns
    assert targets.select("user", "position", "item", "behaviour", "history").rows() == [
        (user, len(train[user]) - 1, train[user][-1], "buy", train[user][:-1][-(longest or 99) :]) for user in kept
    ]
    assert targets["history_behaviours"].list.len().to_list() == targets["history"].list.len().to_list()
    every = catalogue.rl_targets(None)
    assert every.select("user", "item", "history").rows() == [
        (user, item, own[:place]) for user, own in train.items() for place, item in enumerate(own) if place
    ]


def test_the_past_of_a_target_holds_no_event_of_another_split(tmp_path):
    """Whatever the split's shape: here training goes on after a validation event."""
    catalogue = write_catalogue(tmp_path, "abcdef", {"u": list("abcdef"), "v": list("fedcba")}, split="train")
    labels = ["train", "valid", "train", "train", "test", "train"] * 2
    catalogue.__dict__["interactions"] = catalogue.interactions.with_columns(split=pl.Series(labels))
    assert catalogue.rl_targets(1.0).select("position", "item", "history").rows() == [
        (5, "f", ["a", "c", "d"]),
        (5, "a", ["f", "d", "c"]),
    ]
    assert catalogue.training_sequences(1.0)["items"].to_list() == [["a", "c", "d"], ["f", "d", "c"]]


def test_a_user_is_drawn_by_the_id_alone():
    # SHA-256 of the lengths (8 bytes, little-endian) and bytes of "recllm rl_share" and the id: its first 13 hex digits
    assert rl_draw("u1") == 0x1E5FFFBBD28CB / 16**13
    assert rl_draw("käufer") == 0xE6B1F8BD17DF6 / 16**13
    draws = np.array([rl_draw(f"user {n}") for n in range(20_000)])
    assert 0 <= draws.min() < draws.max() < 1
    counts = np.histogram(draws, bins=10, range=(0, 1))[0]
    assert (abs(counts - 2_000) < 5 * np.sqrt(2_000 * 0.9)).all()


def test_a_larger_share_takes_more_users_and_keeps_the_others(tmp_path):
    catalogue = write_catalogue(tmp_path, "abcde", {f"u{n}": list("abcde") for n in range(300)})
    users = [set(catalogue.rl_targets(share)["user"]) for share in (0.0, 0.1, 0.2, 1.0)]
    assert [len(some) for some in users][::3] == [0, 300]
    assert users[1] < users[2]
    assert 10 < len(users[1]) < 50 < len(users[2]) < 90


# ---- what supervised training sees

KINDS = ("Guitars", "Strings", "Cups", "Pots", "Hoses")


def write_shop(folder, ends: str, texts: bool = True):
    """40 users, whose last three events are `ends` (train), valid and test, each an item that nobody else takes.

    ends    which of two such items the last training event is, a or b
    texts   without, titles are all that is known
    """
    random, rows = np.random.default_rng(0), []
    for n in range(30):
        own = {"brand": "AB"[n % 2], "categories": ["Shop", KINDS[n % 5]], "tier": ("low", "high")[n // 5 % 2]}
        rows.append({"item": f"c{n}", "title": f"{KINDS[n % 5]} of series {n % 7}"} | (own if texts else {}))
    sequences = {}
    for user in range(40):
        lasts = [f"last{user}{letter}" for letter in "abvt"]
        for n, item in enumerate(lasts):
            own = {"brand": "AB"[n % 2], "categories": ["Shop", KINDS[n]], "tier": ("low", "high")[n % 2]}
            rows.append({"item": item, "title": f"Secret {KINDS[n]}"} | (own if texts else {}))
        taken = [f"c{n}" for n in random.choice(30, random.integers(2, 8), replace=False)]
        sequences[f"u{user}"] = [*taken, f"last{user}{ends}", lasts[2], lasts[3]]
    catalogue = write_catalogue(folder, rows, sequences)
    codes = np.array([[n // 16, n % 16] for n in range(len(rows))], np.int32)
    table = SemanticIdTable(
        tuple(catalogue.item_ids), codes, (len(rows) // 16 + 1, 16), items_fingerprint=catalogue.items_fingerprint
    )
    table.save(folder / "semantic_ids.json")
    return catalogue, table


def build_both(folder, share: float) -> tuple[Mixture, Mixture]:
    tasks = [f"{task}=1" for task in WEIGHTS]
    align = AlignmentConfig(str(folder), tasks=tasks, rl_share=share, summaries="window")
    reason = ReasoningConfig(str(folder), rl_share=share, targets="all", min_history=1, template="short")
    return build_alignment(align, TeacherConfig()), build_reasoning(reason, TeacherConfig())


def test_what_is_kept_is_in_no_example_of_its_user(tmp_path):
    catalogue, table = write_shop(tmp_path, "a")
    kept = dict(catalogue.rl_targets(0.5).select("user", "item").iter_rows())
    assert 10 < len(kept) < 30
    tasks = {}
    for mixture in build_both(tmp_path, 0.5):
        assert mixture.rl_share == 0.5 == mixture.report["settings"]["rl_share"]
        for row in mixture.examples:
            if not row["user"]:
                continue
            item = kept.get(row["user"])
            shown = {row["item"], *row["history"]}
            said = row["prompt"] + row["completion"]
            if item is None:  # of the others the last event is there
                number = row["user"].removeprefix("u")
                tasks.setdefault(row["task"], set()).add(f"last{number}a" in shown)
            else:
                assert item not in shown
                assert table.text_of(item) not in said
                assert "Secret" not in said
    told = {task: True in found for task, found in tasks.items()}
    assert told == {task: task != "preference_summary" for task in (*SEQUENTIAL, *PREFERENCE, "sequence", "reasoning")}


@pytest.mark.parametrize("texts", [True, False])
def test_what_is_kept_changes_no_byte_of_what_sft_sees(tmp_path, texts):
    """Other last events of the chosen users, and the mixtures are the same: nothing is counted or summed over them."""
    share, mixtures = 1.0, []
    for ends in "ab":
        (tmp_path / ends).mkdir()
        write_shop(tmp_path / ends, ends, texts)
        mixtures.append(build_both(tmp_path / ends, share))
    for one, other in zip(*mixtures):
        assert one.examples.to_list() == other.examples.to_list()
        assert one.report["made_of"] != other.report["made_of"]  # they are of different data
        told = [name for name in ("settings", "attributes", "tasks", "dropped", "windows") if name in one.report]
        assert [one.report[name] for name in told] == [other.report[name] for name in told]


def test_what_is_kept_is_not_counted_in_what_is_said_of_items(tmp_path):
    """Columns that speak, and words of titles: both are chosen by what follows what in training."""
    titles = "strings alpha bundle", "strings alpha single", "strings alpha single"
    titles += "cups omega single", "cups omega bundle", "cups omega bundle"
    rows = [{"item": f"i{n}", "title": title, "tier": ("low", "high")[n // 3]} for n, title in enumerate(titles)]
    sequences = {
        "like": {f"u{n}": ["i0", "i1", "i2"] if n % 2 else ["i3", "i4", "i5"] for n in range(8)},
        "unlike": {f"u{n}": ["i0", "i1", "i3"] if n % 2 else ["i3", "i4", "i0"] for n in range(8)},
    }
    like, unlike = (write_catalogue(tmp_path / name, rows, own, "train") for name, own in sequences.items())
    columns = ["title", "categories", "brand"]
    assert speaking_columns(like) == speaking_columns(like, 1.0) == speaking_columns(unlike, 1.0) == [*columns, "tier"]
    assert speaking_columns(unlike) == columns
    assert item_facts(like, columns, 1.0) == item_facts(unlike, columns, 1.0)
    assert item_facts(like, columns) != item_facts(unlike, columns)
    codes = np.array([[n // 3, n % 3] for n in range(6)], np.int32)
    chains = []
    for catalogue in (like, unlike):
        SemanticIdTable(tuple(catalogue.item_ids), codes, (2, 3)).save(catalogue.folder / "semantic_ids.json")
        config = ReasoningConfig(str(catalogue.folder), rl_share=1.0, min_history=1)
        chains.append(build_reasoning(config, TeacherConfig()).examples.to_list())
    assert chains[0] == chains[1]
    assert "tier low" in chains[0][1]["completion"]


def test_without_a_share_a_mixture_is_what_it_was(tmp_path):
    """A mixture made before there was the setting is found again, and counts as one that keeps nothing out."""
    write_shop(tmp_path, "a")
    for mixture in build_both(tmp_path, 0.0):
        assert "rl_share" not in mixture.report["settings"]
        assert mixture.rl_share == 0.0
    with pytest.raises(UserError, match="another --output"):
        build_both(tmp_path, 0.2)


@pytest.mark.parametrize("share", [-0.1, 1.01, float("nan")])
@pytest.mark.parametrize("config", [AlignmentConfig, ReasoningConfig])
def test_a_share_is_from_0_to_1(config, share):
    with pytest.raises(UserError, match=r"rl_share is .*from 0 to 1"):
        config("data", rl_share=share)


def mixture_of(kind: str, share: float | None, catalogue: str = "c") -> Mixture:
    own = {} if share is None else {"settings": {"rl_share": share} if share else {}}
    return Mixture(None, {"kind": kind, "catalogue": catalogue, **own})


def test_mixtures_of_one_run_keep_the_same_out():
    assert rl_share_of([mixture_of("alignment", 0.2), mixture_of("reasoning", 0.2)]) == 0.2
    assert rl_share_of([mixture_of("alignment", None), mixture_of("reasoning", 0.0, "d")]) == 0.0
    assert rl_share_of([]) == 0.0
    with pytest.raises(UserError, match=r"differ in rl_share \(alignment 0.2, reasoning 0\).*same --rl_share"):
        rl_share_of([mixture_of("alignment", 0.2), mixture_of("reasoning", None)])
    with pytest.raises(UserError, match="different data"):
        rl_share_of([mixture_of("alignment", 0.2), mixture_of("reasoning", 0.2, "d")])


# ---- prompts


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """13 items, one of them of one code alone; a model that is asked with 3 items directly, and with 2 to reason."""
    data, model = write_small_model(tmp_path_factory.mktemp("small"), items=13, users=60)
    checkpoint = Checkpoint.load(model, "cpu")
    report = checkpoint.report | {"reasoning_prompt": dataclasses.asdict(PromptStyle(SHORT_TEMPLATE, max_history=2))}
    checkpoint = dataclasses.replace(checkpoint, style=PromptStyle(max_history=3), report=report)
    return Catalogue.load(data), checkpoint


def after_sft(checkpoint: Checkpoint, share: float, **more) -> Checkpoint:
    return dataclasses.replace(checkpoint, report=checkpoint.report | {"sft": {"rl_share": share, **more}})


def prompts(catalogue, checkpoint, which="held_out", mode="direct", limit=None, seed=0, new_tokens=4):
    return rl_prompts(catalogue, checkpoint, which=which, mode=mode, limit=limit, seed=seed, new_tokens=new_tokens)


@pytest.mark.parametrize("which", ["held_out", "all"])
@pytest.mark.parametrize("mode", ["direct", "reason", "joint"])
@pytest.mark.parametrize("changed", [{}, {"separator": ", "}, {"chat": True}])
def test_rows_equal_a_slow_reference(small, which, mode, changed):
    catalogue, checkpoint = small
    checkpoint = after_sft(checkpoint, 0.6)
    checkpoint = dataclasses.replace(checkpoint, style=dataclasses.replace(checkpoint.style, **changed))
    cases = catalogue.rl_targets(0.6 if which == "held_out" else None).rows(named=True)
    expected = []
    for name in ("direct", "reason"):
        if mode not in (name, "joint"):
            continue
        style = checkpoint.style if name == "direct" else checkpoint.reasoning
        for case in cases:
            history, codes = case["history"][-style.max_history :], checkpoint.table.codes_of(case["item"])
            row = {key: case[key] for key in ("user", "position", "item")} | {"mode": name, "history": history}
            row["prompt"] = style.text(case["history"], checkpoint.table, checkpoint.tokenizer)
            row["prompt_ids"] = checkpoint.writer_of(style).ids([case["history"]])[0]
            expected.append(row | {"target": [*codes, -1][: checkpoint.table.levels]})
    found = prompts(catalogue, checkpoint, which, mode)
    assert found.to_list() == [{key: row[key] for key in found.column_names} for row in expected]
    assert len(found) == len(cases) * (2 if mode == "joint" else 1) > 10
    if which == "all":
        assert min(row["target"][-1] for row in expected) == -1  # the shallow item is among them
    assert {len(row["history"]) for row in expected} == {"direct": {1, 2, 3}, "reason": {1, 2}, "joint": {1, 2, 3}}[
        mode
    ] - ({1} if which == "held_out" else set())


def test_a_limit_is_a_seeded_sample_in_the_same_order(small):
    catalogue, checkpoint = small
    every = prompts(catalogue, checkpoint, "all").to_list()
    drawn = [prompts(catalogue, checkpoint, "all", limit=9, seed=seed) for seed in (0, 0, 1)]
    assert drawn[0].to_list() == drawn[1].to_list() != drawn[2].to_list()
    assert drawn[0]._fingerprint == drawn[1]._fingerprint != drawn[2]._fingerprint
    for some in drawn:
        assert len(some) == 9
        places = [every.index(row) for row in some]
        assert places == sorted(set(places))
    assert prompts(catalogue, checkpoint, "all", limit=len(every)).to_list() == every
    both = prompts(catalogue, checkpoint, "all", mode="joint", limit=9)
    assert both["item"][:9] == both["item"][9:] == drawn[0]["item"][:]  # so many targets, each in both ways


def test_batches_are_joined_in_order(small, monkeypatch):
    catalogue, checkpoint = small
    whole = prompts(catalogue, checkpoint, "all", "joint")
    monkeypatch.setattr("recllm.mixtures.targets.BATCH", 7)
    assert prompts(catalogue, checkpoint, "all", "joint").to_list() == whole.to_list()


def test_prompts_ask_for_what_sft_never_saw(small):
    catalogue, checkpoint = small
    data = str(catalogue.folder)
    align = build_alignment(AlignmentConfig(data, tasks=["next_item=1"], rl_share=0.5), TeacherConfig())
    trained = {(row["user"], *row["history"], row["item"]) for row in align.examples}
    asked = prompts(catalogue, after_sft(checkpoint, rl_share_of([align]), catalogue=align.report["catalogue"]))
    assert len(asked) > 5
    whole = {(user, *items) for user, items, _ in catalogue.training_sequences().rows()}
    for row in catalogue.rl_targets(0.5).rows(named=True):
        event = (row["user"], *row["history"], row["item"])
        assert event in whole
        assert event not in trained
    users = set(asked["user"])
    assert {row[0] for row in trained} >= users  # of the same users SFT did see the rest


@pytest.mark.parametrize("report", [{}, {"sft": {}}, {"sft": {"rl_share": 0.0}}])
def test_without_targets_kept_out_of_sft_there_are_none(small, report):
    catalogue, checkpoint = small
    checkpoint = dataclasses.replace(checkpoint, report=checkpoint.report | report)
    with pytest.raises(UserError, match=r"kept no target out.*--rl_share 0.2 and train, or rl_targets: all"):
        prompts(catalogue, checkpoint)
    assert len(prompts(catalogue, checkpoint, "all")) > 10


def test_targets_kept_out_of_other_data_are_refused(small):
    catalogue, checkpoint = small
    assert len(prompts(catalogue, after_sft(checkpoint, 1.0, catalogue=catalogue.fingerprint))) > 5
    with pytest.raises(UserError, match="other data"):
        prompts(catalogue, after_sft(checkpoint, 1.0, catalogue="another"))


def test_data_without_a_target_is_refused(small, tmp_path):
    _, checkpoint = small
    short = write_catalogue(tmp_path / "short", checkpoint.table.items, {"u": ["i0", "i1"], "v": ["i2"]}, "train")
    with pytest.raises(UserError, match=r"three training events.*a larger --rl_share"):
        prompts(short, after_sft(checkpoint, 1.0))
    assert prompts(short, checkpoint, "all")["item"][:] == ["i1"]
    single = write_catalogue(tmp_path / "single", checkpoint.table.items, {"u": ["i0"], "v": ["i2"]}, "train")
    with pytest.raises(UserError, match="no user has two training events"):
        prompts(single, checkpoint, "all")


def test_an_item_without_semantic_id_is_refused(small, tmp_path):
    _, checkpoint = small
    for number, sequence in enumerate((["i0", "i1", "new"], ["new", "i0", "i1"])):
        data = write_catalogue(tmp_path / str(number), [*checkpoint.table.items, "new"], {"u": sequence}, "train")
        with pytest.raises(UserError, match=r"1 items have no semantic ID in the model, 'new' first.*encode_new"):
            prompts(data, after_sft(checkpoint, 1.0))


def test_a_prompt_that_leaves_no_room_is_refused(small):
    catalogue, checkpoint = small
    lengths = [len(ids) for ids in prompts(catalogue, checkpoint, "all")["prompt_ids"]]
    context = checkpoint.model.config.max_position_embeddings
    longest, fits = max(lengths), context - max(lengths)
    assert len(prompts(catalogue, checkpoint, "all", new_tokens=fits)) == len(lengths)
    words = f"{lengths.count(longest):,} of {len(lengths):,} prompts, the longest of {longest:,} tokens"
    with pytest.raises(UserError, match=f"{words}.*{fits + 1:,} more.*{context:,}.*max_completion_length"):
        prompts(catalogue, checkpoint, "all", new_tokens=fits + 1)


def test_a_model_that_was_never_taught_to_reason_is_refused(small):
    catalogue, checkpoint = small
    report = {name: value for name, value in checkpoint.report.items() if name != "reasoning_prompt"}
    for mode in ("reason", "joint"):
        with pytest.raises(UserError, match="not taught to reason"):
            prompts(catalogue, dataclasses.replace(checkpoint, report=report), "all", mode)


def test_settings_stand_in_a_recipes_own():
    @dataclasses.dataclass(kw_only=True)
    class Recipe(TargetsConfig):
        data: str

    assert Recipe(data="d") == Recipe(data="d", rl_targets="held_out", mode="direct", limit=None)
    with pytest.raises(UserError, match="limit is 0"):
        Recipe(data="d", limit=0)
