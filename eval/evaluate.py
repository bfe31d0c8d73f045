"""Measure a checkpoint: every user of the split, the whole catalogue, items and not strings, in one of its modes.

    python eval/evaluate.py --model runs/mine/model --data runs/mine --output runs/mine/test
    python eval/evaluate.py --model … --data … --output … --mode reasoning --samples 10 --temperature 0.7 --top_p 0.9
    python eval/evaluate.py --model … --data … --output … --mode reason_then_beam --users 1000
    python eval/evaluate.py --model … --data … --output … --mode reflection --beams 20 --entropy_weight 0.2
    python eval/evaluate.py --model … --data … --output … --mode conversion --target_behaviour pay
    torchrun --nproc_per_node 4 eval/evaluate.py --model … --data … --output …          (each takes its share of users)

Writes predictions.jsonl and metrics.json. Killed and run again, it goes on where it was; run again after the end, it
prints the same. docs/evaluation.md explains the figures.
"""

from recllm import launch
from recllm.evaluation.scoring import score_tables
from recllm.evaluation.stage import EvaluateConfig, evaluate


def main(config: EvaluateConfig) -> None:
    if (result := evaluate(config)) is not None:
        for table in score_tables(result):
            launch.results.print(table)


if __name__ == "__main__":
    launch.run(main, EvaluateConfig, description=__doc__)
