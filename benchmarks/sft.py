"""Training throughput: this project's SFT against plain SFTTrainer with packing, on the same examples in one run.

    python benchmarks/sft.py --output runs/bench/sft.json                        (about 6 minutes on 2 CPU cores)

Both train the same tiny Qwen3 on the same alignment and reasoning examples of the shop, from the same weights, with the
same tokens a step as near as can be, in turns. Tokens are those of the examples, padding not counted. The memory that
packing needs is not compared.
"""

import statistics
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from datasets import Dataset
from rich.table import Table
from transformers import PrinterCallback, ProgressCallback, TrainerCallback
from trl import SFTConfig, SFTTrainer

from recllm import launch
from recllm.checkpoint import Checkpoint
from recllm.embeddings import EmbedConfig, embed
from recllm.files import write_json
from recllm.mixtures.alignment import AlignmentConfig, build_alignment
from recllm.mixtures.encoding import encode
from recllm.mixtures.reasoning import ReasoningConfig, build_reasoning
from recllm.models.build import BuildModelConfig, build_model
from recllm.preparation import PrepareConfig, prepare
from recllm.semantic_ids.build import BuildConfig, build
from recllm.teacher import TeacherConfig
from recllm.trainers.sft import RecSFTConfig, RecSFTTrainer

COMMON = {
    "per_device_train_batch_size": 8, "bf16": False, "use_cpu": True, "gradient_checkpointing": False,
    "report_to": "none", "save_strategy": "no", "disable_tqdm": True, "learning_rate": 1e-3, "logging_steps": 1000,
}  # fmt: skip


@dataclass
class SFTBenchConfig:
    output: str | None = field(default=None, metadata={"help": "JSON file for the figures."})
    steps: int = field(default=15, metadata={"help": "Of each trainer, each time."})
    rounds: int = field(default=3, metadata={"help": "Turns of each."})
    max_length: int = field(default=512, metadata={"help": "Tokens of a packed row."})
    seed: int = field(default=0, metadata={"help": "Of everything."})


class Clock(TrainerCallback):
    """Seconds and tokens of the steps after the first two."""

    def __init__(self):
        self.seconds, self.tokens, self.began = 0.0, 0, None

    def on_step_begin(self, args, state, control, **kwargs):
        self.began = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step > 2:
            self.seconds += time.perf_counter() - self.began
            self.tokens += self.in_step
        self.in_step = 0

    in_step = 0


def timed(trainer: SFTTrainer) -> float:
    """Tokens of examples a second."""
    clock = Clock()
    for callback in (PrinterCallback, ProgressCallback):
        trainer.pop_callback(callback)
    trainer.add_callback(clock)
    step = trainer.training_step

    def counted(model, inputs, *args, **kwargs):
        mask = inputs.get("attention_mask")
        clock.in_step += int(mask.sum()) if mask is not None else inputs["input_ids"].numel()
        return step(model, inputs, *args, **kwargs)

    trainer.training_step = counted
    trainer.train()
    return clock.tokens / clock.seconds


def main(config: SFTBenchConfig) -> None:
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "shop"
        prepare(PrepareConfig(output=str(data), format="shop", shop_items=600, shop_users=2000, repeats="first"))
        embed(EmbedConfig(data=str(data)))
        build(BuildConfig(data=str(data), levels=3, codes=32))
        mixtures = (
            [build_alignment(AlignmentConfig(data=str(data)), TeacherConfig())],
            [build_reasoning(ReasoningConfig(data=str(data), template="short"), TeacherConfig())],
        )
        build_model(BuildModelConfig(data=str(data), output=str(data / "model"), initialise="random"))
        found: dict[str, list[float]] = {"plain SFTTrainer, packing": [], "ours, packing": [], "ours, like lengths": []}
        for _ in range(config.rounds):
            for way, rates in found.items():
                rates.append(timed(trainer_of(way, config, data, mixtures, Path(folder))))
    table = Table("trainer", "tokens/s", "over plain")
    plain = statistics.median(found["plain SFTTrainer, packing"])
    for way, rates in found.items():
        table.add_row(way, f"{statistics.median(rates):,.0f}", f"{statistics.median(rates) / plain:.2f}")
    launch.results.print(table)
    if config.output:
        write_json(config.output, {"tokens_per_second": found, "steps": config.steps, "max_length": config.max_length})


def trainer_of(way: str, config: SFTBenchConfig, data: Path, mixtures: tuple, folder: Path) -> SFTTrainer:
    checkpoint = Checkpoint.load(data / "model", "cpu", "float32")
    settings = {**COMMON, "output_dir": str(folder / "out"), "max_steps": config.steps, "seed": config.seed}
    if way.startswith("plain"):
        rows = encode(*mixtures, checkpoint.tokenizer, config.max_length).rows
        rows = Dataset.from_dict({"input_ids": rows["input_ids"][:], "labels": rows["labels"][:]})
        arguments = SFTConfig(**settings, packing=True, max_length=config.max_length)
        return SFTTrainer(checkpoint.model, args=arguments, train_dataset=rows, processing_class=checkpoint.tokenizer)
    pack = way.endswith("packing")
    rows = encode(*mixtures, checkpoint.tokenizer, config.max_length, pack=pack)
    if not pack:  # as many tokens a step as eight packed rows hold
        settings["per_device_train_batch_size"] = round(8 * config.max_length / rows.lengths.mean())
        settings["train_sampling_strategy"] = "group_by_length"
    arguments = RecSFTConfig(
        **settings, packing=pack, max_length=config.max_length, validation_users=0, schedule="uniform"
    )
    return RecSFTTrainer(checkpoint.model, arguments, rows, checkpoint.tokenizer, None)


if __name__ == "__main__":
    launch.run(main, SFTBenchConfig, description=__doc__)
