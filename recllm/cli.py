"""The console script. Stages have scripts of their own under data_prep/.

recllm demo              the whole way from a log to a model, on the embedded shop
recllm recommend         what a checkpoint recommends after a history
recllm inspect FOLDER    what a prepared folder or a checkpoint holds
recllm version
"""

import dataclasses
import json
import sys
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

from recllm import launch
from recllm.errors import UserError


@dataclass
class InspectConfig:
    """Settings of `recllm inspect`."""

    folder: str = field(metadata={"help": "A prepared folder or a checkpoint."})


def inspect(config: InspectConfig) -> None:
    """Say what a folder holds: catalogue, semantic IDs, model."""
    from recllm.summary import folder_tables

    for table in folder_tables(Path(config.folder)):
        launch.results.print(table)


@dataclass
class RecommendConfig:
    """Settings of `recllm recommend`."""

    model: str = field(metadata={"help": "Checkpoint folder or Hub repository."})
    history: list[str] = field(metadata={"help": "Items that the user took, oldest first."})
    k: int = field(default=10, metadata={"help": "Items to recommend."})
    exclude: list[str] = field(default_factory=list, metadata={"help": "Items never to show."})
    exclude_history: bool = field(default=False, metadata={"help": "Show nothing that the user took already."})
    filter: list[str] = field(
        default_factory=list, metadata={"help": "column=value of the items; several values of a column: any of them."}
    )
    beams: int | None = field(default=None, metadata={"help": "Width of the search. Default: 20, or k."})
    json: bool = field(default=False, metadata={"help": "One JSON object a line in place of the table."})

    def __post_init__(self):
        for part in self.filter:
            if not all(part.partition("=")):
                raise UserError(f"filter {part!r} is not column=value", fix="--filter brand=Nord")

    def filters(self) -> dict[str, list[str]] | None:
        found: dict[str, list[str]] = {}
        for part in self.filter:
            column, _, value = part.partition("=")
            found.setdefault(column, []).append(value)
        return found or None


def recommend(config: RecommendConfig) -> None:
    """What a checkpoint recommends to a user with this history."""
    from recllm.recommender import Recommender
    from recllm.summary import recommendations_table

    recommender = Recommender.from_pretrained(config.model)
    recommender.writer.check(config.history)
    exclude = [*config.exclude, *(config.history if config.exclude_history else [])]
    found = recommender.recommend(
        config.history, config.k, beams=config.beams, exclude=exclude, filter=config.filters()
    )  # fmt: skip
    if config.json:
        for one in found:
            print(json.dumps(dataclasses.asdict(one), ensure_ascii=False))
        return
    titles = dict(recommender.checkpoint.items.select("item", "title").iter_rows())
    launch.results.print(recommendations_table("the history", [(item, titles[item], None) for item in config.history]))
    launch.results.print(
        recommendations_table("recommended", [(one.item, one.title, one.score) for one in found])
    )  # fmt: skip


def main() -> None:
    name, args = (sys.argv[1], sys.argv[2:]) if len(sys.argv) > 1 else ("help", [])
    with launch.exit_codes():
        if name in ("help", "-h", "--help"):
            print(__doc__)
        elif name in ("version", "--version"):
            print(f"recllm {version('recllm')}")
        elif name == "demo":
            from recllm.demo import DemoConfig, demo  # torch and friends load only for what needs them

            launch.run(demo, DemoConfig, args=args, description=demo.__doc__, prog="recllm demo")
        elif name == "recommend":
            launch.run(recommend, RecommendConfig, args=args, description=recommend.__doc__, prog="recllm recommend")
        elif name == "inspect":
            folder = ["--folder", *args] if args and not args[0].startswith("-") else args
            launch.run(inspect, InspectConfig, args=folder, description=inspect.__doc__, prog="recllm inspect")
        else:
            raise UserError(
                f"{name!r} is not a command", fix="recllm demo, recllm recommend, recllm inspect FOLDER, recllm version"
            )
