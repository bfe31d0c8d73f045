"""From raw files to a prepared folder: `prepare(config)` reads like the list of what happens.

stage      raw lines → parquet parts in file order, bad lines refused or counted
code       ids → integers; events → buckets of whole users
order      by time; repeats; iterated k-core
split      train, valid, test
write      items, interactions, splits, and last catalogue.json, without which a folder does not count as prepared
"""

from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import numpy as np
import polars as pl

from recllm import formats
from recllm.catalogue import Catalogue, fingerprint_items
from recllm.errors import UserError
from recllm.files import digest, digest_all
from recllm.formats.records import BadLines
from recllm.launch import console
from recllm.preparation import filtering, folder, items, splitting, staging, writing
from recllm.preparation.config import PrepareConfig

__all__ = ["PrepareConfig", "prepare"]


def prepare(config: PrepareConfig) -> Catalogue:
    """Prepare `config.output`, or return it as it is when it was made from the same files with the same settings."""
    output = Path(config.output)
    of = folder.sources(config)
    made_of = folder.made_of(config, of)
    if (done := folder.already(config, made_of)) is not None:
        console.print(f"{output} is prepared already, from the same files with the same settings.")
        return done
    with folder.staged_in(output) as made:
        raw = folder.with_the_shop(config) if config.format == "shop" else config
        report = _prepare(raw, made) | {"made_of": made_of, "sources": of}
        folder.move_in(made, output, report)
    return Catalogue.load(output)


def _prepare(config: PrepareConfig, made: Path) -> dict:
    bad = BadLines(config.on_bad_line)
    with console.status("reading items"):
        item_parts = items.stage_items(config, bad, made)
    staged = staging.stage_events(_counted(_events(config, bad)), made, config)

    with console.status("ordering and filtering events"):
        buckets = staging.bucket_users(staged, made, config.bucket_events)
        ties, dropped = _ordered(buckets, staged, config)
        dropped |= _without_unknown_items(buckets, staged, item_parts, config)
        rounds = filtering.k_core(buckets, len(staged.users), len(staged.items), config.user_core, config.item_core)
        _, of_item = filtering.counts(buckets, len(staged.users), len(staged.items))
        if not of_item.any():
            raise UserError(
                f"no event is left of {staged.events:,}: no users with {config.user_core} and items with "
                f"{config.item_core} events remain",
                file=config.interactions[0],
                fix="lower --user_core and --item_core",
            )

    with console.status("splitting and writing"):
        splitting.check(config, staged.timed, buckets)
        boundaries = splitting.time_boundaries(buckets, config) if config.split == "time" else None
        converts = splitting.conversions(config, staged) if config.split == "conversion" else None
        label = {
            "leave-one-out": splitting.leave_one_out,
            "official": splitting.official,
            "time": lambda ordered: splitting.by_time(ordered, *boundaries),
            "conversion": lambda ordered: splitting.by_conversion(ordered, converts(ordered)),
        }[config.split]
        written = writing.write_events(made, staged, buckets, label)
        splitting.refuse_empty(config, written.splits)
        survivors = staged.items.filter(pl.Series(of_item > 0))
        table = items.gather_items(item_parts, survivors, config.cold_items)
        reviews = items.gather_reviews(staged, written.trains, table["item"], config.reviews_per_item)
        table = items.with_own_columns(items.with_reviews(table, reviews))
        table.write_parquet(made / "items.parquet", compression="zstd")
    dropped["k_core_rounds"] = rounds
    return {
        "recllm": version("recllm"),
        "version": folder.FOLDER_VERSION,
        "name": config.name or Path(config.output).resolve().name,
        **_counts(staged, written, table),
        "time_boundaries": boundaries,
        "max_history": config.max_history,
        "dropped": dropped,
        "cold_items": len(table) - len(survivors),
        "same_timestamp": {"events": ties, "rule": "events of one user and timestamp keep the order of the file"},
        "bad_lines": {"count": bad.count, "listed": bad.listed},
        "settings": config.fingerprinted(),
        **_fingerprints(table, written),
    }


def _fingerprints(table: pl.DataFrame, written: writing.Written) -> dict[str, str]:
    """Of the items and of everything; of the content, so that another version of parquet changes neither."""
    items_fingerprint = fingerprint_items(table["item"].to_list())
    text = digest_all(repr(row) for row in table.iter_rows())
    return {"items_fingerprint": items_fingerprint, "fingerprint": digest(items_fingerprint, text, written.fingerprint)}


def _counts(staged: staging.Staged, written: writing.Written, table: pl.DataFrame) -> dict:
    return {
        "users": written.users,
        "items": len(table),
        "interactions": written.events,
        "behaviours": dict(sorted(written.behaviours.items(), key=lambda pair: (-pair[1], pair[0]))),
        "events_per_user": {
            "min": written.shortest,
            "mean": round(written.events / written.users, 4),
            "max": written.longest,
        },
        "splits": written.splits,
        "read": {"events": staged.events, "users": len(staged.users), "items": len(staged.items)},
    }


def _ordered(buckets: list[Path], staged: staging.Staged, config: PrepareConfig) -> tuple[int, dict]:
    ties = 0

    def order(events: np.ndarray) -> np.ndarray:
        nonlocal ties
        events = filtering.in_order(events)
        ties += filtering.count_ties(events) if staged.timed else 0
        return filtering.without_repeats(events, config.repeats)

    left = filtering.rewrite(buckets, order)
    return ties, {"repeats": staged.events - left}


def _without_unknown_items(buckets, staged: staging.Staged, item_parts: list[Path], config: PrepareConfig) -> dict:
    """Events of items that the item files lack: refused, dropped or kept, as `config.unknown_items` says."""
    _, of_item = filtering.counts(buckets, len(staged.users), len(staged.items))
    events_of = pl.DataFrame({"item": staged.items, "events": of_item}).filter(pl.col("events") > 0)
    unknown = items.unknown_items(item_parts, events_of)
    if len(unknown) and config.unknown_items == "stop":
        items.refuse_unknown(unknown, staged, config.interactions)
    if len(unknown) and config.unknown_items == "drop":
        lost = staged.items.is_in(unknown["item"].implode()).to_numpy()
        filtering.rewrite(buckets, lambda events: events[~lost[events["item"]]])
    events = int(unknown["events"].sum())
    return {"unknown_items": {"policy": config.unknown_items, "items": len(unknown), "events": events}}


def _events(config: PrepareConfig, bad: BadLines) -> Iterator[pl.DataFrame]:
    """The events of all files, with the number of the file."""
    reader = formats.by_name(config.format)
    for number, path in enumerate(config.interactions):
        for batch in reader.events(Path(path), bad):
            yield batch.with_columns(file=pl.lit(number, pl.UInt16))


def _counted(batches):
    """The batches, with a running count on stderr."""
    with console.status("reading events") as status:
        seen = 0
        for batch in batches:
            seen += len(batch)
            status.update(f"reading events: {seen:,}")
            yield batch
