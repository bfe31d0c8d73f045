"""TIGER-style: a small Qwen3 from scratch that writes the next item's codes (Rajput et al. 2023, arXiv 2305.05065).

Differences from the paper: 1. a causal decoder in place of T5; 2. every item of every training sequence is a target, in
one pass over the sequence, in place of one example an item; 3. semantic IDs of any kind, by default this project's;
4. no user token. Decoding is the project's engine, so that it is measured like every other model here.

The result is an ordinary checkpoint folder.
"""

import shutil
from dataclasses import dataclass, field
from pathlib import Path

import torch
from datasets import Dataset
from torch import Tensor
from transformers import EarlyStoppingCallback, ProgressCallback, Trainer, TrainingArguments

from recllm.catalogue import Catalogue
from recllm.checkpoint import REPORT, Checkpoint
from recllm.errors import UserError
from recllm.evaluation.validation import EvaluatesByDecoding, Validation
from recllm.files import digest, read_object, restore_folder, write_folder_whole, write_json
from recllm.launch import console
from recllm.models.attention import use_fp32_attention
from recllm.models.build import TINY, BuildModelConfig, build_model
from recllm.models.build import made_of as start_made_of
from recllm.pretrained import quiet
from recllm.prompting import PromptStyle
from recllm.training import BarOnStderr, add_dropout, last_whole_step, made_for_bf16

TEMPLATE = "<|im_start|>{history}"
PLACES = ("data", "output", "semantic_ids", "overwrite")  # settings that do not change the model
ALGORITHM = 1  # raised when the same settings come to give another model


