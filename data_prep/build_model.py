"""Put a catalogue's semantic-ID tokens into a causal LM: add, resize, initialise, save.

    python data_prep/build_model.py --data runs/mine --model Qwen/Qwen3-0.6B --output runs/mine/model
    python data_prep/build_model.py --data runs/mine --model tiny --output runs/mine/model     (no download)

Writes a folder that AutoModelForCausalLM and AutoTokenizer load, with semantic_ids.json inside.
"""

from recllm import launch
from recllm.models.build import BuildModelConfig, build_model
from recllm.summary import model_table


def main(config: BuildModelConfig) -> None:
    launch.results.print(model_table(build_model(config)))


if __name__ == "__main__":
    launch.run(main, BuildModelConfig, description=__doc__)
