"""What `recipes/sft.py` does: a start, mixtures, training that goes on after a kill, a checkpoint that stands alone."""

import copy
import dataclasses
import shutil
from dataclasses import dataclass, field
from pathlib import Path

from transformers import PreTrainedModel
from transformers.trainer_utils import set_seed
from trl import ModelConfig

from recllm.catalogue import Catalogue
from recllm.checkpoint import REASONING, REPORT, TABLE, Checkpoint, save_items
from recllm.errors import UserError
from recllm.evaluation.validation import Validation
from recllm.files import digest, read_object, restore_folder, write_folder_whole, write_json
from recllm.launch import console
from recllm.mixtures.encoding import Encoded, encode
from recllm.mixtures.store import Mixture
from recllm.models.build import BuildModelConfig, build_model
from recllm.models.build import made_of as start_made_of
from recllm.pretrained import quiet, which_model
from recllm.processes import Processes, processes
from recllm.prompting import PromptStyle
from recllm.publish import finish
from recllm.tokenization import Initialisation
from recllm.trainers.adapters import load_new_rows, lora_of, merged, only_new_rows, save_new_rows
from recllm.trainers.sft import RecSFTConfig, RecSFTTrainer
from recllm.training import add_dropout, last_whole_step

WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json")
# Settings of the Trainer that say where and how often something is written, not what is learnt.
PLACES = (
    "output_dir", "overwrite", "logging_dir", "run_name", "report_to", "project", "trackio_space_id", "disable_tqdm",
    "push_to_hub", "hub_model_id", "hub_strategy", "hub_token", "hub_private_repo", "hub_always_push", "hub_revision",
    "save_total_limit", "resume_from_checkpoint", "log_level", "log_level_replica", "logging_steps",
    "logging_first_step", "logging_strategy", "dataloader_num_workers", "local_rank", "dataset_num_proc",
)  # fmt: skip


@dataclass
class SFTData:
    """What is trained on, and where the model begins. Paths of what the earlier stages wrote."""

    data: str = field(metadata={"help": "Prepared folder (data_prep/prepare.py), with semantic_ids.json."})
    alignment: list[str] = field(default_factory=list, metadata={"help": "Folders of data_prep/build_alignment.py."})
    reasoning: list[str] = field(default_factory=list, metadata={"help": "Folders of data_prep/build_reasoning.py."})
    initialise: Initialisation = field(
        default="cluster", metadata={"help": "New rows, where the start is a model without them."}
    )
    tiny_width: int = field(default=128, metadata={"help": "model_name_or_path tiny: hidden width."})
    tiny_layers: int = field(default=4, metadata={"help": "model_name_or_path tiny: layers."})

    def __post_init__(self):
        if not self.alignment and not self.reasoning:
            raise UserError(
                "there is nothing to train on",
                fix="--alignment FOLDER and --reasoning FOLDER, which data_prep/build_*.py write",
            )


def run_sft(data: SFTData, training: RecSFTConfig, model: ModelConfig) -> Path | None:
    """Train into `output_dir`, or leave it when the same was trained there. Killed and run again, it goes on.

    The folder on the first process, None on the others.
    """
    with processes() as group:
        run = Run.of(data, training, model, group)
        if run.done():
            console.print(f"{run.output} is trained already, from the same data with the same settings.")
            return run.output if group.first else None
        start = run.start()
        rows, styles = run.rows(start)
        catalogue = Catalogue.load(data.data)
        style = styles.get("prompt", start.style)
        validation = None
        if training.validation_users:
            validation = Validation.of(catalogue, start, style, training.validation_users, training.validation_beams)
        train_new_rows(run, start, rows)
        trainer = trainer_of(run, start, rows, validation)
        with quiet():  # Trainer takes a tied head for missing when it loads the best epoch
            trainer.train(resume_from_checkpoint=last_whole_step(run.work / "steps") if run.resumes else None)
        save(run, trainer, start, styles, rows)
        if not group.first:
            return None
        finish(
            run.output, settings=settings_of(run), method="sft", papers=["gream"],
            push_to_hub=training.push_to_hub, hub_model_id=training.hub_model_id,
            hub_private_repo=training.hub_private_repo, hub_token=training.hub_token,
        )  # fmt: skip
    return run.output


