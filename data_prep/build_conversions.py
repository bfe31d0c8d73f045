"""Write the conversion data of a prepared folder: histories of (behaviour, item), and what came next.

python data_prep/prepare.py --format shop --output data/shop --user_core 1 --item_core 1 --split conversion
python data_prep/build_conversions.py --data data/shop --stage all                      # stage 1: the next event
python data_prep/build_conversions.py --data data/shop --stage all --windows sequence   # the same in fewer, longer rows
python data_prep/build_conversions.py --data data/shop --stage target                   # stage 2: conversions alone

The data say what a conversion is (prepare.py --target_behaviour pay) and hold out a user's last two, or those of a
share of the users (--held_out_share 0.3). Run again, it changes nothing; a mixture of other settings is replaced only
with --overwrite.
"""

from recllm import launch
from recllm.mixtures.conversions import ConversionsConfig, build_conversions
from recllm.mixtures.conversions_summary import conversions_table


def main(config: ConversionsConfig) -> None:
    mixture = build_conversions(config)
    launch.results.print(conversions_table(mixture))
    launch.results.print(f"written to {config.folder}", highlight=False)
    if config.stage == "all":
        command = f"python recipes/sft.py --data {config.data} --alignment {config.folder} --validation_users 0"
        launch.results.print(f"next       {command} --model_name_or_path MODEL", highlight=False)


if __name__ == "__main__":
    launch.run(main, ConversionsConfig, description=__doc__)
