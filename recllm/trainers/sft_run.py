"""What `recipes/sft.py` does: mixtures, a start, training that goes on after a kill, a checkpoint that stands alone."""

import copy
import dataclasses
import shutil
from dataclasses import dataclass, field
from pathlib import Path

from transformers.trainer_utils import set_seed
from trl import ModelConfig

from recllm.catalogue import Catalogue
from recllm.checkpoint import REASONING, Checkpoint
from recllm.errors import UserError
from recllm.evaluation.validation import Validation
from recllm.files import sha256_file
from recllm.hub import CARD
from recllm.launch import console
from recllm.mixtures.encoding import Encoded, encode
from recllm.mixtures.store import Mixture, rl_share_of
from recllm.models.attention import use_fp32_attention
from recllm.models.build import BuildModelConfig
from recllm.pretrained import quiet
from recllm.processes import Processes, processes
from recllm.prompting import PromptStyle
from recllm.publish import finish
from recllm.settings import plain
from recllm.tokenization import Initialisation
from recllm.trainers.adapters import load_new_rows, lora_of, only_new_rows, save_new_rows
from recllm.trainers.conversion_validation import ConversionValidation
from recllm.trainers.run import PLACES, Run, save, shapes_of, spread
from recllm.trainers.sft import RecSFTConfig, RecSFTTrainer
from recllm.training import add_dropout, last_whole_step

ALIGN, REASON = "data_prep/build_alignment.py", "data_prep/build_reasoning.py"


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
    check(data, training)
    with processes() as group:
        catalogue = Catalogue.load(data.data)
        run = run_of(data, training, model, group, catalogue)
        if run.done():
            if group.first:
                console.print(f"{run.output} is trained already, from the same data with the same settings.")
        else:
            train(run, data, catalogue)
        if not group.first:
            return None
        if training.push_to_hub or not (run.output / CARD).exists():
            finish(
                run.output, settings=settings_of(run, data), method="sft", papers=["gream"],
                push_to_hub=training.push_to_hub, hub_model_id=training.hub_model_id,
                hub_private_repo=training.hub_private_repo, hub_revision=training.hub_revision,
                hub_token=training.hub_token,
            )  # fmt: skip
        shutil.rmtree(run.work, ignore_errors=True)
        return run.output


def check(data: SFTData, training: RecSFTConfig) -> None:
    """What would fail or mean nothing after an hour is said now."""
    if not training.output_dir or training.output_dir == "trainer_output":
        raise UserError("output_dir is not set", fix="--output_dir FOLDER for the trained checkpoint")
    if training.load_best_model_at_end and not data.alignment:
        raise UserError(
            "the best epoch is chosen by direct recommendation, which reasoning data alone does not teach",
            fix="load_best_model_at_end: false and no early_stopping_patience, or alignment data too",
        )
    layout = spread(training)
    if training.rows_first_steps and layout != "copies":
        raise UserError(
            "rows_first_steps needs whole weights on each process, which DeepSpeed and FSDP take apart",
            fix="rows_first_steps: 0, or do that stage alone on one GPU or with DDP",
        )
    if training.validation_users and layout == "sharded":
        raise UserError(
            "a sharded model (ZeRO-3, FSDP) cannot be decoded for validation",
            fix="validation_users: 0, and eval/evaluate.py on the finished checkpoint",
        )


def run_of(
    data: SFTData, training: RecSFTConfig, model: ModelConfig, group: Processes, catalogue: Catalogue
) -> Run:  # fmt: skip
    folders = [("align", folder) for folder in data.alignment] + [("reason", folder) for folder in data.reasoning]
    # The rows themselves: a teacher's late answers make another mixture of the same requests.
    content = [part for kind, folder in folders for part in (kind, *map(sha256_file, _arrows(folder)))]
    content += [catalogue.fingerprint] if training.load_best_model_at_end else []
    return Run.of("sft", training, model, group, build_of(data, training, model), *content)


def _arrows(folder: str) -> list[Path]:
    return sorted(Path(folder).glob("*.arrow"))


def build_of(data: SFTData, training: RecSFTConfig, model: ModelConfig, work: Path | None = None) -> BuildModelConfig:
    """How the start is made where the model has no item tokens."""
    return BuildModelConfig(
        data=data.data, output=str((work or Path(training.output_dir)) / "start"),
        model=model.model_name_or_path or "", initialise=data.initialise, tiny_width=data.tiny_width,
        tiny_layers=data.tiny_layers, seed=training.seed, dtype="float32" if model.dtype == "auto" else model.dtype,
    )  # fmt: skip


