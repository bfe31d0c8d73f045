"""From raw files to a prepared folder: `prepare(config)` reads like the list of what happens.

stage      raw lines → parquet parts in file order, bad lines refused or counted
code       ids → integers; events → buckets of whole users
order      by time; repeats; iterated k-core
split      train, valid, test
write      items, interactions, splits, and last catalogue.json, without which a folder does not count as prepared
"""

import shutil
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
import polars as pl

from recllm import formats, shop
from recllm.catalogue import Catalogue, fingerprint_items
from recllm.errors import UserError
from recllm.files import digest, digest_all, read_json, sha256_file, write_json, write_whole
from recllm.formats.records import BadLines
from recllm.launch import console
from recllm.preparation import filtering, items, splitting, staging, writing
from recllm.preparation.config import PrepareConfig

__all__ = ["PrepareConfig", "prepare"]

FOLDER_VERSION = 1
FILES = ("items.parquet", "interactions.parquet", "splits.parquet")
STAGING = ".prepare-staging"


def prepare(config: PrepareConfig) -> Catalogue:
    """Prepare `config.output`, or return it as it is when it was made from the same files with the same settings."""
    output = Path(config.output)
    if config.format == "shop":
        config = _with_the_shop(config, output)
    sources = _sources(config)
    made_of = digest(*(f"{source['file']} {source['sha256']}" for source in sources), repr(config.fingerprinted()))
    if (done := _already(output, made_of, config.overwrite)) is not None:
        console.print(f"{output} is prepared already, from the same files with the same settings.")
        return done

    folder = output / STAGING
    shutil.rmtree(folder, ignore_errors=True)  # what a killed run left
    folder.mkdir(parents=True)
    try:
        (output / "catalogue.json").unlink(missing_ok=True)
        report = _prepare(config, output, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    files = {name: sha256_file(output / name) for name in FILES}
    write_json(output / "catalogue.json", report | {"files": files, "made_of": made_of, "sources": sources})
    return Catalogue.load(output)


def _prepare(config: PrepareConfig, output: Path, folder: Path) -> dict:
    reader, bad = formats.by_name(config.format), BadLines(config.on_bad_line)
    with console.status("reading items"):
        item_parts = items.stage_items(_each(config.items, reader.items, bad), folder)
    batches = _counted(_each(config.interactions, reader.events, bad))
    staged = staging.stage_events(batches, folder, config)

    with console.status("ordering and filtering events"):
        buckets = staging.bucket_users(staged, folder, config.bucket_events)
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
        label = {
            "leave-one-out": splitting.leave_one_out,
            "official": splitting.official,
            "time": partial(splitting.by_time, **dict(zip(("valid_from", "test_from"), boundaries or ()))),
        }[config.split]
        written = writing.write_events(output, staged, buckets, label)
        survivors = staged.items.filter(pl.Series(of_item > 0))
        table = items.gather_items(item_parts, survivors, config.cold_items)
        reviews = items.gather_reviews(staged, written.trains, table["item"], config.reviews_per_item)
        table = items.with_own_columns(items.with_reviews(table, reviews))
        with write_whole(output / "items.parquet") as path:
            table.write_parquet(path, compression="zstd")
    dropped["k_core_rounds"] = rounds
    return {
        "recllm": version("recllm"),
        "version": FOLDER_VERSION,
        "name": config.name or output.resolve().name,
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
        items.refuse_unknown(unknown, staged, config.interactions[0])
    if len(unknown) and config.unknown_items == "drop":
        lost = staged.items.is_in(unknown["item"].implode()).to_numpy()
        filtering.rewrite(buckets, lambda events: events[~lost[events["item"]]])
    events = int(unknown["events"].sum())
    return {"unknown_items": {"policy": config.unknown_items, "items": len(unknown), "events": events}}


def _each(paths: list[str], read, bad: BadLines):
    for path in paths:
        yield from read(Path(path), bad)


def _counted(batches):
    """The batches, with a running count on stderr."""
    with console.status("reading events") as status:
        seen = 0
        for batch in batches:
            seen += len(batch)
            status.update(f"reading events: {seen:,}")
            yield batch


def _sources(config: PrepareConfig) -> list[dict]:
    """Each input file's name, size and SHA-256; a missing file is found here, before anything is written."""
    reader = formats.by_name(config.format)
    files = [file for path in config.interactions for file in reader.files(_present(path))]
    files += [_present(path) for path in config.items]
    return [{"file": file.name, "bytes": file.stat().st_size, "sha256": sha256_file(file)} for file in files]


def _present(path: str) -> Path:
    if not Path(path).exists():
        raise UserError("the file does not exist", file=path, fix="check the path")
    return Path(path)


def _already(output: Path, made_of: str, overwrite: bool) -> Catalogue | None:
    """The folder if it is what would be made; an error if it holds something else."""
    if not (output / "catalogue.json").exists() or overwrite:
        return None
    if read_json(output / "catalogue.json").get("made_of") != made_of:
        raise UserError(
            "the folder holds a data set made from other files or with other settings",
            file=output,
            fix="choose another --output, or --overwrite",
        )
    return Catalogue.load(output)


def _with_the_shop(config: PrepareConfig, output: Path) -> PrepareConfig:
    """The shop is written as any user's data would lie there, and read as such."""
    raw = output / "raw"
    wanted = shop.ShopConfig(items=config.shop_items, users=config.shop_users, seed=config.seed)
    if not shop.is_written(wanted, raw):
        shop.write(shop.make_shop(wanted), raw)
    return PrepareConfig(
        **vars(config)
        | {
            "format": "jsonl",
            "interactions": [str(raw / "interactions.jsonl.gz")],
            "items": [str(raw / "items.jsonl.gz")],
            "name": config.name or "shop",
        }
    )
