"""The card of a checkpoint, README.md of its folder: what the Hub shows. Text is made here; no file is read or written.

Whatever comes from a user (names, titles, settings) is escaped: a card is Markdown, and its head is YAML.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from recllm.checkpoint import REASONING
from recllm.papers import TRL, papers_of
from recllm.prompting import PromptStyle
from recllm.semantic_ids import SemanticIdTable

INTERVAL = "95 %"


@dataclasses.dataclass(frozen=True, eq=False)
class CardFacts:
    name: str  # what the snippets load: the repository, or the folder's name
    report: Mapping[str, Any]  # recllm.json, with method and papers
    config: Mapping[str, Any]  # config.json
    table: SemanticIdTable
    style: PromptStyle
    history: tuple[str, ...]  # items of the table, for the snippets
    prompt: str  # what the model is given after that history
    base_model: str | None  # of the Hub
    settings: str  # training.yaml
    evaluations: Mapping[str, Mapping[str, Any]]  # name → metrics.json


def card(facts: CardFacts) -> str:
    sections = (_head, _what, _use, _use_plain, _results, _prompt, _training, _limits, _citations)
    return "\n\n".join(text for section in sections if (text := section(facts).strip())) + "\n"


def _head(facts: CardFacts) -> str:
    """What the Hub files the model under."""
    method = [facts.report["method"]] if facts.report.get("method") else []
    head: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["recllm", "trl", "generative-recommendation", "recommendation", *method],
    }
    if facts.base_model:
        head["base_model"] = facts.base_model
    results = [_indexed(result) for result in facts.evaluations.values() if figures(result)]
    if results:
        head["model-index"] = [{"name": facts.name, "results": results}]
    return f"---\n{yaml.safe_dump(head, sort_keys=False, allow_unicode=True)}---"


def _indexed(result: Mapping) -> dict:
    """One evaluation as the Hub's model-index has it."""
    data = str(result["run"]["catalogue"]["name"])
    how = protocol(result["run"])  # direct or by reasoning, over which users: figures of one name are not of one kind
    return {
        "task": {"type": "text-generation", "name": f"Sequential recommendation ({how})"},
        "dataset": {"name": data, "type": slug(data), "split": result["run"]["split"]},
        "metrics": [{"type": name, "value": value} for name, (value, _) in figures(result).items()],
    }


def _what(facts: CardFacts) -> str:
    report, table = facts.report, facts.table
    kind = (facts.config.get("architectures") or ["a causal language model"])[0]
    size = f" of {report['parameters']:,} parameters" if report.get("parameters") else ""
    cited = ", ".join(f"[{escaped(paper.title)}]({paper.url})" for paper in papers_of(report.get("papers", [])))
    several = "at most" if table.depths.min() < table.levels else "written in"
    trained = f"trained with the method `{report['method']}`" if report.get("method") else "not trained on it yet"
    return f"""# {escaped(facts.name)}

A recommender that is a language model ({escaped(kind)}{size}). Each of the {len(table):,} items of the catalogue
*{escaped(_data(report)[0])}* is {several} {table.levels} tokens of its vocabulary; it reads what a user took and writes
what comes next. It is {trained}{f", after {cited}" if cited else ""}."""


def _use(facts: CardFacts) -> str:
    reasoned = ""
    if REASONING in facts.report:
        reasoned = (
            'for one in recommender.recommend(history, k=5, mode="reason"):\n    print(one.title, one.reasoning)\n'
        )
    code = f"""from recllm import Recommender

recommender = Recommender.from_pretrained({facts.name!r})
history = {list(facts.history)!r}  # items that the user took, oldest first
for one in recommender.recommend(history, k=5):
    print(one.item, one.title, one.score)
{reasoned}"""
    return f"## Use\n\nWith `recllm`, which never names what is no item of the index:\n\n{fenced(code, 'python')}"


def _use_plain(facts: CardFacts) -> str:
    beams = min(20, len(facts.table))
    code = f"""import json
from string import ascii_lowercase

from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import cached_file

name = {facts.name!r}
tokenizer = AutoTokenizer.from_pretrained(name)
model = AutoModelForCausalLM.from_pretrained(name)
with open(cached_file(name, "semantic_ids.json"), encoding="utf-8") as file:
    index = json.load(file)

# Each item's tokens, and what may follow what: beams stay among the items.
item_of, following = {{}}, {{}}
for item, codes in index["items"].items():
    words = [index["pattern"].format(level=ascii_lowercase[n], code=code) for n, code in enumerate(codes)]
    ids = tuple(tokenizer.convert_tokens_to_ids(words))
    item_of[ids] = item
    for n, id in enumerate(ids):
        following.setdefault(ids[:n], set()).add(id)

prompt = {facts.prompt!r}
inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
start, end = inputs["input_ids"].shape[1], tokenizer.eos_token_id
answers = model.generate(
    **inputs,
    do_sample=False,
    max_new_tokens={facts.table.levels},
    num_beams={beams},
    num_return_sequences={min(5, beams)},
    prefix_allowed_tokens_fn=lambda _, ids: sorted(following.get(tuple(ids[start:].tolist()), [end])),
)
for answer in answers[:, start:].tolist():
    print(item_of[tuple(id for id in answer if id != end)])
"""
    return f"With `transformers` alone:\n\n{fenced(code, 'python')}"


def figures(result: Mapping) -> dict[str, tuple[float, Sequence[float] | None]]:
    """name → (value, interval or None): the metrics, and every single figure of the part on reasoning or reflection."""
    more = result.get("reasoning") or result.get("reflection") or {}
    intervals = (result.get("intervals") or {}) | (more.get("intervals") or {})
    found = dict(_scalars(result.get("metrics") or {})) | dict(_scalars(more))
    return {name: (value, intervals.get(name)) for name, value in found.items()}


