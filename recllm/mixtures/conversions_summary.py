"""What conversion data hold, for people: how many targets, and how many of them the user had met before."""

from rich.table import Table
from rich.text import Text

from recllm.mixtures.alignment_summary import SHOWN
from recllm.mixtures.conversions import Conversions


def conversions_table(mixture: Conversions) -> Table:
    report, row = mixture.report, mixture.examples[0]
    title = f"conversions ({mixture.target_behaviour}), stage {report['stage']}: {len(mixture.examples):,} examples"
    table = Table(title=title, title_justify="left", box=None, show_header=False)
    table.add_column()
    table.add_column(ratio=1)
    users = report["users"]
    lines = {"users": "{all:,}, {with_conversions:,} with conversions, {held_out:,} held out".format(**users)}
    lines["targets"] = _listed(report["targets"])
    for split, counts in report["conversions"].items():
        met = f"; met before {counts['repeat']:,} ({_listed(counts['repeat_by'])})" if counts["repeat"] else ""
        met += (
            f", {counts['repeat_not_shown']:,} of them too long ago to be shown" if counts["repeat_not_shown"] else ""
        )
        lines[split] = f"{counts['targets']:,} conversions, {counts['new']:,} of new items{met}"
    lines["dropped"] = _listed({reason.replace("_", " "): n for reason, n in report["dropped"].items()}) or "none"
    lines["an example"] = f"{_end(row['prompt'])} → {row['completion'][:SHOWN]}"
    for name, line in lines.items():
        table.add_row(name, Text(line))  # no markup: tokens hold brackets
    return table


def _listed(counts: dict[str, int]) -> str:
    return ", ".join(f"{count:,} {name}" for name, count in counts.items())


def _end(text: str) -> str:
    """Of a long one its end, where the question is."""
    return text if len(text) <= SHOWN else "…" + text[1 - SHOWN :]
