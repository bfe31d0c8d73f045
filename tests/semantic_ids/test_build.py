"""The stage on a small prepared folder: same bytes however often it was killed, and clear refusals."""

import json
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest
import torch

from recllm.catalogue import INTERACTION_COLUMNS, ITEM_COLUMNS, SPLIT_COLUMNS, Catalogue, fingerprint_items
from recllm.embeddings import Embeddings
from recllm.errors import UserError
from recllm.semantic_ids import SemanticIdTable
from recllm.semantic_ids import build as stage
from recllm.semantic_ids.build import BuildConfig, build, load
from recllm.semantic_ids.quantizer import Quantizer

ITEMS = [f"i{number}" for number in range(120)]
SCRIPT = Path(__file__).parents[2] / "data_prep" / "build_semantic_ids.py"
SMALL = {"levels": 2, "codes": 8}


@pytest.fixture
def data(tmp_path) -> Path:
    """A prepared folder of 120 items in 6 categories, and their embeddings."""
    folder = tmp_path / "data"
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(6, 8, generator=generator)
    category = [number % 6 for number in range(len(ITEMS))]
    columns = {name: [None] * len(ITEMS) for name in ITEM_COLUMNS} | {"item": ITEMS}
    columns["categories"] = [["all", f"category {number}"] for number in category]
    pl.DataFrame(columns, schema=ITEM_COLUMNS).write_parquet(folder / "items.parquet")
    pl.DataFrame(schema=INTERACTION_COLUMNS).write_parquet(folder / "interactions.parquet")
    pl.DataFrame(schema=SPLIT_COLUMNS).write_parquet(folder / "splits.parquet")
    about = {"name": "test", "fingerprint": "f", "items_fingerprint": fingerprint_items(ITEMS), "behaviours": {}}
    (folder / "catalogue.json").write_text(json.dumps(about))
    Catalogue.load(folder)
    matrix = centres[category] + 0.3 * torch.randn(len(ITEMS), 8, generator=generator)
    Embeddings(tuple(ITEMS), matrix, "test", "hash", "f").save(folder / "embeddings.safetensors")
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_table_quantizer_and_report(data, tmp_path):
    config = BuildConfig(data=str(data), output=str(tmp_path / "out"), **SMALL)
    table = build(config)
    assert table.items == tuple(ITEMS)
    loaded, quantizer = load(tmp_path / "out")
    assert loaded == table
    embeddings = Embeddings.load(data / "embeddings.safetensors").matrix
    assert (quantizer.encode(embeddings)[0].numpy() == table.codes[:, :2]).all()
    report = loaded.report
    assert report["distinct_share_after"] == 1
    assert report["label"] == "category"
    assert report["purity"][0]["purity"] > 0.8 > 0.3 > report["purity"][0]["shuffled"]


@pytest.mark.parametrize("method", ["rqkmeans", "balanced", "rqvae"])
@pytest.mark.parametrize("collisions", ["extra-level", "extra-level-all", "reassign"])
def test_again_is_nothing_and_anew_is_the_same(data, tmp_path, method, collisions, monkeypatch):
    def config(name):
        settings = SMALL | {"method": method, "collisions": collisions, "epochs": 3, "latent": 4}
        return BuildConfig(data=str(data), output=str(tmp_path / name), **settings)

    build(config("one"))
    build(config("two"))
    assert files(tmp_path / "one") == files(tmp_path / "two")
    monkeypatch.setattr(stage, "_quantise", lambda *_: pytest.fail("it was built already"))
    build(config("one"))


def test_other_settings_need_overwrite(data):
    build(BuildConfig(data=str(data), **SMALL))
    before = files(data)
    with pytest.raises(UserError, match=r"with other settings.*--overwrite"):
        build(BuildConfig(data=str(data), levels=3, codes=8))
    assert files(data) == before
    assert build(BuildConfig(data=str(data), levels=3, codes=8, overwrite=True)).sizes[:3] == (8, 8, 8)
    assert len(load(data)[1].sizes) == 3


