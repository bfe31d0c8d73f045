"""A training run on disk: where it lives, whether it is done, what it starts from, and how its checkpoint is saved.

Steps go to a folder beside the output, named by everything that decides the result, so that a killed run goes on and a
run with other settings never goes on from its steps. The finished folder appears whole; only then the steps go.
"""

import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open
from transformers import Trainer
from trl import GRPOConfig, ModelConfig, SFTConfig

from recllm.checkpoint import REPORT, TABLE, Checkpoint, save_items
from recllm.errors import UserError
from recllm.files import digest, read_object, restore_folder, write_folder_whole, write_json
from recllm.launch import console
from recllm.models.build import BuildModelConfig, build_model
from recllm.models.build import made_of as start_made_of
from recllm.pretrained import quiet, which_model
from recllm.processes import Processes
from recllm.trainers.adapters import merged

WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json")
# Settings of the Trainer that say where and how often something is written, not what is learnt.
PLACES = (
    "output_dir", "overwrite", "logging_dir", "run_name", "report_to", "project", "trackio_space_id", "disable_tqdm",
    "push_to_hub", "hub_model_id", "hub_strategy", "hub_token", "hub_private_repo", "hub_always_push", "hub_revision",
    "save_total_limit", "save_steps", "save_strategy", "save_on_each_node", "resume_from_checkpoint", "log_level",
    "log_level_replica", "logging_steps", "logging_first_step", "logging_strategy", "dataloader_num_workers",
    "dataloader_pin_memory", "dataloader_prefetch_factor", "dataloader_persistent_workers", "local_rank",
    "dataset_num_proc", "per_device_eval_batch_size", "ddp_timeout", "ddp_backend",
)  # fmt: skip
CHOOSING = (  # they decide something only where the best evaluation is kept
    "eval_strategy", "eval_steps", "eval_delay", "validation_users", "validation_beams", "metric_for_best_model",
    "greater_is_better",
)  # fmt: skip


@dataclass(frozen=True)
class Run:
    """`kind` names the run's part of recllm.json, such as "sft"."""

    kind: str
    training: SFTConfig | GRPOConfig
    model: ModelConfig
    group: Processes
    output: Path
    made_of: str

    @classmethod
    def of(
        cls, kind: str, training: SFTConfig | GRPOConfig, model: ModelConfig, group: Processes,
        build: BuildModelConfig | None, *content: str,
    ) -> "Run":  # fmt: skip
        """`build`: how a start is made of a plain model, if one will do; `content`: what the data is, by its hashes."""
        check_model(model)
        left_out = PLACES if training.load_best_model_at_end else (*PLACES, *CHOOSING)
        settings = sorted((name, value) for name, value in training.to_dict().items() if name not in left_out)
        plain = build is not None and not is_checkpoint(build.model)
        base = start_made_of(build) if plain else which_model(model.model_name_or_path)
        adapter = sorted((name, value) for name, value in vars(model).items() if name != "model_name_or_path")
        made_of = digest(kind, base, *content, repr(settings), repr(adapter), str(training.rows_a_step))
        run = cls(kind, training, model, group, Path(training.output_dir), made_of)
        others = [path.name for path in run.output.parent.glob(f"{run.output.name}.work-*") if path != run.work]
        if others and group.first:
            console.print(f"{others[0]} holds steps of other settings: they are left as they are", soft_wrap=True)
        return run

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
            found = read_object(self.output / REPORT).get(self.kind, {}).get("made_of", "")
        else:
            raise UserError("holds files that are no checkpoint of ours", file=self.output, fix="another --output_dir")
        self.group.wait()
        if found is not None and found != self.made_of and not self.training.overwrite:
            fix = "another --output_dir, or --overwrite"
            raise UserError("the folder holds another model", file=self.output, fix=fix)
        done = found == self.made_of and not self.training.overwrite
        if self.group.first and (done or self.training.overwrite):
            shutil.rmtree(self.work, ignore_errors=True)  # of a run that was killed at its very end, or to begin anew
        self.group.wait()
        return done

    def start(self, build: BuildModelConfig | None = None) -> Checkpoint:
        """The checkpoint that training begins with; made from a plain model if one is named and will do."""
        folder = self.model.model_name_or_path
        if build is not None and not is_checkpoint(folder):
            folder = build.output
            if self.group.first:
                build_model(build)
            self.group.wait()
        checkpoint = Checkpoint.load(folder, "cpu", None if self.model.dtype == "auto" else self.model.dtype)
        if self.model.attn_implementation:
            checkpoint.model.set_attn_implementation(self.model.attn_implementation)
        return checkpoint


