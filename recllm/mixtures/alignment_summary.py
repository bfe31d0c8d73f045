"""What an alignment mixture holds, for people: a row a task, with an example of it."""

from rich.table import Table
from rich.text import Text

from recllm.mixtures.store import Mixture

SHOWN = 100  # characters of a prompt or a completion


def alignment_table(mixture: Mixture) -> Table:
    table = Table(title=f"alignment ({len(mixture.examples):,} examples)", title_justify="left", box=None)
    table.add_column("task")
    table.add_column("examples", justify="right")
    table.add_column("words", justify="right")  # of a prompt → of a completion
    table.add_column("dropped")
    table.add_column("an example: prompt → completion", ratio=1)
    report, first = mixture.report, 0
    for task in [*report["tasks"], *(task for task in report["dropped"] if task not in report["tasks"])]:
        count = report["tasks"].get(task, 0)
        dropped = ", ".join(f"{number:,} {reason}" for reason, number in report["dropped"].get(task, {}).items())
        words, example = "", ""
        if count:  # the examples of a task follow one another
            row = mixture.examples[first]
            words = "{prompt:.0f} → {completion:.0f}".format(**report["words"][task])
            example = f"{_shown(row['prompt'])} → {_shown(row['completion'])}"
        table.add_row(task, f"{count:,}", words, Text(dropped), Text(example))  # no markup: titles hold brackets
        first += count
    return table


def _shown(text: str) -> str:
    """Of a long one its end, where the question is."""
    text = text.replace("\n", " ⏎ ")
    return text if len(text) <= SHOWN else "…" + text[1 - SHOWN :]
