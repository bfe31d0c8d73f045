"""Have a pre-trained recommender draft next items, and label where each draft goes wrong. Writes FOLDER/reflection.

python data_prep/build_reflection.py --data runs/mine --model runs/mine/sft
python data_prep/build_reflection.py --data runs/mine --model runs/mine/sft --attributes categories brand price:5
python data_prep/build_reflection.py --data runs/mine --model runs/mine/sft --policy all --rl_targets all --limit 10000

Run again, it changes nothing; reflection data of other settings are replaced only with --overwrite.
"""

from recllm import launch
from recllm.mixtures.reflection import ReflectionConfig, build_reflection
from recllm.mixtures.reflection_summary import reflection_notes, reflection_table


def main(config: ReflectionConfig) -> None:
    data = build_reflection(config)
    launch.results.print(reflection_table(data))
    for line in reflection_notes(data):
        launch.results.print(line, highlight=False)
    launch.results.print(f"written to {config.folder}", highlight=False)
    start = f"--data {config.data} --drafts {config.folder} --model_name_or_path {config.model}"
    launch.results.print(f"next       python recipes/grc_sft.py {start}", highlight=False)


if __name__ == "__main__":
    launch.run(main, ReflectionConfig, description=__doc__)
