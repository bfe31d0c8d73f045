"""A training step of RCLRec against one of supervised training on the same conversions, in turns in one run; and a
search behind the chosen prefix against plain beams.

    python benchmarks/rclrec.py --output runs/bench/rclrec.json                     (about 2 minutes on one CPU core)
    python benchmarks/rclrec.py --width 256 --ragged true

Both take the same batches of prompts and targets through the same weights, a tiny Qwen3: loss, gradient and AdamW's
update. Supervised training is the prompt, the behaviour's token and the target as one row through transformers' own
forward, with logits of the answer alone. RCLRec selects, puts the prefix before the target, and has its hinge besides;
its ℓ_base is computed once for a whole training and is timed apart. Making the batch of token ids is not counted.
Plain beams stand behind prompt and opening; RCLRec's behind the prefix that the module chose besides.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from rich.table import Table
from torch import Tensor, nn

from recllm import launch
from recllm.checkpoint import Checkpoint
from recllm.decoding import Decoder
from recllm.decoding.prefixed import Choice, History, PrefixedDecoder, Shown
from recllm.embeddings import EmbedConfig, embed
from recllm.event_prompts import TEMPLATE, EventWriter
from recllm.files import write_json
from recllm.models.build import BuildModelConfig, build_model
from recllm.models.prefix_module import PrefixModule
from recllm.preparation import PrepareConfig, prepare
from recllm.prompting import PromptStyle
from recllm.semantic_ids.build import BuildConfig, build
from recllm.trainers.batches import Batch
from recllm.trainers.prefixed import NLL_BASE, base_nll
from recllm.trainers.rclrec import RCLRecConfig, RCLRecTrainer

BEAMS = 20
SFT, RCLREC, BASE = "supervised", "rclrec", "ℓ_base, once"
Step = Callable[[Batch], None]


@dataclass
class RCLRecBenchConfig:
    output: str | None = field(default=None, metadata={"help": "JSON file for the figures."})
    batch: int = field(default=32, metadata={"help": "Conversions of a step."})
    steps: int = field(default=12, metadata={"help": "Of each, in turns, after two that are not counted."})
    events: int = field(default=50, metadata={"help": "Of a history, each a behaviour and three codes."})
    ragged: bool = field(default=False, metadata={"help": "Histories of a fifth of that to all of it: padded prompts."})
    k: int = field(default=3, metadata={"help": "Items in the prefix."})
    width: int = field(default=128, metadata={"help": "Of the tiny Qwen3."})
    layers: int = field(default=4, metadata={"help": "Of the tiny Qwen3."})
    seed: int = field(default=0, metadata={"help": "Of everything."})


def main(config: RCLRecBenchConfig) -> None:
    with tempfile.TemporaryDirectory() as folder:
        found = step_seconds(config, Path(folder))
        searched = search_seconds(config, Path(folder))
    table = Table("step", "ms", "over supervised")
    for name, seconds in found.items():
        table.add_row(name, f"{1e3 * statistics.median(seconds):,.0f}", f"{over(found, name):.2f}")
    launch.results.print(table)
    ratio = statistics.median(own / plain for own, plain in zip(*searched))
    launch.results.print(f"a search of {BEAMS} beams behind the prefix: {ratio:.2f} of plain beams", highlight=False)
    if config.output:
        ratios = {name: over(found, name) for name in found} | {"search": ratio}
        settings = {name: value for name, value in vars(config).items() if name != "output"}
        write_json(config.output, {"settings": settings, "seconds": found, "over_supervised": ratios})


def search_seconds(config: RCLRecBenchConfig, folder: Path) -> tuple[list[float], list[float]]:
    """Of RCLRec's search and of plain beams, in turns, a batch of prompts each time."""
    trainer = trainer_of(config, str(folder / "model"), folder)
    start = Checkpoint.load(folder / "model", trainer.accelerator.device)
    rows = [trainer.train_dataset[place] for place in range(config.batch)]
    prompts, shown = [row["prompt_ids"] for row in rows], [Shown(row["ends"], row["rows"]) for row in rows]
    opening, module = int(trainer.data_collator.opening), trainer.take_module().eval()
    behaviour = start.model.get_input_embeddings().weight[opening].detach()
    nobody = torch.zeros(len(rows), dtype=torch.int64, device=behaviour.device)

    def choose(history: History) -> Choice:
        asked = history.states, history.mask, history.last, behaviour, nobody[: len(history.places)]
        return Choice(module.choose(*asked), module.relevance(*asked))

    decoder = Decoder(start.model, start.tokens, batch_size=config.batch)
    prefixed, opened = PrefixedDecoder(decoder, opening, choose, config.k), [[*ids, opening] for ids in prompts]
    sides = (lambda: prefixed.beams(prompts, shown, BEAMS), lambda: decoder.beams(opened, BEAMS))
    found: tuple[list[float], list[float]] = ([], [])
    for step in range(config.steps + 2):
        for seconds, search in zip(found, sides):
            with torch.no_grad():
                took = timed(lambda _, search=search: search(), {}, behaviour.device)
            if step >= 2:
                seconds.append(took)
    return found


