"""GRPO on chains from TRL's colocated vLLM: it has the trainer's weights, and its log-probs are the trainer's."""

import copy
import functools
import os

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from taught import write_reasoning_model
from trl import ModelConfig

from recllm.checkpoint import Checkpoint
from recllm.rewards import reward_functions
from recllm.trainers.adapters import lora_of, merged
from recllm.trainers.grpo import GRPOSettings, RecGRPO
from recllm.trainers.rollouts import RolloutSettings, RolloutSource

pytestmark = pytest.mark.vllm
G, TEMPERATURE = 4, 1.2
ALIVE = []  # an engine that is deleted takes the process groups of the others with it
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


class Watched(RecGRPO):
    """Keeps, of each generation, how far vLLM's weights are from the trainer's, and what came of it."""

    def _roll_out(self):
        found = super()._roll_out()
        self.seen = [*getattr(self, "seen", []), (distance(self), embedding(self.model), slow_logps(self), found)]
        self.answered = [*getattr(self, "answered", []), self._rollouts]
        return found


def vllm_weights(trainer):
    runner = trainer.vllm_generation.llm.llm_engine.model_executor.driver_worker.model_runner
    return dict(runner.model.named_parameters())


def distance(trainer):
    """The largest difference over all tensors; vLLM keeps some of them joined."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    model = merged(copy.deepcopy(model)) if isinstance(model, PeftModel) else model
    own = dict(model.named_parameters())
    most, used = 0.0, set()
    for name, theirs in vllm_weights(trainer).items():
        joined = next((part for part in FUSED if f".{part}." in name), None)
        names = [name.replace(joined, part) for part in FUSED[joined]] if joined else [name]
        ours = torch.cat([own[part] for part in names])
        used.update(names)
        most = max(most, float((theirs[: len(ours)] - ours).detach().abs().max()))
    assert used == set(own), "every tensor was compared"
    return most


def embedding(model):
    return model.get_input_embeddings().weight.detach().clone()


def slow_logps(trainer):
    """Of each chain's tokens, by the model's own forward over the whole vocabulary."""
    model, found = trainer.source.checkpoint.model, trainer._rollouts  # with LoRA, inside of what is trained
    logps = []
    for place, (ids, start) in enumerate(zip(found.answers, found.starts)):
        prompt = found.prompts[place // G]
        with torch.no_grad():
            logits = type(model).forward(model, input_ids=torch.tensor([[*prompt, *ids[:start]]])).logits[0]
        of_each = (logits[len(prompt) - 1 : -1] / TEMPERATURE).log_softmax(-1)
        logps.append(of_each.gather(1, torch.tensor(ids[:start]).unsqueeze(1)).squeeze(1).tolist())
    return logps


@pytest.fixture(scope="module")
def patched():
    """On a CPU vLLM packs its weights away, so that none can be given to it afterwards: here it leaves them.

    TRL has no settings for two things: that vLLM compiles the model, which takes longer than the test, and that it
    takes bf16 for a model in fp32.
    """
    from trl.generation import vllm_generation
    from vllm.model_executor.layers import utils

    before = dict(os.environ)  # TRL tells vLLM of its processes there
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            utils,
            "dispatch_cpu_unquantized_gemm",
            lambda layer, remove_weight: setattr(layer, "cpu_linear", torch.nn.functional.linear),
        )
        patch.setattr(
            vllm_generation, "LLM", functools.partial(vllm_generation.LLM, enforce_eager=True, dtype="float32")
        )
        yield
    os.environ.clear()
    os.environ.update(before)


def prompts_of(checkpoint):
    """The truth is what the model was taught: the history's last item."""
    writer, table = checkpoint.writer_of(checkpoint.reasoning), checkpoint.table
    histories = [[f"i{(place + step) % 12}" for step in range(2 + place % 3)] for place in range(12)]
    return Dataset.from_list(
        [
            {"prompt": str(place), "prompt_ids": ids, "mode": "reason", "history": history,
             "target": list(table.codes_of(history[-1]))}
            for place, (ids, history) in enumerate(zip(writer.ids(histories), histories))
        ]
    )  # fmt: skip


@pytest.fixture(scope="module", params=["whole", "lora"])
def trained(patched, request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("rl")
    _, model = write_reasoning_model(folder)
    checkpoint = Checkpoint.load(model, "cpu")
    settings = GRPOSettings(
        output_dir=str(folder / "out"), use_vllm=True, vllm_mode="colocate", vllm_max_model_length=256,
        num_generations=G, per_device_train_batch_size=16, max_steps=2, learning_rate=1e-3, validation_users=0,
        max_completion_length=60, temperature=TEMPERATURE, rewards=["prefix"], bf16=False, logging_steps=1,
        report_to="none", save_strategy="no", beta=0.0,
    )  # fmt: skip
    source = RolloutSource.of(checkpoint, RolloutSettings(temperature=TEMPERATURE, max_new_tokens=60))
    rewards = reward_functions(["prefix"], 0.5, None, None, checkpoint.table, False)
    names = ["q_proj", "v_proj", "down_proj"]
    lora = ModelConfig(use_peft=request.param == "lora", lora_target_modules=names, lora_dropout=0.0)
    lora = lora_of(checkpoint.model, lora)
    trainer = Watched(checkpoint, settings, prompts_of(checkpoint), source, rewards, peft_config=lora)
    ALIVE.append(trainer)
    trainer.train()
    return trainer, checkpoint


def test_vllm_has_the_weights_of_each_step(trained):
    trainer, _ = trained
    (first, before, *_), (second, after, *_) = trainer.seen
    assert float((before - after).abs().max()) > 1e-4, "the step between the two generations moved the weights"
    trainer.vllm_generation.sync_weights()
    rounding = 1e-6 if isinstance(trainer.model, PeftModel) else 0.0  # an adapter is added, and taken off again
    assert max(first, second, distance(trainer)) <= rounding


def test_log_probs_are_those_of_the_trainers_model(trained):
    trainer, _ = trained
    for (_, _, slow, _), found in zip(trainer.seen, trainer.answered):
        for ids, start, logps, own in zip(found.answers, found.starts, found.logps, slow):
            assert len(logps) == len(ids)
            assert logps[:start] == pytest.approx(own, abs=1e-4)
        assert len({tuple(ids[:start]) for ids, start in zip(found.answers, found.starts)}) > 4, "they were drawn"


def test_every_answer_that_is_opened_names_an_item(trained):
    trainer, checkpoint = trained
    opening = trainer.source.reasoner.openings[0]
    for found in trainer.answered:
        assert found.named.float().mean() > 0
        for ids, start, codes in zip(found.answers, found.starts, found.codes.tolist()):
            item = checkpoint.table.item_of(codes)
            if item is None:
                assert start == len(ids)
            else:
                assert ids[start:] == checkpoint.tokens.ids_of(item)
                assert tuple(ids[start - len(opening) : start]) == opening


def test_the_correction_for_the_sampler_finds_nothing_to_correct(trained):
    trainer, _ = trained
    for batch in trainer._buffered_inputs:
        assert batch["free"].any(), "tokens that vLLM drew are in the update"
        ratio = batch["importance_sampling_ratio"]
        torch.testing.assert_close(ratio, torch.ones_like(ratio), atol=1e-3, rtol=0)
    assert trainer.state.global_step == 2
