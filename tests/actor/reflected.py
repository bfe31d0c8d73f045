"""Reflected answers, and the slow and plain way to their log-probabilities: each by itself under its form's mask."""

import copy
import dataclasses

import numpy as np
import torch
from answers import gradient, text
from decoding.reference import LEVELS, SIZES
from torch import Tensor

from recllm.actor import AnswerRows, AnswerScorer
from recllm.reflection import NOTHING, PROMPT, ReflectionTokens, Template
from recllm.trie import SemanticIdTrie

CODES = np.unique(np.random.default_rng(0).integers(0, 3, (90, 4)), axis=0)  # so near that most prefixes branch
TRIE = SemanticIdTrie.from_codes(CODES, SIZES)
PARALLEL = Template(4, ("brand", "category"))  # 4 + 3 + 3 + 4 places
TEMPLATES = {
    "parallel": PARALLEL,
    "causal": dataclasses.replace(PARALLEL, layout="causal"),
    "gc": dataclasses.replace(PARALLEL, labels=False),
}
LABELS = (torch.tensor([110, 111, 112, 113, 114]), torch.tensor([116, 115]), torch.tensor([117, 121]))


def ids_of(item: int) -> list[int]:
    return [int(LEVELS[level][code]) for level, code in enumerate(CODES[item])]


def tokens_of(template: Template) -> ReflectionTokens:
    if not template.labels:
        return ReflectionTokens(template, torch.tensor([100]), ())
    return ReflectionTokens(template, torch.tensor([101, 102, 103]), LABELS)


def reflected(template: Template, random: np.random.Generator) -> list[int]:
    draft, item = (ids_of(int(random.integers(len(CODES)))) for _ in range(2))
    labels = [int(random.integers(len(ids))) for ids in tokens_of(template).labels]
    return tokens_of(template).ids(draft, labels, item)


def form_rows(
    template: Template, seed: int = 0, lengths: tuple[int, ...] = (5, 9, 1), group: int = 3, drafts: bool = True
) -> AnswerRows:
    """`group` answers a prompt; with `drafts` every other holds its draft alone and one holds nothing."""
    random, places = np.random.default_rng(seed), template.form.places
    prompts = [prompt for prompt in (text(random, length) for length in lengths) for _ in range(group)]
    answers = torch.tensor([reflected(template, random) for _ in prompts])
    mask = torch.ones_like(answers)
    if drafts:
        mask[::2, template.levels :] = 0
        mask[1] = 0
    left = max(lengths) + (2 if drafts else 0)
    return AnswerRows(
        torch.tensor([[7] * (left - len(prompt)) + prompt for prompt in prompts]),
        torch.tensor([[0] * (left - len(prompt)) + [1] * len(prompt) for prompt in prompts]),
        torch.where(mask > 0, answers, 9), mask, torch.full((len(prompts),), places), template.form,
    )  # fmt: skip


def whole_logits(model, prompt: list[int], answer: list[int], template: Template, held: list[int]) -> Tensor:
    """(Tp + tokens held, vocabulary), by a mask of four dimensions and positions that are written out."""
    form, own = template.form, torch.tensor(held)
    size = len(prompt) + len(held)
    sees = torch.ones(size, size).tril().bool()
    sees[len(prompt) :, len(prompt) :] = form.sees[own][:, own]
    positions = torch.cat([torch.arange(len(prompt)), len(prompt) + form.offsets[own]])
    ids = torch.tensor([prompt + [answer[place] for place in held]])
    return model(input_ids=ids, attention_mask=sees[None, None], position_ids=positions[None]).logits[0]


def slow_form_scores(model, rows: AnswerRows, template: Template, normaliser="children", temperature=1.0):
    """logps and entropies (R, F), with gradient: every answer whole, one after the other."""
    form, levels = template.form, template.levels
    logps = torch.zeros(rows.answer_ids.shape)
    entropies = torch.zeros(rows.answer_ids.shape)
    for row, answer in enumerate(rows.answer_ids.tolist()):
        prompt = rows.prompt_ids[row][rows.prompt_mask[row] > 0].tolist()
        held = rows.answer_mask[row].nonzero().flatten().tolist()
        logits = whole_logits(model, prompt, answer, template, held) / temperature if held else None
        for place in held:
            kind, before = int(form.kinds[place]), int(form.before[place])
            if before == NOTHING or (rows.scored is not None and not rows.scored[row, place]):
                continue
            own = logits[len(prompt) - 1 if before == PROMPT else len(prompt) + held.index(before)]
            over = torch.arange(len(own)) if normaliser == "full" else [*LEVELS, *LABELS][kind]
            if normaliser == "children" and kind < levels:
                so_far = [LEVELS[h].tolist().index(answer[place - kind + h]) for h in range(kind)]
                over = over[TRIE.allowed_next(so_far)]
            shares = own[over].log_softmax(0)
            logps[row, place] = shares[over.tolist().index(answer[place])]
            entropies[row, place] = -(shares.exp() * shares).sum()
    return logps, entropies


def fast(model, rows: AnswerRows, template: Template, entropy: bool = True, **settings):
    scorer = AnswerScorer(model, LEVELS, TRIE, labels=tokens_of(template).labels, **settings)
    scorer.install(model)
    return *model(answer_rows=rows, entropy=entropy), scorer


def assert_as_slow(model, rows: AnswerRows, template: Template, normaliser="children", temperature=1.0, **settings):
    plain = copy.deepcopy(model)
    wanted = slow_form_scores(plain, rows, template, normaliser, temperature)
    *found, scorer = fast(model, rows, template, normaliser=normaliser, temperature=temperature, **settings)
    for ours, theirs in zip(found, wanted):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    theirs = gradient(plain, *wanted)
    assert (gradient(model, *found) - theirs).norm() <= 1e-5 * theirs.norm()
    return scorer