def check_model(model: ModelConfig) -> None:
    if not model.model_name_or_path:
        raise UserError(
            "model_name_or_path is not set",
            fix="a folder of build_model.py, a Hub name such as Qwen/Qwen3-0.6B, or tiny",
        )
    if model.model_revision != "main":
        raise UserError(f"model_revision {model.model_revision!r} is not loaded here", fix="download it to a folder")
    if model.use_peft and spread() != "copies":
        raise UserError(
            "LoRA with DeepSpeed or FSDP has never been run here, and sharded weights cannot be merged",
            fix="DDP or one GPU (recipes/accelerate/ddp.yaml), or full fine-tuning",
        )


def spread(training: SFTConfig | GRPOConfig | None = None) -> str:
    """How `accelerate launch` or the settings lay the model out: copies, deepspeed, or sharded (ZeRO-3 and FSDP)."""
    on = {name: os.environ.get(f"ACCELERATE_USE_{name}", "").lower() in ("1", "true") for name in ("FSDP", "DEEPSPEED")}
    plugin = getattr(training, "deepspeed_plugin", None)
    stage = plugin.zero_stage if plugin is not None else int(os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2"))
    if on["FSDP"] or getattr(training, "fsdp", None):
        return "sharded"
    if on["DEEPSPEED"] or plugin is not None:
        return "sharded" if stage == 3 else "deepspeed"
    return "copies"


def is_checkpoint(name: str) -> bool:
    return (Path(name) / TABLE).exists()


def shapes_of(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    """Of the weights as they will be saved; asked before training, since a trainer may shard them."""
    return {name: tuple(parameter.shape) for name, parameter in checkpoint.model.named_parameters()}


def save(
    run: Run, trainer: Trainer, start: Checkpoint, shapes: Mapping[str, tuple[int, ...]], report: Mapping,
    parts: Callable[[Path], None] | None = None,
) -> None:  # fmt: skip
    """The finished checkpoint: the trainer's weights, all else from the start; `report` is added to recllm.json.

    `parts` writes what else belongs to the folder.
    """
    whole = run.work / "final"
    if spread(run.training) == "copies":
        if run.group.first:
            with quiet():
                merged(trainer.accelerator.unwrap_model(trainer.model)).save_pretrained(whole)
    else:
        trainer.save_model(str(whole))  # gathers what is sharded
    run.group.wait()
    if run.group.first:
        check_weights(whole, shapes)
        with write_folder_whole(run.output) as folder:
            for pattern in WEIGHTS:
                for path in sorted(whole.glob(pattern)):
                    shutil.copy(path, folder)
            start.tokenizer.save_pretrained(folder)
            start.table.save(folder / TABLE)
            save_items(start.items, folder)
            if parts is not None:
                parts(folder)
            write_json(folder / REPORT, start.report | dict(report))
    run.group.wait()


def check_weights(folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Before anything that could make them again is deleted."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    wrong = [name for name, shape in shapes.items() if found.get(name) != shape]
    if wrong:
        raise UserError(
            f"the trained weights were not written whole: {wrong[0]} is {found.get(wrong[0], 'missing')}",
            file=folder,
            fix="the steps are kept: gather sharded weights when saving (zero3_save_16bit_model, FULL_STATE_DICT)",
        )
