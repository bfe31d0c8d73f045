"""Free text is what one-by-one sampling writes, whatever the batch; greedy it is Hugging Face's `generate`."""

import pytest
import torch
from reference import some_model, some_prompts

from recllm.decoding import chains
from recllm.decoding.chains import Sampling, draw, sample_chains
from recllm.decoding.decoder import generator_of
from recllm.errors import UserError

EOS, NEVER = 2, 127
PROMPTS = some_prompts(3, (4, 9, 1, 6))
FREE = Sampling(temperature=1.0, top_p=1.0, max_new_tokens=24)


def slowly(model, prompt, key, sample, sampling, openings, seed):
    """One text, every token by a forward pass over all of it."""
    numbers = torch.rand(sampling.max_new_tokens, generator=generator_of(seed, key, "chain", sample))
    ids, logps = [], []
    for number in numbers.double():
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *ids]])).logits[0, -1].double()
        shares = torch.softmax(logits / sampling.temperature, 0)
        order = shares.argsort(descending=True)
        nucleus, mass = [], 0.0
        for token in order.tolist():
            if mass >= sampling.top_p:
                break
            nucleus.append(token)
            mass += float(shares[token])
        cumulated = shares[nucleus].cumsum(0) / mass
        place = min(int((cumulated <= number).sum()), len(nucleus) - 1)
        ids.append(nucleus[place])
        logps.append(float(torch.log(shares[nucleus[place]] / mass)))
        if ids[-1] == EOS or any(tuple(ids[-len(tag) :]) == tag for tag in openings):
            break
    return tuple(ids), logps


@pytest.mark.parametrize("sampling", [FREE, Sampling(0.7, 0.8, 24)], ids=["all", "temperature and top-p"])
def test_samples_are_those_of_one_by_one(sampling):
    model, openings = some_model(), ((50,), (51,), (52,), (40, 41))
    written = sample_chains(model, PROMPTS, 6, openings=openings, eos=EOS, sampling=sampling, seed=5)
    lengths = set()
    for place, prompt in enumerate(PROMPTS):
        for sample, one in enumerate(written[place]):
            ids, logps = slowly(model, prompt, place, sample, sampling, openings, 5)
            assert one.ids == ids
            assert one.logps == pytest.approx(logps, abs=2e-4)
            assert one.logp == pytest.approx(sum(logps), abs=2e-3)
            assert one.opened == any(ids[-len(tag) :] == tag for tag in openings)
            lengths.add(len(ids))
    assert len(lengths) > 5, "samples that end at different steps are what this is about"


def test_batches_keys_and_the_prefix_change_nothing():
    model, prefix = some_model(), [5, 9, 77]
    prompts = [prefix + prompt for prompt in PROMPTS]
    settings = {"openings": ((50,), (51,)), "eos": EOS, "sampling": FREE, "seed": 1}

    def written(prompts, **more):
        return [[one.ids for one in some] for some in sample_chains(model, prompts, 3, **settings | more)]

    together = written(prompts, batch_size=4, prefix=prefix)
    assert written(prompts, batch_size=1) == together
    assert written(prompts[::-1], keys=[3, 2, 1, 0])[::-1] == together
    assert written(prompts, seed=2) != together
    assert len(set(together[0])) == 3, "samples of one prompt differ"


@pytest.mark.parametrize("kind", ["qwen3", "a window of 8"])
def test_greedy_is_generate(kind):
    windowed = {} if kind == "qwen3" else {"sliding_window": 8, "layers": 2}
    model = some_model() if kind == "qwen3" else mistral(windowed)
    written = sample_chains(
        model, PROMPTS, 1, openings=((NEVER, NEVER),), eos=EOS, sampling=Sampling(0, 1.0, 20), prefix=()
    )  # fmt: skip
    for prompt, (one,) in zip(PROMPTS, written):
        out = model.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), max_new_tokens=20, do_sample=False,
            eos_token_id=EOS, pad_token_id=0,
        )  # fmt: skip
        assert list(one.ids) == out[0, len(prompt) :].tolist()
        assert set(one.logps) == {0.0}


