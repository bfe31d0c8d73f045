"""Answers under the rule on a real vLLM, on the CPU: valid, with Hugging Face's log-probs, alone and among others."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from recllm.errors import UserError
from recllm.rollouts import AnswerSettings, CatalogueLogits

pytestmark = pytest.mark.vllm
ITEMS = ("cup", "mug", "pan", "pot", "jar", "urn")
PROMPTS = [f"<|im_start|>user\nbought <|a_0|><|b_{n}|> a {name}<|im_end|>\n" for n, name in enumerate(ITEMS)]
END = "<|im_end|>"
ITEMS_AND_MORE = 50  # beams for 40 items: nothing is pruned


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def model(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def encode(tokenizer):
    return lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.fixture(scope="module")
def texts(table):
    return {table.text_of(item) for item in table.items}


def sampling(mode=None, **settings):
    from vllm import SamplingParams

    extra = {"recllm_mode": mode} if mode else None
    return SamplingParams(**{"temperature": 1.0, "max_tokens": 16, "extra_args": extra} | settings)


def written(engine, prompts, parameters):
    """For each prompt the outputs of its samples."""
    outputs = engine.generate([{"prompt_token_ids": ids} for ids in prompts], parameters, use_tqdm=False)
    return [output.outputs for output in outputs]


def decode(tokenizer, output):
    return tokenizer.decode(output.token_ids)


def test_after_a_chain_of_thought_comes_an_item_and_the_end(engine, tokenizer, encode, texts):
    tag = tokenizer.convert_tokens_to_ids("<answer>")  # a random model hardly ever writes it by itself
    parameters = [sampling(n=10, max_tokens=120, logit_bias={tag: 3.0}, seed=10 * row) for row in range(len(PROMPTS))]
    groups = written(engine, [encode(prompt) for prompt in PROMPTS], parameters)
    answered, thought = set(), 0
    for output in (output for group in groups for output in group):
        chain, found, answer = decode(tokenizer, output).partition("<answer>")
        if found and output.finish_reason != "length":
            assert answer.removesuffix("</answer>" + END) in texts
            answered.add(answer)
            thought += chain != ""
    print(f"answers after a thought: {thought} of 60, {len(answered)} different")
    assert thought > 20  # of 60, some end without an answer
    assert len(answered) > 5


def test_a_mixed_batch_keeps_every_request_to_its_own_mode(engine, tokenizer, model, encode, texts):
    prompts, parameters = [], []
    for prompt in PROMPTS:
        for mode, end in (("direct", ""), ("reason", "<answer>"), (None, "<answer>"), ("free", "<answer>")):
            prompts.append(encode(prompt + end))
            free = mode == "free"
            parameters.append(sampling(mode, n=1 if free else 4, temperature=float(not free), seed=4 * len(prompts)))
    groups = written(engine, prompts, parameters)
    answers = [[decode(tokenizer, output) for output in group] for group in groups]
    for direct, reason, default, free in zip(*(answers[n::4] for n in range(4))):
        assert {answer.removesuffix(END) for answer in direct} <= texts
        assert {answer.removesuffix("</answer>" + END) for answer in reason + default} <= texts
        assert free[0].removesuffix("</answer>" + END) not in texts
    assert len({answer for group in answers for answer in group}) > 20
    for ids, group in zip(prompts[3::4], groups[3::4]):  # the others' masks did not touch the free rows
        alone = model.generate(torch.tensor([ids]), max_new_tokens=16, do_sample=False)[0, len(ids) :]
        assert list(group[0].token_ids) == alone.tolist()


def test_shallow_and_deep_items_are_both_written(engine, tokenizer, encode, table, texts):
    outputs = written(engine, [encode(PROMPTS[0])], sampling("direct", n=600))[0]
    seen = {decode(tokenizer, output).removesuffix(END) for output in outputs}
    assert seen <= texts
    assert {table.depth_of(item) for item in table.items if table.text_of(item) in seen} == {2, 3}


def reference(model, ids, output, masked, temperature):
    """Hugging Face's log-probs of the tokens of an output; `masked` puts the rule's mask on first."""
    with torch.no_grad():
        logits = model(torch.tensor([ids + output])).logits[0]
    logits = logits[len(ids) - 1 : -1]
    if masked:
        rows = [masked(torch.tensor([ids + output[:n]]), logits[n : n + 1]) for n in range(len(output))]
        logits = torch.cat(rows) / temperature
    return logits.log_softmax(-1).gather(1, torch.tensor(output).unsqueeze(1)).squeeze(1)


@pytest.mark.parametrize("which", ["raw", "processed"])
def test_log_probs_are_those_of_hugging_face(request, which, folder, model, encode):
    engine = request.getfixturevalue("engine" if which == "raw" else "processed")
    rule = AnswerSettings(str(folder)).rule()
    worst, tokens = 0.0, 0
    for mode, end, temperature in (("direct", "", 1.0), ("reason", "<answer>", 0.7), ("free", "", 1.0)):
        prompts = [encode(prompt + end) for prompt in PROMPTS]
        groups = written(engine, prompts, sampling(mode, n=4, temperature=temperature, logprobs=0))
        for ids, group in zip(prompts, groups):
            masked = CatalogueLogits(rule.direct if mode == "direct" else rule, len(ids)) if mode != "free" else None
            for output in group:
                said = torch.tensor([step[id].logprob for id, step in zip(output.token_ids, output.logprobs)])
                true = reference(
                    model, ids, list(output.token_ids), masked if which == "processed" else None, temperature
                )
                worst = max(worst, float((said - true).abs().max()))
                tokens += len(said)
    print(f"{which} log-probs of {tokens} tokens: largest difference {worst:.1e}")
    assert tokens > 300
    assert worst < 1e-4


def test_a_cached_prefix_changes_nothing(make_engine, tokenizer, encode, texts):
    engine = make_engine(enable_prefix_caching=True)
    ids = encode(PROMPTS[0] + "a cup of iron, bought by one who thinks " * 12)
    ids = [*ids[:200], *encode("<answer>")]
    runs = []
    for _ in range(2):
        output = engine.generate([{"prompt_token_ids": ids}], sampling(n=8, seed=1), use_tqdm=False)[0]
        runs.append((output.num_cached_tokens, [list(sample.token_ids) for sample in output.outputs]))
        assert {decode(tokenizer, sample).removesuffix("</answer>" + END) for sample in output.outputs} <= texts
    (_, first), (cached, second) = runs
    assert cached > 0
    assert first == second


def test_requests_put_back_for_want_of_memory_go_on_where_they_were(make_engine, tokenizer, encode, texts):
    closing = "thank you, come again soon, this is what one who thinks of iron should buy"  # so an answer takes memory
    engine = make_engine({"closing": closing}, num_gpu_blocks_override=8, block_size=32, max_model_len=192)
    assert len(encode(closing)) > 32
    groups = written(engine, [encode(prompt + "<answer>") for prompt in PROMPTS], sampling(n=4, max_tokens=90))
    preempted = next(metric.value for metric in engine.get_metrics() if metric.name == "vllm:num_preemptions")
    assert preempted > 4
    answers = {decode(tokenizer, output) for group in groups for output in group}
    assert len(answers) > 4
    assert {answer.removesuffix(closing + END) for answer in answers} <= texts


def test_a_tag_of_several_tokens_that_the_model_completes(make_engine, tokenizer, encode, texts):
    engine = make_engine({"opening": "Answer: ", "closing": "."})
    tag = encode("Answer: ")
    assert len(tag) > 2
    parameters = sampling(n=8, logit_bias={tag[-1]: 100.0})  # no more than a push: the mask stands over it
    groups = written(engine, [[*encode(prompt), *tag[:-1]] for prompt in PROMPTS], parameters)
    for output in (output for group in groups for output in group):
        assert output.token_ids[0] == tag[-1]
        assert tokenizer.decode(output.token_ids[1:]).removesuffix("." + END) in texts


@pytest.mark.parametrize("mode", ["direct", "reason"])
def test_beam_search_finds_the_best_items(make_engine, processed, tokenizer, model, folder, encode, table, mode):
    from vllm.sampling_params import BeamSearchParams

    engine = processed if mode == "direct" else make_engine(logprobs_mode="processed_logprobs")
    rule = AnswerSettings(str(folder)).rule()
    rule, end, close = (rule.direct, "", []) if mode == "direct" else (rule, "<answer>", list(rule.closing))
    prompt = encode(PROMPTS[1] + end)
    search = BeamSearchParams(beam_width=ITEMS_AND_MORE, max_tokens=6, temperature=0.0, length_penalty=0.0)
    beams = engine.beam_search([{"prompt_token_ids": prompt}], search)[0].sequences
    beams = [beam for beam in beams if beam.cum_logprob > -torch.inf]  # vLLM fills up with impossible ones
    ids = {item: [tokenizer.convert_tokens_to_ids(token) for token in table.tokens_of(item)] for item in table.items}
    scores = {
        item: float(reference(model, prompt, [*ids[item], *close], CatalogueLogits(rule, len(prompt)), 1.0).sum())
        for item in table.items
    }
    best = sorted(scores, key=scores.get, reverse=True)
    found = [tokenizer.decode(beam.tokens[len(prompt) :]).removesuffix(END) for beam in beams]
    assert found == [table.text_of(item) + ("" if mode == "direct" else "</answer>") for item in best]
    assert [beam.cum_logprob for beam in beams] == pytest.approx([scores[item] for item in best], abs=1e-4)


def test_bad_requests_and_settings_in_one_sentence(engine, make_engine, encode):
    from vllm.exceptions import VLLMValidationError

    with pytest.raises(VLLMValidationError, match="mode 'slow' is not one of reason, direct, free"):
        written(engine, [encode("a")], sampling("slow"))
    with pytest.raises(VLLMValidationError, match="extra_args has no 'recllm_tag'"):
        written(engine, [encode("a")], sampling(extra_args={"recllm_tag": "x"}))
    with pytest.raises(UserError, match="holds no setting 'start'"):
        make_engine(additional_config={"recllm": {"start": "x"}})
