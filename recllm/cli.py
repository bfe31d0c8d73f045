"""The console script. Stages have scripts of their own under data_prep/.

recllm demo              the whole way from a log to a model, on the embedded shop
recllm inspect FOLDER    what a prepared folder or a checkpoint holds
recllm version
"""

import sys
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

from recllm import launch
from recllm.errors import UserError


@dataclass
class InspectConfig:
    """Settings of `recllm inspect`."""

    folder: str = field(metadata={"help": "A prepared folder or a checkpoint."})


def inspect(config: InspectConfig) -> None:
    """Say what a folder holds: catalogue, semantic IDs, model."""
    from recllm.summary import folder_tables

    for table in folder_tables(Path(config.folder)):
        launch.results.print(table)


def main() -> None:
    name, args = (sys.argv[1], sys.argv[2:]) if len(sys.argv) > 1 else ("help", [])
    with launch.exit_codes():
        if name in ("help", "-h", "--help"):
            print(__doc__)
        elif name in ("version", "--version"):
            print(f"recllm {version('recllm')}")
        elif name == "demo":
            from recllm.demo import DemoConfig, demo  # torch and friends load only for what needs them

            launch.run(demo, DemoConfig, args=args, description=demo.__doc__, prog="recllm demo")
        elif name == "inspect":
            folder = ["--folder", *args] if args and not args[0].startswith("-") else args
            launch.run(inspect, InspectConfig, args=folder, description=inspect.__doc__, prog="recllm inspect")
        else:
            raise UserError(f"{name!r} is not a command", fix="recllm demo, recllm inspect FOLDER, recllm version")
