import os

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from recllm.catalogue import fingerprint_items
from recllm.embeddings import Embeddings
from recllm.errors import UserError


def some(items=("a", "b", "c"), width=2, **changes):
    matrix = torch.arange(len(items) * width, dtype=torch.float32).reshape(len(items), width)
    return Embeddings(**({"items": items, "matrix": matrix, "encoder": "by hand", "text_hash": "0"} | changes))


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"])), unique=True, max_size=6))
def test_what_is_saved_is_loaded(tmp_path_factory, items):
    path = tmp_path_factory.mktemp("saved") / "embeddings.safetensors"
    before = some(tuple(items))  # newlines, NULs and the empty string are ids like others
    before.save(path)
    after = Embeddings.load(path, expect_items_fingerprint=fingerprint_items(items))
    assert (after.items, after.encoder, after.text_hash) == (before.items, "by hand", "0")
    assert after.catalogue_fingerprint == ""
    assert torch.equal(after.matrix, before.matrix)


def test_the_same_embeddings_are_the_same_bytes(tmp_path):
    for name in ("1", "2"):
        some().save(tmp_path / name)
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()


def test_valid_by_construction():
    with pytest.raises(UserError, match=r"2 items and a matrix of shape \(3, 2\)"):
        some(("a", "b"), matrix=torch.zeros(3, 2))
    with pytest.raises(UserError, match=r"the embedding of 'b' is not finite, nor are 1 others"):
        some(matrix=torch.tensor([[0.0], [torch.nan], [torch.inf]]))
    with pytest.raises(UserError, match=r"float32, not torch.float64"):
        some(matrix=torch.zeros(3, 2, dtype=torch.float64))
    with pytest.raises(UserError, match="two embeddings"):
        some(("a", "b", "a"))


def test_embeddings_of_another_state_of_the_catalogue_are_refused(tmp_path):
    some(catalogue_fingerprint="then").save(path := tmp_path / "e.safetensors")
    assert Embeddings.load(path).catalogue_fingerprint == "then"
    assert Embeddings.load(path, expect_catalogue_fingerprint="then").catalogue_fingerprint == "then"
    with pytest.raises(UserError, match=r"made from other data.*embed_items\.py with --overwrite"):
        Embeddings.load(path, fingerprint_items(["a", "b", "c"]), "now")
    some().save(path)  # which does not say
    with pytest.raises(UserError, match="made from other data"):
        Embeddings.load(path, expect_catalogue_fingerprint="now")


@pytest.mark.parametrize("where", ["/proc/y", "folder", "file/y"])
def test_what_cannot_be_written_is_one_sentence(tmp_path, where):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot be written|is a folder") as caught:
        some().save(tmp_path / where)  # an absolute path stands for itself
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


def test_the_file_may_be_read_by_whom_the_umask_lets(tmp_path):
    before = os.umask(0o027)
    try:
        some().save(tmp_path / "e.safetensors")
    finally:
        os.umask(before)
    assert (tmp_path / "e.safetensors").stat().st_mode & 0o777 == 0o640


def test_what_cannot_be_loaded_is_one_sentence(tmp_path):
    some().save(path := tmp_path / "embeddings.safetensors")
    with pytest.raises(UserError, match="of another catalogue's items"):
        Embeddings.load(path, expect_items_fingerprint=fingerprint_items(["a", "b"]))
    with pytest.raises(UserError, match=r"does not exist.*embed_items"):
        Embeddings.load(tmp_path / "none.safetensors")
    whole = path.read_bytes()
    for length in (0, 5, 100, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match="not a readable safetensors file"):
            Embeddings.load(path)
    from safetensors.torch import save_file

    save_file({"weight": torch.zeros(1)}, path)
    with pytest.raises(UserError, match="not a file of format"):
        Embeddings.load(path)
