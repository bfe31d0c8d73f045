"""The main job on the embedded shop: a raw log and a catalogue go in, models that recommend and a table come out.

It runs the stages that a user's own data goes through, with the settings of a small shop, and prints the figures that
say whether each stage did its work.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from rich.table import Table
from trl import ModelConfig

from recllm.catalogue import Catalogue
from recllm.embeddings import EmbedConfig, embed
from recllm.errors import UserError
from recllm.evaluation.comparison import CompareConfig, compare
from recllm.evaluation.comparison_tables import render
from recllm.evaluation.stage import EvaluateConfig, evaluate
from recllm.files import read_json
from recllm.launch import console, results
from recllm.mixtures.alignment import AlignmentConfig, build_alignment
from recllm.mixtures.reasoning import ReasoningConfig, build_reasoning
from recllm.models.build import TINY, BuildModelConfig, build_model
from recllm.preparation import PrepareConfig, prepare
from recllm.recommender import Recommender
from recllm.semantic_ids.build import BuildConfig, build
from recllm.summary import (
    catalogue_table,
    model_table,
    pairs_table,
    reasoning_table,
    recommendations_table,
    semantic_ids_table,
)
from recllm.teacher import TeacherConfig
from recllm.trainers.methods import SRPO_RUN
from recllm.trainers.rl_run import RLData, run_rl
from recllm.trainers.sft import RecSFTConfig
from recllm.trainers.sft_run import SFTData, run_sft
from recllm.trainers.srpo import SRPOSettings
from recllm.yardstick import BaselinesConfig, run_baselines

# Of a shop of hundreds of items; the defaults are for tens of thousands of users.
SMALL = [
    *("tiger.width=128", "tiger.layers=2", "tiger.epochs=12", "tiger.lr=0.003", "tiger.batch=32", "tiger.dropout=0.1"),
    *("tiger.validation_users=500", "sasrec.batch=256", "sasrec.epochs=15"),
]
# The settings of recipes/gream/shop.yaml. Whole sequences in one row, so that a tiny model sees them often enough.
TASKS = ["sequence=1", "attributes_of_item=1", "items_of_category=1", "item_from_intent=1"]
CHAINS = {"template": "short", "max_history": 6, "columns": ["categories", "brand"]}  # short: written token by token
REASONED = 200  # test users of the reasoning figures, ten chains each
SFT = {
    "num_train_epochs": 5, "per_device_train_batch_size": 12, "learning_rate": 2e-3, "lr_scheduler_type": "cosine",
    "warmup_steps": 50, "dropout": 0.1, "train_sampling_strategy": "group_by_length", "bf16": False,
    "gradient_checkpointing": False, "validation_users": 0, "report_to": "none",
}  # fmt: skip
# Few and careful steps: the shop is small, and what sampled answers teach it is soon learnt (docs/rl.md).
KEPT_OUT = 0.2
RL = {
    "num_generations": 16, "max_steps": 60, "learning_rate": 2e-5,
    "lr_scheduler_type": "constant_with_warmup", "warmup_steps": 10, "temperature": 1.0, "refill_tries": 1,
    "bf16": False, "validation_users": 0, "report_to": "none",
}  # fmt: skip
NEXT = """Next, with your own log and catalogue (docs/data_formats.md lists what can be read):
  python data_prep/prepare.py --interactions log.jsonl.gz --items items.jsonl.gz --output runs/mine
  python data_prep/embed_items.py --data runs/mine
  python data_prep/build_semantic_ids.py --data runs/mine
  python eval/baselines.py --data runs/mine --output runs/mine/baselines
  python data_prep/build_alignment.py --data runs/mine --rl_share 0.2
  python data_prep/build_reasoning.py --data runs/mine --rl_share 0.2
  python recipes/sft.py --data runs/mine --alignment runs/mine/alignment --reasoning runs/mine/reasoning \\
      --model_name_or_path Qwen/Qwen3-0.6B --output_dir runs/mine/sft
  python recipes/srpo.py --data runs/mine --model_name_or_path runs/mine/sft --output_dir runs/mine/srpo"""


@dataclass
class DemoConfig:
    """Settings of `recllm demo`."""

    output: str = field(default="runs/demo", metadata={"help": "Folder for the shop, its index and the model."})
    items: int = field(default=600, metadata={"help": "Items of the shop."})
    users: int = field(default=2000, metadata={"help": "Customers of the shop."})
    seed: int = field(default=0, metadata={"help": "Of everything."})
    overwrite: bool = field(default=False, metadata={"help": "Replace a demo of another size or seed."})

    def __post_init__(self):
        if self.items < 60 or self.users < 50:
            raise UserError(
                f"a shop of {self.items} items and {self.users} users is too small to show anything",
                fix="--items 60 and --users 50 or more",
            )


def demo(config: DemoConfig) -> None:
    """Run the stages on the shop, and print what each made."""
    data, model = Path(config.output), Path(config.output) / "model"
    with stage("1/9  prepare: the shop's log and catalogue, first events of each user and item, leave-one-out"):
        catalogue = prepare(
            PrepareConfig(
                output=str(data),
                format="shop",
                shop_items=config.items,
                shop_users=config.users,
                seed=config.seed,
                repeats="first",
                overwrite=config.overwrite,
            )
        )
    with stage("2/9  embed: TF-IDF of the items' text beside who bought what next to what"):
        embed(EmbedConfig(data=str(data), seed=config.seed, overwrite=config.overwrite))
    with stage("3/9  semantic IDs: residual k-means, collisions resolved"):
        table = build(BuildConfig(data=str(data), levels=3, codes=32, seed=config.seed, overwrite=config.overwrite))
    with stage("4/9  model: a tiny Qwen3 whose vocabulary holds every item"):
        build_model(BuildModelConfig(data=str(data), output=str(model), seed=config.seed, overwrite=config.overwrite))

    with stage("5/9  baselines: popularity, item-kNN, SASRec and a small generative model, trained and measured"):
        names = ["popularity", "item-knn", "sasrec", "tiger"]
        baselines = BaselinesConfig(
            data=str(data), output=str(data / "baselines"), baselines=names, seeds=[config.seed], settings=SMALL,
            overwrite=config.overwrite,
        )  # fmt: skip
        runs = run_baselines(baselines)

    with stage("6/9  mixtures: alignment of indices, words and users; chains of reasoning by the offline writer"):
        write_mixtures(config)
    with stage("7/9  supervised fine-tuning: the tiny Qwen3 learns to recommend, ever more often by reasoning"):
        run_sft(*sft_settings(config))
    with stage("8/9  reinforcement learning: SRPO on targets that were kept out of supervised training"):
        sharpened = run_rl(SRPO_RUN, *srpo_settings(config))
    with stage("9/9  evaluation: direct over all users, reasoning over some of them"):
        for name in ("sft", "srpo"):
            runs.append(data / f"{name}-direct")
            evaluate(asking(config, name, "direct"))
        reasoned = evaluate(asking(config, "srpo", "reasoning"))

    for made in (catalogue_table(catalogue), semantic_ids_table(table), model_table(model), floor_table(data)):
        results.print()
        results.print(made)
    compared = compare(CompareConfig(runs=list(map(str, runs)), metrics=["recall@10", "ndcg@10", "recall@20"]))
    print("\n" + render(compared, "text", styled=results.is_terminal), end="")
    results.print()
    results.print(samples_table(reasoned))
    for made in recommendation(catalogue, sharpened):
        results.print()
        results.print(made)
    results.print(f"\n{item_line(catalogue, table)}\n\n{NEXT}", highlight=False, markup=False)


@contextmanager
def stage(what: str):
    console.print(f"[bold]{what}[/bold]", highlight=False)
    start = time.perf_counter()
    yield
    console.print(f"     {time.perf_counter() - start:.1f} s", highlight=False)


def floor_table(data: Path) -> Table:
    """What any model can reach on this shop, from the generator itself."""
    floor = read_json(data / "shop" / "truth.json")["floor"]
    table = Table(title="the best any model can do here", title_justify="left", box=None, pad_edge=False)
    for column in ("", "Recall@10", "NDCG@10"):
        table.add_column(column, justify="right" if column else "left")
    for name, what in (("oracle", "knowing each customer's taste"), ("observer", "knowing the history alone")):
        table.add_row(what, f"{floor[f'{name}_recall']:.3f}", f"{floor[f'{name}_ndcg']:.3f}")
    return table


def write_mixtures(config: DemoConfig) -> None:
    common = {"data": config.output, "seed": config.seed, "overwrite": config.overwrite, "rl_share": KEPT_OUT}
    build_alignment(AlignmentConfig(**common, tasks=TASKS), TeacherConfig())
    build_reasoning(ReasoningConfig(**common, **CHAINS), TeacherConfig())


def sft_settings(config: DemoConfig) -> tuple[SFTData, RecSFTConfig, ModelConfig]:
    data = Path(config.output)
    training = RecSFTConfig(output_dir=str(data / "sft"), seed=config.seed, overwrite=config.overwrite, **SFT)
    given = SFTData(
        str(data), [str(data / "alignment")], [str(data / "reasoning")], initialise="random", tiny_layers=2
    )  # fmt: skip
    return given, training, ModelConfig(model_name_or_path=TINY)


def srpo_settings(config: DemoConfig) -> tuple[RLData, SRPOSettings, ModelConfig]:
    data = Path(config.output)
    prompts = max(1, min(32, config.users // 60))  # of a step; fewer than are kept out, however small the shop
    training = SRPOSettings(
        output_dir=str(data / "srpo"), seed=config.seed, overwrite=config.overwrite,
        per_device_train_batch_size=prompts * RL["num_generations"], **RL,
    )  # fmt: skip
    return RLData(data=str(data)), training, ModelConfig(model_name_or_path=str(data / "sft"))


def asking(config: DemoConfig, model: str, mode: str) -> EvaluateConfig:
    return EvaluateConfig(
        model=f"{config.output}/{model}", data=config.output, output=f"{config.output}/{model}-{mode}", mode=mode,
        name=f"{model}, {mode}", users=None if mode == "direct" else REASONED,
        max_new_tokens=200, seed=config.seed, overwrite=config.overwrite,
    )  # fmt: skip


def samples_table(result: dict) -> Table:
    """Of reasoned answers, ten a user."""
    found = result["reasoning"]
    rows = {name: f"{value:.3f}" for name, value in found["metrics"].items()}
    rows |= {"chains in the form taught": f"{found['format_validity']:.1%}", "tokens": f"{found['tokens_mean']:.0f}"}
    return pairs_table(f"the same model by reasoning, {result['users']:,} users", rows)


def recommendation(catalogue: Catalogue, model: Path) -> Iterator[Table]:
    """What the model recommends to the first customer of the test split, and how it reasons."""
    recommender = Recommender.from_pretrained(model)
    history = catalogue.targets("test")["history"][0].to_list()[-5:]
    title = dict(catalogue.items.select("item", "title").iter_rows())
    found = recommender.recommend(history, k=5, mode="reason", exclude="history")
    yield recommendations_table("a customer who took", [(item, title[item], None) for item in history])
    yield reasoning_table(found[0].reasoning, title)
    yield recommendations_table("is recommended", [(one.item, one.title, one.score) for one in found])


def item_line(catalogue, table) -> str:
    """One item, in words and in tokens."""
    item, title = catalogue.items.select("item", "title").row(0)
    return f"{item} “{title}” is now {table.text_of(item)}"
