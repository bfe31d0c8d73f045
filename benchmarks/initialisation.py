"""Where new tokens should begin: cluster mean, plain mean or random, by the loss after N steps.

    python benchmarks/initialisation.py --output runs/initialisation                (about 15 minutes on one CPU core)

Cluster and mean need a model that knows the words of the catalogue, and no pretrained model is assumed here: a tiny
Qwen3 is first trained as a language model on the shop's item texts, its vocabulary free of item tokens. Then, for each
seed and each way, the tokens are added and the same alignment data is trained on with the same settings. The loss is
the mean over the last tenth of the steps; Recall@10 is over validation users.
"""

import statistics
from dataclasses import dataclass, field
from pathlib import Path

from datasets import Dataset
from rich.table import Table
from transformers import set_seed
from trl import ModelConfig, SFTConfig, SFTTrainer

from recllm import launch
from recllm.catalogue import Catalogue
from recllm.embeddings import EmbedConfig, embed
from recllm.files import read_object, write_folder_whole, write_json
from recllm.mixtures.alignment import AlignmentConfig, build_alignment
from recllm.models.build import wordings
from recllm.models.tiny import tiny_model, tiny_tokenizer
from recllm.preparation import PrepareConfig, prepare
from recllm.semantic_ids.build import BuildConfig, build
from recllm.teacher import TeacherConfig
from recllm.text import fuse
from recllm.trainers.sft import RecSFTConfig
from recllm.trainers.sft_run import SFTData, run_sft

WAYS = ("cluster", "mean", "random")


@dataclass
class InitialisationConfig:
    output: str = field(default="runs/initialisation", metadata={"help": "Folder for everything."})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "Of shop, base and training."})
    steps: int = field(default=200, metadata={"help": "Of the training that is compared."})
    base_epochs: int = field(default=20, metadata={"help": "Passes of the base over the items' texts."})


def base_model(data: Path, folder: Path, seed: int, epochs: int) -> None:
    """A language model of the shop's texts."""
    if folder.exists():
        return
    texts = [fuse(row, max_words=100) for row in Catalogue.load(data).items.iter_rows(named=True)]
    tokenizer = tiny_tokenizer([*texts, *wordings() * 50], 4096)
    model = tiny_model(len(tokenizer), 128, 2, seed)
    arguments = SFTConfig(
        output_dir=str(folder.with_name("base.work")), num_train_epochs=epochs, per_device_train_batch_size=16,
        learning_rate=3e-3, lr_scheduler_type="cosine", bf16=False, use_cpu=True, gradient_checkpointing=False,
        save_strategy="no", report_to="none", seed=seed,
    )  # fmt: skip
    set_seed(seed)
    SFTTrainer(
        model, args=arguments, train_dataset=Dataset.from_dict({"text": texts}), processing_class=tokenizer
    ).train()
    with write_folder_whole(folder) as partial:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)


def measure(data: Path, base: Path, way: str, seed: int, steps: int) -> dict[str, float]:
    training = RecSFTConfig(
        output_dir=str(data / f"sft-{way}"), seed=seed, max_steps=steps, learning_rate=1e-3, warmup_steps=20,
        per_device_train_batch_size=32, bf16=False, gradient_checkpointing=False, report_to="none", logging_steps=1,
        train_sampling_strategy="group_by_length", validation_users=500, eval_strategy="steps", eval_steps=steps,
    )  # fmt: skip
    given = SFTData(str(data), [str(data / "alignment")], initialise=way)
    folder = run_sft(given, training, ModelConfig(model_name_or_path=str(base)))
    log = read_object(folder / "recllm.json")["sft"]["log"]
    losses = [entry["loss"] for entry in log if "loss" in entry]
    recall = next(entry["eval_recall@10"] for entry in log if "eval_recall@10" in entry)
    return {"first loss": losses[0], "loss": statistics.mean(losses[-steps // 10 :]), "recall@10": recall}


def main(config: InitialisationConfig) -> None:
    found: dict[str, list[dict]] = {way: [] for way in WAYS}
    for seed in config.seeds:
        data = Path(config.output) / f"shop{seed}"
        prepare(
            PrepareConfig(output=str(data), format="shop", shop_items=600, shop_users=2000, seed=seed, repeats="first")
        )
        embed(EmbedConfig(data=str(data), seed=seed))
        build(BuildConfig(data=str(data), levels=3, codes=32, seed=seed))
        tasks = ["sequence=1", "title_of_item=1", "item_from_text=1", "attributes_of_item=1"]
        build_alignment(AlignmentConfig(data=str(data), tasks=tasks, seed=seed), TeacherConfig())
        base_model(data, data / "base", seed, config.base_epochs)
        for way in WAYS:
            found[way].append(measure(data, data / "base", way, seed, config.steps))
    table = Table("new rows", "first loss", f"loss after {config.steps} steps", "validation Recall@10")
    for way, runs in found.items():
        cells = []
        for name in ("first loss", "loss", "recall@10"):
            values = [run[name] for run in runs]
            spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.3f}{spread}")
        table.add_row(way, *cells)
    launch.results.print(table)
    write_json(Path(config.output) / "initialisation.json", found)


if __name__ == "__main__":
    launch.run(main, InitialisationConfig, description=__doc__)
