"""Short tables that say what an artifact holds, for the scripts and `recllm inspect`."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.table import Table
from rich.text import Text

from recllm.catalogue import Catalogue
from recllm.errors import UserError
from recllm.files import read_json
from recllm.reasoning import Chain
from recllm.recommender import Evidence, Recommendation
from recllm.semantic_ids import SemanticIdTable


def pairs_table(title: str, rows: dict[str, str]) -> Table:
    table = Table(title=title, title_justify="left", show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(name, str(value))
    return table


def catalogue_table(catalogue: Catalogue) -> Table:
    report = catalogue.report
    per_user = report["events_per_user"]
    dropped = report["dropped"]
    rounds = dropped["k_core_rounds"]
    rows = {
        "users / items / events": f"{report['users']:,} / {report['items']:,} / {report['interactions']:,}",
        "events per user": f"min {per_user['min']:,}, mean {per_user['mean']:.2f}, max {per_user['max']:,}",
        "behaviours": ", ".join(f"{name} {count:,}" for name, count in report["behaviours"].items()),
        "split": ", ".join(f"{name} {count:,}" for name, count in report["splits"].items())
        + f"  ({report['settings']['split']})",
        "dropped": f"{dropped['repeats']:,} repeats; {sum(r['events'] for r in rounds):,} events by the k-core "
        f"in {len(rounds)} rounds; {report['bad_lines']['count']:,} bad lines",
        "fingerprint": report["fingerprint"][:16],
    }
    if report["same_timestamp"]["events"]:
        rows["same timestamp"] = f"{report['same_timestamp']['events']:,} events; {report['same_timestamp']['rule']}"
    if report["dropped"]["unknown_items"]["items"]:
        unknown = report["dropped"]["unknown_items"]
        verb = {"drop": "dropped", "keep": "kept without text"}[unknown["policy"]]
        rows["unknown items"] = f"{unknown['items']:,} items, {unknown['events']:,} events {verb}"
    return pairs_table(f"{report['name']} ({catalogue.folder})", rows)


def semantic_ids_table(table: SemanticIdTable) -> Table:
    report = table.report
    if "levels" not in report:  # made by hand, not by the stage
        return pairs_table("semantic IDs", {"items": f"{len(table):,}", "fingerprint": table.fingerprint[:16]})
    levels = ", ".join(f"{level['level']} {level['used']}/{level['codes']}" for level in report["levels"])
    rows = {
        "distinct": f"{report['distinct_share_before']:.2%} of {len(table):,} items, "
        f"{report['distinct_share_after']:.2%} after collision handling",
        "collisions": f"{report['items_in_collisions']:,} items, largest bucket {report['largest_bucket']}; "
        f"{report['items_moved']:,} moved, {report['items_with_extra_level']:,} with an extra level",
        "codes used": levels,
    }
    if "relative_error" in report:
        rows["relative error"] = f"{report['relative_error']:.3f}"
    purity = [figure for figure in report.get("purity", []) if figure["purity"] is not None]
    if purity:
        shares = [f"{figure['purity']:.2f} with {figure['depth']}" for figure in purity]
        rows["same category"] = (
            f"share of the items with the same first codes: {', '.join(shares)}; by chance {purity[0]['shuffled']:.2f}"
        )
    rows["fingerprint"] = table.fingerprint[:16]
    return pairs_table("semantic IDs", rows)


def folder_tables(folder: Path) -> list[Table]:
    """Of everything that lies in a folder."""
    tables = []
    if (folder / "catalogue.json").exists():
        tables.append(catalogue_table(Catalogue.load(folder)))
    if (folder / "semantic_ids.json").exists():
        table = SemanticIdTable.load(folder / "semantic_ids.json")
        tables.append(semantic_ids_table(table))
        made_from = table.report.get("made_from", {}).get("catalogue")
        if (folder / "catalogue.json").exists() and made_from not in (None, Catalogue.load(folder).fingerprint):
            tables.append(pairs_table("stale", {"semantic IDs": "made before the data were prepared anew"}))
    if (folder / "recllm.json").exists():
        tables.append(model_table(folder))
    if not tables:
        raise UserError(
            "the folder holds no prepared data, semantic IDs or checkpoint", file=folder, fix="run data_prep/prepare.py"
        )
    return tables


def model_table(folder: Path) -> Table:
    report = read_json(folder / "recllm.json")
    tokens = report["tokens"]
    return pairs_table(
        f"model ({folder})",
        {
            "base": f"{report['base_model']}, {report['parameters'] / 1e6:.2f} M parameters",
            "tokens": f"{tokens['text']:,} text + {tokens['items']:,} items + {len(tokens['behaviours'])} behaviours "
            f"in {tokens['rows']:,} rows",
            "new rows": f"start from: {report['initialise']}",
            "index": report["semantic_ids"][:16],
        },
    )


def recommendations_table(title: str, rows: list[tuple[str, str, float | None]]) -> Table:
    """item, title, score (or none) of each, numbered."""
    table = Table("", "item", "title", title=title, title_justify="left", box=None, pad_edge=False)
    scored = any(score is not None for _, _, score in rows)
    if scored:
        table.add_column("log p", justify="right")
    for number, (item, name, score) in enumerate(rows, 1):
        words = Text(item), Text(name)  # a title in [brackets] is no markup
        table.add_row(f"{number}.", *words, *([f"{score:.2f}"] if scored else []))
    return table


def corrections_table(found: Sequence[Recommendation], levels: int) -> Table:
    """draft → what the model doubted → what it made of it, one line a recommendation."""
    table = Table("", "draft", title="reflection", title_justify="left", box=None, pad_edge=False)
    table.add_column("log p", justify="right")
    table.add_column("doubted")
    table.add_column("entropy", justify="right")
    table.add_column("corrected to")
    for number, one in enumerate(found, 1):
        said = one.reflection
        wrong = [] if said.first_wrong is None else [f"code {said.first_wrong} of {levels}"]
        doubted = ", ".join([*wrong, *said.doubted]) or "nothing"
        after = (
            "kept"
            if said.kept
            else "fills up"
            if said.filler
            else "the same"
            if said.draft == one.item
            else _both(one.item, one.title)
        )
        draft = Text(_both(said.draft, said.title))
        table.add_row(
            f"{number}.", draft, f"{said.score:.2f}", Text(doubted), f"{said.uncertainty:.2f}", Text(f"→ {after}")
        )
    return table


def evidence_table(evidence: Sequence[Evidence]) -> Table:
    """The events that stand before the answers, the most relevant last, as the model reads them."""
    table = Table("", "item", "behaviour", title="evidence", title_justify="left", box=None, pad_edge=False)
    table.add_column("relevance", justify="right")
    for number, one in enumerate(evidence, 1):
        relevance = "" if one.relevance is None else f"{one.relevance:.2f}"
        table.add_row(f"{number}.", Text(_both(one.item, one.title)), Text(one.behaviour), relevance)
    return table


def _both(item: str, title: str) -> str:
    return f"{title} ({item})" if title else item


def reasoning_table(reasoning: Chain | str, titles: Mapping[str, str]) -> Table:
    """A chain stage by stage; a text that is none, as it was written."""
    if isinstance(reasoning, str):
        return _stages("reasoning, not in the form that was taught", {"": reasoning})
    kept = [_both(item, titles.get(item, "")) for item in reasoning.history]
    rows = {
        "evidence": reasoning.evidence,
        "preferences": reasoning.preferences,
        "intent": reasoning.intent,
        "history kept": ", ".join(kept),
    } | ({"why": reasoning.justification} if reasoning.justification else {})
    return _stages("reasoning", rows)


def _stages(title: str, rows: Mapping[str, str]) -> Table:
    """What a model wrote in [brackets] is no markup."""
    table = Table(title=title, title_justify="left", show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, said in rows.items():
        table.add_row(name, Text(said.strip()))
    return table
