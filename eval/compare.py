"""Lay evaluations side by side: mean ± standard deviation over seeds, and marks where a difference is no accident.

    python eval/compare.py runs/sasrec runs/tiger-seed0 runs/tiger-seed1 --baseline sasrec
    python eval/compare.py runs/* --metrics recall@10 ndcg@10 --format latex --output table.tex

Each folder holds the metrics.json and predictions.jsonl of evaluate.py; runs of one name and several seeds are one row.
Folders come first, settings after them.
"""

import sys

from recllm import launch
from recllm.evaluation.comparison import CompareConfig, compare
from recllm.evaluation.comparison_tables import render
from recllm.files import write_whole


def main(config: CompareConfig) -> None:
    comparison = compare(config)
    if config.output is None:
        print(render(comparison, config.format, styled=launch.results.is_terminal), end="")
        return
    with write_whole(config.output) as partial:
        partial.write_text(render(comparison, config.format), encoding="utf-8")
    launch.results.print(f"written to {config.output}", highlight=False, markup=False)


if __name__ == "__main__":
    given = sys.argv[1:]
    folders = ["--runs"] if given and not given[0].startswith("-") else []
    launch.run(main, CompareConfig, description=__doc__, args=folders + given)
