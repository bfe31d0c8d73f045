"""A checkpoint folder that stands by itself, and its way to the Hub.

complete        the settings it came from, its results and a card, beside the model
check_complete  refuses a folder that lacks a part, or whose parts do not belong together
push            uploads what belongs to a checkpoint, and nothing else
finish          what a recipe calls at its end: all three
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError, safe_open

from recllm import hub
from recllm.card import CardFacts, card, slug
from recllm.catalogue import ITEM_COLUMNS, read_table
from recllm.checkpoint import BUILD, ITEMS, REPORT, TABLE
from recllm.errors import UserError
from recllm.evaluation.run import METRICS
from recllm.files import digest, read_object, write_json, write_whole
from recllm.hub import CARD, EVALUATIONS, SETTINGS, SHARDS, WEIGHTS, read_text
from recllm.launch import console
from recllm.papers import papers_of
from recllm.pretrained import load_tokenizer, reason, which_model
from recllm.prompting import PromptStyle
from recllm.semantic_ids import SemanticIdTable
from recllm.settings import plain, shortened
from recllm.tokenization import ItemTokens

CONFIG = "config.json"
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib")


def complete(
    folder: str | Path,
    *,
    settings: Mapping[str, Any] | None = None,
    results: Sequence[str | Path] = (),
    method: str | None = None,
    papers: Sequence[str] | None = None,
    repo: str | None = None,
) -> Path:
    """Write training.yaml, evaluations/ and README.md into a checkpoint folder; the card's path.

    settings  what it was trained with; default: what the folder or its recllm.json says
    results   folders of evaluations of this checkpoint, beside those that the folder holds already
    method    and the papers to cite, kept in recllm.json; default: what it says
    repo      where it will lie on the Hub, for the card's examples
    """
    folder = Path(folder)
    table, report = _table_and_report(folder)
    if not (folder / CONFIG).exists():
        raise UserError("holds items and no model: it is prepared data, not a checkpoint", file=folder, fix=BUILD)
    named = dict(report)
    if method is not None:
        named["method"] = method
    if papers is not None:
        named["papers"] = list(papers)
    papers_of(named.get("papers", []))
    base = str(named.get("base_model", ""))
    named |= {"base_model": shortened(base)} if base else {}
    weights = which_model(str(folder)) if results else ""
    found = [_evaluation(Path(path), table, weights) for path in results]
    if named != report:
        write_json(folder / REPORT, named)
    for result in found:
        write_json(_place(folder / EVALUATIONS, result["run"]), result)
    if settings is not None or not (folder / SETTINGS).exists():
        text = yaml.safe_dump(plain(settings if settings is not None else _own_settings(named)), sort_keys=False)
        _write(folder / SETTINGS, text)
    facts = _facts(folder, repo, named, table, base)
    _write(folder / CARD, card(facts))
    return folder / CARD


def _table_and_report(folder: Path) -> tuple[SemanticIdTable, dict]:
    """Of a checkpoint folder; refused where they are of different models."""
    for name in (TABLE, REPORT):
        if not (folder / name).exists():
            raise UserError(f"holds no {name}, so it is no checkpoint of ours", file=folder, fix=BUILD)
    table, report = SemanticIdTable.load(folder / TABLE), read_object(folder / REPORT)
    if report.get("semantic_ids", table.fingerprint) != table.fingerprint:
        raise UserError(
            "is not the index that the model was made with", file=folder / TABLE, fix="put back the one that was there"
        )
    return table, report


def _facts(folder: Path, repo: str | None, report: dict, table: SemanticIdTable, base: str) -> CardFacts:
    style, history = PromptStyle.read(report.get("prompt")), table.items[:2]
    evaluations = sorted((folder / EVALUATIONS).glob("*.json"))
    on_the_hub = re.fullmatch(r"[\w.-]+/[\w.-]+", base) and not Path(base).exists()
    return CardFacts(
        name=repo or folder.resolve().name,
        report=report,
        config=read_object(folder / CONFIG),
        table=table,
        style=style,
        history=history,
        prompt=style.text(history, table, load_tokenizer(str(folder))),
        base_model=base if on_the_hub else None,
        settings=read_text(folder / SETTINGS),
        evaluations={path.stem: _figures_of(path) for path in evaluations},
    )


def _evaluation(folder: Path, table: SemanticIdTable, weights: str) -> dict:
    """metrics.json of an evaluation folder; refused where it is of another model than these weights."""
    if not (folder / METRICS).exists():
        raise UserError(f"holds no {METRICS}, so it is no finished evaluation", file=folder, fix="eval/evaluate.py")
    result = _figures_of(folder / METRICS)
    ranker = result["run"].get("ranker") or {}
    for name, ours in (("semantic_ids", table.fingerprint), ("weights", weights)):
        if str(ranker.get(name)).rpartition("@")[2] != ours.rpartition("@")[2]:
            raise UserError(
                "is of another model, or of this one before it changed",
                file=folder / METRICS,
                fix="evaluate this checkpoint",
            )
    return result


def _figures_of(path: Path) -> dict:
    result = read_object(path)
    run = result.get("run")
    if not isinstance(run, dict) or "split" not in run or "name" not in (run.get("catalogue") or {}):
        raise UserError("does not say what was evaluated", file=path, fix="run eval/evaluate.py again")
    return result


def _place(folder: Path, run: Mapping) -> Path:
    """evaluations/shop-test-direct.json; the same evaluation replaces its old file, another gets a number."""
    parts = (run["catalogue"]["name"], run["split"], run.get("ranker", {}).get("ranker", "direct"))
    stem = slug("-".join(map(str, parts)))
    number = 1
    while (path := folder / f"{stem}{f'-{number}' if number > 1 else ''}.json").exists():
        if _question(read_object(path).get("run", {})) == _question(run):
            break
        number += 1
    return path


def _question(run: Mapping) -> str:
    """What an evaluation asked: everything of `run` but who answered and with which versions."""
    ranker = {name: value for name, value in run.get("ranker", {}).items() if name not in ("checkpoint", "weights")}
    asked = {name: value for name, value in run.items() if name not in ("name", "ranker", "versions")}
    return digest(repr(sorted(asked.items())), repr(sorted(ranker.items())))


def _own_settings(report: Mapping) -> dict:
    """What recllm.json says about the training."""
    own = report.get(report.get("method") or "", {})
    settings = own.get("settings", {}) if isinstance(own, dict) else {}
    return {name: report[name] for name in ("base_model", "initialise", "seed") if name in report} | settings


def check_complete(folder: str | Path) -> None:
    """Raises UserError at the first thing that is missing or does not fit. The weights' headers are read, not they."""
    folder = Path(folder)
    table, _ = _table_and_report(folder)
    for path in sorted(folder.iterdir()):
        if path.suffix in PICKLES:
            raise UserError("is a pickle, which may run code", file=path, fix="delete it; weights are in safetensors")
        if path.name == "adapter_config.json":
            raise UserError("is of an adapter, not of a whole model", file=path, fix="merge it into the model first")
    for name in (CONFIG, "tokenizer.json", "tokenizer_config.json", ITEMS):
        if not (folder / name).exists():
            raise UserError(f"lacks {name}", file=folder, fix="make the checkpoint again")
    for name in (CARD, SETTINGS):
        if not (folder / name).exists():
            raise UserError(f"lacks {name}", file=folder, fix=f"recllm publish {folder}")
    known = set(read_table(folder / ITEMS, {"item": ITEM_COLUMNS["item"], "title": ITEM_COLUMNS["title"]})["item"])
    if unknown := [item for item in table.items if item not in known]:
        raise UserError(f"lacks the item {unknown[0]!r} of {TABLE}", file=folder / ITEMS, fix="put back the right one")
    tokens = ItemTokens.of(load_tokenizer(str(folder)), table)
    rows = _embedding_rows(folder)
    if rows is not None and rows <= max(int(ids.max()) for ids in tokens.levels):
        raise UserError(f"has {rows:,} rows, too few for the tokenizer", file=folder / WEIGHTS, fix="save it again")


