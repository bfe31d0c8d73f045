"""What reflection data hold, for people: a row a label, of how many drafts that were found and that train."""

from rich.table import Table

from recllm.mixtures.reflection import ReflectionData


def reflection_table(data: ReflectionData) -> Table:
    report = data.report
    targets, (found, kept) = report["targets"], report["drafts"]
    title = f"reflection ({targets:,} targets, {found:,} drafts, {kept:,} of them train)"
    table = Table(title=title, title_justify="left", box=None)
    table.add_column("slot")
    table.add_column("label")
    for name in ("drafts", "share", "train", "share"):
        table.add_column(name, justify="right")
    last = len(report["labels"])
    for label, counts in report["labels"].items():
        said = "correct" if int(label) == last else f"wrong from level {label}"
        table.add_row("loc" if label == "1" else "", said, *_figures(counts, found, kept))
    for name, labels in report["attribute_labels"].items():
        for place, (label, counts) in enumerate(labels.items()):
            table.add_row(name if not place else "", label, *_figures(counts, found, kept))
    return table


def reflection_notes(data: ReflectionData) -> list[str]:
    """What the table does not say, a line each."""
    report = data.report
    share = report["with_target"] / report["targets"]
    missing = ", ".join(f"{name} of {count:,} items" for name, count in report["missing"].items() if count)
    return [
        f"the target is among its own drafts for {report['with_target']:,} targets ({share:.1%})",
        f"not known: {missing or 'nothing'}",
    ]


def _figures(counts: list[int], found: int, kept: int) -> list[str]:
    shares = [f"{count / of:.1%}" if of else "-" for count, of in zip(counts, (found, kept))]
    return [text for count, share in zip(counts, shares) for text in (f"{count:,}", share)]
