import sys

import pytest
import torch
from helpers import write_catalogue
from safetensors.torch import save_file

from recllm.embeddings import EmbedConfig, Embeddings, embed
from recllm.embeddings.sentence import SentenceEncoder
from recllm.embeddings.vllm_pooling import VLLMEncoder
from recllm.errors import UserError

ITEMS = [
    {"item": item, "title": f"{colour} {thing}", "own": "text of my own"}
    for item, (colour, thing) in zip("abcdef", ((c, t) for c in ("red", "blue") for t in ("cup", "pot", "hose")))
]
SEQUENCES = {f"u{user}": ["abcdef"[(user + step) % 6] for step in range(5)] for user in range(12)}


@pytest.fixture
def data(tmp_path):
    write_catalogue(tmp_path, ITEMS, SEQUENCES)
    return str(tmp_path)


def test_the_default_is_text_and_use_half_each(data):
    embeddings = embed(EmbedConfig(data))
    assert embeddings.items == tuple("abcdef")
    assert embeddings.encoder.startswith("0.5 × TF-IDF + SVD (dim 128")
    assert "of fused text, centred, + 0.5 × PPMI-SVD" in embeddings.encoder
    torch.testing.assert_close(embeddings.matrix.norm(dim=1), torch.ones(6))
    text = embed(EmbedConfig(data, output=f"{data}/text.safetensors", collaborative_weight=0.0))
    assert "PPMI" not in text.encoder
    assert text.matrix.size(1) < embeddings.matrix.size(1)


def test_run_again_it_returns_what_is_there_unless_something_changed(data):
    config = EmbedConfig(data)
    embed(config)
    first, written = config.path.read_bytes(), config.path.stat().st_mtime_ns
    embed(EmbedConfig(data))
    assert config.path.stat().st_mtime_ns == written
    embed(EmbedConfig(data, overwrite=True))
    assert config.path.stat().st_mtime_ns != written
    assert config.path.read_bytes() == first


FIX = r"Fix: --overwrite, or another --output"


@pytest.mark.parametrize("changed", [{"window": 1}, {"text": "own"}, {"collaborative_weight": 0.1}, {"seed": 1}])
def test_vectors_made_in_another_way_are_not_replaced_unasked(data, changed):
    embed(config := EmbedConfig(data))
    first = config.path.read_bytes()
    with pytest.raises(UserError, match=rf"holds vectors made in another way \(0\.5 × TF-IDF.*{FIX}"):
        embed(EmbedConfig(data, **changed))
    assert config.path.read_bytes() == first
    encoder = Embeddings.load(config.path).encoder
    assert embed(EmbedConfig(data, **changed, overwrite=True)).encoder != encoder


@pytest.mark.parametrize("encoder", ["tfidf", "collaborative"])
@pytest.mark.parametrize("change", ["items", "text", "events", "split"])
def test_vectors_made_from_other_data_are_not_taken_for_these(data, encoder, change):
    """Collaborative vectors of another split know of what is now a test event."""
    embed(config := EmbedConfig(data, encoder=encoder))
    first = config.path.read_bytes()
    items = {"items": ITEMS[::-1], "text": [ITEMS[0] | {"title": "green cup"}, *ITEMS[1:]]}.get(change, ITEMS)
    sequences = {"u": "abc", **SEQUENCES} if change == "events" else SEQUENCES
    catalogue = write_catalogue(data, items, sequences, split="train" if change == "split" else "leave-one-out")
    with pytest.raises(UserError, match=rf"holds vectors made from other data.*{FIX}"):
        embed(config)
    assert config.path.read_bytes() == first
    made = embed(EmbedConfig(data, encoder=encoder, overwrite=True))
    assert made.items == tuple(catalogue.item_ids)
    assert made.catalogue_fingerprint == catalogue.fingerprint


def test_a_damaged_file_and_a_file_of_something_else_are_not_replaced_unasked(data):
    config = EmbedConfig(data)
    config.path.write_bytes(b"damaged")
    with pytest.raises(UserError, match=rf"is there already and is not a readable safetensors file\. {FIX}"):
        embed(config)
    save_file({"weight": torch.zeros(1)}, config.path)
    with pytest.raises(UserError, match=rf"is there already and is not a file of format .*{FIX}"):
        embed(config)
    embed(EmbedConfig(data, overwrite=True))
    Embeddings.load(config.path)


def test_an_output_that_cannot_be_written_is_said_before_anything_is_encoded(data, monkeypatch):
    monkeypatch.setattr("recllm.embeddings.tfidf.TfidfEncoder.encode", None)
    with pytest.raises(UserError, match=r"is a folder.*embeddings\.safetensors"):
        embed(EmbedConfig(data, output=data))
    for output in ("/proc/y", "/proc/y/z", f"{data}/items.parquet/e.safetensors"):
        with pytest.raises(UserError, match=r"cannot be written.*--output"):
            embed(EmbedConfig(data, output=output))


def test_events_of_validation_and_test_change_no_vector(data):
    first = embed(EmbedConfig(data))
    write_catalogue(data, ITEMS, {user: [*events[:3], "a", "f"] for user, events in SEQUENCES.items()})
    other = embed(EmbedConfig(data, overwrite=True))
    assert other.catalogue_fingerprint != first.catalogue_fingerprint
    assert other.encoder == first.encoder
    assert other.matrix.numpy().tobytes() == first.matrix.numpy().tobytes()


def test_a_log_without_text_is_told_what_to_do_and_embeds_so(tmp_path):
    write_catalogue(tmp_path, "abcdef", SEQUENCES)
    with pytest.raises(UserError, match=r"no item has any text.*--encoder collaborative"):
        embed(EmbedConfig(str(tmp_path)))
    assert not (tmp_path / "embeddings.safetensors").exists()
    embeddings = embed(EmbedConfig(str(tmp_path), encoder="collaborative"))
    assert embeddings.encoder.startswith("PPMI-SVD")


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"collaborative_weight": 1.5}, "collaborative_weight is 1.5"),
        ({"dim": 0}, "dim is 0"),
        ({"encoder": "hf"}, "the hf encoder needs a model"),
    ],
)
def test_bad_settings_are_refused(settings, sentence):
    with pytest.raises(UserError, match=sentence):
        EmbedConfig("somewhere", **settings)


def test_optional_packages_are_asked_for_by_name(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(UserError, match=r"requirements-gpu\.txt"):
        VLLMEncoder("m").encode(["a"])
    with pytest.raises(UserError, match="pip install sentence-transformers"):
        SentenceEncoder("m").encode(["a"])
