"""From the walks to a log: events with times and reviews, and which earlier events led to each purchase."""

import dataclasses
import functools
import gzip
import json
from pathlib import Path

import numpy as np
import polars as pl

from recllm.files import read_object, write_json, write_whole
from recllm.shop.floor import Floor, entropy_floor
from recllm.shop.story import CHUNK, FUNNEL, walk
from recllm.shop.texts import catalogue_items, review
from recllm.shop.world import ShopConfig, World, make_world

BEHAVIOURS = np.array(["click", "favourite", "cart", "pay"])
BEHAVIOUR_OF = np.array([0, 0, 1, 2, 3, 0, 3])  # of FUNNEL's events; a direct purchase is set apart below
OPENED = 1_672_531_200  # 1 January 2023
DAY = 86_400
REVIEWED = 0.5  # of payments


@dataclasses.dataclass(frozen=True, eq=False)
class Shop:
    """A made shop. Events of a user are consecutive rows, in time order."""

    config: ShopConfig
    world: World  # hidden facts
    ids: list[str]  # the names of the world's items 0 … N − 1
    items: list[dict]
    events: pl.DataFrame  # user, item, behaviour, timestamp, review, helpful, rating
    decisions: pl.DataFrame  # user, position, item, repeat, evidence, reasons

    @functools.cached_property
    def floor(self) -> Floor:
        """The best any model can do: over 2,000 customers at most."""
        return entropy_floor(self.config)


def make_shop(config: ShopConfig) -> Shop:
    world = make_world(config)
    ids = _ids(config, world.items)
    log = _log(world, config)
    position = np.arange(len(log["user"])) - np.searchsorted(log["user"], log["user"])
    width = len(str(config.users - 1))
    users = np.array([f"u{user:0{width}d}" for user in range(config.users)], dtype=object)
    events = pl.DataFrame(
        {
            "user": pl.Series(users[log["user"]], dtype=pl.String),
            "item": pl.Series(np.array(ids, dtype=object)[log["item"]], dtype=pl.String),
            "behaviour": pl.Series(BEHAVIOURS[log["behaviour"]].astype(object), dtype=pl.String),
            "timestamp": log["timestamp"],
        }
    )
    events = events.with_columns(_reviews(world, config, log))
    items = catalogue_items(world, ids, config.seed)
    return Shop(config, world, ids, items, events, _decisions(world, log, position, users, ids))


def write(shop: Shop, folder: str | Path) -> None:
    """interactions.jsonl.gz (an event a line), items.jsonl.gz, truth.json (config, floor, decisions)."""
    folder = Path(folder)
    rows = (
        {key: value for key, value in row.items() if value is not None} for row in shop.events.iter_rows(named=True)
    )
    _write_lines(folder / "interactions.jsonl.gz", rows)
    _write_lines(folder / "items.jsonl.gz", shop.items)
    truth = {"config": dataclasses.asdict(shop.config), "floor": dataclasses.asdict(shop.floor)}
    write_json(folder / "truth.json", truth | {"decisions": shop.decisions.to_dicts()})


def is_written(config: ShopConfig, folder: str | Path) -> bool:
    """Does the folder hold this shop? truth.json is written last; write a folder whole that held another."""
    truth = Path(folder) / "truth.json"
    return truth.exists() and read_object(truth).get("config") == dataclasses.asdict(config)


def _write_lines(path: Path, rows) -> None:
    with (
        write_whole(path) as partial,
        open(partial, "wb") as raw,
        gzip.GzipFile("", "wb", compresslevel=6, fileobj=raw, mtime=0) as stream,  # neither name nor date in it
    ):
        for row in rows:
            stream.write(json.dumps(row, ensure_ascii=False, separators=(",", ":")).encode() + b"\n")


def _ids(config: ShopConfig, N: int) -> list[str]:
    """Names that tell nothing of the item's place in the catalogue."""
    width = len(str(N - 1))
    return [f"i{number:0{width}d}" for number in np.random.default_rng([config.seed, 3]).permutation(N)]


