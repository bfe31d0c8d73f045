"""Answers for reinforcement learning: items of the table, with the log-probs of a slow forward pass over the children
that the trie allows, and draws that know nothing of the batch."""

import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from helpers import write_small_model
from peft import LoraConfig, get_peft_model
from taught import chain_of, write_reasoning_model
from trl.generation import vllm_generation
from trl.trainer.utils import add_fused_lm_head

from recllm.checkpoint import Checkpoint
from recllm.decoding import Decoder
from recllm.decoding.chains import Sampling, WrittenChain
from recllm.errors import UserError
from recllm.reasoning import CLOSING, OPENING, Chain, NotAChain
from recllm.trainers.groups import Rollouts
from recllm.trainers.rollouts import RolloutSettings, RolloutSource
from recllm.vllm_chains import STOPPING, TRLChains

G = 4
HISTORIES = [["i1", "i2"], ["i5", "i3", "i7"], ["i9", "i0"], ["i4"], ["i8", "i6", "i2", "i1"]]
SETTINGS = RolloutSettings(temperature=0.8, top_p=0.95, max_new_tokens=60)


@pytest.fixture(scope="module")
def direct(tmp_path_factory):
    """13 items, one of them of a single code; weights large enough that they differ in probability."""
    _, model = write_small_model(tmp_path_factory.mktemp("direct"), items=13)
    checkpoint, generator = Checkpoint.load(model, "cpu"), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in checkpoint.model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return checkpoint


@pytest.fixture(scope="module")
def taught_folder(tmp_path_factory):
    return write_reasoning_model(tmp_path_factory.mktemp("taught"))[1]


@pytest.fixture
def taught(taught_folder):
    return Checkpoint.load(taught_folder, "cpu")


def rows_of(checkpoint, mode="direct", histories=HISTORIES):
    """Rows of a data set; the truth is the item that the history ends with."""
    writer = checkpoint.writer if mode == "direct" else checkpoint.writer_of(checkpoint.reasoning)
    table = checkpoint.table
    return [
        {"prompt_ids": ids, "mode": mode, "target": table.codes[table.row_of[history[-1]]].tolist()}
        for ids, history in zip(writer.ids(histories), histories)
    ]


def mixed_rows(checkpoint):
    pairs = zip(rows_of(checkpoint, "reason"), rows_of(checkpoint))
    return [row for pair in pairs for row in pair][:7]


