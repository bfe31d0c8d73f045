"""What the text that is embedded does to semantic IDs: collisions and purity of four embeddings of one catalogue.

    python data_prep/prepare.py --interactions $RECLLM_DATA/office2014/interactions.jsonl.gz \\
        --items $RECLLM_DATA/office2014/items.jsonl.gz --output runs/office2014
    python benchmarks/index_quality.py --data runs/office2014

Titles alone, fused text, who consumed what next to what, and both, by RQ-KMeans; both by balanced k-means. Before
collisions are resolved; mean and standard deviation over seeds. Prints the rows of docs/semantic_ids.md.
"""

import statistics
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from recllm import launch
from recllm.embeddings import EmbedConfig, embed
from recllm.files import write_json
from recllm.semantic_ids.build import BuildConfig, build
from recllm.text import TEXT_COLUMNS


@dataclass
class QualityConfig:
    data: str = field(metadata={"help": "Prepared folder."})
    title: str = field(default="title", metadata={"help": "Column that serves as the title."})
    text_columns: list[str] = field(default_factory=lambda: list(TEXT_COLUMNS), metadata={"help": "Fused columns."})
    levels: int = field(default=4, metadata={"help": "Codes of an item."})
    codes: int = field(default=256, metadata={"help": "Codes a level."})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "Of SVD and k-means."})
    output: str | None = field(default=None, metadata={"help": "JSON file for the figures."})


def variants(config: QualityConfig) -> dict[str, tuple[dict, str]]:
    """What is embedded, and how it is quantised."""
    fused = {"text": "fused", "text_columns": config.text_columns}
    both = fused | {"collaborative_weight": 0.5}
    return {
        "titles alone": ({"text": config.title, "collaborative_weight": 0.0}, "rqkmeans"),
        "fused text": (fused | {"collaborative_weight": 0.0}, "rqkmeans"),
        "collaborative": ({"encoder": "collaborative"}, "rqkmeans"),
        "fused text and collaborative": (both, "rqkmeans"),
        "the same, balanced k-means": (both, "balanced"),
    }


def figures(config: QualityConfig, settings: dict, method: str, seed: int) -> dict[str, float]:
    """One index, built in a folder of its own."""
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "embeddings.safetensors")
        embed(EmbedConfig(data=config.data, output=path, seed=seed, **settings))
        table = build(
            BuildConfig(
                data=config.data,
                embeddings=path,
                output=folder,
                levels=config.levels,
                codes=config.codes,
                seed=seed,
                method=method,
            )
        )
    report = table.report
    row = {
        "colliding": report["items_in_collisions"] / report["items"],
        "distinct": report["distinct_share_before"],
        "largest": report["largest_bucket"],
        "error": report["relative_error_before"],
    }
    for figure in report.get("purity", [])[:2]:
        row[f"same_{figure['depth']}"] = figure["purity"]
        row["chance"] = figure["shuffled"]
    return row


def main(config: QualityConfig) -> None:
    made = {
        name: [figures(config, *variant, seed) for seed in config.seeds] for name, variant in variants(config).items()
    }
    print(
        "| embedded | colliding items | distinct before | largest bucket | relative error | same label, 1 / 2 codes |"
    )
    print("| --- | --- | --- | --- | --- | --- |")
    for name, runs in made.items():
        cell = {key: spread([run[key] for run in runs if run.get(key) is not None]) for key in runs[0]}
        same = f"{cell['same_1']} / {cell['same_2']}" if "same_1" in cell else "–"
        print(f"| {name} | {cell['colliding']} | {cell['distinct']} | {cell['largest']} | {cell['error']} | {same} |")
    if "chance" in made["titles alone"][0]:
        print(f"\nSame label by chance: {made['titles alone'][0]['chance']:.3f}.")
    ratio = statistics.mean(r["colliding"] for r in made["fused text"]) / statistics.mean(
        r["colliding"] for r in made["titles alone"]
    )
    print(f"Colliding items of fused text over those of titles: {ratio:.2f}.")
    if config.output:
        write_json(config.output, made)


def spread(values: list[float]) -> str:
    digits = 0 if all(float(value).is_integer() for value in values) else 3
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.{digits}f} ± {deviation:.{digits}f}"


if __name__ == "__main__":
    launch.run(main, QualityConfig, description=__doc__)
