"""RCLRec on the embedded shop's whole funnel, or on a prepared folder: the paper's Tables 1 and 2 and its Figure 3.

    python benchmarks/rclrec_shop.py --output runs/rclrec_shop                      (about half an hour on 2 CPU cores)
    python benchmarks/rclrec_shop.py --output runs/rclrec_shop --sweep 1 2 4 8      (K, after the rows)
    python benchmarks/rclrec_shop.py --output runs/rocket --data runs/rocket/data --seeds 0

For each seed: a shop whose users see, put into the cart, pay and come back; a share of the users' last conversions held
out; stage 1, a tiny Qwen3 on the events of every behaviour; stage 2 on conversions alone, with RCLRec's prefix and with
each part of it left out; the baselines under the same protocol. Targets that the user had met before and new ones stand
apart. The shop knows which earlier events led to a purchase: `precision` is the share of the events in a prefix that
are among them, over test targets that have any. --data takes a folder of `prepare.py --split conversion` with semantic
IDs instead of the shop. Settings were not searched (docs/rclrec.md). Interrupted, the same command goes on.
"""

import statistics
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.table import Table
from trl import ModelConfig

from recllm import launch
from recllm.catalogue import Catalogue
from recllm.checkpoint import Checkpoint
from recllm.converter import Converter
from recllm.embeddings import EmbedConfig, embed
from recllm.evaluation.stage import EvaluateConfig, evaluate
from recllm.files import read_object, write_json
from recllm.mixtures.conversion_cases import cases, histories_of
from recllm.mixtures.conversions import ConversionsConfig, build_conversions
from recllm.preparation import PrepareConfig, prepare
from recllm.semantic_ids.build import BuildConfig, build
from recllm.trainers.rclrec import RCLRecConfig
from recllm.trainers.rclrec_run import RCLRecData, run_rclrec
from recllm.trainers.sft import RecSFTConfig
from recllm.trainers.sft_run import SFTData, run_sft
from recllm.yardstick import BaselinesConfig, run_baselines

BASELINES = {"popularity": False, "repeat-last": False, "item-knn": False, "sasrec": True}  # has a seed of its own?
STAGE_1, PLAIN, FULL = "TIGER-style, stage 1", "stage 2, no module", "RCLRec"
STAGE_2 = {
    PLAIN: {"selection": "none"},
    "most recent K": {"selection": "recent"},
    "random K": {"selection": "random"},
    "RCLRec w/o quality loss": {"quality_weight": 0.0},
    FULL: {},
}
ROWS = (*BASELINES, STAGE_1, *STAGE_2)
METRICS = ("recall@5", "recall@10", "ndcg@5", "ndcg@10")


@dataclass
class RCLRecShopConfig:
    output: str = field(default="runs/rclrec_shop", metadata={"help": "Folder for everything."})
    data: str | None = field(default=None, metadata={"help": "Prepared folder in place of a shop of each seed."})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "Of shop, model and training."})
    users: int = field(default=4000, metadata={"help": "Of the shop."})
    held_out_share: float = field(default=0.3, metadata={"help": "Of the shop's users, whose last conversion is kept."})
    stage_1_epochs: float = field(default=10, metadata={"help": "Over all events."})
    epochs: float = field(default=8, metadata={"help": "Of stage 2 over conversions."})
    batch: int = field(default=32, metadata={"help": "Conversions a step."})
    learning_rate: float = field(default=5e-4, metadata={"help": "Of stage 2."})
    k: int = field(default=3, metadata={"help": "K, events of a prefix."})
    sweep: list[int] = field(default_factory=list, metadata={"help": "Values of K to train RCLRec with as well."})
    split: str = field(default="test", metadata={"help": "valid, to choose settings by."})
    show: bool = field(default=False, metadata={"help": "Only print what is there."})


def shop(config: RCLRecShopConfig, seed: int) -> Path:
    data = Path(config.output) / f"shop{seed}"
    prepare(
        PrepareConfig(
            output=str(data), format="shop", shop_items=600, shop_users=config.users, seed=seed, user_core=1,
            item_core=1, split="conversion", held_out_share=config.held_out_share,
        )
    )  # fmt: skip
    embed(EmbedConfig(data=str(data), seed=seed))
    build(BuildConfig(data=str(data), levels=3, codes=32, seed=seed))
    return data


def stage_1(config: RCLRecShopConfig, data: Path, folder: Path, seed: int) -> Path:
    events = build_conversions(ConversionsConfig(data=str(data), stage="all", windows="sequence"))
    build_conversions(ConversionsConfig(data=str(data), stage="target"))
    training = RecSFTConfig(
        output_dir=str(folder / "stage1"), seed=seed, num_train_epochs=config.stage_1_epochs, dropout=0.1,
        learning_rate=2e-3, lr_scheduler_type="cosine", warmup_steps=50, per_device_train_batch_size=32, bf16=False,
        gradient_checkpointing=False, train_sampling_strategy="group_by_length", validation_users=0, report_to="none",
        max_length=1024,
    )  # fmt: skip
    assert events.examples is not None
    given = SFTData(str(data), [str(data / "conversions_all")], initialise="random", tiny_layers=2)
    return run_sft(given, training, ModelConfig(model_name_or_path="tiny"))


