"""Encoders of language models, on a tiny Qwen3 with random weights and a tokenizer of whole words."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from helpers import torchrun, write_catalogue
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from recllm.embeddings import EmbedConfig, Embeddings, HFEncoder, SentenceEncoder, embed, stage
from recllm.embeddings.hf import batches_by_length
from recllm.embeddings.shards import encode_in_shards, shard_folder
from recllm.errors import UserError
from recllm.processes import Processes

WORDS = ["red", "blue", "tea", "cup", "rubber", "hose", "garden", "brass", "light", "old"]


def texts(count: int, seed: int = 0) -> list[str]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, 12, (count,), generator=generator).tolist()
    return [" ".join(WORDS[i] for i in torch.randint(0, len(WORDS), (n,), generator=generator)) for n in lengths]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["<pad>", *WORDS])}, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>").save_pretrained(folder)
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=16, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, max_position_embeddings=64, initializer_range=0.2,
    )  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(folder)
    return str(folder)


def one_by_one(model: str, texts: list[str], pooling: str = "last", max_tokens: int = 512) -> torch.Tensor:
    tokenizer, lm = AutoTokenizer.from_pretrained(model), AutoModelForCausalLM.from_pretrained(model)
    vectors = torch.zeros(len(texts), lm.config.hidden_size)
    for row, text in enumerate(texts):
        if ids := tokenizer(text)["input_ids"][:max_tokens]:
            with torch.no_grad():
                hidden = lm(torch.tensor([ids]), output_hidden_states=True).hidden_states[-1][0]  # (T, D)
            vectors[row] = hidden[-1] if pooling == "last" else hidden.mean(0)
    return vectors


@pytest.mark.parametrize("pooling", ["last", "mean"])
@pytest.mark.parametrize(("max_tokens", "batch_tokens"), [(512, 64), (5, 7)])
def test_batches_equal_one_text_at_a_time(model, pooling, max_tokens, batch_tokens):
    read = texts(40)
    assert "" in read
    encoder = HFEncoder(model, pooling, max_tokens=max_tokens, batch_tokens=batch_tokens)
    expected = one_by_one(model, read, pooling, max_tokens)
    torch.testing.assert_close(encoder.encode(read), expected, atol=1e-5, rtol=1e-4)


def test_the_tokenizers_padding_side_does_not_matter(model):
    read, results = texts(30), []
    for side in ("left", "right"):
        encoder = HFEncoder(model, batch_tokens=64)
        encoder._parts[0].padding_side = side
        results.append(encoder.encode(read))
    assert torch.equal(*results)


def test_batches_hold_every_row_once_within_the_limit():
    lengths = [3, 0, 9, 3, 1, 8, 0, 30]
    batches = batches_by_length(lengths, batch_tokens=18)
    assert batches == [[7], [2, 5], [0, 3, 4]]
    assert all(len(batch) * max(lengths[row] for row in batch) <= 18 for batch in batches[1:])


def test_every_text_is_counted_once(model):
    counted = []
    HFEncoder(model, batch_tokens=64).encode(read := texts(40), counted.append)
    assert sum(counted) == len(read)


def test_shards_any_number_of_processes_and_restarts_give_the_same_bytes(model, tmp_path):
    read = texts(50)
    encoder = HFEncoder(model, batch_tokens=64)
    alone = encode_in_shards(encoder, read, tmp_path / "alone", shard=8)
    torch.testing.assert_close(alone, one_by_one(model, read), atol=1e-5, rtol=1e-4)

    assert encode_in_shards(encoder, read, tmp_path / "two", Processes(1, 2), shard=8) is None
    together = encode_in_shards(encoder, read, tmp_path / "two", Processes(0, 2), shard=8)
    assert torch.equal(together, alone)

    (tmp_path / "two" / "00001.safetensors").unlink()
    again = encode_in_shards(encoder, read, tmp_path / "two", shard=8)
    assert torch.equal(again, alone)


def test_a_finished_shard_is_not_encoded_again(model, tmp_path):
    read = [text or "cup" for text in texts(20)]
    encode_in_shards(HFEncoder(model), read, tmp_path / "s", shard=8)
    (tmp_path / "s" / "00002.safetensors").unlink()

    class Counting:
        settings, encoded = "", 0

        def encode(self, texts, advance):
            self.encoded += len(texts)
            return torch.zeros(len(texts), 32)

    counting = Counting()
    encode_in_shards(counting, read, tmp_path / "s", shard=8)
    assert counting.encoded == 4  # the third of 8 + 8 + 4


def test_other_settings_texts_or_weights_never_meet_the_same_shards(model, tmp_path):
    encoder, output = HFEncoder(model), tmp_path / "e.safetensors"
    folders = {
        shard_folder(output, encoder, ["a", "b"]),
        shard_folder(output, encoder, ["a", "c"]),
        shard_folder(output, HFEncoder(model, pooling="mean"), ["a", "b"]),
        shard_folder(output, HFEncoder(model, max_tokens=3), ["a", "b"]),
    }
    assert len(folders) == 4


def test_a_sentence_encoder_made_of_a_causal_model_reads_the_last_token(model):
    pytest.importorskip("sentence_transformers")
    read = [text or "cup" for text in texts(10)]
    expected = one_by_one(model, read, "last", max_tokens=5)
    torch.testing.assert_close(SentenceEncoder(model, max_tokens=5).encode(read), expected, atol=1e-5, rtol=1e-4)


def test_a_model_that_cannot_be_loaded_is_one_sentence(tmp_path, model):
    with pytest.raises(UserError, match="the model 'no/such-model' cannot be loaded"):
        HFEncoder("no/such-model").encode(["cup"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"holds no weights.*Fix"):
        HFEncoder(str(tmp_path / "empty")).encode(["cup"])


RUN = """
import sys, time
from recllm.embeddings import shards, stage, EmbedConfig, HFEncoder
folder, model, slow = sys.argv[1:]
encode = HFEncoder.encode
def slowly(self, texts, advance):
    time.sleep(float(slow))
    return encode(self, texts, advance)
