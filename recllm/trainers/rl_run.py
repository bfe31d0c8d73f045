"""What the recipes of reinforcement learning do: targets, a start that knows the items, a run, a checkpoint.

`run_rl(SRPO, data, training, model)`; the methods differ by their trainer and its settings alone.
"""

import copy
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from datasets import Dataset
from transformers import Trainer
from transformers.trainer_utils import set_seed
from trl import ModelConfig

from recllm.catalogue import Catalogue
from recllm.checkpoint import TABLE, Checkpoint
from recllm.errors import UserError
from recllm.evaluation.validation import Validation
from recllm.files import sha256_file
from recllm.hub import CARD
from recllm.launch import console
from recllm.mixtures.targets import TargetsConfig, rl_prompts
from recllm.models.attention import use_fp32_attention
from recllm.pretrained import quiet
from recllm.processes import processes
from recllm.publish import finish
from recllm.rewards import reward_functions
from recllm.settings import plain
from recllm.trainers.adapters import lora_of
from recllm.trainers.config import RecConfig
from recllm.trainers.rl_config import RecGRPOConfig
from recllm.trainers.rollouts import RolloutSettings, RolloutSource
from recllm.trainers.run import PLACES, Run, is_checkpoint, save, shapes_of, spread
from recllm.training import last_whole_step


@dataclass(kw_only=True)
class RLData(TargetsConfig):
    """What is trained on. The start is `model_name_or_path`, a checkpoint of recipes/sft.py."""

    data: str = field(metadata={"help": "Prepared folder (data_prep/prepare.py), with semantic_ids.json."})


@dataclass(frozen=True)
class Method:
    """Which trainer, what a checkpoint of it says about itself, and what its data has to be.

    This is what methods that draw answers have in common; `exact_run.Exact` draws none.
    """

    name: str  # in recllm.json
    trainer: type[Trainer]
    papers: tuple[str, ...]
    kind: ClassVar[str] = "rl"  # the part of recllm.json that says how it was trained

    def check(self, data: RLData, training: RecGRPOConfig) -> None:
        if training.use_vllm and data.mode == "direct":
            raise UserError(
                "vLLM writes chains of thought; items come from the engine", fix="use_vllm: false, or --mode reason"
            )
        if training.expected and data.mode == "direct":
            raise UserError(
                "of direct answers the expectation needs no rollouts", fix="recipes/exact.py, or --mode reason or joint"
            )
        if training.sampling != "samples" and data.mode != "direct":
            raise UserError(f"sampling {training.sampling} is of direct answers alone", fix="--mode direct, or samples")

    def content(self, data: RLData, catalogue: Catalogue) -> list[str]:
        """What the data is, whatever its folders are called."""
        return [catalogue.fingerprint, repr(sorted(vars(data).items() - {("data", data.data)}))]

    def start_of(self, run: Run, data: RLData) -> Checkpoint:
        """What training begins with."""
        return run.start()

    def prompts_of(self, run: Run, data: RLData, start: Checkpoint, catalogue: Catalogue) -> Dataset:
        """A row is a prompt and its target."""
        return rl_prompts(
            catalogue, start, which=data.rl_targets, mode=data.mode, limit=data.limit, seed=run.training.seed,
            new_tokens=self.new_tokens(data, run.training, start.table.levels),
        )  # fmt: skip

    def validation_of(self, run: Run, start: Checkpoint, catalogue: Catalogue) -> Validation:
        users, beams = run.training.validation_users, run.training.validation_beams
        return Validation.of(catalogue, start, start.style, users, beams)

    def rows_at_a_time(self, training: RecGRPOConfig) -> int:
        """Prompts that a step generates answers for."""
        return training.generation_batch_size // training.num_generations

    def new_tokens(self, data: RLData, training: RecGRPOConfig, levels: int) -> int:
        """That an answer may add to a prompt."""
        return levels + (0 if data.mode == "direct" else training.max_completion_length)

    def trainer_of(
        self, run: Run, data: RLData, start: Checkpoint, training: RecGRPOConfig, prompts: Dataset,
        validation: Validation | None,
    ) -> Trainer:  # fmt: skip
        how = RolloutSettings(training.sampling, training.temperature, training.top_p, training.max_completion_length)
        source = RolloutSource.of(start, how)
        source.check(set(prompts["mode"]), training.num_generations)
        rewards = reward_functions(
            training.rewards, training.reward_beta, training.reward_sasrec, data.data, start.table, training.reward_gate
        )
        return self.trainer(
            start, training, prompts, source, rewards, validation, peft_config=lora_of(start.model, run.model)
        )

    def parts_of(self, trainer: Trainer) -> Callable[[Path], None] | None:
        """What writes into the finished folder what else the trainer has made; called before the model is saved."""
        return None