def logits_after(model, prompt, answer):
    """(T, V), what each token of the answer was drawn from."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*prompt, *answer]])).logits[0]
    return logits[len(prompt) - 1 : -1].double()


def slow_logp(logits, allowed, token, settings):
    """Of one token among `allowed`, after temperature, cut to the fewest that reach top-p."""
    shares = torch.softmax(logits[allowed] / settings.temperature, 0)
    order = shares.argsort(descending=True).tolist()
    kept, mass = [], 0.0
    for place in order:
        if mass >= settings.top_p:
            break
        kept.append(allowed[place])
        mass += float(shares[place])
    assert token in kept, "a token outside the nucleus was drawn"
    return float((shares[allowed.index(token)] / mass).log())


def children_of(checkpoint, before):
    """Token ids that may follow these codes."""
    level, codes = len(before), checkpoint.table.codes
    under = codes[(codes[:, :level] == before).all(axis=1)]
    return sorted({int(checkpoint.tokens.levels[level][code]) for code in under[:, level] if code >= 0})


def assert_items_with_their_logps(checkpoint, found: Rollouts, settings, model=None):
    """Every answer is chain + item, or a chain that came to none, drawn with the log-probs that are said."""
    table, levels = checkpoint.table, checkpoint.tokens.levels
    for place, (ids, start, codes) in enumerate(zip(found.answers, found.starts, found.codes.tolist())):
        codes = [code for code in codes if code >= 0]
        assert ids[start:] == [int(levels[level][code]) for level, code in enumerate(codes)]
        assert (table.item_of(codes) is not None) == (start < len(ids)) == bool(found.named[place])
        logits = logits_after(model or checkpoint.model, found.prompts[place // found.group], ids)
        everything = list(range(logits.size(1)))
        slow = [slow_logp(logits[at], everything, token, settings) for at, token in enumerate(ids[:start])]
        for level, token in enumerate(ids[start:]):
            slow.append(slow_logp(logits[start + level], children_of(checkpoint, codes[:level]), token, settings))
        assert found.logps[place] == pytest.approx(slow, abs=1e-5)


# ---- direct


@pytest.mark.parametrize("sampling", ["samples", "distinct"])
def test_direct_answers_are_items_with_the_log_probs_of_their_draws(direct, sampling):
    settings = dataclasses.replace(SETTINGS, sampling=sampling, top_p=0.95 if sampling == "samples" else 1.0)
    rows = rows_of(direct)
    found = RolloutSource.of(direct, settings)(rows, 8, seed=3, keys=range(5))
    assert found.prompts == [row["prompt_ids"] for row in rows]
    assert found.starts == [0] * 40
    assert_items_with_their_logps(direct, found, settings)
    assert {len(ids) for ids in found.answers} == {1, 2}, "an item of one code is among the answers"
    kinds = [len(set(map(tuple, found.answers[place : place + 8]))) for place in range(0, 40, 8)]
    assert (set(kinds) == {8}) if sampling == "distinct" else (min(kinds) < 8)


def test_items_come_as_often_as_they_are_probable(direct):
    settings = RolloutSettings(temperature=0.7)
    (row,) = rows_of(direct, histories=HISTORIES[:1])
    draws = 4000
    found = RolloutSource.of(direct, settings)([row] * 40, draws // 40, seed=0, keys=range(40))
    wanted = []
    for item in direct.table.items:
        codes, ids = direct.table.codes_of(item), direct.tokens.ids_of(item)
        logits = logits_after(direct.model, row["prompt_ids"], ids)
        steps = [
            slow_logp(logits[level], children_of(direct, codes[:level]), token, settings)
            for level, token in enumerate(ids)
        ]
        wanted.append(sum(steps))
    wanted = torch.tensor(wanted).exp()
    assert float(wanted.sum()) == pytest.approx(1, abs=1e-5)
    places = torch.tensor(direct.table.rows_of(found.codes.numpy()))
    seen = torch.bincount(places, minlength=13) / draws
    error = (wanted * (1 - wanted) / draws).sqrt()
    assert ((seen - wanted).abs() <= 4.5 * error + 1e-3).all()


def test_beams_are_the_decoders_and_were_not_drawn(direct):
    rows = rows_of(direct)
    settings = RolloutSettings(sampling="beams", normaliser="full")
    found = RolloutSource.of(direct, settings)(rows, 6, seed=1, keys=range(5))
    own = Decoder(direct.model, direct.tokens, normaliser="full").beams([row["prompt_ids"] for row in rows], 6)
    assert torch.equal(found.codes, own.codes.flatten(0, 1))
    assert found.logps is None
    assert found.answers[0] == direct.tokens.ids_of(direct.table.items[own.rows[0, 0]])


def test_as_many_different_items_as_there_are(direct):
    for sampling in ("distinct", "beams"):
        found = RolloutSource.of(direct, RolloutSettings(sampling))(rows_of(direct)[:2], 13, 0, [0, 1])
        assert len(set(map(tuple, found.answers[:13]))) == 13


# ---- reasoning


def test_reasoned_answers_carry_the_log_probs_of_chain_and_item(taught):
    rows = rows_of(taught, "reason")
    source = RolloutSource.of(taught, SETTINGS)
    found = source(rows, G, seed=2, keys=range(5))
    assert_items_with_their_logps(taught, found, SETTINGS)
    opening = taught.tokenizer(OPENING, add_special_tokens=False)["input_ids"]
    assert found.named.float().mean() > 0.5
    for ids, start, named in zip(found.answers, found.starts, found.named):
        assert not named or ids[start - len(opening) : start] == opening
    # As the reasoner writes them, for the same seed and keys.
    reasoner, prompts = source.reasoner, found.prompts
    chains = reasoner.chains(prompts, G, 2, range(5))
    assert [ids[:start] for ids, start in zip(found.answers, found.starts)] == [
        list(one.ids) for some in chains for one in some
    ]
    assert torch.equal(found.codes, reasoner.one_answer_each(prompts, chains, 2, range(5)).codes.flatten(0, 1))


def test_chains_that_come_to_no_answer_name_none(taught):
    settings = dataclasses.replace(SETTINGS, max_new_tokens=3)
    found = RolloutSource.of(taught, settings)(rows_of(taught, "reason"), G, 0, range(5))
    assert not found.named.any()
    assert found.starts == [len(ids) for ids in found.answers]
    assert {len(ids) for ids in found.answers} <= {1, 2, 3}
    assert (found.codes == -1).all()
    assert_items_with_their_logps(taught, found, settings)


# ---- both


def same(one: Rollouts, two: Rollouts) -> bool:
    return (one.prompts, one.answers, one.starts) == (two.prompts, two.answers, two.starts)


@pytest.mark.parametrize("sampling", ["samples", "distinct"])
def test_draws_know_nothing_of_the_batch(taught, sampling):
    rows, keys = mixed_rows(taught), [f"row {place}" for place in range(7)]
    source = RolloutSource.of(taught, dataclasses.replace(SETTINGS, sampling=sampling, top_p=1.0))
    together = source(rows, G, 5, keys)
    assert together.prompts == [row["prompt_ids"] for row in rows], "the order of the rows is kept"
    assert_items_with_their_logps(taught, together, source.settings)
    for places in ([2], [6, 3, 0], [1, 5], [4, 0]):
        alone = source([rows[place] for place in places], G, 5, [keys[place] for place in places])
        assert same(alone, together.take(places))
        assert torch.equal(alone.codes, together.take(places).codes)
    assert not same(source(rows, G, 6, keys), together)
    assert not same(source(rows, G, 5, keys[::-1]), together)
    if sampling == "samples":  # the first answers stay when there are more of them
        more = source(rows, G + 3, 5, keys).answers
        assert [ids for row in range(7) for ids in more[row * (G + 3) :][:G]] == together.answers


def test_formed_is_an_item_or_a_whole_chain(taught):
    rows = [*rows_of(taught, "reason")[:2], rows_of(taught)[0]]
    eos, table = taught.tokenizer.eos_token_id, taught.table

    def ids_of(text):
        return taught.tokenizer(text, add_special_tokens=False)["input_ids"]

    whole = chain_of(HISTORIES[0]).text(table).removesuffix(CLOSING)
    before, item = whole.split(OPENING)
    chain, codes = ids_of(before + OPENING), ids_of(item)
    answers = [[*chain, *codes], ids_of("so" + OPENING) + codes, chain[:-1], [*chain[:5], eos], codes, codes]
    starts = [len(chain), len(answers[1]) - 2, len(chain) - 1, 6, 0, 0]
    named = torch.tensor([list(table.codes_of("i2")), *[[0, 0]] * 5], dtype=torch.int64)
    named[2:4] = -1
    rollouts = Rollouts([row["prompt_ids"] for row in rows], answers, starts, named, None)
    source = RolloutSource.of(taught, SETTINGS)
    assert source.formed(rollouts, rows) == [True, False, False, False, True, True]
    nothing = dataclasses.replace(rollouts, codes=torch.full((6, 2), -1))
    assert source.formed(nothing, rows) == [False] * 6


def test_what_is_drawn_is_formed_as_evaluation_counts_it(taught):
    rows = mixed_rows(taught)
    source = RolloutSource.of(taught, dataclasses.replace(SETTINGS, temperature=1.2, top_p=1.0))
    found = source(rows, G, 0, range(7))
    formed = source.formed(found, rows)
    assert {formed[row] for row in range(7 * G) if row // G % 2} == {True}
    assert {formed[row] for row in range(7 * G) if row // G % 2 == 0} == {True, False}
    for row, ids in enumerate(found.answers):
        if rows[row // G]["mode"] == "reason":
            text = taught.tokenizer.decode(ids, clean_up_tokenization_spaces=False) + CLOSING
            try:
                Chain.parse(text, taught.table)
            except NotAChain:
                assert not formed[row]
            else:
                assert formed[row]


def test_the_anchor_is_the_truth_in_the_answers_own_form(taught):
    (row,), (plain,) = rows_of(taught, "reason", HISTORIES[:1]), rows_of(taught, "direct", HISTORIES[:1])
    source, truth = RolloutSource.of(taught, SETTINGS), taught.tokens.ids_of("i2")
    opening = taught.tokenizer(OPENING, add_special_tokens=False)["input_ids"]
    eos = taught.tokenizer.eos_token_id
    assert source.anchor(plain, [9, 9], 0) == (truth, 0)
    opened = [11, 12, *opening]
    assert source.anchor(row, [*opened, 300, 301], len(opened)) == ([*opened, *truth], len(opened))
    assert source.anchor(row, [11, 12, eos], 3) == ([*opened, *truth], len(opened))
    assert source.anchor(row, [11, 12], 2) == ([*opened, *truth], len(opened))
    short = RolloutSource.of(taught, dataclasses.replace(SETTINGS, max_new_tokens=len(opening) + 1))
    assert short.anchor(row, [11, 12, 13], 3) == ([11, *opening, *truth], 1 + len(opening))


def test_the_anchor_of_a_shallow_item_has_no_padding(direct):
    (row,) = rows_of(direct, histories=[["i12"]])
    assert row["target"][1] == -1
    assert RolloutSource.of(direct, SETTINGS).anchor(row, [1, 2], 0) == (direct.tokens.ids_of("i12"), 0)
    assert len(direct.tokens.ids_of("i12")) == 1


# ---- the model in training


def test_answers_follow_the_weights_and_leave_the_model_as_it_was(taught):
    rows, source = mixed_rows(taught), RolloutSource.of(taught, SETTINGS)
    taught.model.gradient_checkpointing_enable()
    taught.model.train()
    source(rows, G, 0, range(7))
    assert taught.model.training
    with torch.no_grad():
        for parameter in taught.model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    after = source(rows, G, 0, range(7))
    taught.model.eval()
    assert_items_with_their_logps(taught, after, SETTINGS)


@pytest.mark.parametrize("lora", [False, True])
def test_as_trl_patches_the_model(taught, lora):
    """With the fused head, and LoRA around it: embedding and head trained whole, as recllm.trainers.adapters asks."""
    rows, model = mixed_rows(taught), taught.model
    add_fused_lm_head(model, temperature=0.8)
    if lora:
        config = LoraConfig(
            target_modules=["q_proj", "v_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=True,
            init_lora_weights=False,
        )  # fmt: skip
        model = get_peft_model(model, config)
        with torch.no_grad():
            model.get_input_embeddings().weight.mul_(1.1)
    sources = [RolloutSource.of(taught, SETTINGS), RolloutSource.of(taught, SETTINGS, model=model)]
    found = [source(rows, G, 0, range(7)) for source in sources]
    assert same(*found), "the checkpoint's own object is the one that is trained"
    model.eval()
    assert_items_with_their_logps(taught, found[1], SETTINGS, model)


def test_a_head_that_was_replaced_is_noticed(taught):
    source = RolloutSource.of(taught, SETTINGS)
    source(rows_of(taught), G, 0, range(5))
    taught.model.lm_head.weight = torch.nn.Parameter(taught.model.lm_head.weight.detach().clone())
    with pytest.raises(AssertionError, match="the head was replaced"):
        source(rows_of(taught), G, 0, range(5))


def test_under_autocast_answers_stay_items(taught):
    with torch.autocast("cpu", torch.bfloat16):
        found = RolloutSource.of(taught, SETTINGS)(mixed_rows(taught), G, 0, range(7))
    rows = taught.table.rows_of(found.codes.numpy())
    assert ((rows >= 0) == found.named.numpy()).all()
    assert found.named.float().mean() > 0.5


# ---- refusals


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"sampling": "beam"}, "sampling 'beam' is not one of samples, distinct, beams"),
        ({"temperature": 0}, "temperature 0 must be above 0"),
        ({"temperature": float("nan")}, "temperature nan must be above 0"),
        ({"top_p": 1.5}, "top_p 1.5"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"max_new_tokens": 5.5}, "max_new_tokens must be a whole number, got 5.5"),
        ({"normaliser": "trie"}, "normaliser 'trie' is not one of"),
    ],
)
def test_settings_that_draw_nothing_are_refused(settings, sentence):
    with pytest.raises(UserError, match=sentence):
        RolloutSettings(**settings)


def test_what_would_fail_later_is_refused_at_the_start(direct, taught):
    def check(modes, answers=G, checkpoint=taught, vllm=None, **settings):
        RolloutSource.of(checkpoint, RolloutSettings(**settings), vllm).check(modes, answers)

    check({"direct", "reason"}, sampling="distinct")
    check({"reason"}, 200, vllm=print)
    check({"direct"}, 13, direct, sampling="beams")
    with pytest.raises(UserError, match="num_generations 14 is above the 13 items there are, and beams are all diff"):
        check({"direct"}, 14, direct, sampling="beams")
    with pytest.raises(UserError, match="beams are for direct prompts alone"):
        check({"direct", "reason"}, sampling="beams")
    with pytest.raises(UserError, match="sampling 'distinct' is for direct prompts, and there are none"):
        check({"reason"}, sampling="distinct")
    with pytest.raises(UserError, match="vLLM writes chains, and no prompt asks for one"):
        check({"direct"}, vllm=print)
    with pytest.raises(UserError, match="the model was not taught to reason"):
        check({"reason"}, checkpoint=direct)
    with pytest.raises(UserError, match="mode 'think' of a prompt is not one of direct, reason"):
        check({"direct", "think"})


def test_a_batch_that_cannot_be_answered_is_refused(direct, taught):
    with pytest.raises(UserError, match="beams are for direct prompts alone"):
        RolloutSource.of(taught, RolloutSettings("beams"))(mixed_rows(taught), G, 0, range(7))
    with pytest.raises(UserError, match=r"num_generations 14 is above the 13 items"):
        RolloutSource.of(direct, RolloutSettings("distinct"))(rows_of(direct), 14, 0, range(5))
    with pytest.raises(UserError, match=r"top_p 0.1 may leave fewer items than are to be distinct"):
        RolloutSettings("distinct", top_p=0.1)


# ---- vLLM by way of TRL: its own VLLMGeneration around an engine that is none


class FakeVLLM(vllm_generation.VLLMGeneration):
    """Writes, for the g-th answer to a prompt, [10 + g, opening] with log-probs −0.5 − g and −0.25."""

    def _init_vllm(self):
        self.calls = []
        self.llm = SimpleNamespace(generate=self._colocated)
        self.vllm_client = SimpleNamespace(generate=self._served)

    def _colocated(self, prompts, sampling_params, use_tqdm):
        self.calls.append(sampling_params)
        token = {place: [10 + place % G, *self.opening] for place in range(len(prompts))}
        return [
            SimpleNamespace(
                prompt_token_ids=prompt["prompt_token_ids"],
                outputs=[
                    SimpleNamespace(
                        token_ids=token[place],
                        logprobs=[
                            {id: SimpleNamespace(rank=2, logprob=-0.25 if step else -0.5 - place % G)}
                            | {7: SimpleNamespace(rank=1, logprob=-0.1)}
                            for step, id in enumerate(token[place])
                        ],
                    )
                ],
            )
            for place, prompt in enumerate(prompts)
        ]

    def _served(self, prompts, features, n, **asked):
        self.calls.append(asked | {"prompts": prompts, "n": n})
        ids = [[10 + answer, *self.opening] for _ in prompts for answer in range(n)]
        logps = [[[-0.5 - answer], *[[-0.25] for _ in self.opening]] for _ in prompts for answer in range(n)]
        which = [[[id] for id in one] for one in ids]
        return {"prompt_ids": prompts, "completion_ids": ids, "logprobs": logps, "logprob_token_ids": which}


def fake_vllm(checkpoint, monkeypatch, **settings):
    monkeypatch.setattr(vllm_generation, "SamplingParams", SimpleNamespace, raising=False)
    generation = FakeVLLM(checkpoint.model, Accelerator(cpu=True), checkpoint.tokenizer, **settings)
    generation.opening = checkpoint.tokenizer(OPENING, add_special_tokens=False)["input_ids"]
    return generation


@pytest.mark.parametrize("mode", ["colocate", "server"])
def test_trls_vllm_is_asked_for_chains_up_to_their_opening(taught, monkeypatch, mode):
    generation = fake_vllm(taught, monkeypatch, mode=mode, max_completion_length=7)
    rows = mixed_rows(taught)
    source = RolloutSource.of(taught, SETTINGS, vllm=TRLChains(generation))
    found = source(rows, G, 0, range(7))
    (asked,) = generation.calls
    asked = asked if mode == "server" else vars(asked) | {"generation_kwargs": STOPPING}
    assert (asked["temperature"], asked["top_p"], asked["max_tokens"], asked["logprobs"]) == (0.8, 0.95, 60, 0)
    assert asked["generation_kwargs"]["stop"] == [OPENING]
    if mode == "server":
        assert asked["n"] == G
        assert asked["prompts"] == [row["prompt_ids"] for row in rows[::2]]
    else:
        assert (asked["n"], asked["stop"], asked["include_stop_str_in_output"]) == (1, [OPENING], True)
    for place in range(0, 7 * G, 2 * G):  # the prompts that reason
        for answer in range(G):
            ids, start = found.answers[place + answer], found.starts[place + answer]
            assert ids[:start] == [10 + answer, *generation.opening]
            assert found.logps[place + answer][:start] == [-0.5 - answer, *[-0.25] * (start - 1)]
    assert found.named.all()
    own = RolloutSource.of(taught, SETTINGS)(rows[1::2], G, 0, range(1, 7, 2))
    assert same(found.take([1, 3, 5]), own), "direct answers are the engine's own"
    assert generation.max_completion_length == 7, "TRL's settings are what they were"
    assert generation.generation_kwargs == {}


def test_processes_that_ask_together_ask_for_as_many(taught, monkeypatch):
    """TRL's server cuts the answers of all processes into equal parts."""
    generation = fake_vllm(taught, monkeypatch, mode="server")
    generation.accelerator = SimpleNamespace(num_processes=2, process_index=1, is_main_process=True)
    monkeypatch.setattr("accelerate.utils.gather_object", lambda counts: [3, *counts])
    filled = []

    def gathered(given):  # by TRL: prompts, then the images that there are none of
        filled.append(given)
        return [[5] if given[0] else None] * 3 * G + given

    monkeypatch.setattr(vllm_generation, "gather_object", gathered)
    source = RolloutSource.of(taught, SETTINGS, vllm=TRLChains(generation))
    found = source(rows_of(taught), G, 0, range(5))  # none of them reasons, and the process takes part
    assert filled[0] == [[taught.tokenizer.eos_token_id]] * 3 * G
    assert (len(found.prompts), len(generation.calls)) == (5, 1)


