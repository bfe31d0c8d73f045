"""The folder that is prepared: what it was made from, whether it may be replaced, and the moment it becomes another.

Everything is made in a hidden folder inside it. Only when all of it is there do the files move in: catalogue.json goes
first and comes last, so a folder without it does not count as prepared, and a failed run changes nothing.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from recllm import formats, shop
from recllm.catalogue import Catalogue
from recllm.errors import UserError
from recllm.files import digest, make_folder, read_object, sha256_file, write_folder_whole, write_json
from recllm.preparation.config import PrepareConfig

FOLDER_VERSION = 1
FILES = ("items.parquet", "interactions.parquet", "splits.parquet")
REPORT = "catalogue.json"
STAGING = ".prepare-staging"
SHOP = "shop"  # where --format shop leaves its raw files


def sources(config: PrepareConfig) -> list[dict]:
    """Each input file's role, name, size and SHA-256; a missing file is found here, before anything is written."""
    if config.format == "shop":
        return [{"role": "shop", "file": "shop", "settings": repr(_shop_config(config))}]
    reader = formats.by_name(config.format)
    files = [("interactions", file) for path in config.interactions for file in reader.files(_present(path))]
    files += [("items", _present(path)) for path in config.items]
    taken = {(Path(config.output) / name).resolve() for name in (*FILES, REPORT)}
    for _, file in files:
        if file.resolve() in taken:
            raise UserError("would be overwritten by its own result", file=file, fix="choose another --output")
    return [
        {"role": role, "file": file.name, "bytes": file.stat().st_size, "sha256": sha256_file(file)}
        for role, file in files
    ]


def _present(path: str) -> Path:
    if not Path(path).exists():
        raise UserError("the file does not exist", file=path, fix="check the path")
    return Path(path)


def made_of(config: PrepareConfig, of: list[dict]) -> str:
    """Everything that the result is a function of."""
    return digest(str(FOLDER_VERSION), repr(of), repr(config.fingerprinted()), config.name or "")


def already(config: PrepareConfig, made_of: str) -> Catalogue | None:
    """The folder if it is what would be made; an error if it holds something else."""
    output = Path(config.output)
    if config.overwrite or not (output / REPORT).exists():
        foreign = [name for name in FILES if (output / name).exists() and not (output / STAGING).exists()]
        if foreign and not config.overwrite:
            raise UserError(
                "was not made by prepare.py and would be replaced", file=output / foreign[0], fix="another --output"
            )
        return None
    if read_object(output / REPORT).get("made_of") != made_of:
        raise UserError(
            "the folder holds a data set made from other files or with other settings",
            file=output,
            fix="choose another output, or --overwrite",
        )
    shutil.rmtree(output / STAGING, ignore_errors=True)  # of a run that was killed when all was in place
    whole = config.format != "shop" or shop.is_written(_shop_config(config), output / SHOP)
    return Catalogue.load(output) if whole else None


@contextmanager
def staged_in(output: Path) -> Iterator[Path]:
    """A hidden folder to make everything in; gone afterwards, whatever happens but a kill."""
    folder = output / STAGING
    shutil.rmtree(folder, ignore_errors=True)  # what a killed run left
    fresh = not output.exists()
    make_folder(folder)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if fresh and not any(output.iterdir()):
            output.rmdir()


def move_in(made: Path, output: Path, report: dict) -> None:
    """Replace what is there by what was made."""
    files = {name: sha256_file(made / name) for name in FILES}
    (output / REPORT).unlink(missing_ok=True)
    for name in FILES:
        os.replace(made / name, output / name)
    write_json(output / REPORT, report | {"files": files})


def with_the_shop(config: PrepareConfig) -> PrepareConfig:
    """The shop is written as any user's data would lie there, and read as such."""
    folder, wanted = Path(config.output) / SHOP, _shop_config(config)
    if folder.exists() and not (folder / "truth.json").exists():
        raise UserError("is in the way of the shop's own files", file=folder, fix="choose another output")
    if not shop.is_written(wanted, folder):
        with write_folder_whole(folder) as raw:
            shop.write(shop.make_shop(wanted), raw)
    files = {name: [str(folder / f"{name}.jsonl.gz")] for name in ("interactions", "items")}
    return replace(config, format="jsonl", name=config.name or "shop", **files)


def _shop_config(config: PrepareConfig) -> shop.ShopConfig:
    return shop.ShopConfig(items=config.shop_items, users=config.shop_users, seed=config.seed)
