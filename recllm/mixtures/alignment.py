"""Alignment data: what teaches a language model the items' indices and the users' habits.   GREAM, section 2.

A prepared folder with its semantic IDs → a folder of prompts and completions. A sequence is `training_sequences(share)`
and nothing else, so that no event of validation or test, and none that is kept for reinforcement learning, is ever in a
history, a target or a summary.
"""

import dataclasses
import difflib
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from datasets import Dataset
from datasets.table import MemoryMappedTable

from recllm.catalogue import Catalogue
from recllm.errors import UserError
from recllm.files import digest, make_folder, sha256_file, write_whole
from recllm.mixtures.alignment_facts import ItemFacts, Windows, attribute_columns
from recllm.mixtures.alignment_tasks import (
    PREFERENCE,
    WEIGHTS,
    Choice,
    Counts,
    Material,
    category_groups,
    task_random,
    write_examples,
)
from recllm.mixtures.alignment_texts import write_texts
from recllm.mixtures.store import RL_SHARE, Mixture, already_made, check_rl_share, save_mixture
from recllm.mixtures.templates import ALIGNMENT, ASKED, SEQUENCE, Template, read_templates
from recllm.progress import progress
from recllm.prompting import PromptStyle
from recllm.semantic_ids import SemanticIdTable
from recllm.semantic_ids.of_data import index_of
from recllm.teacher import Request, TeacherConfig
from recllm.text import TEXTS_FILE, check_columns

VERSION = 2  # of what is written; a change of it makes every mixture anew
COMMAND = "data_prep/build_alignment.py"
CACHE_FILE = "alignment.cache.jsonl"


@dataclass
class AlignmentConfig:
    """Settings of `data_prep/build_alignment.py`."""

    data: str = field(metadata={"help": "Prepared folder, with semantic_ids.json inside."})
    output: str | None = field(default=None, metadata={"help": "Folder to write. Default: alignment, in the data."})
    semantic_ids: str | None = field(default=None, metadata={"help": "Default: semantic_ids.json of the data folder."})
    templates: list[str] = field(
        default_factory=list, metadata={"help": "YAML files that add templates to tasks, or replace a task's."}
    )
    tasks: list[str] = field(
        default_factory=list,
        metadata={"help": "name=weight; what is not named is left out. Default: every task (docs/alignment.md)."},
    )
    windows: Literal["all", "last"] = field(
        default="all", metadata={"help": "Targets: every training event from a user's second on, or the last alone."}
    )
    summaries: Literal["user", "window"] = field(
        default="user", metadata={"help": "One summary a user, before the last target, or one a window."}
    )
    max_history: int = field(default=20, metadata={"help": "Most recent items of a history that a prompt shows."})
    max_targets: int | None = field(default=None, metadata={"help": "The latest targets of a user. Default: all."})
    separator: str = field(default="", metadata={"help": "Between indices."})
    chat: bool = field(default=False, metadata={"help": "Write prompts as messages of the model's chat template."})
    title: str = field(default="title", metadata={"help": "The column of items.parquet that names an item."})
    attributes: list[str] = field(
        default_factory=list,
        metadata={"help": "Columns of items.parquet. Default: brand, categories and the data's own columns of text."},
    )
    max_words: int = field(default=60, metadata={"help": "Of an item's text or description; longer ones are cut."})
    rewritten: bool = field(default=False, metadata={"help": "Describe items by texts.parquet (rewrite_text.py)."})
    category_items: int = field(default=5, metadata={"help": "Items that an example of a category names at most."})
    rl_share: float = field(default=0.0, metadata={"help": RL_SHARE})
    seed: int = field(default=0, metadata={"help": "Of templates, shares and samples."})
    overwrite: bool = field(default=False, metadata={"help": "Replace a mixture of other data or settings."})

    def __post_init__(self):
        for name in ("max_history", "max_words", "category_items"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}", fix="1 or more")
        if self.max_targets is not None and self.max_targets < 1:
            raise UserError(f"max_targets is {self.max_targets}", fix="1 or more, or leave it out for all")
        check_rl_share(self.rl_share)
        if self.seed < 0:
            raise UserError(f"seed is {self.seed}", fix="0 or more")
        if SEQUENCE in self.weights() and (self.separator or self.chat):
            problem = "in a sequence nothing may stand between an item and the next: no separator, no chat template"
            raise UserError(problem, fix="the task next_item in place of sequence")

    def weights(self) -> dict[str, float]:
        """task → weight, in the library's order; those of weight 0 are left out."""
        given = dict(WEIGHTS) if not self.tasks else {}
        for text in self.tasks:
            name, _, weight = text.partition("=")
            if name not in WEIGHTS:
                near = difflib.get_close_matches(name, WEIGHTS, n=1)
                fix = f"did you mean {near[0]}?" if near else f"name some of {', '.join(WEIGHTS)}"
                raise UserError(f"tasks: {name!r} is no alignment task", fix=fix)
            if name in given:
                raise UserError(f"tasks: {name} is named twice", fix="name it once")
            given[name] = _weight(name, weight)
        chosen = {name: given[name] for name in WEIGHTS if given.get(name)}
        if not chosen:
            raise UserError("tasks: none has a weight above 0", fix="next_item=1")
        return chosen

    @property
    def folder(self) -> Path:
        return Path(self.output) if self.output else Path(self.data) / "alignment"


