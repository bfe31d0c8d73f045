"""The stage behind eval/evaluate.py: a checkpoint on a split."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from recllm.catalogue import Catalogue, Split
from recllm.checkpoint import Checkpoint
from recllm.decoding import Normaliser
from recllm.errors import UserError
from recllm.evaluation.direct import DirectRanker
from recllm.evaluation.predicting import BLOCK
from recllm.evaluation.run import Protocol, evaluate_ranker
from recllm.pretrained import DTYPES
from recllm.processes import processes


@dataclass
class EvaluateConfig:
    """Settings of `eval/evaluate.py`."""

    model: str = field(metadata={"help": "Checkpoint folder or Hub repository."})
    data: str = field(metadata={"help": "Prepared folder."})
    output: str = field(metadata={"help": "Folder for predictions.jsonl and metrics.json."})
    mode: Literal["direct"] = field(default="direct", metadata={"help": "direct: beams right after the history."})
    split: Split = field(default="test", metadata={"help": "valid or test."})
    beams: int = field(default=20, metadata={"help": "Width of the search, and length of the lists."})
    k: list[int] = field(default_factory=lambda: [5, 10], metadata={"help": "Cut-offs of the metrics."})
    normaliser: Normaliser = field(
        default="level", metadata={"help": "What a code's probability is over: full, level or children (docs)."}
    )
    max_history: int | None = field(default=None, metadata={"help": "Items of a history. Default: as prepared."})
    exclude_history: bool = field(
        default=False, metadata={"help": "Never recommend an item of the history that the model is given."}
    )
    name: str | None = field(default=None, metadata={"help": "Of the row in compare.py. Default: the model's folder."})
    seed: int = field(default=0, metadata={"help": "Of the training run, for compare.py; the search draws nothing."})
    batch_size: int | None = field(default=None, metadata={"help": "Users at once. Default: what memory allows."})
    block: int = field(default=BLOCK, metadata={"help": "Users that a process finishes at once: what a kill can lose."})
    dtype: str | None = field(default=None, metadata={"help": f"{', '.join(DTYPES)}. Default: as stored."})
    overwrite: bool = field(default=False, metadata={"help": "Begin anew in a folder that holds another evaluation."})

    def __post_init__(self):
        if self.dtype is not None and self.dtype not in DTYPES:
            raise UserError(f"dtype {self.dtype!r} is not one of {', '.join(DTYPES)}")
        if self.block < 1:
            raise UserError(f"block must be at least 1, got {self.block}")
        if self.max_history is not None and self.max_history < 1:
            raise UserError(f"max_history must be at least 1, got {self.max_history}")
        self.protocol()

    def protocol(self) -> Protocol:
        return Protocol(self.split, tuple(self.k), self.beams, self.max_history, self.exclude_history)


def evaluate(config: EvaluateConfig) -> dict | None:
    """Under `accelerate launch` or `torchrun` each process takes its share of the users; None on all but the first."""
    with processes() as group:
        catalogue = Catalogue.load(config.data)
        checkpoint = Checkpoint.load(config.model, group.device, config.dtype)
        if (config.max_history or 0) > checkpoint.style.max_history:
            raise UserError(
                f"max_history {config.max_history}: the model reads the last {checkpoint.style.max_history} items",
                fix=f"--max_history {checkpoint.style.max_history} or fewer",
            )
        ranker = DirectRanker(
            checkpoint, catalogue, config.beams, config.normaliser, config.exclude_history, config.batch_size
        )
        name = config.name or Path(config.model).name
        return evaluate_ranker(
            name, ranker, catalogue, config.protocol(), config.output, seed=config.seed,
            overwrite=config.overwrite, group=group, block=config.block,
        )  # fmt: skip
