"""Supervised fine-tuning: a causal LM learns the catalogue, to recommend, and to reason.   GREAM, stages 1 and 2.

    python recipes/sft.py --config recipes/gream/shop.yaml
    accelerate launch --config_file recipes/accelerate/zero2.yaml recipes/sft.py \\
        --config recipes/gream/beauty.yaml --config recipes/sizes/1.7b.yaml

Settings are TRL's (SFTConfig, ModelConfig) and those of `recllm.trainers.sft`; what stands on the command line goes
before the files. Killed and run again, the same command goes on. The result is a checkpoint folder for
eval/evaluate.py, Recommender and plain transformers; docs/sft.md explains.
"""

from trl import ModelConfig

from recllm import launch
from recllm.trainers.sft import RecSFTConfig
from recllm.trainers.sft_run import SFTData, run_sft


def main(data: SFTData, training: RecSFTConfig, model: ModelConfig) -> None:
    if (folder := run_sft(data, training, model)) is not None:
        launch.results.print(folder)
        evaluate = f"python eval/evaluate.py --model {folder} --data {data.data} --output {folder}-test"
        launch.console.print(f"next: {evaluate}" + (" --mode reasoning" if data.reasoning else ""), soft_wrap=True)


if __name__ == "__main__":
    launch.run(main, SFTData, RecSFTConfig, ModelConfig, description=__doc__)
