"""What every model is held against: the baselines trained and measured on one data set, under one protocol."""

import os
import typing
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from recllm.baselines import ItemKNN, Popularity, RepeatLast
from recllm.catalogue import Catalogue, Split
from recllm.checkpoint import Checkpoint
from recllm.errors import UserError
from recllm.evaluation.direct import DirectRanker
from recllm.evaluation.ranking import Ranker
from recllm.evaluation.repeats import checked
from recllm.evaluation.run import Protocol, evaluate_ranker
from recllm.launch import console
from recllm.models.sasrec import SASRecConfig, SASRecRanker
from recllm.models.sasrec_training import train_sasrec
from recllm.models.tiger import TigerConfig, train_tiger

BASELINES = ["popularity", "repeat-last", "item-knn", "sasrec", "tiger"]
LEARNT = ("sasrec", "tiger")  # a run for each seed
KINDS = {"sasrec": SASRecConfig, "tiger": TigerConfig}


@dataclass
class BaselinesConfig:
    """Settings of `eval/baselines.py`."""

    data: str = field(metadata={"help": "Prepared folder; tiger needs its semantic_ids.json."})
    output: str = field(metadata={"help": "Folder for the trained models and the evaluations."})
    baselines: list[str] = field(
        default_factory=lambda: list(BASELINES),
        metadata={"help": f"Which, in the table's order: {', '.join(BASELINES)}."},
    )
    seeds: list[int] = field(default_factory=lambda: [0], metadata={"help": "One training run each."})
    split: Split = field(default="test", metadata={"help": "Models are chosen on valid; look at test once."})
    k: list[int] = field(default_factory=lambda: [5, 10], metadata={"help": "Cut-offs of the metrics."})
    length: int = field(default=20, metadata={"help": "Items of a list; tiger's beams."})
    exclude_history: bool = field(
        default=False, metadata={"help": "Never recommend an item of the history that a model is given."}
    )
    protocol: Literal["next", "conversion"] = field(
        default="next",
        metadata={
            "help": "next: the split's targets, whatever they are. conversion: of data that hold out conversions, "
            "items that the user had met before and new ones apart; popularity is that of conversions."
        },
    )
    settings: list[str] = field(
        default_factory=list, metadata={"help": "Of the models, such as tiger.epochs=16 sasrec.width=128."}
    )
    overwrite: bool = field(default=False, metadata={"help": "Replace models and evaluations of other settings."})

    def __post_init__(self):
        for name in ("baselines", "seeds"):
            if not getattr(self, name) or len(set(getattr(self, name))) < len(getattr(self, name)):
                raise UserError(f"{name}: {getattr(self, name)} is no list of different ones")
        if unknown := [name for name in self.baselines if name not in BASELINES]:
            raise UserError(f"baselines: {unknown[0]!r} is not one of {', '.join(BASELINES)}")
        if self.exclude_history and "repeat-last" in self.baselines:
            raise UserError(
                "repeat-last recommends the history, and that is excluded",
                fix="--baselines popularity item-knn sasrec tiger",
            )
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise UserError("baselines are trained by one process", fix="run it without torchrun or accelerate launch")
        self.rules()
        for model in LEARNT:
            self.settings_of(model)

    def rules(self, target_behaviour: str | None = None) -> Protocol:
        """`target_behaviour`: that of the data, of protocol conversion."""
        return Protocol(
            self.split, tuple(self.k), self.length, None, self.exclude_history, target_behaviour=target_behaviour
        )

    def settings_of(self, model: str) -> dict[str, Any]:
        """`tiger.epochs=16` → {"epochs": 16}, of the type that the model's config has."""
        found = {}
        for setting in self.settings:
            name, _, value = setting.partition("=")
            kind, _, key = name.partition(".")
            hints = typing.get_type_hints(KINDS[kind]) if kind in KINDS else {}
            if key not in hints or key in ("data", "output", "seed", "overwrite") or not value:
                raise UserError(f"{setting!r} is no setting of sasrec or tiger", fix="tiger.epochs=16, say")
            if kind == model:
                found[key] = _converted(setting, value, hints[key])
        return found


def _converted(setting: str, value: str, hint: Any) -> Any:
    for kind in typing.get_args(hint) or (hint,):
        try:
            if kind is bool:
                return {"true": True, "false": False}[value.lower()]
            return kind(value)
        except (KeyError, ValueError, TypeError):
            continue
    raise UserError(f"{setting!r}: not a value of {getattr(hint, '__name__', hint)}")


def run_baselines(config: BaselinesConfig) -> list[Path]:
    """Train what has to be trained, evaluate, and return the evaluations' folders. What is there already stays."""
    catalogue, output = Catalogue.load(config.data), Path(config.output)
    target = checked(catalogue, None).target_behaviour if config.protocol == "conversion" else None
    part = config.split if target is None else f"{config.split}-{config.protocol}"
    folder = output / (f"{part}-without-history" if config.exclude_history else part)
    folders = []
    for name, seed, ranker in _rankers(config, catalogue, output, target):
        suffix = f"-seed{seed}" if name in LEARNT else ""
        folders.append(folder / f"{name}{suffix}")
        evaluate_ranker(
            name, ranker, catalogue, config.rules(target), folders[-1], seed=seed, overwrite=config.overwrite
        )  # fmt: skip
    return folders


def _rankers(
    config: BaselinesConfig, catalogue: Catalogue, output: Path, target: str | None
) -> Iterator[tuple[str, int, Ranker]]:
    """One after the other: a model is trained when its turn comes."""
    for name in config.baselines:
        for seed in config.seeds if name in LEARNT else [0]:
            console.print(f"[bold]{name}[/bold]" + (f", seed {seed}" if name in LEARNT else ""), highlight=False)
            yield name, seed, _ranker(name, seed, config, catalogue, output, target)


def _ranker(
    name: str, seed: int, config: BaselinesConfig, catalogue: Catalogue, output: Path, target: str | None
) -> Ranker:
    """All learn from events of every behaviour, and popularity of conversions from those of `target`."""
    exclude = config.exclude_history
    if name == "popularity":
        return Popularity.of(catalogue, exclude, target)
    if name == "repeat-last":
        return RepeatLast.of(catalogue)
    if name == "item-knn":
        return ItemKNN.of(catalogue, exclude_history=exclude)
    folder, device = output / "models" / f"{name}-seed{seed}", "cuda" if torch.cuda.is_available() else "cpu"
    if name == "sasrec":
        settings = SASRecConfig(seed=seed, **config.settings_of(name))
        model = train_sasrec(catalogue, settings, folder, device, config.overwrite)
        return SASRecRanker(model, catalogue.item_ids, exclude_history=exclude)
    settings = TigerConfig(
        data=config.data, output=str(folder), seed=seed, overwrite=config.overwrite, **config.settings_of(name)
    )
    return DirectRanker(
        Checkpoint.load(train_tiger(settings), device), catalogue, config.length, exclude_history=exclude
    )  # fmt: skip