@pytest.mark.parametrize("when", ["quantizer", "table"])
def test_killed_between_or_within_the_files(data, tmp_path, when, monkeypatch):
    config = BuildConfig(data=str(data), output=str(tmp_path / "out"), overwrite=True, **SMALL)
    build(BuildConfig(data=str(data), output=str(tmp_path / "out"), seed=7, **SMALL))  # what lies there already
    build(BuildConfig(data=str(data), output=str(tmp_path / "whole"), **SMALL))

    def die(*_):
        raise KeyboardInterrupt

    owner = Quantizer if when == "quantizer" else SemanticIdTable
    with monkeypatch.context() as patch:
        patch.setattr(owner, "save", die)
        with pytest.raises(KeyboardInterrupt):
            build(config)
    if when == "table":
        with pytest.raises(UserError, match="not of one run"):
            load(tmp_path / "out")
    build(config)
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_a_damaged_quantizer_is_made_again_and_a_damaged_table_is_named(data):
    build(BuildConfig(data=str(data), **SMALL))
    whole = files(data)
    for file in ("quantizer.safetensors", "semantic_ids.json"):
        (data / file).write_bytes(whole[file][:-10])
    with pytest.raises(UserError, match=r"semantic_ids\.json.*--overwrite"):
        build(BuildConfig(data=str(data), **SMALL))
    (data / "semantic_ids.json").write_bytes(whole["semantic_ids.json"])
    build(BuildConfig(data=str(data), **SMALL))
    assert files(data) == whole


def test_embeddings_of_another_split_are_refused(data):
    Embeddings(tuple(ITEMS), torch.zeros(120, 4), "test", "hash", "g").save(data / "embeddings.safetensors")
    with pytest.raises(UserError, match="were made from other data"):
        build(BuildConfig(data=str(data), **SMALL))


def test_embeddings_of_another_catalogue_are_refused(data):
    Embeddings(tuple(ITEMS[::-1]), torch.zeros(120, 4), "test", "hash").save(data / "embeddings.safetensors")
    with pytest.raises(UserError, match="another catalogue"):
        build(BuildConfig(data=str(data), **SMALL))
    (data / "embeddings.safetensors").unlink()
    with pytest.raises(UserError, match=r"run data_prep/embed_items\.py"):
        build(BuildConfig(data=str(data), **SMALL))


def test_import_and_export(data, tmp_path):
    path = tmp_path / "x.index.json"
    index = {item: [f"<a_{number // 12}>", f"<b_{number % 12}>"] for number, item in enumerate(ITEMS)}
    index[ITEMS[1]] = index[ITEMS[0]]
    path.write_text(json.dumps(index | {"unknown": ["<a_1>", "<b_99>"]}))
    settings = {"data": str(data), "import_index": str(path)}
    with pytest.raises(UserError, match="have the same codes") as error:
        build(BuildConfig(**settings, collisions="refuse"))
    assert "x.index.json" in str(error.value)
    assert not (data / "semantic_ids.json").exists()
    build(BuildConfig(data=str(data), **SMALL))  # its quantizer must not stay beside the imported table
    table = build(BuildConfig(**settings, export_index=str(tmp_path / "y.index.json"), overwrite=True))
    assert not (data / "quantizer.safetensors").exists()
    assert table.report["index_items_unused"] == 1
    assert table.pattern == "<{level}_{code}>"
    exported = json.loads((tmp_path / "y.index.json").read_text())
    assert exported["i0"] == ["<a_0>", "<b_0>", "<c_0>"]
    assert exported["i5"] == index["i5"]
    path.write_text(json.dumps({item: index[item] for item in ITEMS[1:]}))
    with pytest.raises(UserError, match="'i0' of the catalogue is not in the index"):
        build(BuildConfig(**settings, overwrite=True))


@pytest.mark.parametrize(
    "bad",
    [
        {"levels": 0},
        {"levels": 26},
        {"codes": -1},
        {"sample": 10},
        {"pattern": "<{code}>"},
        {"collisions": "none"},
        {"device": "abacus"},
        {"import_index": "x", "collisions": "reassign"},
    ],
)
def test_bad_settings(bad):
    with pytest.raises(UserError):
        BuildConfig(data="data", **bad)


def test_the_script(data):
    command = [sys.executable, str(SCRIPT), "--data", str(data), "--levels", "2", "--codes", "8"]
    good = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert good.returncode == 0, good.stderr
    assert "distinct share after" in good.stdout
    wrong = subprocess.run([*command, "--embeddings", "none"], capture_output=True, text=True, timeout=120)
    assert wrong.returncode == 2
    assert wrong.stderr.splitlines()[-1].startswith("error: none: the embeddings file does not exist")