def _weight(name: str, text: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = -1.0
    if not math.isfinite(weight) or weight < 0:
        raise UserError(f"tasks: the weight of {name} is {text!r}", fix=f"a number from 0 on, like {name}=0.5")
    return weight


def build_alignment(config: AlignmentConfig, teacher: TeacherConfig) -> Mixture | None:
    """Make `config.folder`, or leave it when it is made already; None if only the teacher's estimate was wanted."""
    catalogue = Catalogue.load(config.data)
    table = index_of(catalogue, config.semantic_ids)
    attributes = config.attributes or attribute_columns(catalogue.items, config.title)
    check_columns(catalogue, [config.title, *attributes])
    templates = read_templates(config.templates)
    made_of = _made_of(config, teacher, catalogue, table)
    if not teacher.estimate_only and already_made(config.folder, made_of, config.overwrite):
        return Mixture.load(config.folder, table, COMMAND)

    facts = ItemFacts.of(catalogue, table, config.title, attributes, config.max_words, config.rewritten)
    every, share = config.windows == "all", config.rl_share
    windows = Windows.of(catalogue, every, config.max_history, config.max_targets, share)
    summarised = windows.last_of_users() if config.summaries == "user" else np.arange(len(windows))
    groups = category_groups(facts, config.category_items, task_random(config.seed, "categories"))
    pieces = Windows.pieces(catalogue, config.max_history + 1, share) if SEQUENCE in config.weights() else None
    material = Material(facts, windows, summarised, groups, config.separator, pieces)
    choices = {
        task: Choice.draw(material.numbers(task), weight, len(templates[task]), task_random(config.seed, task))
        for task, weight in config.weights().items()
    }
    written = write_texts(facts, *_to_be_written(material, choices), teacher, catalogue.folder / CACHE_FILE)
    if written is None:
        return None
    material = dataclasses.replace(
        material,
        summaries=dict.fromkeys(summarised.tolist(), "") | written.summaries,
        intents=dict.fromkeys(range(len(facts.ids)), "") | written.intents,
    )
    make_folder(config.folder.parent)
    # Millions of rows go by way of a file beside the folder: they are never in memory together.
    with write_whole(rows := config.folder.with_name(f".{config.folder.name}.arrow")) as path:
        with progress("alignment examples", sum(map(len, choices.values()))) as advance:
            counts = write_examples(path, material, choices, templates, advance)
        if not counts.examples:
            fix = "data with sequences of two training events or more, or with text, or other --tasks"
            raise UserError("no task has an example", file=catalogue.folder, fix=fix)
        examples = Dataset(MemoryMappedTable.from_file(str(path)), fingerprint=made_of[:16])
        asked = SEQUENCE if SEQUENCE in config.weights() else ASKED
        report = {"kind": "alignment", "version": VERSION, "made_of": made_of, "catalogue": catalogue.fingerprint}
        report |= {"semantic_ids": table.fingerprint, "settings": _settings(config), "attributes": attributes}
        report |= {"prompt": dataclasses.asdict(style_of(config, templates[asked][0])), "teacher": _teacher(teacher)}
        report |= {"windows": _windows(windows), "stand_ins": written.stand_ins} | _counted(counts)
        save_mixture(examples, report, config.folder)
    rows.unlink()
    return Mixture.load(config.folder, table, COMMAND)


def style_of(config: AlignmentConfig, asked: Template) -> PromptStyle:
    """How the trained model is asked: the first template of that task, with this mixture's separator and length."""
    return PromptStyle(asked.prompt, config.separator, config.chat, config.max_history)


def _to_be_written(material: Material, choices: dict[str, Choice]) -> tuple[dict[int, tuple[str, list[int]]], list]:
    """The histories (by window) and the items that chosen examples need a teacher's text of; nothing else is paid."""
    windows = material.windows
    of_windows = [choices[task].number for task in PREFERENCE if task in choices]
    wanted = np.unique(np.concatenate(of_windows)).tolist() if of_windows else []
    items = np.unique(choices["item_from_intent"].number).tolist() if "item_from_intent" in choices else []
    return {w: (windows.users[windows.user[w]], windows.history(w)) for w in wanted}, items


def _made_of(config: AlignmentConfig, teacher: TeacherConfig, catalogue: Catalogue, table: SemanticIdTable) -> str:
    """Everything that the examples are a function of; of files their content, not their place."""
    files = [ALIGNMENT, *config.templates, *([catalogue.folder / TEXTS_FILE] if config.rewritten else [])]
    settings = json.dumps(_settings(config), sort_keys=True)
    writer = teacher.make().cache_key(Request("", (), ""))  # of an empty request: the teacher and its sampling alone
    parts = catalogue.fingerprint, table.fingerprint, settings, writer, *map(sha256_file, files)
    return digest(str(VERSION), *parts)


def _settings(config: AlignmentConfig) -> dict:
    places = ("data", "output", "semantic_ids", "templates", "overwrite", "tasks")
    settings = {name: value for name, value in vars(config).items() if name not in places}
    if not config.rl_share:
        del settings["rl_share"]  # a mixture made before there was the setting is the same
    return settings | {"tasks": config.weights()}


def _teacher(teacher: TeacherConfig) -> str:
    return "offline" if teacher.teacher == "offline" else f"{teacher.teacher} {teacher.teacher_model}"


def _windows(windows: Windows) -> dict[str, int]:
    with_one = len(windows.last_of_users())
    return {"count": len(windows), "users": with_one, "users_without": len(windows.users) - with_one}


def _counted(counts: Counts) -> dict:
    """tasks (examples by task), words (means of prompt and completion), dropped (by task and reason)."""
    words = {
        task: {
            "prompt": round(counts.prompt_words[task] / examples, 1),
            "completion": round(counts.completion_words[task] / examples, 1),
        }
        for task, examples in counts.examples.items()
    }
    dropped = {task: dict(sorted(reasons.items())) for task, reasons in counts.dropped.items()}
    return {"tasks": dict(counts.examples), "words": words, "dropped": dropped}
