"""Short tables that say what an artifact holds, for the scripts and `recllm inspect`."""

from pathlib import Path

from rich.table import Table

from recllm.catalogue import Catalogue
from recllm.files import read_json


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
