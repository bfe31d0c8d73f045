"""Write the alignment data of a prepared folder: what teaches a model the items' indices. FOLDER/alignment.

python data_prep/build_alignment.py --data data/shop                                          # templates, no model
python data_prep/build_alignment.py --data data/shop --tasks next_item=1 item_from_text=0.5 --windows last
python data_prep/build_alignment.py --data data/shop --templates mine.yaml --output data/shop/mine
python data_prep/build_alignment.py --data data/shop --teacher openai --teacher_model MODEL --estimate_only

What a teacher writes is kept in FOLDER/alignment.cache.jsonl: interrupted, the same command goes on where it stopped.
Run again, it changes nothing; a mixture of other settings is replaced only with --overwrite. See docs/alignment.md.
"""

from recllm import launch
from recllm.mixtures.alignment import AlignmentConfig, build_alignment
from recllm.mixtures.alignment_summary import alignment_table
from recllm.teacher import TeacherConfig


def main(config: AlignmentConfig, teacher: TeacherConfig) -> None:
    mixture = build_alignment(config, teacher)
    if mixture is not None:
        launch.results.print(alignment_table(mixture))
        launch.results.print(f"written to {config.folder}", highlight=False)
        command = f"python recipes/sft.py --data {config.data} --alignment {config.folder} --model_name_or_path MODEL"
        launch.results.print(f"next       {command}", highlight=False)


if __name__ == "__main__":
    launch.run(main, AlignmentConfig, TeacherConfig, description=__doc__)
