"""The same masks under both of vLLM's model runners. V2 needs Triton: here it is driven by hand, with its own types."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytestmark = pytest.mark.vllm
SLOTS, LENGTH, WIDTH = 64, 40, 2000


@pytest.fixture(scope="module")
def make_processor(folder):
    from recllm.vllm_processor import CatalogueProcessor

    def make(*runner):
        model = SimpleNamespace(model=str(folder), tokenizer=str(folder), revision=None, tokenizer_revision=None)
        config = SimpleNamespace(model_config=model, additional_config={}, speculative_config=None)
        return CatalogueProcessor(config, *runner)

    return make


def requests(rule, generator, how_many):
    """(mode, max_tokens, prompt, output): answers at every stage, in the prompt's end and in the output."""
    closing, opening = list(rule.closing), list(rule.openings[0])
    for _ in range(how_many):
        mode = str(generator.choice(["direct", "reason", "free"]))
        answer, text = [], generator.integers(3, 200, generator.integers(1, 12)).tolist()
        current = rule.direct if mode == "direct" else rule
        start = [] if mode == "direct" else opening
        for _ in range(generator.integers(0, 6)):
            allowed = current.allowed_next([*start, *answer])
            if allowed is None:  # the end is written
                break
            answer.append(int(generator.choice(allowed.numpy())))
        whole = [*text, *start, *answer]
        one_token = bool(generator.integers(2)) and rule.eos not in answer and not (answer and answer[-1] in closing)
        cut = len(whole) if one_token else len(text) if mode == "direct" else int(generator.integers(1, len(whole) + 1))
        yield mode, 1 if one_token else 16, whole[:cut], whole[cut:]


def test_both_runners_put_on_the_same_mask(make_processor):
    from vllm import SamplingParams
    from vllm.v1.sample.logits_processor import BatchUpdate
    from vllm.v1.worker.gpu.sample.logits_processor import LogitsContext

    generator = np.random.default_rng(0)
    tokens = torch.zeros(SLOTS, LENGTH, dtype=torch.int32)
    lengths = np.zeros(SLOTS, np.int32)
    history = SimpleNamespace(all_token_ids=SimpleNamespace(gpu=tokens), prompt_len=SimpleNamespace(np=lengths))
    first, second = make_processor(torch.device("cpu"), False), make_processor(history)
    constrained = 0
    for _ in range(10):  # slots are used again, by requests of other modes
        batch = list(requests(first.rule, generator, 40))
        slots = generator.permutation(SLOTS)[: len(batch)]
        added, ends = [], []
        for row, (slot, (mode, most, prompt, output)) in enumerate(zip(slots.tolist(), batch)):
            parameters = SamplingParams(max_tokens=most, extra_args={"recllm_mode": mode})
            added.append((row, parameters, prompt, output))
            lengths[slot] = len(prompt)
            assert second.add_request(slot, parameters) == (mode != "free")
            tokens[slot] = -7  # what a former request left
            tokens[slot, : len(prompt) + len(output)] = torch.tensor(prompt + output)
            ends.append(len(prompt) + len(output) - 1)
        first.update_state(BatchUpdate(batch_size=len(batch), removed=[], added=added, moved=[]))
        rows = torch.from_numpy(slots)
        context = LogitsContext(
            expanded_idx_mapping=rows,
            idx_mapping=rows,
            idx_mapping_np=slots,
            expanded_local_pos=torch.zeros_like(rows),
            input_ids=tokens[rows, ends],
            pos=torch.tensor(ends),
            seq_lens_upper_bound_np=np.array(ends) + 1,
        )
        logits = torch.randn(len(batch), WIDTH, generator=torch.Generator().manual_seed(0))
        masked = first.apply(logits.clone())
        assert torch.equal(second.apply(logits.clone(), context), masked)
        constrained += int((masked == -torch.inf).any(1).sum())
    assert 150 < constrained < 350
