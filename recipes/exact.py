"""The exact expectation: reinforcement learning of direct recommendation without rollouts, at the cost of an SFT step.

    python recipes/exact.py --config recipes/exact/shop.yaml
    accelerate launch --config_file recipes/accelerate/ddp.yaml recipes/exact.py --config recipes/exact/beauty.yaml

Starts from a checkpoint of recipes/sft.py. Settings are the Trainer's (TrainingArguments), TRL's ModelConfig and those
of `recllm.trainers.exact`; what stands on the command line goes before the files. Killed and run again, the same
command goes on. docs/rl.md explains; `recllm health RUN/` shows how it goes.
"""

from trl import ModelConfig

from recllm import launch
from recllm.trainers.exact import ExactConfig
from recllm.trainers.exact_run import run_exact
from recllm.trainers.rl_run import RLData


def main(data: RLData, training: ExactConfig, model: ModelConfig) -> None:
    if (folder := run_exact(data, training, model)) is not None:
        launch.results.print(folder)


if __name__ == "__main__":
    launch.run(main, RLData, ExactConfig, ModelConfig, description=__doc__)
