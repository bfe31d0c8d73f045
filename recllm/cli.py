"""The console script. Stages have scripts of their own under data_prep/.

recllm demo              the whole way from a log to a model, on the embedded shop
recllm recommend         what a checkpoint recommends after a history
recllm inspect FOLDER    what a prepared folder or a checkpoint holds
recllm health FOLDER …   how training runs went or go: tables, curves, warnings; --output health.svg, --csv health.csv
recllm publish FOLDER    complete a checkpoint with its card and, with --repo user/name, upload it to the Hub
recllm version
"""

import dataclasses
import json
import sys
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Literal

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
    history: list[str] = field(
        metadata={
            "help": "Items that the user took, oldest first. With target_behaviour what the user did too, as "
            "ITEM:BEHAVIOUR, such as i1:click i2:cart."
        }
    )
    target_behaviour: str | None = field(
        default=None,
        metadata={"help": "Of a model that was trained on behaviours: what the user does with the items, such as pay."},
    )
    user: str | None = field(
        default=None, metadata={"help": "target_behaviour: who asks, a name of the training data."}
    )
    k: int = field(default=10, metadata={"help": "Items to recommend."})
    exclude: list[str] = field(default_factory=list, metadata={"help": "Items never to show."})
    exclude_history: bool = field(default=False, metadata={"help": "Show nothing that the user took already."})
    filter: list[str] = field(
        default_factory=list, metadata={"help": "column=value of the items; several values of a column: any of them."}
    )
    beams: int | None = field(default=None, metadata={"help": "Width of the search. Default: 20, or k."})
    mode: Literal["direct", "reason", "reflect"] = field(
        default="direct",
        metadata={
            "help": "reason: the model says first what it makes of the history. reflect: it says where its drafts are "
            "wrong, and corrects them."
        },
    )
    temperature: float = field(default=0.0, metadata={"help": "reason: of the draws. 0: the best token every time."})
    top_p: float = field(default=0.9, metadata={"help": "reason: of the draws."})
    max_new_tokens: int = field(default=512, metadata={"help": "reason: longest chain."})
    seed: int = field(default=0, metadata={"help": "reason: of the draws."})
    entropy_weight: float = field(
        default=0.2, metadata={"help": "reflect: what a draft's doubt adds to its score while correcting; 0: nothing."}
    )
    skip: bool = field(default=True, metadata={"help": "reflect: a draft that is called right is left as it is."})
    json: bool = field(default=False, metadata={"help": "One JSON object a line in place of the table."})

    def __post_init__(self):
        if self.target_behaviour is None and self.user is not None:
            raise UserError("user has no meaning without target_behaviour", fix="--target_behaviour pay, say")
        if self.target_behaviour is not None and self.mode != "direct":
            raise UserError(f"a target behaviour has no mode {self.mode}", fix="--mode direct")
        _ = self.events
        for part in self.filter:
            if not all(part.partition("=")):
                raise UserError(f"filter {part!r} is not column=value", fix="--filter brand=Nord")

    @property
    def events(self) -> list[tuple[str, str]]:
        """The history as (item, behaviour); without a target behaviour none is known."""
        if self.target_behaviour is None:
            return [(item, "") for item in self.history]
        parts = [event.rpartition(":") for event in self.history]
        if bad := [event for event, (item, _, behaviour) in zip(self.history, parts) if not (item and behaviour)]:
            raise UserError(f"event {bad[0]!r} is not ITEM:BEHAVIOUR", fix="--history i1:click i2:cart")
        return [(item, behaviour) for item, _, behaviour in parts]

    def filters(self) -> dict[str, list[str]] | None:
        found: dict[str, list[str]] = {}
        for part in self.filter:
            column, _, value = part.partition("=")
            found.setdefault(column, []).append(value)
        return found or None


