import sys

import pytest
import torch
from helpers import write_catalogue

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
    for changed in ({"window": 1}, {"text": "own"}, {"collaborative_weight": 0.1}, {"seed": 1}):
        assert embed(EmbedConfig(data, **changed)).encoder != embed(config).encoder
    write_catalogue(data, [ITEMS[0] | {"title": "green cup"}, *ITEMS[1:]], SEQUENCES)  # another text
    embed(config)
    assert config.path.read_bytes() != first
    config.path.write_bytes(b"damaged")
    embed(config)
    Embeddings.load(config.path)


def test_another_catalogue_is_embedded_anew(data):
    embed(EmbedConfig(data))
    write_catalogue(data, ITEMS[::-1], SEQUENCES)
    assert embed(EmbedConfig(data)).items == tuple("fedcba")


def test_events_of_validation_and_test_change_no_byte_of_the_file(data):
    config = EmbedConfig(data)
    embed(config)
    first = config.path.read_bytes()
    write_catalogue(data, ITEMS, {user: [*events[:3], "a", "f"] for user, events in SEQUENCES.items()})
    embed(EmbedConfig(data, overwrite=True))
    assert config.path.read_bytes() == first


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
