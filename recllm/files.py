"""Files are written whole or not at all, hashed in one way, and read with errors that name the file and the line."""

import contextlib
import glob
import gzip
import hashlib
import json
import os
import shutil
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from recllm.errors import UserError

_PARTIAL = ".partial-"  # what a killed run leaves is hidden, named so, and swept away by the next run
_ASIDE = ".aside"  # the old folder while the new one takes its place; never swept, put back if a kill came between


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}{_PARTIAL}{os.getpid()}")


def sweep(path: str | Path) -> None:
    """Remove what killed runs left while they wrote `path`. Only the running stage may write there, so none is live."""
    path = Path(path)
    for left in path.parent.glob(f".{glob.escape(path.name)}{_PARTIAL}*"):
        shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)


@contextlib.contextmanager
def write_whole(path: str | Path) -> Iterator[Path]:
    """Yield a hidden path beside `path` to write to; rename it over `path` at the end, delete it on an exception."""
    path = Path(path)
    partial = _partial(path)
    with _writable(path):
        if path.is_dir():
            raise UserError("is a folder, and a file is to be written", file=path, fix="choose another name")
        path.parent.mkdir(parents=True, exist_ok=True)
        sweep(path)
        partial.touch()
    try:
        yield partial
        with _writable(path):
            with open(partial, "rb") as written:
                os.fsync(written.fileno())  # a rename may reach the disk before the bytes do
            partial.chmod(0o666 & ~_umask())  # some libraries write for the owner alone
            os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def write_folder_whole(folder: str | Path) -> Iterator[Path]:
    """The same for a folder. An existing `folder` is replaced only when the new one is complete."""
    folder = Path(folder)
    partial = _partial(folder)
    with _writable(folder):
        restore_folder(folder)
        make_folder(folder.parent)
        sweep(folder)
        partial.mkdir()
    try:
        yield partial
        with _writable(folder):
            for file in partial.rglob("*"):
                file.chmod((0o777 if file.is_dir() else 0o666) & ~_umask())
            aside = folder.with_name(f".{folder.name}{_ASIDE}")
            if folder.exists():  # a folder cannot be replaced in one step
                os.replace(folder, aside)
            os.replace(partial, folder)
            shutil.rmtree(aside, ignore_errors=True)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def restore_folder(folder: str | Path) -> None:
    """Put back the old folder where a kill came between its going and the new one's coming."""
    folder = Path(folder)
    aside = folder.with_name(f".{folder.name}{_ASIDE}")
    if aside.exists():
        if folder.exists():
            shutil.rmtree(aside)
        else:
            os.replace(aside, folder)


def make_folder(folder: str | Path) -> Path:
    """The folder, made if it is not there; one sentence if it cannot be."""
    folder = Path(folder)
    with _writable(folder):
        folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextlib.contextmanager
def _writable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot be written ({error.strerror})", file=path, fix="choose another output") from None


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_json(path: str | Path, value: Any) -> None:
    with write_whole(path) as partial:
        partial.write_text(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


def read_json(path: str | Path) -> Any:
    path = Path(path)
    try:
        return json.loads(b"\n".join(line for _, line in read_lines(path)))
    except UnicodeDecodeError:
        raise UserError("not UTF-8 text", file=path, fix="check the path") from None
    except json.JSONDecodeError as error:
        raise UserError(f"not valid JSON ({error.msg})", file=path, line=error.lineno) from None


def read_object(path: str | Path) -> dict:
    """A JSON file of ours that holds an object."""
    if not isinstance(value := read_json(path), dict):
        raise UserError("holds no JSON object", file=path, fix="it is damaged: make it again")
    return value


def require(path: str | Path, what: str, fix: str) -> Path:
    """`path`, or one sentence that says what is missing and which command makes it."""
    if not (path := Path(path)).exists():
        raise UserError(f"{what} does not exist", file=path, fix=fix)
    return path


def read_lines(path: str | Path) -> Iterator[tuple[int, bytes]]:
    """(line number from 1, line without its end) of a plain or gzip file, as a stream."""
    path = Path(path)
    number = 0
    try:
        if path.is_dir():
            raise UserError("is a folder, and a file is wanted", file=path, fix="give the files in it")
        with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as stream:
            for line in stream:
                number += 1
                yield number, line.rstrip(b"\r\n")
    except FileNotFoundError:
        raise UserError("the file does not exist", file=path, fix="check the path") from None
    except (EOFError, zlib.error):
        raise UserError(
            "the gzip stream is truncated or damaged", file=path, line=number + 1, fix="download the file again"
        ) from None
    except gzip.BadGzipFile:
        raise UserError("not a gzip file", file=path, fix="remove .gz from its name or compress it") from None
    except OSError as error:
        raise UserError(f"cannot be read ({error.strerror})", file=path, fix="check the path and its rights") from None


def sha256_file(path: str | Path) -> str:
    if Path(path).is_dir():
        raise UserError("is a folder, and a file is wanted", file=path, fix="give the files in it")
    try:
        with open(path, "rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except FileNotFoundError:
        raise UserError("the file does not exist", file=path, fix="check the path") from None
    except OSError as error:
        raise UserError(f"cannot be read ({error.strerror})", file=path, fix="check the path and its rights") from None


def digest(*parts: str | bytes) -> str:
    """SHA-256 of the parts, each preceded by its length, so that ("ab", "c") and ("a", "bc") differ."""
    return digest_all(parts)


def digest_all(parts: Iterable[str | bytes]) -> str:
    """The same of a stream of parts."""
    state = hashlib.sha256()
    for part in parts:
        part = part.encode() if isinstance(part, str) else part
        state.update(len(part).to_bytes(8, "little"))
        state.update(part)
    return state.hexdigest()