def _embedding_rows(folder: Path) -> int | None:
    """From the headers of the weights, all of which have to be there and readable."""
    names = [WEIGHTS]
    if (folder / WEIGHTS).exists() and (folder / SHARDS).exists():
        raise UserError(f"holds {WEIGHTS} and weights in parts ({SHARDS})", file=folder, fix="delete the older ones")
    if (folder / SHARDS).exists():
        names = sorted(set(read_object(folder / SHARDS).get("weight_map", {}).values()))
    rows = None
    for path in (folder / name for name in names):
        if not path.exists():
            raise UserError(f"lacks {path.name}: there are no whole weights", file=folder, fix="save the model again")
        try:
            with safe_open(path, framework="pt") as weights:
                found = [name for name in weights.keys() if name.endswith("embed_tokens.weight")]  # noqa: SIM118
                rows = weights.get_slice(found[0]).get_shape()[0] if found else rows
        except (SafetensorError, OSError) as error:
            raise UserError(f"not readable ({reason(error)})", file=path, fix="save the model again") from None
    return rows


def push(
    folder: str | Path, repo: str, *, private: bool = False, revision: str | None = None, token: str | None = None
) -> str:
    """Upload a complete folder; the URL. `token`: default is that of `hf auth login` or HF_TOKEN."""
    check_complete(folder)
    return hub.upload(Path(folder), repo, private, revision, token)


def finish(
    folder: str | Path,
    *,
    settings: Mapping[str, Any] | None,
    method: str,
    papers: Sequence[str],
    results: Sequence[str | Path] = (),
    push_to_hub: bool = False,
    hub_model_id: str | None = None,
    hub_private_repo: bool | None = None,
    hub_revision: str | None = None,
    hub_token: str | None = None,
) -> str | None:
    """The end of a recipe, on its first process: complete, push if asked, and one line about what to do next."""
    folder = Path(folder)
    repo = hub_model_id or folder.resolve().name
    complete(folder, settings=settings, results=results, method=method, papers=papers, repo=hub_model_id)
    check_complete(folder)
    if not push_to_hub:
        console.print(f"{folder} is complete. Next: recllm publish {folder} --repo user/name", highlight=False)
        return None
    try:
        url = push(folder, repo, private=bool(hub_private_repo), revision=hub_revision, token=hub_token)
    except UserError as error:
        again = f"then recllm publish {folder} --repo {repo}: the checkpoint is whole"
        raise UserError(error.problem, file=error.file, fix=f"{error.fix}; {again}") from None
    console.print(f'{folder} is at {url}. Next: Recommender.from_pretrained("{repo}")', highlight=False)
    return url


def _write(path: Path, text: str) -> None:
    with write_whole(path) as partial:
        partial.write_text(text, encoding="utf-8")
