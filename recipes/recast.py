"""ReCast: a group without a hit is given one, then its best answer is contrasted with its hardest miss.

    python recipes/recast.py --config recipes/recast/shop.yaml
    accelerate launch --config_file recipes/accelerate/ddp.yaml recipes/recast.py \\
        --config recipes/recast/beauty.yaml --config recipes/sizes/rl/1.7b.yaml

Starts from a checkpoint of recipes/sft.py. Settings are TRL's (GRPOConfig, ModelConfig) and those of
`recllm.trainers.rl_config`; what stands on the command line goes before the files. Killed and run again, the same
command goes on. docs/rl.md explains; `recllm health RUN/` shows how it goes.
"""

from trl import ModelConfig

from recllm import launch
from recllm.trainers.methods import RECAST_RUN
from recllm.trainers.recast import ReCastSettings
from recllm.trainers.rl_run import RLData, run_rl


def main(data: RLData, training: ReCastSettings, model: ModelConfig) -> None:
    if (folder := run_rl(RECAST_RUN, data, training, model)) is not None:
        launch.results.print(folder)


if __name__ == "__main__":
    launch.run(main, RLData, ReCastSettings, ModelConfig, description=__doc__)