@dataclass(frozen=True)
class Run:
    """Where a training run lives. `work` is named by what is trained: no other settings go on from its steps."""

    data: SFTData
    training: RecSFTConfig
    model: ModelConfig
    group: Processes
    output: Path
    made_of: str

    @classmethod
    def of(cls, data: SFTData, training: RecSFTConfig, model: ModelConfig, group: Processes) -> "Run":
        if not training.output_dir or training.output_dir == "trainer_output":
            raise UserError("output_dir is not set", fix="--output_dir FOLDER for the trained checkpoint")
        if not model.model_name_or_path:
            raise UserError(
                "model_name_or_path is not set",
                fix="a folder of build_model.py, a Hub name such as Qwen/Qwen3-0.6B, or tiny",
            )
        output = Path(training.output_dir)
        settings = {name: value for name, value in training.to_dict().items() if name not in PLACES}
        start = _start_config(data, training, model, output)
        base = which_model(model.model_name_or_path) if _is_checkpoint(model) else start_made_of(start)
        mixtures = [
            read_object(Path(folder) / "mixture.json").get("made_of", "")
            for folder in (*data.alignment, "", *data.reasoning)
            if folder and (Path(folder) / "mixture.json").exists()
        ]
        lora = {name: value for name, value in vars(model).items() if name != "model_name_or_path"}
        parts = [sorted(settings.items()), sorted(lora.items()), training.rows_a_step, len(data.alignment)]
        return cls(data, training, model, group, output, digest(base, *mixtures, *map(repr, parts)))

    @property
    def work(self) -> Path:
        return self.output.with_name(f"{self.output.name}.work-{self.made_of[:16]}")

    @property
    def resumes(self) -> bool:
        return self.training.resume_from_checkpoint not in (False, "false", "False")

    def done(self) -> bool:
        """Is the model there? An error if something else is. Begins anew with --overwrite."""
        if self.group.first:
            restore_folder(self.output)
        self.group.wait()
        if not self.output.exists() or (self.output.is_dir() and not any(self.output.iterdir())):
            found = None
        elif (self.output / REPORT).exists():
            found = read_object(self.output / REPORT).get("sft", {}).get("made_of", "")
        else:
            raise UserError("holds files that are no checkpoint of ours", file=self.output, fix="another --output_dir")
        self.group.wait()
        if found == self.made_of and not self.training.overwrite:
            return True
        if found is not None and not self.training.overwrite:
            raise UserError(
                "the folder holds another model", file=self.output, fix="another --output_dir, or --overwrite"
            )
        if self.group.first and self.training.overwrite:
            shutil.rmtree(self.work, ignore_errors=True)
        self.group.wait()
        return False

    def start(self) -> Checkpoint:
        """The checkpoint that training begins with; made from a plain model if one is named."""
        if _is_checkpoint(self.model):
            folder = self.model.model_name_or_path
        else:
            config = _start_config(self.data, self.training, self.model, self.work)
            folder = config.output
            if self.group.first:
                build_model(config)
            self.group.wait()
        checkpoint = Checkpoint.load(folder, "cpu", None if self.model.dtype == "auto" else self.model.dtype)
        if self.model.attn_implementation:
            checkpoint.model.set_attn_implementation(self.model.attn_implementation)
        return checkpoint

    def rows(self, start: Checkpoint) -> tuple[Encoded, dict[str, PromptStyle]]:
        """Tokenised examples, and how the trained model is asked: `prompt`, and `reasoning_prompt` if it reasons."""
        align = [Mixture.load(folder, start.table, "data_prep/build_alignment.py") for folder in self.data.alignment]
        reason = [Mixture.load(folder, start.table, "data_prep/build_reasoning.py") for folder in self.data.reasoning]
        styles = {"prompt": align[0].style} if align else {}
        styles |= {REASONING: reason[0].style} if reason else {}
        settings = self.training
        # The first process tokenises; the others read what it wrote.
        if not self.group.first:
            self.group.wait()
        rows = encode(
            align, reason, start.tokenizer, settings.max_length, settings.packing,
            None if self.group.count == 1 else self.work / "encoded",
        )  # fmt: skip
        if self.group.first:
            self.group.wait()
            console.print(
                f"{rows.examples:,} examples in {len(rows.rows):,} rows"
                + (
                    f"; {rows.too_long:,} longer than {settings.max_length} tokens are left out"
                    if rows.too_long
                    else ""
                ),
                highlight=False,
            )
        return rows, styles


