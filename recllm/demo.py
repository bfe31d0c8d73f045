"""The main job on the embedded shop: a raw log and a catalogue go in, a model that holds every item comes out.

It runs the stages that a user's own data goes through, with the settings of a small shop, and prints the figures that
say whether each stage did its work.
"""

import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from rich.table import Table

from recllm.embeddings import EmbedConfig, embed
from recllm.errors import UserError
from recllm.files import read_json
from recllm.launch import console, results
from recllm.models.build import BuildModelConfig, build_model
from recllm.preparation import PrepareConfig, prepare
from recllm.semantic_ids.build import BuildConfig, build
from recllm.summary import catalogue_table, model_table, semantic_ids_table

NEXT = """Next, with your own log and catalogue (docs/data_formats.md lists what can be read):
  python data_prep/prepare.py --interactions log.jsonl.gz --items items.jsonl.gz --output runs/mine
  python data_prep/embed_items.py --data runs/mine
  python data_prep/build_semantic_ids.py --data runs/mine
  python data_prep/build_model.py --data runs/mine --model Qwen/Qwen3-0.6B --output runs/mine/model"""


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
    with stage("1/4  prepare: the shop's log and catalogue, first events of each user and item, leave-one-out"):
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
    with stage("2/4  embed: TF-IDF of the items' text beside who bought what next to what"):
        embed(EmbedConfig(data=str(data), seed=config.seed, overwrite=config.overwrite))
    with stage("3/4  semantic IDs: residual k-means, collisions resolved"):
        table = build(BuildConfig(data=str(data), levels=3, codes=32, seed=config.seed, overwrite=config.overwrite))
    with stage("4/4  model: a tiny Qwen3 whose vocabulary holds every item"):
        build_model(BuildModelConfig(data=str(data), output=str(model), seed=config.seed, overwrite=config.overwrite))

    for made in (catalogue_table(catalogue), floor_table(data), semantic_ids_table(table), model_table(model)):
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


def item_line(catalogue, table) -> str:
    """One item, in words and in tokens."""
    item, title = catalogue.items.select("item", "title").row(0)
    return f"{item} “{title}” is now {table.text_of(item)}"