def _log(world: World, config: ShopConfig) -> dict[str, np.ndarray]:
    """Columns over all events, users' in order: user, item, behaviour, timestamp, session, fit, anchor, first."""
    parts = []
    for chunk in range(-(-config.users // CHUNK)):
        columns = [_events_of(step, index) for index, step in enumerate(walk(world, config, chunk))]
        part = {name: np.concatenate([column[name] for column in columns]) for name in columns[0]}
        order = np.lexsort((part.pop("place"), part.pop("step"), part["user"]))
        part = {name: values[order] for name, values in part.items()}
        rng = np.random.default_rng([config.seed, 4, chunk])
        part["timestamp"] = _times(rng, part["user"], part["opens"])
        part["user"] = part["user"] + chunk * CHUNK
        parts.append(part)
    log = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    log["session"] = log.pop("opens").cumsum()
    return log


def _events_of(step, index: int) -> dict[str, np.ndarray]:
    row, place = np.nonzero(step.happened)
    behaviour = np.where((place == 0) & step.direct[row], 3, BEHAVIOUR_OF[place])
    return {
        "user": step.rows[row],
        "step": np.full(len(row), index),
        "place": place,
        "item": step.subject[row, place],
        "behaviour": behaviour,
        "first": place == 0,
        "opens": (place == 0) & (step.way[row] > 0),  # a session
        "anchor": np.where(step.fit, step.state.anchor, -1)[row],  # only where the item is its complement or upgrade
    }


def _times(rng: np.random.Generator, user: np.ndarray, opens: np.ndarray) -> np.ndarray:
    """Seconds: minutes between events of a session, days between sessions.   (E,) -> (E,)"""
    gap = np.where(opens, DAY + rng.integers(13 * DAY, size=len(user)), 5 + rng.integers(240, size=len(user)))
    total = gap.cumsum()
    first = np.searchsorted(user, user)
    return OPENED + total - total[first] + rng.integers(180 * DAY, size=int(user.max()) + 1)[user]


def _reviews(world: World, config: ShopConfig, log: dict[str, np.ndarray]) -> list[pl.Series]:
    rng = np.random.default_rng([config.seed, 5])
    E = len(log["item"])
    written = np.flatnonzero((log["behaviour"] == 3) & (rng.random(E) < REVIEWED))
    quality = world.quality[log["item"][written]]
    ratings = np.clip(np.floor(2 + 3 * quality + 1.5 * rng.random(len(written))).astype(int), 1, 5)
    helpful = rng.integers(12, size=len(written))
    turns = rng.integers(3, size=len(written))
    texts: list = [None] * E
    stars: list = [None] * E
    votes: list = [None] * E
    for row, rating, turn, vote in zip(written.tolist(), ratings.tolist(), turns.tolist(), helpful.tolist()):
        texts[row], stars[row], votes[row] = review(world, int(log["item"][row]), rating, turn), rating, vote
    return [
        pl.Series("review", texts, pl.String),
        pl.Series("helpful", votes, pl.Int64),
        pl.Series("rating", stars, pl.Int64),
    ]


def _decisions(world: World, log: dict[str, np.ndarray], position, users, ids: list[str]) -> pl.DataFrame:
    """One row a payment. `evidence`: positions of the events that raised its chance, oldest first; `reasons`: of each,

    anchor    the strongest event of the item that this one complements or upgrades
    compared  a look at another item of the leaf in the session in which the item was first seen, before it: 3 at most
    own       first sight of the item itself, or its way into the cart
    """
    item, behaviour, user = log["item"], log["behaviour"], log["user"]
    rows = []
    for row in np.flatnonzero(behaviour == 3).tolist():
        start = row - int(position[row])
        past = item[start : row + 1]
        sight = start + int(np.argmax(past == item[row]))
        found: dict[int, str] = {}
        for place in np.flatnonzero(item[start:row] == item[row]):
            if place + start == sight or behaviour[start + place] == 2:
                found[int(place)] = "own"
        session = np.arange(start, sight)
        same = (log["session"][session] == log["session"][sight]) & log["first"][session]
        same &= world.leaf[item[session]] == world.leaf[item[row]]
        found |= {int(place): "compared" for place in np.flatnonzero(same)[-3:]}
        if (anchor := log["anchor"][sight]) >= 0:
            of_anchor = np.flatnonzero(item[start:sight] == anchor)
            strongest = of_anchor[np.argmax(np.maximum(behaviour[start + of_anchor], 1))]
            found[int(strongest)] = "anchor"
        evidence = sorted(found)
        rows.append((user[row], position[row], item[row], sight < row, evidence, [found[place] for place in evidence]))
    columns = list(zip(*rows)) if rows else [[]] * 6
    return pl.DataFrame(
        [
            pl.Series("user", [users[number] for number in columns[0]], pl.String),
            pl.Series("position", [int(place) for place in columns[1]], pl.UInt32),
            pl.Series("item", [ids[number] for number in columns[2]], pl.String),
            pl.Series("repeat", [bool(seen) for seen in columns[3]], pl.Boolean),
            pl.Series("evidence", columns[4], pl.List(pl.UInt32)),
            pl.Series("reasons", columns[5], pl.List(pl.String)),
        ]
    )


assert len(BEHAVIOUR_OF) == len(FUNNEL)
