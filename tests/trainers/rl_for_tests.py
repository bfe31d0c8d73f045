"""A trainer of reinforcement learning on a tiny checkpoint, with answers that a test knows; and TRL's own beside it."""

import dataclasses
from pathlib import Path

import torch
from datasets import Dataset
from helpers import write_small_model
from torch import Tensor
from transformers import TrainerCallback

from recllm.catalogue import Catalogue
from recllm.checkpoint import Checkpoint
from recllm.evaluation.validation import Validation
from recllm.mixtures.targets import rl_prompts
from recllm.rewards import reward_functions
from recllm.trainers.groups import RolloutGroups, Rollouts, Signal
from recllm.trainers.grpo import GRPOSettings, RecGRPO
from recllm.trainers.rollouts import RolloutSettings, RolloutSource

G, P = 4, 4
QUIET = {
    "per_device_train_batch_size": P * G, "num_generations": G, "max_steps": 1, "bf16": False, "validation_users": 0,
    "report_to": "none", "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1, "max_grad_norm": 0.0,
    "optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant", "rewards": ["prefix"], "normaliser": "full",
}  # fmt: skip


def write_uneven_model(folder: str | Path) -> tuple[Path, Path]:
    """13 items, one of them of a single code; weights large enough that answers differ in probability."""
    data, path = write_small_model(folder, items=13)
    checkpoint, generator = Checkpoint.load(path, "cpu"), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in checkpoint.model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    checkpoint.model.save_pretrained(path)
    return data, path


def prompts_of(data: Path, checkpoint: Checkpoint, count: int = P, mode: str = "direct", room: int = 2) -> Dataset:
    return rl_prompts(
        Catalogue.load(data), checkpoint, which="all", mode=mode, limit=count, seed=0, new_tokens=room
    )  # fmt: skip


@dataclasses.dataclass(frozen=True, eq=False)
class KnownSource:
    """Answers that depend on the prompt alone: items of the table, or for some prompts the target in all places.

    alike: of how many prompts (the first of the data set) all answers are one and the same, so that nothing differs
    """

    own: RolloutSource
    prompts: Dataset
    alike: int = 0

    form, labels = RolloutSource.form, RolloutSource.labels

    def rows_for(self, prompt: str, group: int) -> list[int]:
        """Rows of the table that the answers name."""
        place = self.prompts["prompt"].index(prompt)
        table, generator = self.own.checkpoint.table, torch.Generator().manual_seed(place)
        items = torch.randint(len(table), (group,), generator=generator).tolist()
        target = table.row_of[self.prompts["item"][place]]
        if place < self.alike:
            return [(target + 1) % len(table)] * group
        items[place % group] = target
        items[(place + 1) % group] = (target + 1) % len(table)
        items[(place + 2) % group] = len(table) - 1  # of a single code
        return items

    def __call__(self, rows, group, seed, keys) -> Rollouts:
        table = self.own.checkpoint.table
        items = [item for row in rows for item in self.rows_for(row["prompt"], group)]
        codes = torch.from_numpy(table.codes[items].astype("int64"))
        answers = [self.own._ids_of(some) for some in codes.tolist()]
        logps = [[-1.0] * len(ids) for ids in answers]
        return Rollouts([list(row["prompt_ids"]) for row in rows], answers, [0] * len(answers), codes, logps)

    def formed(self, found, rows):
        return self.own.formed(found, rows)

    def anchor(self, row, answer, start):
        return self.own.anchor(row, answer, start)


class SavesGradients(TrainerCallback):
    """Of every optimizer step, as they are."""

    def __init__(self):
        self.steps: list[dict[str, Tensor]] = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.steps.append(
            {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}
        )  # fmt: skip


def trainer_of(
    made, output, trainer=RecGRPO, settings=GRPOSettings, *, prompts=None, known=True, validation=False, alike=0,
    mode="direct", lora=None, count=P, **given,
):  # fmt: skip
    """Ready to train; `.gradients` holds those of each step."""
    data, path = made
    checkpoint = Checkpoint.load(path, "cpu")
    args = settings(output_dir=str(output), **{**QUIET, **given})
    rows = prompts_of(data, checkpoint, count, mode, 40 if mode != "direct" else 2) if prompts is None else prompts
    source = RolloutSource.of(
        checkpoint, RolloutSettings(args.sampling, args.temperature, args.top_p, args.max_completion_length)
    )
    source = KnownSource(source, rows, alike) if known else source
    rewards = reward_functions(args.rewards, args.reward_beta)
    gradients = SavesGradients()
    judge = Validation.of(Catalogue.load(data), checkpoint, checkpoint.style, 10, 10) if validation else None
    made = trainer(checkpoint, args, rows, source, rewards, judge, peft_config=lora, callbacks=[gradients])
    made.gradients = gradients.steps
    return made


class TRLsAdvantages(RecGRPO):
    """(r − mean) / (std + 1e-4), and no group is dropped."""

    def build_signal(self, groups: RolloutGroups) -> Signal:
        return Signal(trls_advantages(groups.rewards), torch.ones_like(groups.rewards, dtype=torch.bool))


def trls_advantages(rewards: Tensor) -> Tensor:
    return (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)


def losses_of(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def assert_same_gradients(one, other, tolerance=1e-5) -> None:
    """Relative to the norm of each parameter's gradient."""
    assert len(one) == len(other) > 0
    for step, (own, others) in enumerate(zip(one, other)):
        assert own.keys() == others.keys()
        assert sum(float(each.norm()) for each in others.values()) > 0
        for name in own:
            scale = max(float(others[name].norm()), 1e-4 * max(float(each.norm()) for each in others.values()))
            assert float((own[name] - others[name]).norm()) <= tolerance * scale, f"step {step}, {name}"
