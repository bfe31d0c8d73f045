"""RCLRec on the embedded shop's whole funnel, or on a prepared folder: the paper's Tables 1 and 2 and its Figure 3.

    python benchmarks/rclrec_shop.py --output runs/rclrec_shop                      (an hour and a half on one core)
    python benchmarks/rclrec_shop.py --output runs/rclrec_shop --sweep 1 2 4 8      (K, after the rows)
    python benchmarks/rclrec_shop.py --output runs/rocket --data runs/rocket/data --seeds 0

For each seed: a shop whose users see, put into the cart, pay and come back; a share of the users' last conversions held
out; stage 1, a tiny Qwen3 on the events of every behaviour; stage 2 on conversions alone, with RCLRec's prefix and with
each part of it left out; the baselines under the same protocol. Targets that the user had met before and new ones stand
apart. The shop knows which earlier events led to a purchase: `precision` is the share of the events in a prefix that
are among them, over test targets that have any. --data takes a folder of `prepare.py --split conversion` with semantic
IDs instead of the shop. Every row of stage 2 keeps its best epoch on validation conversions; users have no embedding,
since hardly a user whose last conversion is held out has another one. What was tried is in docs/rclrec.md.
Interrupted, the same command goes on.
"""

import statistics
from dataclasses import dataclass, field
from pathlib import Path

import polars as pl
import torch
from rich.table import Table
from trl import ModelConfig

from recllm import launch
from recllm.catalogue import Catalogue
from recllm.checkpoint import Checkpoint
from recllm.converter import Converter
from recllm.embeddings import EmbedConfig, embed
from recllm.errors import UserError
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
    "RCLRec, random query": {"query_start": "random"},
    FULL: {},
}
ROWS = (*BASELINES, STAGE_1, *STAGE_2)
SIMPLE = ("last K events", "last K in the cart", "ceiling")
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

    def place(self, seed: int) -> Path:
        """Where everything of a seed lies."""
        return Path(self.output) / (f"seed{seed}" if self.data else f"shop{seed}")


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
        warmup_steps=20, validation_users=500, load_best_model_at_end=True, save_total_limit=1, logging_steps=20,
        user_width=0, dropout=0.1, **{"k": config.k, **settings},
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
    checkpoint = Checkpoint.load(model, "cpu")
    if not (data / "shop" / "truth.json").exists() or "conversion" not in checkpoint.report:
        return {}
    converter, asked = Converter.of(checkpoint), cases(Catalogue.load(data), config.split)
    if converter.settings.selection == "none":
        return {}
    histories = histories_of(asked)
    chosen = converter.beams(histories, 1, asked["user"].to_list()).events.tolist()
    return precision_of(data, asked, converter.writer.style.max_history, chosen)


def simple_choices(config: RCLRecShopConfig, data: Path) -> dict[str, dict]:
    """What choices that learn nothing reach: the last K events, the last K in the cart, any K that led to it."""
    asked, style = cases(Catalogue.load(data), config.split), ConversionsConfig(data=str(data)).style
    led, found = led_to(data, asked, style.max_history), {}
    kinds = [behaviours[-style.max_history :] for behaviours in asked["history_behaviours"].to_list()]
    choices = {
        "last K events": [list(range(len(some)))[-config.k :] for some in kinds],
        "last K in the cart": [
            [place for place, kind in enumerate(some) if kind == "cart"][-config.k :] for some in kinds
        ],
        "ceiling": [sorted(some)[-config.k :] for some in led],
    }
    for name, chosen in choices.items():
        chosen = [(some + [-1] * config.k)[: config.k] for some in chosen]
        if name == "ceiling":  # a prefix of K events may have to hold others too
            chosen = [
                some if -1 not in some else [one if one >= 0 else len(kind) + 1 for one in some]
                for some, kind in zip(chosen, kinds)
            ]
        found[name] = precision_of(data, asked, style.max_history, chosen)
    return found


