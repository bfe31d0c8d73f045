"""Table 4 of GREAM on the embedded shop: what alignment, reasoning and their order do to both ways of recommending.

    python benchmarks/gream_shop.py --output runs/gream_shop                  (about an hour and a half on 2 CPU cores)

For each seed: a shop, its index, a tiny Qwen3 from scratch; alignment only, reasoning only, both mixed by the
curriculum or uniformly, and one after the other (D→R). Every run is trained with the same settings and for the same
number of passes over its data. Direct figures are over all test users, reasoning ones over `--users` of them.
Interrupted, the same command goes on; with some of the `--seeds` or `--schedules` it does those, and prints what is
there. The baselines are measured on the same shops.
"""

import statistics
from dataclasses import dataclass, field
from pathlib import Path

from rich.table import Table
from trl import ModelConfig

from recllm import launch
from recllm.embeddings import EmbedConfig, embed
from recllm.evaluation.stage import EvaluateConfig, evaluate
from recllm.files import read_object, write_json
from recllm.mixtures.alignment import AlignmentConfig, build_alignment
from recllm.mixtures.reasoning import ReasoningConfig, build_reasoning
from recllm.preparation import PrepareConfig, prepare
from recllm.semantic_ids.build import BuildConfig, build
from recllm.teacher import TeacherConfig
from recllm.trainers.sft import RecSFTConfig
from recllm.trainers.sft_run import SFTData, run_sft
from recllm.yardstick import BaselinesConfig, run_baselines

SCHEDULES = ("direct", "reasoning", "curriculum", "uniform", "direct_then_reasoning")
METRICS = ("recall@10", "ndcg@10", "pass@1", "pass@5", "pass@10", "ranked_hit@10", "beam recall@10", "format")


@dataclass
class ShopConfig:
    output: str = field(default="runs/gream_shop", metadata={"help": "Folder for everything."})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "Of shop, model and training."})
    schedules: list[str] = field(default_factory=lambda: list(SCHEDULES), metadata={"help": "Rows of the table."})
    users: int = field(default=200, metadata={"help": "Test users of the reasoning figures."})
    epochs: int = field(default=5, metadata={"help": "Passes over the data."})
    batch: int = field(default=12, metadata={"help": "Rows a step: a tiny model wants many steps."})
    learning_rate: float = field(default=2e-3, metadata={"help": "Highest, cosine to 0."})
    split: str = field(default="test", metadata={"help": "valid, to choose settings by."})
    baselines: bool = field(default=True, metadata={"help": "popularity, item-kNN, SASRec and TIGER-style as well."})
    show: bool = field(default=False, metadata={"help": "Only print what is there."})


def shop(config: ShopConfig, seed: int) -> Path:
    data = Path(config.output) / f"shop{seed}"
    prepare(PrepareConfig(output=str(data), format="shop", shop_items=600, shop_users=2000, seed=seed, repeats="first"))
    embed(EmbedConfig(data=str(data), seed=seed))
    build(BuildConfig(data=str(data), levels=3, codes=32, seed=seed))
    tasks = ["sequence=1", "attributes_of_item=1", "items_of_category=1", "item_from_intent=1"]
    build_alignment(AlignmentConfig(data=str(data), tasks=tasks, seed=seed), TeacherConfig())
    said = {"template": "short", "max_history": 6, "columns": ["categories", "brand"]}
    build_reasoning(ReasoningConfig(data=str(data), seed=seed, **said), TeacherConfig())
    return data


def train(config: ShopConfig, data: Path, schedule: str, seed: int) -> Path:
    kinds = {"direct": (True, False), "reasoning": (False, True)}.get(schedule, (True, True))
    given = SFTData(
        str(data), *([str(data / name)] if wanted else [] for name, wanted in zip(("alignment", "reasoning"), kinds)),
        initialise="random", tiny_layers=2,
    )  # fmt: skip
    training = RecSFTConfig(
        output_dir=str(data / f"sft-{schedule}"), seed=seed, num_train_epochs=config.epochs, dropout=0.1,
        schedule=schedule if all(kinds) else "curriculum", learning_rate=config.learning_rate,
        lr_scheduler_type="cosine", warmup_steps=50, per_device_train_batch_size=config.batch, bf16=False,
        gradient_checkpointing=False, train_sampling_strategy="group_by_length", validation_users=0, report_to="none",
    )  # fmt: skip
    return run_sft(given, training, ModelConfig(model_name_or_path="tiny"))


def measure(config: ShopConfig, data: Path, schedule: str, seed: int) -> dict[str, float]:
    model = str(data / f"sft-{schedule}")
    found = {}
    if schedule != "reasoning":  # which was never shown the direct prompt
        of = evaluate(asking(config, data, model, "direct", seed))
        found |= {name: of["metrics"][name] for name in ("recall@10", "ndcg@10")}
    if schedule != "direct":
        of = evaluate(asking(config, data, model, "reasoning", seed))["reasoning"]
        found |= {name: value for name, value in of["metrics"].items() if name in METRICS}
        found["format"] = of["format_validity"]
        of = evaluate(asking(config, data, model, "reason_then_beam", seed))
        found["beam recall@10"] = of["metrics"]["recall@10"]
    return found


def asking(config: ShopConfig, data: Path, model: str, mode: str, seed: int) -> EvaluateConfig:
    users = None if mode == "direct" else config.users
    return EvaluateConfig(
        model=model, data=str(data), output=f"{model}-{config.split}-{mode}", mode=mode, split=config.split, seed=seed,
        users=users, max_new_tokens=200,
    )  # fmt: skip


def table_of(config: ShopConfig) -> Table:
    """Mean ± standard deviation over the seeds that are there."""
    table = Table("", "seeds", *METRICS, title=f"the shop, {config.split}")
    for schedule in SCHEDULES:
        files = [Path(config.output) / f"shop{seed}" / f"{schedule}-{config.split}.json" for seed in config.seeds]
        found = [read_object(file) for file in files if file.exists()]
        cells = []
        for name in METRICS:
            values = [one[name] for one in found if name in one]
            spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.3f}{spread}" if values else "–")
        table.add_row(schedule, str(len(found)), *cells)
    return table


def main(config: ShopConfig) -> None:
    for seed in [] if config.show else config.seeds:
        data = shop(config, seed)
        for schedule in config.schedules:
            train(config, data, schedule, seed)
            write_json(data / f"{schedule}-{config.split}.json", measure(config, data, schedule, seed))
        if config.baselines:
            small = ["tiger.width=128", "tiger.layers=2", "tiger.epochs=12", "tiger.lr=0.003", "tiger.batch=32"]
            small += ["tiger.dropout=0.1", "tiger.validation_users=500", "sasrec.batch=256", "sasrec.epochs=15"]
            names = ["popularity", "item-knn", "sasrec", "tiger"]
            run_baselines(
                BaselinesConfig(
                    data=str(data), output=str(data / "baselines"), baselines=names, seeds=[seed], settings=small
                )
            )  # fmt: skip
    launch.results.print(table_of(config))


if __name__ == "__main__":
    launch.run(main, ShopConfig, description=__doc__)
