"""Prepared folders of users who click, put into the cart and pay, with semantic IDs, split by conversions."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from recllm.catalogue import Catalogue
from recllm.preparation import PrepareConfig, prepare
from recllm.semantic_ids import SemanticIdTable

Events = Mapping[str, Sequence[tuple[str, str]]]  # user → (item, behaviour), oldest first


def write_events(folder: str | Path, sequences: Events, split: str = "conversion", **settings) -> Catalogue:
    """`prepare` of these, and an index of two levels; the last item of an odd catalogue has one code alone."""
    raw = Path(folder) / "raw.jsonl"
    raw.parent.mkdir(parents=True, exist_ok=True)
    users = (
        {"user": user, "items": [item for item, _ in events], "behaviours": [kind for _, kind in events]}
        for user, events in sequences.items()
    )
    raw.write_text("".join(json.dumps(user) + "\n" for user in users))
    data = str(Path(folder) / "data")
    catalogue = prepare(PrepareConfig(data, interactions=[str(raw)], user_core=1, item_core=1, split=split, **settings))
    count = len(catalogue.item_ids)
    codes = np.array([[number // 4, number % 4] for number in range(count)], np.int32)
    if count % 4 == 1:
        codes[-1, 1] = -1
    SemanticIdTable(
        tuple(catalogue.item_ids), codes, (count // 4 + 1, 4), items_fingerprint=catalogue.items_fingerprint
    ).save(catalogue.folder / "semantic_ids.json")
    return catalogue


def random_shop(users: int = 20, items: int = 13, seed: int = 0) -> dict[str, list[tuple[str, str]]]:
    """Each user's last two payments are of items that nobody else meets, and that the user meets before or not."""
    random = np.random.default_rng(seed)
    sequences = {}
    for user in range(users):
        events = [
            (f"i{random.integers(items):02d}", random.choice(["click", "click", "cart", "pay"]).item())
            for _ in range(random.integers(1, 9))
        ]
        for held in ("valid", "test")[: random.integers(3)]:
            events += [(f"{held}{user}", "pay"), (f"i{random.integers(items):02d}", "click")]
        sequences[f"u{user:02d}"] = events
    return sequences