def stage_2(config: RCLRecShopConfig, data: Path, folder: Path, name: str, seed: int, **settings) -> Path:
    training = RCLRecConfig(
        output_dir=str(folder / slug(name)), seed=seed, num_train_epochs=config.epochs, bf16=False, report_to="none",
        per_device_train_batch_size=config.batch, learning_rate=config.learning_rate, lr_scheduler_type="cosine",
        warmup_steps=20, validation_users=0, logging_steps=20, **{"k": config.k, **settings},
    )  # fmt: skip
    return run_rclrec(RCLRecData(data=str(data)), training, ModelConfig(model_name_or_path=str(folder / "stage1")))


def measure(config: RCLRecShopConfig, data: Path, model: Path, seed: int) -> dict:
    asked = EvaluateConfig(
        model=str(model), data=str(data), output=f"{model}-{config.split}", split=config.split, seed=seed, beams=20,
        mode="conversion", k=[5, 10],
    )  # fmt: skip
    return figures_of(evaluate(asked)) | precision(config, data, model)


def figures_of(result: dict) -> dict:
    """All, and repeats and new ones apart."""
    found = {name: result["metrics"][name] for name in METRICS} | {"targets": result["targets"]}
    for kind in ("repeat", "new"):
        part = result["conversion"][kind]
        found |= {f"{kind} {name}": part["metrics"][name] for name in METRICS if part["targets"]}
        found[f"{kind} targets"] = part["targets"]
    return found


def precision(config: RCLRecShopConfig, data: Path, model: Path) -> dict:
    """Of the events in prefixes, the share that led to the purchase by the shop's own account."""
    truth = data / "shop" / "truth.json"
    checkpoint = Checkpoint.load(model, "cpu")
    if not truth.exists() or "conversion" not in checkpoint.report:
        return {}
    led = {(one["user"], one["position"]): set(one["evidence"]) for one in read_object(truth)["decisions"]}
    converter = Converter.of(checkpoint)
    asked = cases(Catalogue.load(data), config.split)
    histories = histories_of(asked)
    chosen = converter.beams(histories, 1, asked["user"].to_list()).events.tolist()
    shares, chance = [], []
    for user, position, history, events in zip(asked["user"], asked["position"], histories, chosen):
        shown = len(converter.shown(history))
        led_here = {place - (position - shown) for place in led.get((user, position), ())}  # places in what is shown
        led_here = {place for place in led_here if place >= 0}
        events = [event for event in events if event >= 0]
        if led_here and events:
            shares.append(len(led_here.intersection(events)) / len(events))
            chance.append(len(led_here) / shown)
    if not shares:
        return {}
    return {"precision": statistics.mean(shares), "by chance": statistics.mean(chance), "decisions": len(shares)}


def baselines(config: RCLRecShopConfig, data: Path, folder: Path, seed: int) -> None:
    asked = BaselinesConfig(
        data=str(data), output=str(folder / "baselines"), split=config.split, seeds=[seed], k=[5, 10], length=20,
        protocol="conversion", baselines=list(BASELINES),
    )  # fmt: skip
    for name, done in zip(BASELINES, run_baselines(asked)):
        write_json(folder / f"{slug(name)}-{config.split}.json", figures_of(read_object(done / "metrics.json")))


def slug(name: str) -> str:
    return name.replace(", ", "-").replace(" ", "-").replace("/", "")


def table_of(title: str, columns: list[str], found: dict[str, list[dict]]) -> Table:
    """Mean ± standard deviation over the seeds that are there."""
    table = Table("", "seeds", *columns, title=title)
    for row, runs in found.items():
        cells = []
        for name in columns:
            values = [run[name] for run in runs if name in run]
            spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.3f}{spread}" if values else "–")
        table.add_row(row, str(len(runs)), *cells)
    return table


def main(config: RCLRecShopConfig) -> None:
    torch.manual_seed(0)
    swept = {f"RCLRec, K = {k}": {"k": k} for k in config.sweep}
    for seed in [] if config.show else config.seeds:
        data = Path(config.data) if config.data else shop(config, seed)
        folder = data if config.data is None else Path(config.output) / f"seed{seed}"
        baselines(config, data, folder, seed)
        start = stage_1(config, data, folder, seed)
        write_json(folder / f"{slug(STAGE_1)}-{config.split}.json", measure(config, data, start, seed))
        for name, settings in (STAGE_2 | swept).items():
            model = stage_2(config, data, folder, name, seed, **settings)
            write_json(folder / f"{slug(name)}-{config.split}.json", measure(config, data, model, seed))
    found = {}
    for name in (*ROWS, *swept):
        places = [Path(config.output) / (f"seed{seed}" if config.data else f"shop{seed}") for seed in config.seeds]
        files = [place / f"{slug(name)}-{config.split}.json" for place in places]
        if runs := [read_object(file) for file in files if file.exists()]:
            found[name] = runs
    for kind in ("", "repeat ", "new "):
        count = statistics.mean(run[f"{kind}targets"] for run in next(iter(found.values())))
        title = f"{kind or 'all '}conversions, {config.split}, {count:.0f} targets a seed"
        launch.results.print(table_of(title, [kind + name for name in METRICS], found))
    chosen = {name: runs for name, runs in found.items() if "precision" in runs[0]}
    if chosen:
        launch.results.print(table_of("events in the prefix that led to it", ["precision", "by chance"], chosen))


if __name__ == "__main__":
    launch.run(main, RCLRecShopConfig, description=__doc__)
