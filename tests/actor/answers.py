"""The slow and plain way: every answer through the model by itself, its tokens compared one by one."""

import copy

import numpy as np
import torch
from decoding.reference import LEVELS, SIZES, some_codes
from torch import Tensor

from recllm.actor import AnswerRows, AnswerScorer
from recllm.trie import SemanticIdTrie

CODES = some_codes()  # items of one to four codes
TRIE = SemanticIdTrie.from_codes(CODES, SIZES)


def ids_of(item: int) -> list[int]:
    return [int(LEVELS[level][code]) for level, code in enumerate(CODES[item]) if code >= 0]


def text(random: np.random.Generator, length: int) -> list[int]:
    return random.integers(40, 100, length).tolist()


def rows_of(prompts: list[list[int]], answers: list[list[int]], starts: list[int], spare: int = 2) -> AnswerRows:
    """`spare` columns of padding in all rows. Under a mask stands rubbish: nothing may look at it."""
    left, right = max(map(len, prompts)) + spare, max(map(len, answers)) + spare
    before = [[7] * (left - len(prompt)) for prompt in prompts]
    after = [[9] * (right - len(answer)) for answer in answers]
    return AnswerRows(
        torch.tensor([padding + prompt for padding, prompt in zip(before, prompts)]),
        torch.tensor([[0] * len(padding) + [1] * len(prompt) for padding, prompt in zip(before, prompts)]),
        torch.tensor([answer + padding for answer, padding in zip(answers, after)]),
        torch.tensor([[1] * len(answer) + [0] * len(padding) for answer, padding in zip(answers, after)]),
        torch.tensor(starts),
    )


def mixed_rows(seed: int = 0, lengths: tuple[int, ...] = (5, 9, 1, 4), groups: tuple[int, ...] = (4, 1, 3, 2)):
    """Groups of different sizes and prompts: items, items after text, text alone, one token, nothing."""
    random = np.random.default_rng(seed)
    prompts, answers, starts = [], [], []
    for length, answers_to_it in zip(lengths, groups):
        prompt = text(random, length)
        for place in range(answers_to_it):
            said = text(random, int(random.integers(0, 5)) * (place % 2))
            prompts.append(prompt)
            answers.append(said + ids_of(int(random.integers(len(CODES)))))
            starts.append(len(said))
    answers[1], starts[1] = [], 0
    answers[2], starts[2] = text(random, 6), 6  # names no item
    answers[-1] = ids_of(int(np.flatnonzero(CODES[:, 1] < 0)[0]))  # an item of one code
    answers[-2], starts[-2] = [], 3  # the whole of the last prompt's answers but one
    return rows_of(prompts, answers, starts)


def short_rows(seed: int = 0, prompts: int = 2, group: int = 6, length: int = 20) -> AnswerRows:
    """Prompts of one length, answers of four codes each: nothing is padded."""
    random, deep = np.random.default_rng(seed), np.flatnonzero(CODES[:, 3] >= 0)
    some = [text(random, length) for _ in range(prompts)]
    answers = [ids_of(int(random.choice(deep))) for _ in range(prompts * group)]
    return rows_of([prompt for prompt in some for _ in range(group)], answers, [0] * len(answers), spare=0)


def slow_scores(model, rows: AnswerRows, normaliser: str, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """logps and entropies (R, C), with gradient."""
    logps, entropies = [], []
    for row in range(len(rows.starts)):
        prompt = rows.prompt_ids[row][rows.prompt_mask[row] > 0].tolist()
        answer = rows.answer_ids[row][rows.answer_mask[row] > 0].tolist()
        own, spread = [], []
        if answer:
            logits = model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1] / temperature
        for place, token in enumerate(answer):
            level = place - int(rows.starts[row])
            over = torch.arange(logits.size(-1))
            if level >= 0 and normaliser != "full":
                over = LEVELS[level]
                if normaliser == "children":
                    before = [int(LEVELS[h].tolist().index(answer[place - level + h])) for h in range(level)]
                    over = over[TRIE.allowed_next(before)]
            shares = logits[place][over].log_softmax(0)
            own.append(shares[over.tolist().index(token)])
            spread.append(-(shares.exp() * shares).sum())
        nothing = [torch.zeros((), dtype=model.dtype)] * (rows.answer_ids.size(1) - len(answer))
        logps.append(torch.stack(own + nothing))
        entropies.append(torch.stack(spread + nothing))
    return torch.stack(logps), torch.stack(entropies)


def scored(model, rows: AnswerRows, entropy: bool = True, **settings) -> tuple[Tensor, Tensor | None, AnswerScorer]:
    """By a copy of the model that the scorer is installed on; gradients are the caller's own, see `gradient`."""
    scorer = AnswerScorer(model, LEVELS, TRIE, **settings)
    scorer.install(model)
    return *model(answer_rows=rows, entropy=entropy), scorer


def gradient(model, *parts: Tensor | None) -> Tensor:
    """Of a loss in which every token counts differently, with respect to all that trains."""
    loss = sum((part * torch.linspace(-1, 2, part.numel()).view_as(part)).sum() for part in parts if part is not None)
    model.zero_grad()
    loss.backward()
    return torch.cat([parameter.grad.flatten().double() for parameter in model.parameters() if parameter.requires_grad])


def assert_same(model, rows: AnswerRows, normaliser="children", temperature=1.0, entropy=True, **settings):
    """Values within 1e-5 and gradients within 1e-5 of their size of the slow way's; the scorer."""
    plain = copy.deepcopy(model)
    wanted = slow_scores(plain, rows, normaliser, temperature)
    found = scored(model, rows, entropy, normaliser=normaliser, temperature=temperature, **settings)
    for ours, theirs in zip(found[:2], wanted):
        if ours is not None:
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    theirs = gradient(plain, *wanted[: 1 + entropy])
    assert (gradient(model, *found[:2]) - theirs).norm() <= 1e-5 * theirs.norm()
    return found[2]
