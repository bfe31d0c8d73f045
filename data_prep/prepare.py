"""Prepare an interaction log and a catalogue: read, order, filter, split.

    python data_prep/prepare.py --format jsonl --interactions log.jsonl.gz --items items.jsonl.gz --output runs/mine

Writes items.parquet, interactions.parquet, splits.parquet and catalogue.json. docs/data_formats.md lists the formats.
"""

from recllm import launch
from recllm.preparation import PrepareConfig, prepare
from recllm.summary import catalogue_table


def main(config: PrepareConfig) -> None:
    launch.results.print(catalogue_table(prepare(config)))


if __name__ == "__main__":
    launch.run(main, PrepareConfig, description=__doc__)
