"""Prepared folders and checkpoints made by hand: a test of a later stage needs no earlier one."""

import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import polars as pl

from recllm.catalogue import INTERACTION_COLUMNS, ITEM_COLUMNS, SPLIT_COLUMNS, Catalogue, fingerprint_items
from recllm.files import digest, write_json


def write_catalogue(
    folder: str | Path,
    items: Iterable[str | Mapping],
    sequences: Mapping[str, Sequence[str | tuple[str, str]]],
    split: str = "leave-one-out",
    name: str = "tiny",
) -> Catalogue:
    """Write the four files and load them.

    items      "i1" or {"item": "i1", "title": "…", "reviews": ["…"], "own_column": …}; what is absent is null
    sequences  {user: [item, …]} or {user: [(item, behaviour), …]}, oldest first; the timestamp is the position
    split      "leave-one-out": last → test, last but one → valid, for users with 3 events or more; "train": all
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"item": item} if isinstance(item, str) else dict(item) for item in items]
    own = sorted({key for row in rows for key in row} - set(ITEM_COLUMNS))
    columns = [pl.Series(key, [row.get(key) for row in rows], dtype) for key, dtype in ITEM_COLUMNS.items()]
    columns += [pl.Series(key, [row.get(key) for row in rows]) for key in own]
    table = pl.DataFrame(columns).with_columns(
        pl.col("title", "description", "brand").fill_null(""), pl.col("categories", "reviews").fill_null([])
    )
    events, splits = [], []
    for user, sequence in sequences.items():
        for position, event in enumerate(sequence):
            item, behaviour = (event, "buy") if isinstance(event, str) else event
            events.append((user, item, behaviour, float(position), position))
            left = len(sequence) - position if split == "leave-one-out" and len(sequence) >= 3 else 3
            splits.append((user, position, {1: "test", 2: "valid"}.get(left, "train")))
    interactions = pl.DataFrame(events, schema=INTERACTION_COLUMNS, orient="row")
    table.write_parquet(folder / "items.parquet")
    interactions.write_parquet(folder / "interactions.parquet")
    pl.DataFrame(splits, schema=SPLIT_COLUMNS, orient="row").write_parquet(folder / "splits.parquet")
    behaviours = interactions.group_by("behaviour").len().sort("len", "behaviour", descending=[True, False])
    write_json(
        folder / "catalogue.json",
        {
            "name": name,
            "behaviours": dict(behaviours.iter_rows()),
            "items_fingerprint": fingerprint_items(table["item"].to_list()),
            "fingerprint": digest(repr(rows), repr(events), repr(splits)),
        },
    )
    return Catalogue.load(folder)


def write_small_model(folder: str | Path, items: int = 12, users: int = 30, seed: int = 0) -> tuple[Path, Path]:
    """A catalogue of brands and categories with semantic IDs, and a tiny untrained checkpoint of it: (data, model)."""
    from recllm.models.build import BuildModelConfig, build_model
    from recllm.semantic_ids import SemanticIdTable

    data, random = Path(folder) / "data", np.random.default_rng(seed)
    names = [f"i{number}" for number in range(items)]
    rows = [
        {"item": name, "title": f"Thing {n}", "brand": "AB"[n % 2], "categories": ["x", "y"] if n % 3 > 1 else ["x"]}
        for n, name in enumerate(names)
    ]
    sequences = {f"u{user:03d}": random.permutation(names)[: random.integers(3, 8)].tolist() for user in range(users)}
    catalogue = write_catalogue(data, rows, sequences)
    codes = np.array([[number // 4, number % 4] for number in range(items)], np.int32)
    codes[-1, 1] = -1 if items % 4 == 1 else codes[-1, 1]  # one item of its own branch ends early
    SemanticIdTable(tuple(names), codes, (4 + items // 4, 4), items_fingerprint=catalogue.items_fingerprint).save(
        data / "semantic_ids.json"
    )
    model = build_model(
        BuildModelConfig(
            data=str(data), output=str(Path(folder) / "model"), tiny_width=64, tiny_layers=2, tiny_vocabulary=512
        )
    )  # fmt: skip
    return data, model


def write_mixtures(data: str | Path, law: bool = False) -> tuple[Path, Path]:
    """Alignment and reasoning data over every training position of what `write_small_model` wrote.

    law  what follows is made the item after the last one of the history, in the order of the catalogue
    """
    import dataclasses

    from datasets import Dataset

    from recllm.mixtures.store import FEATURES, save_mixture
    from recllm.prompting import PromptStyle
    from recllm.reasoning import SHORT_TEMPLATE, Chain
    from recllm.semantic_ids import SemanticIdTable

    data = Path(data)
    table, sequences = SemanticIdTable.load(data / "semantic_ids.json"), Catalogue.load(data).training_sequences()
    for kind, style in (("alignment", PromptStyle()), ("reasoning", PromptStyle(template=SHORT_TEMPLATE))):
        rows = []
        for user, items in sequences.select("user", "items").iter_rows():
            for place in range(1, len(items)):
                history, item = items[:place], items[place]
                item = table.items[(table.row_of[history[-1]] + 1) % len(table)] if law else item
                chain = Chain(f"took {history[-1]}", "thing", f"more of {item[-1]}", tuple(history), item)
                rows.append(
                    {
                        "task": "next_item" if kind == "alignment" else "reasoning",
                        "prompt": style.text(history, table, None),
                        "completion": table.text_of(item) if kind == "alignment" else chain.text(table),
                        "user": user, "item": item, "history": history,
                    }
                )  # fmt: skip
        report = {"kind": kind, "semantic_ids": table.fingerprint, "made_of": kind, "prompt": dataclasses.asdict(style)}
        save_mixture(Dataset.from_list(rows, features=FEATURES), report, data / kind)
    return data / "alignment", data / "reasoning"


def torchrun(processes: int, *command: object) -> list[str]:
    """A script and its settings on several processes; on a port that is free, since tests run side by side."""
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes]
    return list(map(str, [*start, *command]))


def succeeded(done: subprocess.CompletedProcess) -> None:
    """What failed is said before torchrun's own long words about it, which come last."""
    assert done.returncode == 0, f"{done.stderr[-12_000:-3000]}\n…\n{done.stderr[-3000:]}"
