"""Training SASRec: every training event but a user's first is predicted from those before it.

The weights kept are those of the epoch with the best NDCG@10 on the validation split. A killed run goes on from its
last whole epoch, and ends in the same bytes as one that was never killed.
"""

import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import polars as pl
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from recllm.catalogue import Catalogue
from recllm.embeddings.collaborative import training_events
from recllm.embeddings.container import write_tensors
from recllm.errors import UserError
from recllm.files import read_object, restore_folder, write_folder_whole, write_json
from recllm.launch import console
from recllm.metrics import ndcg_at_k, ranks, recall_at_k
from recllm.models.sasrec import REPORT, WEIGHTS, SASRec, SASRecConfig, SASRecRanker, load_sasrec
from recllm.progress import progress

K = 10  # of the validation's NDCG and recall


def train_sasrec(
    catalogue: Catalogue,
    config: SASRecConfig,
    folder: str | Path,
    device: str | torch.device = "cpu",
    overwrite: bool = False,
) -> SASRec:
    """Train, write `folder`, and return the model on the CPU, ready to score; at once if `folder` holds it already."""
    folder = Path(folder)
    restore_folder(folder)
    made_of = {"config": dataclasses.asdict(config), "catalogue_fingerprint": catalogue.fingerprint}
    if _is_there(folder, made_of, overwrite):
        console.print(f"{folder} is there, trained with these settings on this data", highlight=False, soft_wrap=True)
        return load_sasrec(folder, catalogue)
    windows = Windows.of(catalogue, config.max_length)
    validation = Validation.of(catalogue, config)
    checkpoint = folder.with_name(f"{folder.name}.training.safetensors")
    with torch.random.fork_rng():
        training = Training.start(len(catalogue.items), config, device)
        training.restore(checkpoint, made_of)
        with progress("training SASRec", config.epochs, training.epoch) as advance:
            while not training.finished:
                training.run_epoch(windows)
                training.judge(validation)
                training.save(checkpoint, made_of)
                advance(1)
    with write_folder_whole(folder) as partial:
        write_tensors(partial / WEIGHTS, training.best)
        write_json(partial / REPORT, {**made_of, "best_epoch": training.best_epoch, "validation": training.curve})
    checkpoint.unlink(missing_ok=True)
    best = f"NDCG@{K} {training.curve[training.best_epoch - 1][f'ndcg@{K}']:.4f} on validation"
    console.print(f"SASRec: epoch {training.best_epoch} of {training.epoch} is the best, {best}", highlight=False)
    return load_sasrec(folder, catalogue)


def _is_there(folder: Path, made_of: dict, overwrite: bool) -> bool:
    """Whether the folder is what would be written. Something else is not replaced unasked, a stranger's never."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    if not (folder / REPORT).exists():
        raise UserError("is there and holds no SASRec model", file=folder, fix="choose another output")
    report = read_object(folder / REPORT)
    if all(report.get(name) == value for name, value in made_of.items()):
        return True
    if overwrite:
        return False
    raise UserError(
        "holds a SASRec that was trained with other settings or on other data",
        file=folder,
        fix="--overwrite, or another output",
    )


# ---- what is learnt from


class Windows(NamedTuple):
    """Runs of a user's training events, W of them. Each event but the user's first is predicted in exactly one."""

    events: Tensor  # (E,) rows of the catalogue, all users one after the other
    starts: Tensor  # (W,) index of a window's first event
    lengths: Tensor  # (W,) how many events of it are read; the one after each is predicted

    @classmethod
    def of(cls, catalogue: Catalogue, longest: int) -> "Windows":
        """Windows are cut from the end, so that the latest events have the longest past."""
        items, users = training_events(catalogue)
        ends = np.append(np.flatnonzero(np.diff(users)), len(users) - 1)  # (U,) each user's last event: never read
        firsts = np.append(0, ends[:-1] + 1)  # (U,)
        pieces = -(-(ends - firsts) // longest)  # (U,) windows of each user; 0 for a user with one event
        if not len(users) or not pieces.sum():
            raise UserError("no user has two training events, so there is nothing to learn", file=catalogue.folder)
        before = np.repeat(np.cumsum(pieces) - pieces, pieces)
        stops = np.repeat(ends, pieces) - longest * (np.arange(pieces.sum()) - before)
        starts = np.maximum(np.repeat(firsts, pieces), stops - longest)
        return cls(*(torch.from_numpy(part) for part in (items, starts, stops - starts)))

    def batches(self, size: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Inputs (B, T), targets (B, T) and which of them count (B, T); about `size` count in each batch.

        Windows of like length go together, so that little is filled up; the batches come in random order.
        """
        order = torch.randperm(len(self.starts), generator=generator)
        order = order[self.lengths[order].argsort(stable=True)]
        ends = self.lengths[order].cumsum(0)
        number = (ends - 1) // size  # of the batch
        groups = order.split(number.unique_consecutive(return_counts=True)[1].tolist())
        for chosen in torch.randperm(len(groups), generator=generator).tolist():
            window = groups[chosen]
            step = torch.arange(int(self.lengths[window].max()))
            counted = step < self.lengths[window].unsqueeze(1)
            where = (self.starts[window].unsqueeze(1) + step) * counted
            yield self.events[where], self.events[where + 1], counted