def mistral(settings):
    from reference import shaken
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(
        vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=settings["layers"],
        num_attention_heads=2, num_key_value_heads=1, sliding_window=settings["sliding_window"],
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return shaken(MistralForCausalLM(config).float())


def test_it_stops_at_the_opening_the_end_and_the_limit():
    model, prompt = some_model(), PROMPTS[1]
    free = Sampling(0, 1.0, 12)
    ((whole,),) = sample_chains(model, [prompt], 1, openings=(), eos=NEVER, sampling=free)
    assert len(whole.ids) == 12
    assert not whole.opened
    fifth = whole.ids.index(whole.ids[4])  # the first time that the fifth token is written
    ((ended,),) = sample_chains(model, [prompt], 1, openings=(), eos=whole.ids[4], sampling=free)
    assert (ended.ids, ended.opened) == (whole.ids[: fifth + 1], False)
    tag = whole.ids[3:6]
    ((found,),) = sample_chains(model, [prompt], 1, openings=(tag,), eos=NEVER, sampling=free)
    assert found.opened
    assert found.ids[-3:] == tag
    assert found.ids == whole.ids[: len(found.ids)]


def test_those_that_ended_cost_nothing_more(monkeypatch):
    """Rows that the model is asked about, step by step, are the samples that go on."""
    model, asked = some_model(), []
    plain = chains.backbone(model).forward

    def counted(*args, **settings):
        asked.append(len(settings["input_ids"]))
        return plain(*args, **settings)

    openings = tuple((token,) for token in range(40, 60))
    monkeypatch.setattr(chains.backbone(model), "forward", counted)
    (written,) = sample_chains(model, PROMPTS[:1], 8, openings=openings, eos=EOS, sampling=FREE)
    lengths = [len(one.ids) for one in written]
    going_on = [sum(length > step for length in lengths) for step in range(1, max(lengths))]
    assert asked[-len(going_on) :] == going_on
    assert 1 in asked[: -len(going_on)], "the prompt was computed once"
    assert going_on[0] > going_on[-1]


def test_draws_follow_the_cut_distribution_also_beyond_the_likely_few(monkeypatch):
    """Rows whose nucleus is wide and rows whose is narrow, with only 4 tokens looked at first."""
    logits = torch.stack([torch.linspace(0, 1, 30), torch.linspace(0, 60, 30)])
    uniform = torch.rand(2, 40, generator=torch.Generator().manual_seed(0))
    exact = [draw(logits, uniform[:, i], 0.7, 0.9) for i in range(40)]
    monkeypatch.setattr(chains, "LIKELY", 4)
    for i, (tokens, logps) in enumerate(exact):
        some, values = draw(logits, uniform[:, i], 0.7, 0.9)
        assert torch.equal(some, tokens)
        torch.testing.assert_close(values, logps)
    shares = torch.softmax(logits[0] / 0.7, 0).sort(descending=True).values
    inside = int((shares.cumsum(0) < 0.9).sum()) + 1
    assert min(int(tokens[0]) for tokens, _ in exact) >= 30 - inside
    for tokens, logps in exact:
        wanted = shares[29 - int(tokens[0])] / shares[:inside].sum()
        assert float(logps[0]) == pytest.approx(float(wanted.log()), abs=1e-5)
    # A number just below one takes the last token of the nucleus, zero the first.
    last, _ = draw(logits, torch.tensor([1 - 2**-24, 0.0]), 0.7, 0.9)
    assert last.tolist() == [30 - inside, 29]


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"temperature": -0.1}, "temperature -0.1"),
        ({"top_p": 0.0}, "top_p 0.0"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
    ],
)
def test_settings_that_write_nothing_are_refused(settings, sentence):
    with pytest.raises(UserError, match=sentence):
        Sampling(**settings)


def test_more_than_the_context_is_refused():
    with pytest.raises(UserError, match="9 tokens and 4,096 to reason with do not fit the model's context of 4,096"):
        sample_chains(some_model(), PROMPTS, 1, openings=(), eos=EOS, sampling=Sampling(max_new_tokens=4096))
    with pytest.raises(UserError, match="prompt 1 is empty"):
        sample_chains(some_model(), [[4], []], 1, openings=(), eos=EOS)
