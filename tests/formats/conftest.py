"""What the tests of the readers share: writing a file, and reading it whole."""

import gzip
from pathlib import Path

import polars as pl
import pytest

from recllm import formats
from recllm.formats import BadLines


@pytest.fixture
def write(tmp_path):
    """write(name, content) -> path; lines are joined, a name that ends in .gz is compressed."""

    def write(name: str, content: bytes | str | list) -> Path:
        if isinstance(content, list):
            content = b"".join((line if isinstance(line, bytes) else line.encode()) + b"\n" for line in content)
        content = content.encode() if isinstance(content, str) else content
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
        return path

    return write


@pytest.fixture
def events():
    """events(format, path, bad=None) -> one data frame; stops at a bad line unless told otherwise."""
    return lambda name, path, bad=None: pl.concat(formats.by_name(name).events(path, bad or BadLines()))


@pytest.fixture
def items():
    return lambda name, path, bad=None: list(formats.by_name(name).items(path, bad or BadLines()))