HFEncoder.encode = slowly
full = stage.encode_in_shards
stage.encode_in_shards = lambda *args: full(*args, shard=8)
stage.embed(EmbedConfig(folder, encoder="hf", model=model, batch_tokens=64))
"""


def test_killed_after_its_first_shard_and_run_again_it_ends_with_the_same_bytes(model, tmp_path, monkeypatch):
    read = [text or "cup" for text in texts(40)]
    items = [{"item": f"i{row}", "title": text} for row, text in enumerate(read)]
    sequences = {f"u{user}": [f"i{(user * 7 + step) % 40}" for step in range(6)] for user in range(20)}
    for name in ("killed", "whole"):
        write_catalogue(tmp_path / name, items, sequences)

    command = [sys.executable, "-c", RUN, str(tmp_path / "killed"), model, "0.5"]
    killed = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    deadline = time.monotonic() + 60
    while not (done := list((tmp_path / "killed").glob("*.shards-*/0*.safetensors"))):
        assert time.monotonic() < deadline
        assert killed.poll() is None, killed.stdout.read()
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert 1 <= len(done) < 5
    assert not (tmp_path / "killed" / "embeddings.safetensors").exists()

    monkeypatch.setattr(stage, "encode_in_shards", lambda *args: encode_in_shards(*args, shard=8))
    for name in ("killed", "whole"):
        embed(EmbedConfig(str(tmp_path / name), encoder="hf", model=model, batch_tokens=64))
    results = [(tmp_path / name / "embeddings.safetensors").read_bytes() for name in ("killed", "whole")]
    assert results[0] == results[1]
    assert not list((tmp_path / "killed").glob("*.shards-*"))


@pytest.mark.slow
def test_two_processes_under_torchrun_write_what_one_writes(model, tmp_path, monkeypatch):
    items = [{"item": f"i{row}", "title": text or "cup"} for row, text in enumerate(texts(40))]
    for name in ("one", "two"):
        write_catalogue(tmp_path / name, items, {"u": [f"i{row}" for row in range(40)]})
    monkeypatch.setattr(stage, "encode_in_shards", lambda *args: encode_in_shards(*args, shard=8))
    embed(EmbedConfig(str(tmp_path / "one"), encoder="hf", model=model, batch_tokens=64))
    script = tmp_path / "run.py"
    script.write_text(RUN)
    launch = torchrun(2, script)
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launch, str(tmp_path / "two"), model, "0"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    one, two = (Embeddings.load(tmp_path / name / "embeddings.safetensors") for name in ("one", "two"))
    assert one.encoder == two.encoder
    torch.testing.assert_close(one.matrix, two.matrix, atol=1e-5, rtol=1e-4)  # the number of threads differs
    assert not list((tmp_path / "two").glob("*.shards-*"))
