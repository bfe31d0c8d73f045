"""GRPO with answers that stay inside the catalogue: the baseline of SRPO and ReCast.

    python recipes/grpo.py --config recipes/grpo/shop.yaml
    accelerate launch --config_file recipes/accelerate/ddp.yaml recipes/grpo.py \\
        --config recipes/grpo/beauty.yaml --config recipes/sizes/rl/1.7b.yaml

Starts from a checkpoint of recipes/sft.py. Settings are TRL's (GRPOConfig, ModelConfig) and those of
`recllm.trainers.rl_config`; what stands on the command line goes before the files. Killed and run again, the same
command goes on. docs/rl.md explains; `recllm health RUN/` shows how it goes.
"""

from trl import ModelConfig

from recllm import launch
from recllm.trainers.grpo import GRPOSettings
from recllm.trainers.methods import GRPO_RUN
from recllm.trainers.rl_run import RLData, run_rl


def main(data: RLData, training: GRPOSettings, model: ModelConfig) -> None:
    if (folder := run_rl(GRPO_RUN, data, training, model)) is not None:
        launch.results.print(folder)


if __name__ == "__main__":
    launch.run(main, RLData, GRPOSettings, ModelConfig, description=__doc__)