def test_nothing_to_ask_is_not_asked(taught, monkeypatch):
    generation = fake_vllm(taught, monkeypatch)
    RolloutSource.of(taught, SETTINGS, vllm=TRLChains(generation))(rows_of(taught), G, 0, range(5))
    assert generation.calls == []


@pytest.mark.parametrize(
    "setting",
    [{"top_k": 5}, {"min_p": 0.1}, {"repetition_penalty": 1.2}, {"generation_kwargs": {"seed": 1}}],
    ids=lambda setting: next(iter(setting)),
)
def test_settings_that_answers_would_not_follow_are_refused(taught, monkeypatch, setting):
    with pytest.raises(UserError, match=f"{next(iter(setting))} is set, which answers after a chain would not follow"):
        TRLChains(fake_vllm(taught, monkeypatch, **setting))
    TRLChains(fake_vllm(taught, monkeypatch, generation_kwargs=STOPPING))


def test_a_server_without_log_probs_is_refused(taught, monkeypatch):
    generation = fake_vllm(taught, monkeypatch)
    monkeypatch.setattr(generation, "generate", lambda **_: ([[5]], [[10]], None, None))
    with pytest.raises(UserError, match="vLLM reported no log-probs"):
        TRLChains(generation)([[5]], 1, ((9,),), Sampling(), 0, [0])


def test_a_token_that_vllm_could_not_score_is_nan(taught, monkeypatch):
    generation = fake_vllm(taught, monkeypatch)
    monkeypatch.setattr(generation, "generate", lambda **_: ([[5]], [[8, 9]], [[[None], [-2.0]]], [[[8], [9]]]))
    (((one,),)) = TRLChains(generation)([[5]], 1, ((9,),), Sampling(), 0, [0])
    assert math.isnan(one.logps[0])
    assert (one.ids, one.logps[1], one.opened) == ((8, 9), -2.0, True)


def test_a_chain_that_trls_vllm_cut_off_is_not_open(taught, monkeypatch):
    generation = fake_vllm(taught, monkeypatch)
    monkeypatch.setattr(generation, "generate", lambda **_: ([[5]], [[9, 8]], [[[-1.0], [-2.0]]], [[[9], [8]]]))
    (((one,),)) = TRLChains(generation)([[5]], 1, ((9,),), Sampling(), 0, [0])
    assert one == WrittenChain((9, 8), (-1.0, -2.0), False)