class Validation(NamedTuple):
    """A fixed sample of the validation targets."""

    cases: pl.DataFrame
    targets: Tensor  # (P,) rows of the catalogue
    item_ids: list[str]

    @classmethod
    def of(cls, catalogue: Catalogue, config: SASRecConfig) -> "Validation":
        cases = catalogue.targets("valid", config.max_length)
        if not len(cases):
            raise UserError("the data has no validation target to choose the epoch by", file=catalogue.folder)
        drawn = torch.randperm(len(cases), generator=torch.Generator().manual_seed(config.seed))
        cases = cases[drawn[: config.validation_users].sort().values.tolist()]
        targets = [catalogue.row_of[item] for item in cases["item"]]
        return cls(cases, torch.tensor(targets), catalogue.item_ids)

    def figures(self, model: SASRec) -> dict[str, float]:
        found = ranks(SASRecRanker(model, self.item_ids).rank(self.cases, K).rows, self.targets)
        figures = {f"ndcg@{K}": ndcg_at_k(found, K), f"recall@{K}": recall_at_k(found, K)}
        return {name: float(values.mean()) for name, values in figures.items()}  # sorted, as a checkpoint gives them


# ---- how


@dataclasses.dataclass
class Training:
    """The state between two epochs: all that a later process needs to go on."""

    model: SASRec
    optimizer: torch.optim.AdamW
    best: dict[str, Tensor]  # weights of the best epoch so far
    curve: list[dict]  # figures of every epoch so far

    @classmethod
    def start(cls, n_items: int, config: SASRecConfig, device: str | torch.device) -> "Training":
        torch.manual_seed(config.seed)
        model = SASRec(n_items, config).to(device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=config.weight_decay, fused=True)
        return cls(model, optimizer, {}, [])

    @property
    def config(self) -> SASRecConfig:
        return self.model.config

    @property
    def epoch(self) -> int:
        return len(self.curve)

    @property
    def best_epoch(self) -> int:
        """Counted from 1; the first of equals. 0 before the first."""
        return max(range(1, self.epoch + 1), key=lambda epoch: (self.curve[epoch - 1][f"ndcg@{K}"], -epoch), default=0)

    @property
    def finished(self) -> bool:
        return self.epoch >= self.config.epochs or self.epoch - self.best_epoch >= self.config.patience

    def run_epoch(self, windows: Windows) -> None:
        """One pass over the windows. Its randomness is a function of seed and epoch, so a resumed run is the same."""
        generator = torch.Generator().manual_seed(_seed(self.config.seed, self.epoch))
        torch.manual_seed(_seed(self.config.seed, self.epoch))  # dropout has no generator of its own
        device = self.model.items.weight.device
        self.model.train()
        batches = list(windows.batches(self.config.batch, generator))
        for step, (inputs, targets, counted) in enumerate(batches):
            self.optimizer.param_groups[0]["lr"] = learning_rate(self.config, self.epoch + step / len(batches))
            states = self.model.states(inputs.to(device))[counted.to(device)]  # (M, D)
            loss = self.model.loss(states, targets[counted].to(device))
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self.optimizer.step()

    def judge(self, validation: Validation) -> None:
        figures = validation.figures(self.model)
        self.curve.append(figures)
        if self.best_epoch == self.epoch:
            self.best = {name: value.detach().cpu().clone() for name, value in self.model.state_dict().items()}

    def save(self, path: Path, made_of: dict) -> None:
        tensors = {f"best.{name}": value for name, value in self.best.items()}
        tensors |= {f"model.{name}": value.cpu() for name, value in self.model.state_dict().items()}
        for number, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{number}.{name}": value.cpu() for name, value in state.items()}
        write_tensors(path, tensors, {**made_of, "curve": self.curve})

    def restore(self, path: Path, made_of: dict) -> None:
        """Go on from `path` if it is of the same settings and data; else start anew, and overwrite it later."""
        try:
            with safe_open(path, framework="pt") as stored:
                about = json.loads((stored.metadata() or {}).get("recllm", "{}"))
                tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 (not a dict)
        except (SafetensorError, OSError):
            return
        curve = about.pop("curve", [])
        if about != json.loads(json.dumps(made_of)):
            return
        self.best, self.curve = _under("best.", tensors), curve
        self.model.load_state_dict(_under("model.", tensors))
        state = self.optimizer.state_dict()
        for name, value in _under("optimizer.", tensors).items():
            number, key = name.split(".")
            state["state"].setdefault(int(number), {})[key] = value
        self.optimizer.load_state_dict(state)


def learning_rate(config: SASRecConfig, epoch: float) -> float:
    """lr · (1 + cos(π epoch / epochs)) / 2: from lr down to 0."""
    return config.lr * (1 + math.cos(math.pi * epoch / config.epochs)) / 2


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _seed(seed: int, epoch: int) -> int:
    """Another stream for every epoch, and none that `Training.start` used."""
    return seed * 1_000_003 + epoch + 1
