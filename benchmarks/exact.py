"""A step of the exact expectation against one of supervised training, on the same targets in one run.

    python benchmarks/exact.py --output runs/bench/exact.json                       (about 3 minutes on one CPU core)
    python benchmarks/exact.py --model runs/shop/sft --data runs/shop               (a checkpoint of one's own)

Both take the same batches of prompts and targets through the same weights, in turns: loss, gradient and AdamW's update.
Supervised training is TRL's SFTTrainer, whose loss is on the codes and the end token; the exact expectation has the
codes alone, and computes no padding (`--alike true` leaves none in either). With a KL term the reference is computed
besides. Making the batch of token ids is not counted.
"""

import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from datasets import Dataset
from rich.table import Table
from torch import Tensor
from trl import SFTConfig, SFTTrainer

from recllm import launch
from recllm.catalogue import Catalogue
from recllm.checkpoint import Checkpoint
from recllm.embeddings import EmbedConfig, embed
from recllm.files import write_json
from recllm.mixtures.targets import rl_prompts
from recllm.models.build import BuildModelConfig, build_model
from recllm.preparation import PrepareConfig, prepare
from recllm.semantic_ids.build import BuildConfig, build
from recllm.trainers.exact import ExactConfig, ExactTrainer

SFT, KL = "supervised (TRL)", "exact, with KL"
COMMON = {"bf16": False, "report_to": "none", "save_strategy": "no", "disable_tqdm": True}
Step = Callable[[Mapping[str, Tensor]], float]


@dataclass
class ExactBenchConfig:
    data: str | None = field(default=None, metadata={"help": "Prepared folder. Default: a shop is made."})
    model: str | None = field(default=None, metadata={"help": "Checkpoint. Default: a tiny Qwen3 is made."})
    output: str | None = field(default=None, metadata={"help": "JSON file for the figures."})
    batch: int = field(default=64, metadata={"help": "Targets of a step."})
    steps: int = field(default=12, metadata={"help": "Of each, in turns, after two that are not counted."})
    alike: bool = field(default=False, metadata={"help": "Prompts of one length side by side: nothing is padded."})
    width: int = field(default=256, metadata={"help": "Of the tiny Qwen3."})
    layers: int = field(default=4, metadata={"help": "Of the tiny Qwen3."})
    seed: int = field(default=0, metadata={"help": "Of everything."})


def main(config: ExactBenchConfig) -> None:
    with tempfile.TemporaryDirectory() as folder:
        data, model = config.data, config.model
        if data is None or model is None:
            data, model = make(config, Path(folder))
        found = step_seconds(data, model, config.batch, config.steps, config.seed, config.alike)
    table = Table("step", "ms", "over supervised")
    for name, seconds in found.items():
        table.add_row(name, f"{1e3 * statistics.median(seconds):,.0f}", f"{over(found, name):.2f}")
    launch.results.print(table)
    if config.output:
        write_json(config.output, {"seconds": found, "over_supervised": {name: over(found, name) for name in found}})


def over(found: Mapping[str, Sequence[float]], name: str) -> float:
    """Median over the turns of how long it took beside supervised training's step on the same batch."""
    return statistics.median(own / base for own, base in zip(found[name], found[SFT]))


def step_seconds(
    data: str, model: str, batch: int, steps: int, seed: int = 0, alike: bool = False
) -> dict[str, list[float]]:
    """Seconds of each step by the way it is trained, all on the same batches."""
    start = Checkpoint.load(model, "cpu", "float32")
    rows = rl_prompts(
        Catalogue.load(data), start, which="all", mode="direct", limit=batch * (steps + 2), seed=seed,
        new_tokens=start.table.levels + 1,
    )  # fmt: skip
    order = list(range(len(rows)))
    if alike:
        order.sort(key=lambda place: len(rows[place]["prompt_ids"]))
    with tempfile.TemporaryDirectory() as folder:
        ways = {
            SFT: supervised(model, rows, folder),
            "exact": exact(model, rows, folder, kl_weight=0.0),
            KL: exact(model, rows, folder, kl_weight=0.1),
        }
        found: dict[str, list[float]] = {name: [] for name in ways}
        for step in range(steps + 2):
            places = order[step * batch : (step + 1) * batch]
            for name, (collate, take) in ways.items():
                seconds = take(collate([rows[place] for place in places]))
                if step >= 2:
                    found[name].append(seconds)
    return found


def exact(model: str, rows: Dataset, folder: str, **settings) -> tuple[Callable, Step]:
    config = ExactConfig(output_dir=folder, validation_users=0, **COMMON, **settings)
    trainer = ExactTrainer(Checkpoint.load(model, "cpu", "float32"), config, rows)
    return trainer.data_collator, timed(trainer)


def supervised(model: str, rows: Dataset, folder: str) -> tuple[Callable, Step]:
    """Prompt and target as one sequence; the loss is on the target and the end token."""
    start = Checkpoint.load(model, "cpu", "float32")

    def encoded(row: Mapping) -> dict[str, list[int]]:
        codes = [int(start.tokens.levels[level][code]) for level, code in enumerate(row["target"]) if code >= 0]
        answer = [*codes, start.tokenizer.eos_token_id]
        prompt = list(row["prompt_ids"])
        return {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}

    config = SFTConfig(
        output_dir=folder, gradient_checkpointing=False, dataset_kwargs={"skip_prepare_dataset": True}, **COMMON
    )
    some = Dataset.from_list([encoded(row) for row in rows.select(range(2))])
    trainer = SFTTrainer(start.model, args=config, train_dataset=some, processing_class=start.tokenizer)
    return lambda batch: trainer.data_collator([encoded(row) for row in batch]), timed(trainer)


def timed(trainer) -> Step:
    """Loss, gradient and update of one batch. -> seconds"""
    optimizer = torch.optim.AdamW(trainer.model.parameters(), lr=1e-6)
    trainer.model.train()
    device = trainer.accelerator.device

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def step(batch: Mapping[str, Tensor]) -> float:
        batch = {name: tensor.to(device) for name, tensor in batch.items()}
        start = now()
        trainer.compute_loss(trainer.model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        return now() - start

    return step


def make(config: ExactBenchConfig, folder: Path) -> tuple[str, str]:
    """A shop and an untrained tiny Qwen3: what a step costs does not depend on what it knows."""
    data, model = str(folder / "shop"), str(folder / "model")
    prepare(PrepareConfig(output=data, format="shop", shop_items=600, shop_users=2000, repeats="first"))
    embed(EmbedConfig(data=data))
    build(BuildConfig(data=data, levels=3, codes=32))
    build_model(
        BuildModelConfig(
            data=data, output=model, initialise="random", tiny_width=config.width, tiny_layers=config.layers
        )
    )  # fmt: skip
    return data, model


if __name__ == "__main__":
    launch.run(main, ExactBenchConfig, description=__doc__)
