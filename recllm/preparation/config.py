"""What can be chosen when a log and a catalogue are prepared. The defaults are the field's conventions."""

from dataclasses import dataclass, field
from typing import Literal

from recllm.errors import UserError


@dataclass
class PrepareConfig:
    """Settings of `data_prep/prepare.py`."""

    output: str = field(metadata={"help": "Folder to write."})
    format: str = field(default="jsonl", metadata={"help": "Format of the input (docs/data_formats.md lists them)."})
    interactions: list[str] = field(default_factory=list, metadata={"help": "Interaction files, in order of time."})
    items: list[str] = field(default_factory=list, metadata={"help": "Item files; without them items have no text."})
    name: str | None = field(default=None, metadata={"help": "Name of the data set; default: the output folder's."})

    behaviours: list[str] = field(default_factory=list, metadata={"help": "Keep only these. Default: all."})
    rename: list[str] = field(default_factory=list, metadata={"help": "Rename behaviours: purchase=pay view=click."})
    repeats: Literal["keep", "first", "last", "consecutive"] = field(
        default="keep",
        metadata={
            "help": "An item that a user meets again: keep every event; only the first or last event of each user and "
            "item; or drop an event that repeats the item and behaviour just before it (consecutive)."
        },
    )
    user_core: int = field(default=5, metadata={"help": "Fewest events of a user. Iterated with item_core; 1: off."})
    item_core: int = field(default=5, metadata={"help": "Fewest events of an item. Iterated with user_core; 1: off."})

    split: Literal["leave-one-out", "time", "official", "conversion"] = field(
        default="leave-one-out",
        metadata={
            "help": "leave-one-out: a user's last event is the test target, the one before it validation. time: by "
            "valid_from and test_from, or by shares. official: as the files say. conversion: a user's last event of "
            "target_behaviour is the test target, the one before it of that kind validation."
        },
    )
    target_behaviour: str = field(
        default="pay", metadata={"help": "conversion: the behaviour that is recommended for."}
    )
    held_out_share: float = field(
        default=1.0, metadata={"help": "conversion: share of the users who have a test target, drawn by id."}
    )
    valid_from: float | None = field(default=None, metadata={"help": "time: first timestamp of validation."})
    test_from: float | None = field(default=None, metadata={"help": "time: first timestamp of test."})
    valid_share: float = field(default=0.1, metadata={"help": "time, without valid_from: share of the targets."})
    test_share: float = field(default=0.1, metadata={"help": "time, without test_from: share of the targets."})
    max_history: int = field(
        default=50, metadata={"help": "Longest history shown to a model (the last ones). Nothing is deleted on disk."}
    )

    reviews_per_item: int = field(
        default=5, metadata={"help": "Best reviews kept for an item's text, from training events only. 0: none."}
    )
    unknown_items: Literal["stop", "drop", "keep"] = field(
        default="stop",
        metadata={"help": "Events of items that the item files lack: stop, drop them, or keep them without text."},
    )
    cold_items: bool = field(default=False, metadata={"help": "Keep items of the item files that have no event."})
    on_bad_line: Literal["stop", "skip"] = field(
        default="stop", metadata={"help": "stop at a line that cannot be read, or skip, count and list it."}
    )

    shop_items: int = field(default=600, metadata={"help": "format shop: how many items."})
    shop_users: int = field(default=2000, metadata={"help": "format shop: how many users."})
    seed: int = field(default=0, metadata={"help": "format shop: its seed."})

    bucket_events: int = field(
        default=1_000_000, metadata={"help": "Events held in memory at a time; the result does not depend on it."}
    )
    overwrite: bool = field(default=False, metadata={"help": "Replace a folder that was prepared in another way."})

    def __post_init__(self):
        for name in ("user_core", "item_core", "max_history", "bucket_events"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}", fix=f"--{name} 1 or more")
        if self.reviews_per_item < 0:
            raise UserError(f"reviews_per_item must not be negative, got {self.reviews_per_item}")
        if not (0 < self.valid_share < 1 and 0 < self.test_share < 1 and self.valid_share + self.test_share < 1):
            raise UserError("valid_share and test_share must be positive and sum to less than 1")
        if (self.valid_from is None) != (self.test_from is None):
            raise UserError("valid_from and test_from belong together", fix="set both or neither")
        if self.valid_from is not None and self.valid_from >= self.test_from:
            raise UserError(f"valid_from {self.valid_from} is not before test_from {self.test_from}")
        if self.valid_from is not None and self.split != "time":
            raise UserError(f"valid_from has no meaning in a {self.split} split", fix="add --split time")
        if not 0 < self.held_out_share <= 1:
            raise UserError(f"held_out_share is {self.held_out_share}", fix="a share above 0 and up to 1, such as 0.3")
        if self.held_out_share < 1 and self.split != "conversion":
            raise UserError(f"held_out_share has no meaning in a {self.split} split", fix="add --split conversion")
        for pair in self.rename:
            if pair.count("=") != 1 or pair.startswith("=") or pair.endswith("="):
                raise UserError(f"rename: {pair!r} is not old=new", fix="--rename purchase=pay")
        if self.format != "shop" and not self.interactions:
            raise UserError("no interactions given", fix="--interactions FILE …, or --format shop for our own")

    @property
    def renamed(self) -> dict[str, str]:
        return dict(pair.split("=") for pair in self.rename)

    def fingerprinted(self) -> dict:
        """The settings that decide the result: where it is written and how much memory it takes do not."""
        skip = {"output", "name", "interactions", "items", "bucket_events", "overwrite"}
        if self.split != "conversion":  # a folder made before there were these settings is the same
            skip |= {"target_behaviour", "held_out_share"}
        return {name: value for name, value in vars(self).items() if name not in skip}