def train_new_rows(run: Run, start: Checkpoint, rows: Encoded) -> None:
    """`rows_first_steps` in which only the rows of new tokens move. What they learnt is kept beside the steps."""
    settings = run.training
    if not settings.rows_first_steps:
        return
    if settings.fsdp or (settings.deepspeed_plugin is not None and settings.deepspeed_plugin.zero_stage == 3):
        raise UserError(
            "rows_first_steps needs whole embeddings on each process, and FSDP and ZeRO-3 shard them",
            fix="rows_first_steps: 0, or do this stage alone on one GPU",
        )
    kept, first_new = run.work / "new_rows.safetensors", start.report["tokens"]["text"]
    if kept.exists():
        load_new_rows(start.model, first_new, kept)
        return
    first = copy.copy(settings)
    for name, value in {
        "max_steps": settings.rows_first_steps, "learning_rate": settings.rows_first_learning_rate,
        "weight_decay": 0.0, "eval_strategy": "no", "load_best_model_at_end": False, "warmup_steps": 0,
        "output_dir": str(run.work / "rows_first"), "save_strategy": "no", "early_stopping_patience": None,
    }.items():  # fmt: skip
        setattr(first, name, value)
    console.print(f"{settings.rows_first_steps:,} steps in which only new rows move", highlight=False)
    with only_new_rows(start.model, first_new):
        RecSFTTrainer(start.model, first, rows, start.tokenizer, None).train()
    if run.group.first:
        save_new_rows(start.model, first_new, kept)
    run.group.wait()


def trainer_of(run: Run, start: Checkpoint, rows: Encoded, validation: Validation | None) -> RecSFTTrainer:
    settings = copy.copy(run.training)
    settings.output_dir = str(run.work / "steps")
    settings.push_to_hub = False  # the finished checkpoint is pushed, not every step's
    set_seed(settings.seed)  # LoRA draws its matrices
    if settings.dropout:
        add_dropout(start.model, settings.dropout)
    return RecSFTTrainer(
        start.model, settings, rows, start.tokenizer, validation, peft_config=lora_of(start.model, run.model)
    )


def save(run: Run, trainer: RecSFTTrainer, start: Checkpoint, styles: dict[str, PromptStyle], rows: Encoded) -> None:
    """The finished checkpoint: weights of the trainer, all else from the start, and what it was made of."""
    whole = run.work / "final"
    trainer.model = merged(trainer.model)
    if isinstance(trainer.model, PreTrainedModel) and trainer.accelerator.num_processes == 1:
        with quiet():
            trainer.model.save_pretrained(whole)
    else:
        trainer.save_model(str(whole))  # gathers what is sharded
    if run.group.first:
        curve = [entry for entry in trainer.state.log_history if "eval_recall@10" in entry or "loss" in entry]
        report = start.report | {
            **{name: dataclasses.asdict(style) for name, style in styles.items()},
            "method": "sft",
            "papers": ["gream"],
            "sft": {
                "made_of": run.made_of,
                "settings": settings_of(run),
                "examples": rows.examples,
                "alignment_rows": rows.align,
                "reasoning_rows": len(rows.rows) - rows.align,
                "steps": trainer.state.global_step,
                "log": curve,
            },
        }
        with write_folder_whole(run.output) as folder:
            for pattern in WEIGHTS:
                for path in sorted(whole.glob(pattern)):
                    shutil.copy(path, folder)
            start.tokenizer.save_pretrained(folder)
            start.table.save(folder / TABLE)
            save_items(start.items, folder)
            write_json(folder / REPORT, report)
    run.group.wait()
    if run.group.first:
        shutil.rmtree(run.work)


def settings_of(run: Run) -> dict:
    """What the user set, in the names of the command line: data, the settings that are not the defaults, model."""
    default = RecSFTConfig(output_dir=run.training.output_dir).to_dict()
    changed = {
        name: value
        for name, value in run.training.to_dict().items()
        if name not in PLACES and value != default.get(name) and name != "dataset_kwargs"
    }
    lora = vars(run.model) if run.model.use_peft else {"model_name_or_path": run.model.model_name_or_path}
    return {**vars(run.data), "output_dir": run.output.name, **changed, **lora}


def _is_checkpoint(model: ModelConfig) -> bool:
    return (Path(model.model_name_or_path) / TABLE).exists()


def _start_config(data: SFTData, training: RecSFTConfig, model: ModelConfig, work: Path) -> BuildModelConfig:
    return BuildModelConfig(
        data=data.data, output=str(work / "start"), model=model.model_name_or_path, initialise=data.initialise,
        tiny_width=data.tiny_width, tiny_layers=data.tiny_layers, seed=training.seed,
        dtype="float32" if model.dtype == "auto" else model.dtype,
    )  # fmt: skip
