"""Train and measure the baselines of a prepared data set, and lay them side by side.

    python eval/baselines.py --data runs/mine --output runs/mine/baselines --seeds 0 1 2
    python eval/baselines.py --data runs/mine --output runs/mine/baselines --split valid --settings tiger.epochs=16
    python eval/baselines.py --data runs/shop --output runs/shop/baselines --protocol conversion

Popularity, repeat-last, item-kNN, SASRec and TIGER-style (a small Qwen3 from scratch on the data's semantic IDs), all
over the whole catalogue on the same users. Run again, it does what is missing. Look at test once, when all is chosen.
Of conversions there are three tables: all, items that the user had met before, new ones.
"""

from recllm import launch
from recllm.evaluation.comparison import FILE, CompareConfig, compare
from recllm.evaluation.comparison_tables import render
from recllm.evaluation.repeats import kinds_of
from recllm.files import read_object
from recllm.yardstick import BaselinesConfig, run_baselines


def main(config: BaselinesConfig) -> None:
    folders = run_baselines(config)
    metrics = [f"{name}@{k}" for name in ("recall", "ndcg") for k in config.k]
    for cases in ("all", *kinds_of(read_object(folders[0] / FILE))):
        comparison = compare(CompareConfig(runs=list(map(str, folders)), metrics=metrics, cases=cases))
        print(render(comparison, "text", styled=launch.results.is_terminal), end="")


if __name__ == "__main__":
    launch.run(main, BaselinesConfig, description=__doc__)