def led_to(data: Path, asked: pl.DataFrame, max_history: int) -> list[set[int]]:
    """Of each case the places, in the history as a prompt shows it, of the events that led to the purchase."""
    decisions = read_object(data / "shop" / "truth.json")["decisions"]
    truth = {(one["user"], one["position"]): one["evidence"] for one in decisions}
    found = []
    for user, position in asked.select("user", "position").iter_rows():
        first = max(0, position - max_history)  # the oldest event that is shown
        found.append({place - first for place in truth.get((user, position), ()) if place >= first})
    return found


def precision_of(data: Path, asked: pl.DataFrame, max_history: int, chosen: list[list[int]]) -> dict:
    """Mean over cases that some shown event led to, and that have a prefix. `chosen`: places, -1 for none."""
    shares = []
    for led, events in zip(led_to(data, asked, max_history), chosen):
        events = [event for event in events if event >= 0]
        if led and events:
            shares.append(len(led.intersection(events)) / len(events))
    return {"precision": statistics.mean(shares), "decisions": len(shares)} if shares else {}


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


def paired(found: dict[str, list[dict]]) -> None:
    """Seeds are different shops: what a row has over another in the same shop says more than two means."""
    rivals = [name for name in STAGE_2 if name != FULL and name in found]
    if FULL not in found or not rivals:
        return
    table = Table("RCLRec less", *METRICS[1::2], title="seed by seed")
    for name in rivals:
        pairs = list(zip(found[FULL], found[name]))
        table.add_row(
            name,
            *(" ".join(f"{ours[metric] - theirs[metric]:+.3f}" for ours, theirs in pairs) for metric in METRICS[1::2]),
        )
    launch.results.print(table)


def main(config: RCLRecShopConfig) -> None:
    torch.manual_seed(0)
    swept = {f"RCLRec, K = {k}": {"k": k} for k in config.sweep}
    for seed in [] if config.show else config.seeds:
        data = Path(config.data) if config.data else shop(config, seed)
        folder = config.place(seed)
        baselines(config, data, folder, seed)
        if (data / "shop" / "truth.json").exists():
            for name, found in simple_choices(config, data).items():
                write_json(folder / f"{slug(name)}-{config.split}.json", found)
        start = stage_1(config, data, folder, seed)
        write_json(folder / f"{slug(STAGE_1)}-{config.split}.json", measure(config, data, start, seed))
        for name, settings in (STAGE_2 | swept).items():
            model = stage_2(config, data, folder, name, seed, **settings)
            write_json(folder / f"{slug(name)}-{config.split}.json", measure(config, data, model, seed))
    found = {}
    for name in (*ROWS, *swept):
        files = [config.place(seed) / f"{slug(name)}-{config.split}.json" for seed in config.seeds]
        if runs := [read_object(file) for file in files if file.exists()]:
            found[name] = runs
    if not found:
        raise UserError("nothing is measured yet", file=config.output, fix="run it without --show")
    for kind in ("", "repeat ", "new "):
        count = statistics.mean(run[f"{kind}targets"] for run in next(iter(found.values())))
        title = f"{kind or 'all '}conversions, {config.split}, {count:.0f} targets a seed"
        launch.results.print(table_of(title, [kind + name for name in METRICS], found))
    chosen = {name: runs for name, runs in found.items() if "precision" in runs[0]}
    for name in SIMPLE:
        files = [config.place(seed) / f"{slug(name)}-{config.split}.json" for seed in config.seeds]
        chosen |= {name: [read_object(file) for file in files if file.exists()]}
    chosen = {name: runs for name, runs in chosen.items() if runs}
    if chosen:
        launch.results.print(
            table_of("share of the events in a prefix that led to the purchase", ["precision", "decisions"], chosen)
        )
    paired(found)


if __name__ == "__main__":
    launch.run(main, RCLRecShopConfig, description=__doc__)
