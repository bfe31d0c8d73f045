"""GRC's reinforcement learning: draft, reflection and correction rewarded as one episode.

    python recipes/grc.py --config recipes/grc/shop.yaml
    accelerate launch --config_file recipes/accelerate/ddp.yaml recipes/grc.py --config recipes/grc/beauty.yaml

Starts from a checkpoint of recipes/grc_sft.py. Settings are TRL's (GRPOConfig, ModelConfig) and those of
`recllm.trainers.grc`; what stands on the command line goes before the files. Killed and run again, the same command
goes on. docs/grc.md explains; `recllm health RUN/` shows how it goes.
"""

from trl import ModelConfig

from recllm import launch
from recllm.trainers.grc import GRCSettings
from recllm.trainers.grc_run import GRC_RUN
from recllm.trainers.rl_run import RLData, run_rl


def main(data: RLData, training: GRCSettings, model: ModelConfig) -> None:
    if (folder := run_rl(GRC_RUN, data, training, model)) is not None:
        launch.results.print(folder)


if __name__ == "__main__":
    launch.run(main, RLData, GRCSettings, ModelConfig, description=__doc__)
