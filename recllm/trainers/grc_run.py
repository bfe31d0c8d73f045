"""What `recipes/grc.py` does: a run as of the other methods (`rl_run`), with trajectories for answers."""

from dataclasses import dataclass

from datasets import Dataset
from transformers import Trainer

from recllm.catalogue import Catalogue
from recllm.checkpoint import Checkpoint
from recllm.errors import UserError
from recllm.evaluation.validation import ReflectingValidation, Validation
from recllm.mixtures.targets import rl_prompts
from recllm.trainers.adapters import lora_of
from recllm.trainers.grc import GRC, PARTS, GRCSettings
from recllm.trainers.rl_run import Method, RLData
from recllm.trainers.run import Run
from recllm.trainers.trajectories import TrajectoryReward, TrajectorySource


@dataclass(frozen=True)
class GRCMethod(Method):
    """The start is a checkpoint of recipes/grc_sft.py."""

    def check(self, data: RLData, training: GRCSettings) -> None:
        if data.mode != "direct":
            raise UserError(f"mode {data.mode!r}: a draft is an item, not a chain of thought", fix="mode: direct")

    def start_of(self, run: Run, data: RLData) -> Checkpoint:
        start = run.start()
        if not start.reflection.template.labels:
            raise UserError(
                "the model corrects without reflecting (GC): there is nothing to reward", file=start.name,
                fix="recipes/grc_sft.py with reflection: true",
            )  # fmt: skip
        return start

    def validation_of(self, run: Run, start: Checkpoint, catalogue: Catalogue) -> Validation:
        users, beams = run.training.validation_users, run.training.validation_beams
        return ReflectingValidation.of(catalogue, start, start.style, users, beams)

    def prompts_of(self, run: Run, data: RLData, start: Checkpoint, catalogue: Catalogue) -> Dataset:
        return rl_prompts(
            catalogue, start, which=data.rl_targets, mode="direct", limit=data.limit, seed=run.training.seed,
            new_tokens=start.reflection.template.form.places,
        )  # fmt: skip

    def trainer_of(
        self, run: Run, data: RLData, start: Checkpoint, training: GRCSettings, prompts: Dataset,
        validation: Validation | None,
    ) -> Trainer:  # fmt: skip
        source = TrajectorySource(start, training.temperature, training.top_p)
        source.check({"direct"}, training.num_generations)
        rewards = [TrajectoryReward(part, source, training.beta_last) for part in PARTS]
        return self.trainer(
            start, training, prompts, source, rewards, validation, peft_config=lora_of(start.model, run.model)
        )


GRC_RUN = GRCMethod("grc", GRC, papers=("grc",))
