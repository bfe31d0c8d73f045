"""Whole files or none; one sentence for what cannot be read."""

import gzip
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recllm.errors import UserError
from recllm.files import digest, read_json, read_lines, write_folder_whole, write_json, write_whole


def test_an_exception_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), write_whole(path) as partial:
        partial.write_text(f"half {1 / 0}")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_killed_run_left_is_swept(tmp_path):
    (tmp_path / ".file.txt.partial-123").write_text("half")
    (tmp_path / ".other.txt.partial-123").write_text("another stage's")
    with write_whole(tmp_path / "file.txt") as partial:
        partial.write_text("whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".other.txt.partial-123", "file.txt"]


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path):
    folder = tmp_path / "model"
    with write_folder_whole(folder) as partial:
        (partial / "old").touch()
    with pytest.raises(IsADirectoryError), write_folder_whole(folder) as partial:
        partial.write_text("a folder is not a file")
    assert [path.name for path in folder.iterdir()] == ["old"]
    with write_folder_whole(folder) as partial:
        (partial / "new").touch()
    assert [path.name for path in folder.iterdir()] == ["new"]
    assert list(tmp_path.iterdir()) == [folder]


def test_a_kill_between_the_two_renames_loses_neither_folder(tmp_path, monkeypatch):
    folder = tmp_path / "model"
    with write_folder_whole(folder) as partial:
        (partial / "old").touch()

    def killed(source, target, replace=os.replace):
        replace(source, target)
        raise KeyboardInterrupt  # after the first rename, as a kill would come

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt), write_folder_whole(folder):
        patch.setattr(os, "replace", killed)
    assert not folder.exists()
    with pytest.raises(ZeroDivisionError), write_folder_whole(folder) as partial:
        (partial / f"half {1 / 0}").touch()
    assert [path.name for path in folder.iterdir()] == ["old"]
    assert list(tmp_path.iterdir()) == [folder]


def test_what_cannot_be_written_is_a_sentence(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "file" / "below.txt", "/proc/nothing/there"):
        with pytest.raises(UserError, match=r"is a folder|cannot be written"), write_whole(path):
            pass
    for path in (tmp_path / "file" / "below", "/proc/nothing"):
        with pytest.raises(UserError, match="cannot be written"), write_folder_whole(path):
            pass


def test_files_are_for_everybody_whom_the_umask_lets_in(tmp_path):
    with write_whole(tmp_path / "file") as partial:
        partial.touch(mode=0o600)
    (tmp_path / "usual").touch()
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_a_folder_that_cannot_be_written_is_a_sentence(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"), write_whole(tmp_path / "file" / "below.txt"):
        pass


@given(st.binary(min_size=1, max_size=300), st.floats(0, 1, exclude_max=True))
def test_a_truncated_gzip_is_a_sentence_wherever_it_is_cut(tmp_path_factory, content, share):
    path = tmp_path_factory.mktemp("gz") / "log.gz"
    whole = gzip.compress(content)
    path.write_bytes(whole[: int(len(whole) * share)] or whole[:1])
    with pytest.raises(UserError, match="gz"):
        list(read_lines(path))


def test_lines_are_numbered_from_one(tmp_path):
    path = tmp_path / "log"
    path.write_bytes(b"a\r\n\nb")
    assert list(read_lines(path)) == [(1, b"a"), (2, b""), (3, b"b")]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [(b'{"a": 1,}', "line 1: not valid JSON"), (b'{"a":\n\n]', "line 3: not valid JSON"), (b"\xff", "not UTF-8")],
)
def test_bad_json_names_the_line(tmp_path, content, sentence):
    path = tmp_path / "file.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=sentence):
        read_json(path)


def test_missing_and_foreign_files(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        read_json(tmp_path / "none.json")
    (tmp_path / "plain.gz").write_text("no gzip")
    with pytest.raises(UserError, match="not a gzip file"):
        list(read_lines(tmp_path / "plain.gz"))
    with pytest.raises(UserError, match="is a folder, and a file is wanted"):
        list(read_lines(tmp_path))


def test_json_round_trip_keeps_the_letters(tmp_path):
    write_json(tmp_path / "a.json", {"item": "naïve – 3×4"})
    assert "naïve" in (tmp_path / "a.json").read_text(encoding="utf-8")
    assert read_json(tmp_path / "a.json") == {"item": "naïve – 3×4"}


def test_digest_knows_where_parts_end():
    assert digest("ab", "c") != digest("a", "bc")
    assert digest("é") == digest("é".encode())
