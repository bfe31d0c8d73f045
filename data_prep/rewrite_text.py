"""Have a teacher rewrite the text of every item into one feature-rich description: FOLDER/texts.parquet.

python data_prep/rewrite_text.py --data data/shop                                            # templates, no model
python data_prep/rewrite_text.py --data data/shop --teacher openai --teacher_model MODEL --estimate_only
python data_prep/rewrite_text.py --data data/shop --teacher openai --teacher_model MODEL --base_url http://localhost:8000/v1
python data_prep/rewrite_text.py --data data/shop --teacher vllm --teacher_model MODEL

What is written is kept in FOLDER/texts.cache.jsonl: interrupted, the same command goes on where it stopped.
Texts made in another way or from other data are replaced only with --overwrite, which leaves the answers kept there.
"""

from recllm import launch
from recllm.rewriting import RewriteConfig, rewrite
from recllm.teacher import TeacherConfig


def main(config: RewriteConfig, teacher: TeacherConfig) -> None:
    table = rewrite(config, teacher)
    if table is not None:
        words = table["text"].str.split(" ").list.len()
        empty = (table["text"] == "").sum()
        print(f"items      {len(table):,} ({empty:,} without text)\nwords      {words.mean():.0f} on average")
        print(f"written to {config.path}")
        print(f"next       python data_prep/embed_items.py --data {config.data} --text rewritten")


if __name__ == "__main__":
    launch.run(main, RewriteConfig, TeacherConfig, description=__doc__)
