"""A comparison as text, Markdown or LaTeX: the best of each column bold, the second underlined, the marks explained."""

import io
from collections.abc import Callable, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from recllm.evaluation.comparison import Cell, Comparison

HEADINGS = {"recall": "Recall", "ndcg": "NDCG", "mrr": "MRR", "pass": "Pass"}
LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "±": r"$\pm$",
    "–": "--",
    "*": "{*}",  # bare, the \\ of the row before would take * and [ for its own
    "[": "{[}",
} | {sign: f"\\{sign}" for sign in "&%$#_{}"}
BEST, SECOND, OTHER = range(3)


def render(comparison: Comparison, form: str, styled: bool = False) -> str:
    """The table and the line under it. `styled`: text for a terminal, with bold and underline."""
    if form == "markdown":
        return as_markdown(comparison)
    return as_latex(comparison) if form == "latex" else as_text(comparison, styled)


def as_text(comparison: Comparison, styled: bool = False) -> str:
    """As wide as it needs to be: a cut figure is worse than a long line."""
    style = {BEST: "bold", SECOND: "underline", OTHER: ""}
    table = Table(box=None, pad_edge=False)
    for head in heads(comparison):
        table.add_column(Text(head), no_wrap=True)
    body = grid(
        comparison,
        name=lambda name: Text(" ".join(name.split())),
        cell=lambda cell, place: Text.assemble((number(cell), style[place]), spread(cell) + cell.stars),
    )
    for row in body:
        table.add_row(*row)
    written = io.StringIO()
    console = Console(file=written, width=10_000, force_terminal=styled, legacy_windows=False)
    console.print(table)
    lines = [line.rstrip() for line in written.getvalue().splitlines()]
    return "\n".join([*lines, "", *notes(comparison)]) + "\n"


def as_markdown(comparison: Comparison) -> str:
    def cell(cell: Cell, place: int) -> str:
        mean = {BEST: "**{}**", SECOND: "<u>{}</u>", OTHER: "{}"}[place].format(number(cell))
        return mean + spread(cell) + cell.stars.replace("*", "\\*")

    rows = [[escape_markdown(head) for head in heads(comparison)], *grid(comparison, escape_markdown, cell)]
    rows.insert(1, ["---"] + ["---:"] * (len(rows[0]) - 1))
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([*lines, "", "<br>".join(escape_markdown(note) for note in notes(comparison))]) + "\n"


def as_latex(comparison: Comparison) -> str:
    def cell(cell: Cell, place: int) -> str:
        mean = {BEST: r"\textbf{%s}", SECOND: r"\underline{%s}", OTHER: "%s"}[place] % number(cell)
        return mean + spread(cell).replace("±", r"$\pm$") + (f"$^{{{cell.stars}}}$" if cell.stars else "")

    first, *rows = [[escape_latex(head) for head in heads(comparison)], *grid(comparison, escape_latex, cell)]
    lines = [
        r"% \usepackage{booktabs}",
        r"\begin{table}",
        r"\centering",
        rf"\begin{{tabular}}{{l{'r' * (len(first) - 1)}}}",
        r"\toprule",
        " & ".join(first) + r" \\",
        r"\midrule",
        *(" & ".join(row) + r" \\" for row in rows),
        r"\bottomrule",
        r"\end{tabular}",
        r"\par\smallskip\footnotesize " + r" \par ".join(escape_latex(note) for note in notes(comparison)),
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"


# ---- what all three say


def heads(comparison: Comparison) -> list[str]:
    settings = [name.replace("_", " ") for name in comparison.rows[0].settings]
    shown = [f"{HEADINGS[name]}@{k}" for name, k in (metric.split("@") for metric in comparison.metrics)]
    return ["", *settings, *shown]


def grid(comparison: Comparison, name: Callable, cell: Callable) -> list[list]:
    """Names and settings through `name`, figures with their place through `cell`."""
    columns = [places([row.cells[i] for row in comparison.rows]) for i in range(len(comparison.metrics))]
    return [
        [name(row.name), *(name("–" if value is None else str(value)) for value in row.settings.values())]
        + [cell(figure, column[number]) for figure, column in zip(row.cells, columns)]
        for number, row in enumerate(comparison.rows)
    ]


def places(cells: Sequence[Cell]) -> list[int]:
    """BEST, SECOND or OTHER by the figures as they are shown, so that equals are marked alike; a lone row is OTHER."""
    if len(cells) == 1:
        return [OTHER]
    ranked = sorted({number(cell) for cell in cells}, key=float, reverse=True)
    return [min(ranked.index(number(cell)), OTHER) for cell in cells]


def number(cell: Cell) -> str:
    return f"{cell.mean:.4f}"


def spread(cell: Cell) -> str:
    return "" if cell.deviation is None else f" ± {cell.deviation:.4f}"


def notes(comparison: Comparison) -> list[str]:
    """What was measured on what, and what ± and the stars mean."""
    cases = f"{comparison.users:,} users"
    if comparison.targets != comparison.users:
        cases += f" with {comparison.targets:,} targets"
    cases += " (a part of the split)" if comparison.part else ""
    cases += {"all": "", "repeat": ", items met before", "new": ", items not met before"}[comparison.cases]
    seeds = "; ".join(
        f"{row.name}: {', '.join('none' if s is None else str(s) for s in row.seeds)}" for row in comparison.rows
    )
    lines = [f"{comparison.data}, split {comparison.split}, {cases}. Seeds: {seeds}."]
    if any(len(row.seeds) > 1 for row in comparison.rows):
        lines[0] += " ± is the standard deviation over seeds."
    if len(comparison.rows) > 1:
        lines.append(
            f"* p < .05, ** p < .01: differs from {comparison.baseline}, to either side; paired sign-flip test over "
            "users on values averaged over seeds, Holm-corrected over the rows."
        )
    return lines


def escape_markdown(text: str) -> str:
    """What Markdown would take for markup, and a line break, which would end the table."""
    return "".join(f"\\{sign}" if sign in "\\|*_`[]<>~#" else sign for sign in " ".join(text.split()))


def escape_latex(text: str) -> str:
    return "".join(LATEX.get(sign, sign) for sign in " ".join(text.split()))