@dataclass
class TigerConfig:
    """The defaults are those of docs/baselines.md, chosen on validation users."""

    data: str = field(metadata={"help": "Prepared folder, with semantic_ids.json."})
    output: str = field(metadata={"help": "Checkpoint folder to write."})
    semantic_ids: str | None = field(default=None, metadata={"help": "Default: semantic_ids.json of the data folder."})
    width: int = field(default=256, metadata={"help": "Hidden width, a multiple of 64."})
    layers: int = field(default=4, metadata={"help": "Layers."})
    dropout: float = field(default=0.2, metadata={"help": "On the embeddings and on what each block adds."})
    item_dropout: float = field(
        default=0.0, metadata={"help": "Share of the items left out of a sequence, anew each time."}
    )
    epochs: int = field(default=16, metadata={"help": "Passes over the sequences at most."})
    patience: int = field(default=3, metadata={"help": "Epochs without a better Recall@10 on validation users."})
    batch: int = field(default=64, metadata={"help": "Sequences a step, of about one length."})
    lr: float = field(default=1e-3, metadata={"help": "Highest learning rate (cosine to 0)."})
    weight_decay: float = field(default=0.1, metadata={"help": "AdamW."})
    validation_users: int = field(default=5000, metadata={"help": "Users of the validation split that choose."})
    beams: int = field(default=20, metadata={"help": "Of the validation."})
    bf16: bool | None = field(default=None, metadata={"help": "Autocast. Default: where the processor is made for it."})
    seed: int = field(default=0, metadata={"help": "Of weights, order and dropout."})
    overwrite: bool = field(default=False, metadata={"help": "Replace a model that was trained in another way."})

    def __post_init__(self):
        if not 0 <= self.dropout < 1 or not 0 <= self.item_dropout < 1 or self.lr <= 0 or self.weight_decay < 0:
            raise UserError("dropout and item_dropout must be in [0, 1), lr above 0 and weight_decay not below 0")
        for name in ("layers", "epochs", "patience", "batch", "validation_users", "beams"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")


def train_tiger(config: TigerConfig) -> Path:
    """Train into `config.output`, or leave it when it was trained from the same data in the same way. Resumes."""
    catalogue, output = Catalogue.load(config.data), Path(config.output)
    settings = {name: value for name, value in vars(config).items() if name not in PLACES}
    made_of = digest(str(ALGORITHM), start_made_of(start_of(config, output)), repr(settings))
    if _already(output, made_of, config.overwrite):
        return output
    # Beside the output, and named by what is trained: steps of other settings are never gone on from.
    work = output.with_name(f"{output.name}.work-{made_of[:16]}")
    if config.overwrite:
        shutil.rmtree(work, ignore_errors=True)
    start = build_model(start_of(config, work / "start"))
    style = PromptStyle(template=TEMPLATE, max_history=catalogue.report.get("max_history") or 50)
    checkpoint = Checkpoint.load(start)
    add_dropout(checkpoint.model, config.dropout)
    trainer = trainer_of(config, catalogue, checkpoint, style, work / "steps")
    with quiet():  # Trainer takes the tied head for missing when it loads the best epoch
        trainer.train(resume_from_checkpoint=last_whole_step(work / "steps"))
    with write_folder_whole(output) as folder:
        shutil.copytree(start, folder, dirs_exist_ok=True)
        checkpoint.model.save_pretrained(folder)
        curve = [entry for entry in trainer.state.log_history if "eval_recall@10" in entry]
        report = read_object(start / REPORT) | {
            "prompt": {"template": style.template, "max_history": style.max_history},
            "tiger": {"made_of": made_of, "settings": settings, "validation": curve},
        }
        write_json(folder / REPORT, report)
    shutil.rmtree(work)
    return output


def _already(output: Path, made_of: str, overwrite: bool) -> bool:
    """Is the model there? An error if something else is."""
    restore_folder(output)
    if not output.exists():
        return False
    report = read_object(output / REPORT) if (output / REPORT).exists() else {}
    if "tiger" not in report:
        raise UserError("holds files that are no model of this kind", file=output, fix="another --output")
    if report["tiger"].get("made_of") == made_of and not overwrite:
        console.print(f"{output} is trained already, from the same data with the same settings.")
        return True
    if not overwrite:
        raise UserError("the folder holds another model", file=output, fix="another --output, or --overwrite")
    return False


def start_of(config: TigerConfig, folder: Path) -> BuildModelConfig:
    """The untrained model."""
    return BuildModelConfig(
        data=config.data, output=str(folder), model=TINY, semantic_ids=config.semantic_ids, initialise="random",
        tiny_width=config.width, tiny_layers=config.layers, tiny_vocabulary=512, seed=config.seed,
    )  # fmt: skip


class NextItemTrainer(EvaluatesByDecoding, Trainer):
    """Only the evaluation differs from Trainer: Recall and NDCG of constrained beams, in place of a loss."""

    def __init__(self, *args, validation: Validation, **kwargs):
        super().__init__(*args, **kwargs)
        self.validation = validation
        if self.pop_callback(ProgressCallback):
            self.add_callback(BarOnStderr)


def trainer_of(
    config: TigerConfig, catalogue: Catalogue, checkpoint: Checkpoint, style: PromptStyle, folder: Path
) -> NextItemTrainer:
    sequences = sequences_of(catalogue, checkpoint, style)
    cpu = not torch.cuda.is_available()
    bf16 = config.bf16 if config.bf16 is not None else made_for_bf16()
    if bf16 and cpu:
        use_fp32_attention(checkpoint.model)
    steps = -(-len(sequences) // config.batch)
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=config.batch,
        num_train_epochs=config.epochs,
        learning_rate=config.lr,
        lr_scheduler_type="cosine",
        warmup_steps=min(200, steps),
        weight_decay=config.weight_decay,
        adam_beta2=0.98,
        train_sampling_strategy="group_by_length",
        bf16=bf16,
        use_cpu=cpu,
        eval_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=2,
        disable_tqdm=False,
        load_best_model_at_end=True,
        restore_callback_states_from_checkpoint=True,  # or patience would start anew
        metric_for_best_model="recall@10",
        greater_is_better=True,
        logging_steps=max(1, steps // 2),
        report_to="none",
        seed=config.seed,
        dataloader_pin_memory=not cpu,
    )
    arguments._n_gpu = min(1, arguments.n_gpu)  # several would multiply the batch in silence
    validation = Validation.of(catalogue, checkpoint, style, config.validation_users, config.beams)
    dataset = Dataset.from_dict({"input_ids": sequences, "length": [len(ids) for ids in sequences]})
    return NextItemTrainer(
        model=checkpoint.model,
        args=arguments,
        train_dataset=dataset,
        eval_dataset=dataset.select(range(0)),  # Trainer insists on one; `validation` holds the users
        data_collator=Collator(config.item_dropout, checkpoint.tokens.levels[0]),
        callbacks=[EarlyStoppingCallback(config.patience)],
        validation=validation,
    )


def sequences_of(catalogue: Catalogue, checkpoint: Checkpoint, style: PromptStyle) -> list[list[int]]:
    """Training sequences as the prompts of their items, in pieces of what a prompt may hold and one target more."""
    size = style.max_history + 1
    histories = catalogue.training_sequences()["items"].to_list()
    pieces = [items[start : start + size] for items in histories for start in range(0, len(items), size)]
    style = PromptStyle(template=style.template, separator=style.separator, max_history=size)
    return checkpoint.writer_of(style).ids(pieces)


@dataclass(frozen=True, eq=False)
class Collator:
    """input_ids and labels, padded on the right; no mask is needed, since what follows is not seen. (B, T)"""

    item_dropout: float
    first_codes: Tensor  # (V,) token ids that begin an item

    def __call__(self, rows: list[dict]) -> dict[str, Tensor]:
        ids = [self.thinned(torch.tensor(row["input_ids"])) for row in rows]
        pad = torch.nn.utils.rnn.pad_sequence
        return {"input_ids": pad(ids, batch_first=True), "labels": pad(ids, batch_first=True, padding_value=-100)}

    def thinned(self, ids: Tensor) -> Tensor:
        """Without some of the items; what stands before the first item stays. (T,) -> (up to T,)"""
        if not self.item_dropout:
            return ids
        item = torch.isin(ids, self.first_codes).long().cumsum(0)  # (T,) 0 before the first
        keep = torch.rand(int(item[-1]) + 1) >= self.item_dropout
        keep[0] = True
        return ids[keep[item]]
