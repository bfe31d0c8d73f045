"""What `recipes/exact.py` does: targets, a start that knows the items, a run without rollouts, a checkpoint."""

import copy
import shutil
from pathlib import Path

from datasets import Dataset
from transformers.trainer_utils import set_seed
from trl import ModelConfig

from recllm.catalogue import Catalogue
from recllm.checkpoint import TABLE, Checkpoint
from recllm.errors import UserError
from recllm.evaluation.validation import Validation
from recllm.hub import CARD
from recllm.launch import console
from recllm.mixtures.targets import rl_prompts
from recllm.models.attention import use_fp32_attention
from recllm.pretrained import quiet
from recllm.processes import processes
from recllm.publish import finish
from recllm.settings import plain
from recllm.trainers.adapters import lora_of
from recllm.trainers.exact import ExactConfig, ExactTrainer
from recllm.trainers.rl_run import RLData, settings_of
from recllm.trainers.run import Run, is_checkpoint, save, shapes_of, spread
from recllm.training import last_whole_step


def run_exact(data: RLData, training: ExactConfig, model: ModelConfig) -> Path | None:
    """Train into `output_dir`, or leave it when the same was trained there. Killed and run again, it goes on.

    The folder on the first process, None on the others.
    """
    check(data, training, model)
    with processes() as group:
        catalogue = Catalogue.load(data.data)
        content = [catalogue.fingerprint, repr(sorted(vars(data).items() - {("data", data.data)}))]
        run = Run.of("rl", training, model, group, None, "exact", *content)
        if run.done():
            if group.first:
                console.print(f"{run.output} is trained already, from the same data with the same settings.")
        else:
            train(run, data, catalogue)
        if not group.first:
            return None
        if training.push_to_hub or not (run.output / CARD).exists():
            finish(
                run.output, settings=settings_of(run, data), method="exact", papers=[],
                push_to_hub=training.push_to_hub, hub_model_id=training.hub_model_id,
                hub_private_repo=training.hub_private_repo, hub_revision=training.hub_revision,
                hub_token=training.hub_token,
            )  # fmt: skip
        shutil.rmtree(run.work, ignore_errors=True)
        return run.output


def check(data: RLData, training: ExactConfig, model: ModelConfig) -> None:
    """What would fail or mean nothing after an hour is said now."""
    if not training.output_dir or training.output_dir == "trainer_output":
        raise UserError("output_dir is not set", fix="--output_dir FOLDER for the trained checkpoint")
    if data.mode != "direct":
        raise UserError(
            f"mode {data.mode!r}: chains of thought have no closed form, they are drawn",
            fix="recipes/grpo.py --mode reason --expected true draws the chains and takes the expectation after them",
        )
    folder = model.model_name_or_path
    if folder and Path(folder).exists() and not is_checkpoint(folder):
        raise UserError(f"holds no {TABLE}: the model knows no items", file=folder, fix="train it with recipes/sft.py")
    if spread(training) == "sharded":
        raise UserError(
            "ZeRO-3 and FSDP have never been run with this training",
            fix="ZeRO-2 or DDP (recipes/accelerate), with LoRA or gradient_checkpointing where memory is short",
        )


def train(run: Run, data: RLData, catalogue: Catalogue) -> None:
    settings = plain(settings_of(run, data))  # now: making a config resets accelerate's state, which saving needs
    start = run.start()
    shapes = shapes_of(start)
    prompts = prompts_of(run, data, start, catalogue)
    validation = None
    if run.training.validation_users:
        users, beams = run.training.validation_users, run.training.validation_beams
        validation = Validation.of(catalogue, start, start.style, users, beams)
    trainer = trainer_of(run, start, prompts, validation)
    steps = last_whole_step(run.work / "steps", run.group) if run.resumes else None
    with quiet():  # Trainer takes a tied head for missing when it loads the best evaluation
        trainer.train(resume_from_checkpoint=steps)
    report = {
        "method": "exact",
        "papers": sorted(start.report.get("papers", [])),
        "rl": {
            "made_of": run.made_of,
            "settings": settings,
            "start": start.weights,
            "prompts": len(prompts),
            "steps": trainer.state.global_step,
            "log": trainer.state.log_history,
        },
    }
    save(run, trainer, start, shapes, report)


def prompts_of(run: Run, data: RLData, start: Checkpoint, catalogue: Catalogue) -> Dataset:
    prompts = rl_prompts(
        catalogue, start, which=data.rl_targets, mode="direct", limit=data.limit, seed=run.training.seed,
        new_tokens=start.table.levels,
    )  # fmt: skip
    if len(prompts) < run.training.rows_a_step:
        raise UserError(
            f"{len(prompts)} targets are fewer than the {run.training.rows_a_step} of one step",
            fix="a smaller batch (per_device_train_batch_size, gradient_accumulation_steps), or rl_targets: all",
        )
    if run.group.first:
        console.print(f"{len(prompts):,} targets, none of them answered: the expectation is exact", highlight=False)
    return prompts


def trainer_of(run: Run, start: Checkpoint, prompts: Dataset, validation: Validation | None) -> ExactTrainer:
    training = copy.copy(run.training)
    training.output_dir = str(run.work / "steps")
    training.push_to_hub, training.hub_token = False, None  # the finished checkpoint is pushed, not every step's
    if validation is None:
        training.eval_strategy = "no"
    set_seed(training.seed)  # LoRA draws its matrices
    if training.bf16 and training.use_cpu:
        use_fp32_attention(start.model)  # its backward in bf16 is slower there than all matrix products
    return ExactTrainer(start, training, prompts, validation, peft_config=lora_of(start.model, run.model))
