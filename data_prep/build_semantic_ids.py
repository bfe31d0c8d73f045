"""Give every item of a prepared folder its semantic ID: FOLDER/semantic_ids.json and FOLDER/quantizer.safetensors.

    python data_prep/build_semantic_ids.py --data data/shop
    python data_prep/build_semantic_ids.py --data data/shop --collisions reassign --levels 3 --codes 64
    python data_prep/build_semantic_ids.py --data data/instruments --import_index Instruments.index.json

Prints how good the IDs are. Run again, it prints the same and changes nothing.
"""

from recllm import launch
from recllm.semantic_ids.build import BuildConfig, build
from recllm.semantic_ids.report import report_tables


def main(config: BuildConfig) -> None:
    table = build(config)
    for part in report_tables(table.report):
        launch.results.print(part)
    launch.results.print(f"written to {config.folder}", highlight=False)


if __name__ == "__main__":
    launch.run(main, BuildConfig, description=__doc__)
