"""RCLRec's second stage: conversions, each behind the items of the history that matter to it.

    python recipes/rclrec.py --config recipes/rclrec/shop.yaml
    accelerate launch --config_file recipes/accelerate/ddp.yaml recipes/rclrec.py --config recipes/rclrec/tmall.yaml

Starts from a checkpoint of recipes/sft.py on events of every behaviour (data_prep/build_conversions.py --stage all), on
conversions alone (--stage target). Settings are the Trainer's and those of `recllm.trainers.rclrec`; what stands on the
command line goes before the files. Killed and run again, the same command goes on. docs/rclrec.md explains.
"""

from trl import ModelConfig

from recllm import launch
from recllm.trainers.rclrec import RCLRecConfig
from recllm.trainers.rclrec_run import RCLRecData, run_rclrec


def main(data: RCLRecData, training: RCLRecConfig, model: ModelConfig) -> None:
    if (folder := run_rclrec(data, training, model)) is not None:
        launch.results.print(folder)


if __name__ == "__main__":
    launch.run(main, RCLRecData, RCLRecConfig, ModelConfig, description=__doc__)
