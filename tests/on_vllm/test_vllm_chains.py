"""Chains that vLLM writes are those of the model itself; what answers them is the same engine."""

import json

import pytest
import torch
from taught import write_reasoning_model

from recllm.checkpoint import Checkpoint
from recllm.decoding.chains import Sampling
from recllm.evaluation.stage import EvaluateConfig, evaluate
from recllm.reasoner import Reasoner
from recllm.vllm_chains import VLLMChains

pytestmark = pytest.mark.vllm
HISTORIES = [["i1", "i2"], ["i5", "i3", "i7"], ["i9", "i0"]]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return write_reasoning_model(tmp_path_factory.mktemp("reasoning"))


@pytest.fixture(scope="module")
def chains(folders):
    return VLLMChains(str(folders[1]), {"dtype": "float32", "enforce_eager": True, "max_model_len": 256})


def test_greedy_chains_are_the_models_own(folders, chains):
    checkpoint = Checkpoint.load(folders[1], "cpu")
    own = Reasoner.of(checkpoint, Sampling(0, 1.0, 60))
    prompts = own.writer.ids(HISTORIES)
    written = Reasoner.of(checkpoint, Sampling(0, 1.0, 60), vllm=chains).chains(prompts)
    assert written == own.chains(prompts)
    assert all(one.opened for (one,) in written)


def test_samples_carry_the_log_probs_they_were_drawn_with(folders, chains):
    checkpoint = Checkpoint.load(folders[1], "cpu")
    reasoner = Reasoner.of(checkpoint, Sampling(0.8, 1.0, 60), vllm=chains)
    prompts = reasoner.writer.ids(HISTORIES)
    written = reasoner.chains(prompts, 4, seed=3)
    for prompt, some in zip(prompts, written):
        assert len({one.ids for one in some}) > 1
        for one in some:
            with torch.no_grad():
                logits = checkpoint.model(torch.tensor([[*prompt, *one.ids]])).logits[0, len(prompt) - 1 : -1]
            true = (logits / 0.8).log_softmax(-1).gather(1, torch.tensor(one.ids).unsqueeze(1)).squeeze(1)
            assert list(one.logps) == pytest.approx(true.tolist(), abs=1e-4)
    again = reasoner.chains(prompts[1:], 4, seed=3, keys=[1, 2])
    assert [[one.ids for one in some] for some in again] == [[one.ids for one in some] for some in written[1:]]
    rows = reasoner.one_answer_each(prompts, written).rows
    assert ((rows >= 0) == torch.tensor([[one.opened for one in some] for some in written])).all()


def test_an_evaluation_says_that_vllm_wrote(folders, chains, tmp_path, monkeypatch):
    monkeypatch.setattr("recllm.evaluation.stage.VLLMChains", lambda *_, **__: chains)
    data, model = map(str, folders)
    config = EvaluateConfig(
        model=model, data=data, output=str(tmp_path), mode="reasoning", engine="vllm", k=[1], samples=4,
        max_new_tokens=60, users=6, exclude_history=True,
    )  # fmt: skip
    result = evaluate(config)
    assert result["run"]["ranker"]["engine"] == "vllm"
    assert result["reasoning"]["format_validity"] > 0.5
    assert len([json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]) == 6