def run_rl(method: Method, data: RLData, training: RecConfig, model: ModelConfig) -> Path | None:
    """Train into `output_dir`, or leave it when the same was trained there. Killed and run again, it goes on.

    The folder on the first process, None on the others.
    """
    check(data, training, model)
    method.check(data, training)
    with processes() as group:
        catalogue = Catalogue.load(data.data)
        content = [method.name, *method.content(data, catalogue), *scorer_of(training)]
        run = Run.of(method.kind, training, model, group, None, *content)
        if run.done():
            if group.first:
                console.print(f"{run.output} is trained already, from the same data with the same settings.")
        else:
            train(run, method, data, catalogue)
        if not group.first:
            return None
        if training.push_to_hub or not (run.output / CARD).exists():
            finish(
                run.output, settings=settings_of(run, data), method=method.name, papers=list(method.papers),
                push_to_hub=training.push_to_hub, hub_model_id=training.hub_model_id,
                hub_private_repo=training.hub_private_repo, hub_revision=training.hub_revision,
                hub_token=training.hub_token,
            )  # fmt: skip
        shutil.rmtree(run.work, ignore_errors=True)
        return run.output


def check(data: RLData, training: RecConfig, model: ModelConfig) -> None:
    """What would fail or mean nothing after an hour is said now."""
    if not training.output_dir or training.output_dir == "trainer_output":
        raise UserError("output_dir is not set", fix="--output_dir FOLDER for the trained checkpoint")
    folder = model.model_name_or_path
    if folder and Path(folder).exists() and not is_checkpoint(folder):
        raise UserError(f"holds no {TABLE}: the model knows no items", file=folder, fix="train it with recipes/sft.py")
    if spread(training) == "sharded":
        raise UserError(
            "answers are constrained by the engine, which needs whole weights on each process",
            fix="ZeRO-2, or DDP with LoRA (recipes/accelerate); gradient_checkpointing where memory is short",
        )


def train(run: Run, method: Method, data: RLData, catalogue: Catalogue) -> None:
    settings = plain(settings_of(run, data))  # now: making a config resets accelerate's state, which saving needs
    start = method.start_of(run, data)
    shapes = shapes_of(start)
    prompts = enough(method.prompts_of(run, data, start, catalogue), run, method)
    validation = method.validation_of(run, start, catalogue) if run.training.validation_users else None
    trainer = trainer_of(run, method, data, start, prompts, validation)
    steps = last_whole_step(run.work / "steps", run.group) if run.resumes else None
    with quiet():  # Trainer takes a tied head for missing when it loads the best evaluation
        trainer.train(resume_from_checkpoint=steps)
    report = {
        "method": method.name,
        "papers": sorted({*start.report.get("papers", []), *method.papers}),
        method.kind: {
            "made_of": run.made_of,
            "settings": settings,
            "start": start.weights,
            "prompts": len(prompts),
            "steps": trainer.state.global_step,
            "log": [without_nan(entry) for entry in trainer.state.log_history],
        },
    }
    save(run, trainer, start, shapes, report, method.parts_of(trainer))


def without_nan(entry: dict) -> dict:
    """JSON has none; TRL logs one where a batch had nothing to average."""
    finite = {name: not isinstance(value, float) or math.isfinite(value) for name, value in entry.items()}
    return {name: value if finite[name] else None for name, value in entry.items()}


def scorer_of(training: RecConfig) -> list[str]:
    """Which SASRec rewards answers, by its weights: one that was trained anew makes another model."""
    folder = getattr(training, "reward_sasrec", None)
    return [sha256_file(path) for path in sorted(Path(folder).glob("*.safetensors"))] if folder else []


def enough(prompts: Dataset, run: Run, method: Method) -> Dataset:
    at_a_time = method.rows_at_a_time(run.training)
    if len(prompts) < at_a_time:
        raise UserError(
            f"{len(prompts)} prompts are fewer than the {at_a_time} of one step",
            fix="a smaller batch (per_device_train_batch_size, accumulation, steps_per_generation), or rl_targets: all",
        )
    if run.group.first:
        console.print(f"{len(prompts):,} prompts, {at_a_time:,} at a time", highlight=False)
    return prompts


def trainer_of(
    run: Run, method: Method, data: RLData, start: Checkpoint, prompts: Dataset, validation: Validation | None
) -> Trainer:  # fmt: skip
    training = copy.copy(run.training)
    training.output_dir = str(run.work / "steps")
    training.push_to_hub, training.hub_token = False, None  # the finished checkpoint is pushed, not every step's
    if validation is None:
        training.eval_strategy = "no"
    set_seed(training.seed)  # LoRA draws its matrices
    if training.bf16 and training.use_cpu:
        use_fp32_attention(start.model)  # its backward in bf16 is slower there than all matrix products
    return method.trainer_of(run, data, start, training, prompts, validation)


def settings_of(run: Run, data: RLData) -> dict:
    """What the user set, in the names of the command line: data, the settings that are not the defaults, model."""
    default = type(run.training)(output_dir=run.training.output_dir).to_dict()
    changed = {
        name: value
        for name, value in run.training.to_dict().items()
        if name not in PLACES and value != default.get(name)
    }
    lora = vars(run.model) if run.model.use_peft else {"model_name_or_path": run.model.model_name_or_path}
    return {**vars(data), "output_dir": run.output.name, **changed, **lora}
