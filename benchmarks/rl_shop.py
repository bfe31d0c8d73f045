"""Reinforcement learning on the embedded shop: every method from one checkpoint, with the same number of answers drawn.

    python benchmarks/rl_shop.py --output runs/rl_shop                 (about 40 minutes on 2 quiet CPU cores)

For each seed: a shop, its index, a tiny Qwen3 trained on whole sequences with the last training event of a share of
the users kept out; then on those targets GRPO, SRPO, ReCast, its two halves, and, without answers drawn, the exact
expectation and supervised training gone on with, for about as long. Learning rate and steps were chosen on validation
users of seed 0 (docs/rl.md); test users are looked at once. `budget` is the share of the answers that GRPO drew after
which a method's validation Recall@10 reached GRPO's last. Interrupted, the same command goes on.
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
from recllm.preparation import PrepareConfig, prepare
from recllm.semantic_ids.build import BuildConfig, build
from recllm.teacher import TeacherConfig
from recllm.trainers.exact import ExactConfig
from recllm.trainers.exact_run import run_exact
from recllm.trainers.grpo import GRPOSettings
from recllm.trainers.methods import GRPO_RUN, RECAST_RUN, SRPO_RUN
from recllm.trainers.recast import ReCastSettings
from recllm.trainers.rl_run import RLData, run_rl
from recllm.trainers.sft import RecSFTConfig
from recllm.trainers.sft_run import SFTData, run_sft
from recllm.trainers.srpo import SRPOSettings

HALVES = {"repair": "always", "contrast": "group"}, {"repair": "never", "contrast": "boundary"}
SAMPLED = {
    "grpo": (GRPO_RUN, GRPOSettings, {}),
    "srpo": (SRPO_RUN, SRPOSettings, {"refill_tries": 0}),  # a refilled batch draws more answers than the others may
    "recast": (RECAST_RUN, ReCastSettings, {}),
    "recast, repair alone": (RECAST_RUN, ReCastSettings, HALVES[0]),
    "recast, boundary alone": (RECAST_RUN, ReCastSettings, HALVES[1]),
    "recast, adaptive": (RECAST_RUN, ReCastSettings, {"repair": "adaptive"}),
}
METRICS = ("recall@10", "ndcg@10", "recall@50", "coverage@10")
HEALTH = ("group/all_zero", "group/trainable", "rollout/distinct", "recast/repaired", "actor/width", "kl")


@dataclass
class RLShopConfig:
    output: str = field(default="runs/rl_shop", metadata={"help": "Folder for everything."})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "Of shop, model and training."})
    methods: list[str] = field(default_factory=lambda: [*SAMPLED, "exact", "sft, gone on"], metadata={"help": "Rows."})
    share: float = field(default=0.5, metadata={"help": "Of the users whose last training event is kept for RL."})
    steps: int = field(default=200, metadata={"help": "Updates of the methods that draw answers."})
    prompts: int = field(default=32, metadata={"help": "P of an update."})
    answers: int = field(default=16, metadata={"help": "G."})
    learning_rate: float = field(default=2e-5, metadata={"help": "Of every method, constant after a warm-up."})
    kl: float = field(default=0.001, metadata={"help": "Weight of the KL term."})
    split: str = field(default="test", metadata={"help": "valid, to choose settings by."})
    show: bool = field(default=False, metadata={"help": "Only print what is there."})


def shop(config: RLShopConfig, seed: int, collisions: str = "extra-level") -> Path:
    data = Path(config.output) / f"shop{seed}"
    prepare(PrepareConfig(output=str(data), format="shop", shop_items=600, shop_users=2000, seed=seed, repeats="first"))
    embed(EmbedConfig(data=str(data), seed=seed))
    build(BuildConfig(data=str(data), levels=3, codes=32, collisions=collisions, seed=seed))
    tasks = ["sequence=1", "attributes_of_item=1", "items_of_category=1", "item_from_intent=1"]
    build_alignment(AlignmentConfig(data=str(data), tasks=tasks, seed=seed, rl_share=config.share), TeacherConfig())
    return data


def start_of(config: RLShopConfig, data: Path, seed: int) -> Path:
    """The checkpoint that every method begins with: whole sequences, as in recipes/gream/shop.yaml."""
    given = SFTData(str(data), [str(data / "alignment")], initialise="random", tiny_layers=2)
    training = RecSFTConfig(
        output_dir=str(data / "sft"), seed=seed, num_train_epochs=5, dropout=0.1, learning_rate=2e-3,
        lr_scheduler_type="cosine", warmup_steps=50, per_device_train_batch_size=12, bf16=False,
        gradient_checkpointing=False, train_sampling_strategy="group_by_length", validation_users=0, report_to="none",
    )  # fmt: skip
    return run_sft(given, training, ModelConfig(model_name_or_path="tiny"))


def train(config: RLShopConfig, data: Path, method: str, seed: int) -> Path:
    output = data / method.replace(", ", "-").replace(" ", "-")
    given, model = RLData(data=str(data)), ModelConfig(model_name_or_path=str(data / "sft"))
    common = {
        "output_dir": str(output), "seed": seed, "learning_rate": config.learning_rate, "bf16": False,
        "lr_scheduler_type": "constant_with_warmup", "warmup_steps": 10, "report_to": "none", "logging_steps": 5,
        "validation_users": 1000, "weight_decay": 0.01,
    }  # fmt: skip
    if method in SAMPLED:
        kind, settings, own = SAMPLED[method]
        drawn = {
            "num_generations": config.answers, "per_device_train_batch_size": config.answers * config.prompts,
            "temperature": 1.0, "beta": config.kl, "max_steps": config.steps, "eval_steps": max(1, config.steps // 6),
        }  # fmt: skip
        return run_rl(kind, given, settings(**common, **drawn, **own), model)
    # As many targets as GRPO had prompts; a step costs about as much as one of GRPO's here (the table shows seconds).
    weights = {"hit_weight": 1.0} if method == "exact" else {"hit_weight": 0.0, "log_weight": 1.0, "kl_weight": 0.0}
    settings = ExactConfig(
        **common, **weights, per_device_train_batch_size=config.prompts, max_steps=config.steps,
        eval_steps=max(1, config.steps // 6),
    )  # fmt: skip
    return run_exact(given, settings, model)


def measure(config: RLShopConfig, data: Path, model: Path, seed: int) -> dict:
    asked = EvaluateConfig(
        model=str(model), data=str(data), output=f"{model}-{config.split}", split=config.split, seed=seed, beams=50
    )
    result = evaluate(asked)
    found = {name: value for name, value in (result["metrics"] | result["lists"]).items() if name in METRICS}
    log = read_object(model / "recllm.json").get("rl", {}).get("log", [])
    found["validation"] = [[entry["step"], entry["eval_recall@10"]] for entry in log if "eval_recall@10" in entry]
    found["seconds"] = next((entry["train_runtime"] for entry in log if "train_runtime" in entry), None)
    for name in HEALTH:
        values = [entry[name] for entry in log if entry.get(name) is not None]
        found[name] = [values[0], values[-1]] if values else None
    return found


def budget(curve: list, goal: float, steps: int) -> float | None:
    """The share of its steps after which validation first reached the goal."""
    return next((step / steps for step, value in curve if value >= goal), None)


def table_of(config: RLShopConfig, found: dict[str, list[dict]]) -> Table:
    """Mean ± standard deviation over the seeds that are there."""
    table = Table("", "seeds", *METRICS, "budget", "seconds", title=f"the shop, {config.split}")
    for method, runs in found.items():
        cells = []
        for name in METRICS:
            values = [run[name] for run in runs]
            spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.3f}{spread}")
        shares = [
            budget(run["validation"], grpo["validation"][-1][1], config.steps)
            for run, grpo in zip(runs, found.get("grpo", []))
            if method in SAMPLED and run["validation"]
        ]
        reached = [share for share in shares if share is not None]
        cells.append(f"{statistics.mean(reached):.2f} ({len(reached)}/{len(shares)})" if reached else "–")
        seconds = [run["seconds"] for run in runs if run["seconds"]]
        cells.append(f"{statistics.mean(seconds):.0f}" if seconds else "–")
        table.add_row(method, str(len(runs)), *cells)
    return table


def health_table(found: dict[str, list[dict]]) -> Table:
    """The first and the last line of the log, mean over the seeds."""
    table = Table("", *HEALTH, title="health: at the start → at the end")
    for method, runs in found.items():
        cells = []
        for name in HEALTH:
            ends = [run[name] for run in runs if run.get(name)]
            first, last = (statistics.mean(end[which] for end in ends) for which in (0, 1)) if ends else (None, None)
            cells.append(f"{first:.3g} → {last:.3g}" if ends else "–")
        table.add_row(method, *cells)
    return table


def main(config: RLShopConfig) -> None:
    for seed in [] if config.show else config.seeds:
        data = shop(config, seed)
        start = start_of(config, data, seed)
        write_json(data / f"start-{config.split}.json", measure(config, data, start, seed))
        for method in config.methods:
            model = train(config, data, method, seed)
            write_json(data / f"{model.name}-{config.split}.json", measure(config, data, model, seed))
    found = {}
    for method in ("start", *SAMPLED, "exact", "sft, gone on"):
        name = method.replace(", ", "-").replace(" ", "-")
        files = [Path(config.output) / f"shop{seed}" / f"{name}-{config.split}.json" for seed in config.seeds]
        if runs := [read_object(file) for file in files if file.exists()]:
            found[method] = runs
    launch.results.print(table_of(config, found))
    launch.results.print(health_table({method: runs for method, runs in found.items() if method in SAMPLED}))


if __name__ == "__main__":
    launch.run(main, RLShopConfig, description=__doc__)
