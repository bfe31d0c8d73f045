"""SRPO: a reward for every right level, an advantage calibrated by pass@k, groups that teach.   GREAM, stage 3.

    python recipes/srpo.py --config recipes/srpo/shop.yaml
    accelerate launch --config_file recipes/accelerate/ddp.yaml recipes/srpo.py \\
        --config recipes/srpo/beauty.yaml --config recipes/sizes/rl/1.7b.yaml

Starts from a checkpoint of recipes/sft.py. Settings are TRL's (GRPOConfig, ModelConfig) and those of
`recllm.trainers.rl_config`; what stands on the command line goes before the files. Killed and run again, the same
command goes on. docs/rl.md explains; `recllm health RUN/` shows how it goes.
"""

from trl import ModelConfig

from recllm import launch
from recllm.trainers.methods import SRPO_RUN
from recllm.trainers.rl_run import RLData, run_rl
from recllm.trainers.srpo import SRPOSettings


def main(data: RLData, training: SRPOSettings, model: ModelConfig) -> None:
    if (folder := run_rl(SRPO_RUN, data, training, model)) is not None:
        launch.results.print(folder)


if __name__ == "__main__":
    launch.run(main, RLData, SRPOSettings, ModelConfig, description=__doc__)