def recommend(config: RecommendConfig) -> None:
    """What a checkpoint recommends to a user with this history."""
    from recllm.decoding.chains import Sampling
    from recllm.recommender import Recommender
    from recllm.summary import corrections_table, evidence_table, reasoning_table, recommendations_table

    sampling = Sampling(config.temperature, config.top_p, config.max_new_tokens)

    recommender = Recommender.from_pretrained(config.model)
    target, items = config.target_behaviour, [item for item, _ in config.events]
    history = items if target is None else config.events
    (recommender if target is None else recommender.converter(target)).writer.check(history)
    found = recommender.recommend(
        history, config.k, config.mode, target_behaviour=target, user=config.user, beams=config.beams,
        exclude=[*config.exclude, *(items if config.exclude_history else [])], filter=config.filters(),
        sampling=sampling, seed=config.seed, entropy_weight=config.entropy_weight, skip=config.skip,
    )  # fmt: skip
    if config.json:
        for one in found:
            said = {name: value for name, value in dataclasses.asdict(one).items() if value is not None}
            print(json.dumps(said, ensure_ascii=False))
        return
    titles = dict(recommender.checkpoint.items.select("item", "title").iter_rows())
    said = [(f"{item} {behaviour}".strip(), titles[item], None) for item, behaviour in config.events]
    launch.results.print(recommendations_table("the history", said))
    if found and found[0].reasoning is not None:
        launch.results.print(reasoning_table(found[0].reasoning, titles))
    if found and found[0].reflection is not None:
        launch.results.print(corrections_table(found, recommender.checkpoint.table.levels))
    if found and found[0].evidence:
        launch.results.print(evidence_table(found[0].evidence))
    launch.results.print(
        recommendations_table("recommended", [(one.item, one.title, one.score) for one in found])
    )  # fmt: skip


@dataclass
class HealthConfig:
    """Settings of `recllm health`."""

    runs: list[str] = field(metadata={"help": "Outputs of recipes/*.py, finished or not; the first is compared with."})
    output: str | None = field(default=None, metadata={"help": "An .svg to draw the curves to."})
    csv: str | None = field(default=None, metadata={"help": "A .csv to write every metric to, a row a step."})


def health(config: HealthConfig) -> None:
    """How training runs went, or go: what became of their groups, what a step costs, and what to look at."""
    from recllm.health.report import health

    health(config.runs, config.output, config.csv)


@dataclass
class PublishConfig:
    """Settings of `recllm publish`."""

    folder: str = field(metadata={"help": "A checkpoint folder."})
    repo: str | None = field(
        default=None, metadata={"help": "user/name on the Hub. Without it the folder is completed and checked only."}
    )
    private: bool = field(default=False, metadata={"help": "Make the repository private, if it is new."})
    results: list[str] = field(default_factory=list, metadata={"help": "Evaluation folders, for the card's table."})
    revision: str | None = field(default=None, metadata={"help": "Branch to push to; made if it is not there."})

    def __post_init__(self):
        if self.repo is None and (self.private or self.revision):
            raise UserError("private and revision are of a repository, and none is named", fix="--repo user/name")


def publish(config: PublishConfig) -> None:
    """Complete a checkpoint folder with settings, results and a card; with --repo, upload it to the Hub.

    The token is that of `hf auth login`, or of HF_TOKEN.
    """
    from recllm.publish import check_complete, complete, push

    card = complete(config.folder, results=config.results, repo=config.repo)
    if config.repo is None:
        check_complete(config.folder)
        launch.console.print(f"{config.folder} is complete; --repo user/name uploads it.", highlight=False)
        print(card)
        return
    launch.console.print(f"uploading {config.folder} to {config.repo}", highlight=False)
    print(push(config.folder, config.repo, private=config.private, revision=config.revision))


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
        elif name == "health":
            runs = ["--runs", *args] if args and not args[0].startswith("-") else args
            launch.run(health, HealthConfig, args=runs, description=health.__doc__, prog="recllm health")
        elif name == "publish":
            folder = ["--folder", *args] if args and not args[0].startswith("-") else args
            launch.run(publish, PublishConfig, args=folder, description=publish.__doc__, prog="recllm publish")
        else:
            raise UserError(
                f"{name!r} is not a command",
                fix="recllm demo, recllm recommend, recllm inspect FOLDER, recllm health FOLDER, "
                "recllm publish FOLDER, recllm version",
            )
