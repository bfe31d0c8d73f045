"""What `recipes/exact.py` does: a run as of the other methods (`rl_run`), without rollouts."""

from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset
from trl import ModelConfig

from recllm.checkpoint import Checkpoint
from recllm.errors import UserError
from recllm.evaluation.validation import Validation
from recllm.trainers.adapters import lora_of
from recllm.trainers.exact import ExactConfig, ExactTrainer
from recllm.trainers.rl_run import Method, RLData, run_rl
from recllm.trainers.run import Run


@dataclass(frozen=True)
class Exact(Method):
    """Direct prompts; an answer is the target itself."""

    def check(self, data: RLData, training: ExactConfig) -> None:
        if data.mode != "direct":
            raise UserError(
                f"mode {data.mode!r}: chains of thought have no closed form, they are drawn",
                fix="recipes/grpo.py --mode reason --expected true draws chains and takes the expectation after them",
            )

    def rows_at_a_time(self, training: ExactConfig) -> int:
        return training.rows_a_step

    def new_tokens(self, data: RLData, training: ExactConfig, levels: int) -> int:
        return levels

    def trainer_of(
        self, run: Run, data: RLData, start: Checkpoint, training: ExactConfig, prompts: Dataset,
        validation: Validation | None,
    ) -> ExactTrainer:  # fmt: skip
        return ExactTrainer(start, training, prompts, validation, peft_config=lora_of(start.model, run.model))


EXACT = Exact("exact", ExactTrainer, papers=())


def run_exact(data: RLData, training: ExactConfig, model: ModelConfig) -> Path | None:
    return run_rl(EXACT, data, training, model)
