"""GRC's supervised stage: recommend as before, judge a draft, correct it.

    python recipes/grc_sft.py --config recipes/grc_sft/shop.yaml
    accelerate launch --config_file recipes/accelerate/ddp.yaml recipes/grc_sft.py --config recipes/grc_sft/beauty.yaml

Starts from a checkpoint of recipes/sft.py, on drafts of it that data_prep/build_reflection.py has written. Settings are
the Trainer's and those of `recllm.trainers.grc_sft`; what stands on the command line goes before the files. Killed and
run again, the same command goes on. docs/grc.md explains.
"""

from trl import ModelConfig

from recllm import launch
from recllm.trainers.grc_sft import GRCSFTConfig
from recllm.trainers.grc_sft_run import GRCData, run_grc_sft


def main(data: GRCData, training: GRCSFTConfig, model: ModelConfig) -> None:
    if (folder := run_grc_sft(data, training, model)) is not None:
        launch.results.print(folder)


if __name__ == "__main__":
    launch.run(main, GRCData, GRCSFTConfig, ModelConfig, description=__doc__)
