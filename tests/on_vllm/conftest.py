"""A tiny checkpoint and engines on it. vLLM reads its environment when it is imported, so that is set here first."""

import os

os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR"}
os.environ["TORCHDYNAMO_DISABLE"] = "1"  # compiling vLLM's helpers takes longer than all tests

import numpy as np
import pytest
import torch

from recllm.models.tiny import tiny_model, tiny_tokenizer
from recllm.rollouts import engine_arguments
from recllm.semantic_ids import SemanticIdTable
from recllm.tokenization import resize

CODES, ITEMS, SHALLOW = 6, 40, 8
ENGINE = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 256,
    "max_logprobs": -1,
    "disable_log_stats": False,  # the count of preemptions is one of them
}


def make_table():
    """40 items of 3 codes out of 6; 8 of them stop after 2, where no other item goes on."""
    codes = np.random.default_rng(0).permutation(np.array(list(np.ndindex(CODES, CODES, CODES))))[:ITEMS]
    taken = set(map(tuple, codes[:, :2].tolist()))
    codes[:SHALLOW] = [(*pair, -1) for pair in np.ndindex(CODES, CODES) if pair not in taken][:SHALLOW]
    return SemanticIdTable(tuple(f"item {row}" for row in range(ITEMS)), codes.astype(np.int32), (CODES,) * 3)


@pytest.fixture(scope="session")
def table():
    return make_table()


@pytest.fixture(scope="session")
def folder(tmp_path_factory, table):
    """As build_model.py leaves it: model, tokenizer, semantic_ids.json."""
    folder = tmp_path_factory.mktemp("checkpoint")
    tokenizer = tiny_tokenizer(["a cup of iron, bought by one who thinks"] * 4, 400)
    tokenizer.add_tokens(table.all_tokens())
    model = tiny_model(len(tokenizer), 64, 2)
    resize(model, tokenizer)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(6)  # else all tokens are about equally likely
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    table.save(folder / "semantic_ids.json")
    return folder


@pytest.fixture(scope="session")
def make_engine(folder):
    from vllm import LLM

    alive = []  # an engine that is deleted takes the process groups of the others with it

    def make(settings=None, **arguments):
        alive.append(LLM(**{**engine_arguments(folder, **(settings or {})), **ENGINE, **arguments}))
        return alive[-1]

    return make


@pytest.fixture(scope="session")
def engine(make_engine):
    """Free text, then an item between the tags; log-probs as the model's own."""
    return make_engine()


@pytest.fixture(scope="session")
def processed(make_engine):
    """Direct by default; log-probs after the mask."""
    return make_engine({"mode": "direct"}, logprobs_mode="processed_logprobs")