def over(found: dict[str, list[float]], name: str) -> float:
    """Median over the turns of how long it took beside supervised training's step on the same batch."""
    return statistics.median(own / base for own, base in zip(found[name], found[SFT]))


def step_seconds(config: RCLRecBenchConfig, folder: Path) -> dict[str, list[float]]:
    """Seconds of each step by the way it is trained, all on the same batches."""
    model = make(config, folder)
    trainers = [trainer_of(config, model, folder) for _ in range(2)]
    ways = {SFT: supervised(trainers[0]), RCLREC: rclrec(trainers[1]), BASE: base(trainers[0])}
    found: dict[str, list[float]] = {name: [] for name in ways}
    rows, device = trainers[0].train_dataset, trainers[0].accelerator.device
    for step in range(config.steps + 2):
        places = range(step * config.batch, (step + 1) * config.batch)
        batch = trainers[0].data_collator([rows[place] for place in places])
        batch = {name: part.to(device) for name, part in batch.items()}
        for name, take in ways.items():
            seconds = timed(take, batch, device)
            if step >= 2:
                found[name].append(seconds)
    return found


def timed(take: Step, batch: Batch, device: torch.device) -> float:
    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    start = now()
    take(batch)
    return now() - start


def trainer_of(config: RCLRecBenchConfig, model: str, folder: Path) -> RCLRecTrainer:
    start = Checkpoint.load(model, "cpu", "float32")
    writer = EventWriter(PromptStyle(TEMPLATE, max_history=config.events, events=True), start.table, start.tokenizer)
    args = RCLRecConfig(
        output_dir=str(folder), validation_users=0, k=config.k, bf16=False, report_to="none", save_strategy="no",
        disable_tqdm=True, per_device_train_batch_size=config.batch,
    )  # fmt: skip
    rows = rows_of(config, writer)
    module = PrefixModule(args.prefix("pay"), start.model.config.hidden_size, sorted(set(rows["user"])))
    return RCLRecTrainer(start, args, rows, writer.opening("pay"), module)


def rows_of(config: RCLRecBenchConfig, writer: EventWriter) -> Dataset:
    """Histories drawn from the catalogue: what a step costs does not depend on what is in them."""
    random, table, rows = np.random.default_rng(config.seed), writer.table, []
    for user in range(config.batch * (config.steps + 2)):
        count = int(random.integers(config.events // 5, config.events + 1)) if config.ragged else config.events
        items = random.integers(len(table), size=count + 1).tolist()
        history = [(table.items[item], str(random.choice(["click", "cart", "pay"]))) for item in items[:-1]]
        rows.append(
            {"prompt_ids": writer.ids([history])[0], "ends": writer.ends([history])[0], "rows": items[:-1],
             "target": table.codes[items[-1]].tolist(), "user": f"u{user}", NLL_BASE: 3.0}
        )  # fmt: skip
    return Dataset.from_list(rows)


def updated(trainer: RCLRecTrainer, loss_of: Callable[[Batch], Tensor]) -> Step:
    trainer.create_optimizer()
    trainer.model.train()

    def step(batch: Batch) -> None:
        loss_of(batch).backward()
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()

    return step


def rclrec(trainer: RCLRecTrainer) -> Step:
    return updated(trainer, lambda batch: trainer.compute_loss(trainer.model, batch))


def supervised(trainer: RCLRecTrainer) -> Step:
    """Its module gets no gradient, and so no update."""
    model = trainer.model

    def loss_of(batch: Batch) -> Tensor:
        target = batch["target"]
        ids = torch.cat([batch["prompt_ids"], batch["opening"], target[:, :-1].clamp(min=0)], dim=1)
        mask = torch.cat([batch["prompt_mask"], torch.ones_like(target)], dim=1)
        logits = model(
            input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(dim=1) - 1).clamp(min=0),
            logits_to_keep=target.size(1), use_cache=False,
        ).logits  # fmt: skip
        return nn.functional.cross_entropy(logits.flatten(0, 1).float(), target.flatten(), ignore_index=-1)

    return updated(trainer, loss_of)


def base(trainer: RCLRecTrainer) -> Step:
    return lambda batch: base_nll(trainer.model, batch, trainer.scorer)


def make(config: RCLRecBenchConfig, folder: Path) -> str:
    """A shop's items and an untrained tiny Qwen3."""
    data, model = str(folder / "shop"), str(folder / "model")
    prepare(PrepareConfig(output=data, format="shop", shop_items=600, shop_users=1000))
    embed(EmbedConfig(data=data))
    build(BuildConfig(data=data, levels=3, codes=32))
    build_model(
        BuildModelConfig(
            data=data, output=model, initialise="random", tiny_width=config.width, tiny_layers=config.layers
        )
    )  # fmt: skip
    return model


if __name__ == "__main__":
    launch.run(main, RCLRecBenchConfig, description=__doc__)