def train(run: Run, data: SFTData, catalogue: Catalogue) -> None:
    settings = plain(settings_of(run, data))  # now: making a config resets accelerate's state, which saving needs
    start = run.start(build_of(data, run.training, run.model, run.work))
    shapes = shapes_of(start)
    rows, styles, share = rows_of(run, data, start)
    validation = None
    if run.training.validation_users and data.alignment:
        users, beams = run.training.validation_users, run.training.validation_beams
        kind = ConversionValidation.of_events if styles["prompt"].events else Validation.of
        validation = kind(catalogue, start, styles["prompt"], users, beams)
    train_new_rows(run, start, rows)
    trainer = trainer_of(run, start, rows, validation)
    steps = last_whole_step(run.work / "steps", run.group) if run.resumes else None
    with quiet():  # Trainer takes a tied head for missing when it loads the best epoch
        trainer.train(resume_from_checkpoint=steps)
    report = {
        **{name: dataclasses.asdict(style) for name, style in styles.items()},
        "method": "sft",
        "papers": ["gream"],
        "sft": {
            "made_of": run.made_of,
            "settings": settings,
            "catalogue": catalogue.fingerprint,
            "rl_share": share,
            "examples": rows.examples,
            "alignment_rows": rows.align,
            "reasoning_rows": len(rows.rows) - rows.align,
            "steps": trainer.state.global_step,
            "log": [entry for entry in trainer.state.log_history if "eval_recall@10" in entry or "loss" in entry],
        },
    }
    save(run, trainer, start, shapes, report)


def rows_of(run: Run, data: SFTData, start: Checkpoint) -> tuple[Encoded, dict[str, PromptStyle], float]:
    """Tokenised examples; how the trained model is asked: `prompt`, and `reasoning_prompt` if it reasons; and the share
    of the users whose last training event none of the examples shows."""
    align = [Mixture.load(folder, start.table, ALIGN) for folder in data.alignment]
    reason = [Mixture.load(folder, start.table, REASON) for folder in data.reasoning]
    styles = {"prompt": align[0].style} if align else {}
    styles |= {REASONING: reason[0].style} if reason else {}
    share = rl_share_of([*align, *reason])
    settings, group = run.training, run.group
    if not group.first:  # the first process tokenises; the others read what it wrote
        group.wait()
    cache = None if group.count == 1 else run.work / "encoded"
    rows = encode(align, reason, start.tokenizer, settings.max_length, settings.packing, cache)
    if group.first:
        group.wait()
        left = f"; {rows.too_long:,} longer than {settings.max_length} tokens are left out"
        said = f"{rows.examples:,} examples in {len(rows.rows):,} rows" + (left if rows.too_long else "")
        console.print(said, highlight=False)
    return rows, styles, share


def train_new_rows(run: Run, start: Checkpoint, rows: Encoded) -> None:
    """`rows_first_steps` in which only the rows of new tokens move. What they learnt is kept beside the steps."""
    settings = run.training
    if not settings.rows_first_steps:
        return
    kept, first_new = run.work / "new_rows.safetensors", start.report["tokens"]["text"]
    if kept.exists():
        load_new_rows(start.model, first_new, kept)
        return
    first = copy.copy(settings)
    for name, value in {
        "max_steps": settings.rows_first_steps, "learning_rate": settings.rows_first_learning_rate,
        "weight_decay": 0.0, "eval_strategy": "no", "load_best_model_at_end": False, "warmup_steps": 0,
        "output_dir": str(run.work / "rows_first"), "save_strategy": "no", "early_stopping_patience": None,
        "push_to_hub": False, "hub_token": None,
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
    settings.push_to_hub, settings.hub_token = False, None  # the finished checkpoint is pushed, not every step's
    if validation is None:
        settings.eval_strategy = "no"
    set_seed(settings.seed)  # LoRA draws its matrices
    if settings.dropout:
        add_dropout(start.model, settings.dropout)
    if settings.bf16 and settings.use_cpu:
        use_fp32_attention(start.model)  # its backward in bf16 is slower there than all matrix products
    return RecSFTTrainer(
        start.model, settings, rows, start.tokenizer, validation, peft_config=lora_of(start.model, run.model)
    )


def settings_of(run: Run, data: SFTData) -> dict:
    """What the user set, in the names of the command line: data, the settings that are not the defaults, model."""
    default = RecSFTConfig(output_dir=run.training.output_dir).to_dict()
    changed = {
        name: value
        for name, value in run.training.to_dict().items()
        if name not in PLACES and value != default.get(name) and name != "dataset_kwargs"
    }
    lora = vars(run.model) if run.model.use_peft else {"model_name_or_path": run.model.model_name_or_path}
    return {**vars(data), "output_dir": run.output.name, **changed, **lora}