def _scalars(part: Mapping, prefix: str = "") -> list[tuple[str, float]]:
    found = []
    for name, value in part.items():
        if isinstance(value, Mapping) and name != "intervals":
            found += _scalars(value, prefix if name == "metrics" else f"{prefix}{name} ")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            found.append((f"{prefix}{name}", value))
    return found


def _results(facts: CardFacts) -> str:
    if not facts.evaluations:
        return "## Results\n\nNot evaluated yet."
    rows = {name: figures(result) for name, result in facts.evaluations.items()}
    columns = list(dict.fromkeys(name for row in rows.values() for name in row))
    lines = [["evaluation", "data", "split", "protocol", "users", *columns]]
    for name, row in rows.items():
        result = facts.evaluations[name]
        run = result["run"]
        about = [name, run["catalogue"]["name"], run["split"], protocol(run), f"{result.get('users', 0):,}"]
        lines.append([*map(str, about), *(_cell(*row.get(column, (None, None))) for column in columns)])
    table = [f"| {' | '.join(map(escaped, line))} |" for line in lines]
    table.insert(1, "|" + " --- |" * len(lines[0]))
    notes = f"In brackets the {INTERVAL} interval over users; it says nothing about another seed. The whole of each "
    return "## Results\n\n" + "\n".join(table) + f"\n\n{notes}evaluation is in `evaluations/`."


def _cell(value: float | None, interval: Sequence[float] | None) -> str:
    if value is None:
        return "–"
    text = f"{value:,}" if isinstance(value, int) else f"{value:.4f}"
    return text + (f" ({interval[0]:.4f} – {interval[1]:.4f})" if interval else "")


def protocol(run: Mapping) -> str:
    """`direct, the whole catalogue ranked, 20 items a list, history up to 50`"""
    said, ranker = run.get("protocol") or {}, run.get("ranker") or {}
    parts = [str(ranker.get("ranker", "")), f"{said['length']} items a list" if "length" in said else ""]
    parts += [f"the last {said['max_history']} items read" if said.get("max_history") else ""]
    parts += ["the history's items left out" if said.get("exclude_history") else "the history's items may come again"]
    parts += [f"{said['users']:,} users drawn from the split" if said.get("users") else ""]
    chains = [f"{ranker[name]} {name}" for name in ("samples", "temperature", "top_p") if name in ranker]
    return ", ".join(part for part in [*parts, *chains] if part)


def _prompt(facts: CardFacts) -> str:
    style = facts.style
    how = (
        "as a user's message in the tokenizer's chat template"
        if style.chat
        else "as it stands, without a chat template"
    )
    between = f", with {style.separator!r} between them" if style.separator else ""
    text = f"""## Prompt

{fenced(style.template)}

The text goes to the model {how}; `{{history}}` stands for the tokens of the last {style.max_history} items, oldest
first{between}. The model knows only this form."""
    if REASONING in facts.report:
        text += f"\n\nAsked to reason:\n\n{fenced(PromptStyle.read(facts.report[REASONING]).template)}"
    return text


def _training(facts: CardFacts) -> str:
    name, fingerprint = _data(facts.report)
    table = facts.table
    rows = {
        "data": f"{name}, fingerprint {fingerprint[:16]}" if fingerprint else name,
        "items": f"{len(table):,}",
        "semantic IDs": f"{table.levels} levels of {', '.join(map(str, table.sizes))} codes, "
        f"fingerprint {table.fingerprint[:16]}",
        "base model": str(facts.report.get("base_model", "unknown")),
    }
    if {"text", "items"} <= (tokens := facts.report.get("tokens") or {}).keys():
        rows["vocabulary"] = f"{tokens['text']:,} tokens of the base model, {tokens['items']:,} of items"
    rows |= {key: str(facts.report[key]) for key in ("recllm", "transformers", "seed") if key in facts.report}
    lines = [f"| {escaped(key)} | {escaped(value)} |" for key, value in rows.items()]
    return "\n".join(
        [
            "## Training\n",
            "| | |",
            "| --- | --- |",
            *lines,
            "\nSettings (`training.yaml`):\n",
            fenced(facts.settings, "yaml"),
        ]
    )


def _limits(facts: CardFacts) -> str:
    return f"""## Limits

- It knows only the {len(facts.table):,} items of its index (`semantic_ids.json`): it recommends no other, and a
  history with another is refused. New items need semantic IDs, and training.
- Decoded without the constraint to the index, it may write codes that name no item.
- Scores order items; they are not the chance of a purchase.
- It repeats what its log favours, such as popular items, and the figures above hold for that log, split and protocol.
- The licences of the base model and of the data apply; none is given here."""


def _citations(facts: CardFacts) -> str:
    papers = [*papers_of(facts.report.get("papers", [])), TRL]
    return "## Citation\n\n" + fenced("\n\n".join(paper.bibtex for paper in papers), "bibtex")


def _data(report: Mapping) -> tuple[str, str]:
    """(name, fingerprint) of the data set."""
    catalogue = report.get("catalogue") or {}
    return str(catalogue.get("name", "unknown")), str(catalogue.get("fingerprint", ""))


def escaped(text: str) -> str:
    """`text` as Markdown shows it letter by letter, on one line."""
    return re.sub(r"([\\`*_{}\[\]<>#|~])", r"\\\1", " ".join(text.split()))


def fenced(text: str, language: str = "") -> str:
    """A code block; its fence is longer than any run of backticks inside."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text.strip(chr(10))}\n{fence}"


def slug(text: str) -> str:
    """A name that is safe in a file name and in the Hub's metadata."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "unnamed"
