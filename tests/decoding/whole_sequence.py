"""Generate, reflect, correct the slow way: every trajectory by one plain pass over the whole sequence."""

import numpy as np
import torch
from reference import LEVELS, SIZES, some_codes, some_model
from torch import Tensor

from recllm.decoding import Decoder
from recllm.decoding.reflecting import Reflector
from recllm.reflection import PROMPT, ReflectionTokens, Template
from recllm.trie import SemanticIdTrie

CODES = some_codes(shallow=False, items=25)
TEMPLATES = {
    "parallel": Template(4, ("brand", "price")),
    "causal": Template(4, ("brand", "price"), "causal"),
    "GC": Template(4, ("brand", "price"), labels=False),
}


def tokens_of(template: Template) -> ReflectionTokens:
    """Slots from token 40 on, labels from 50 on, in no order that could be taken for another."""
    sizes = [len(template.values(slot)) for slot in range(len(template.slots))]
    labels = torch.arange(50, 50 + sum(sizes)).flip(0).split(sizes)
    return ReflectionTokens(template, torch.arange(40, 40 + max(1, len(sizes))), tuple(labels))


def reflector(template: Template, seed: int = 0, codes: np.ndarray = CODES, **settings) -> Reflector:
    levels, sizes = LEVELS[: template.levels], SIZES[: template.levels]
    trie = SemanticIdTrie.from_codes(codes, sizes)
    return Reflector(Decoder(some_model(seed), levels, trie, **settings), tokens_of(template))


@torch.no_grad()
def whole_logits(model, prompt: list[int], template: Template, draft, labels, item) -> Tensor:
    """Logits that each place is predicted with, from one pass over prompt and trajectory. (F, vocabulary) double"""
    codes = [[int(LEVELS[level][code]) for level, code in enumerate(some)] for some in (draft, item)]
    ids = tokens_of(template).ids(codes[0], labels, codes[1])
    start, form = len(prompt), template.form
    sees = torch.ones(start + len(ids), start + len(ids)).tril().bool()
    sees[start:, start:] = form.sees
    mask = torch.zeros(sees.shape).masked_fill(~sees, torch.finfo(torch.float32).min)
    positions = torch.cat([torch.arange(start), start + form.offsets])
    logits = model(
        input_ids=torch.tensor([[*prompt, *ids]]), attention_mask=mask[None, None], position_ids=positions[None]
    ).logits[0]
    before = torch.where(form.before == PROMPT, -1, form.before).clamp(min=-1) + start
    return logits[before].double()


def place_logps(model, prompt, template, draft, labels, item, codes=CODES, normaliser="children") -> Tensor:
    """log-probability of what stands at each place, 0 where it is given. (F,)"""
    logits = whole_logits(model, prompt, template, draft, labels, item)
    logps = torch.zeros(len(logits), dtype=torch.double)
    for place, (kind, number) in enumerate(template.places):
        own = logits[place]
        if kind == "label":
            logps[place] = own[tokens_of(template).labels[number]].log_softmax(0)[labels[number]]
        if kind in ("draft", "item"):
            said = draft if kind == "draft" else item
            same = (codes[:, :number] == np.array(said[:number])).all(axis=1)
            over = np.unique(codes[same, number]) if normaliser == "children" else np.arange(SIZES[number])
            logps[place] = own[LEVELS[number][said[number]]] - own[LEVELS[number][over]].logsumexp(0)
    return logps


def slow_schedule(ours: Reflector, prompt, beams, weight, skip, codes, normaliser="level"):
    """Drafts, labels, pairs of draft and prefix: a loop over everything, each item by a pass over the whole sequence.

    Returns drafts (rows), labels, entropies, kept, and the pairs that are left, best first: (score, draft, row).
    """
    model, template, levels = ours.decoder.model, ours.template, ours.template.levels
    at = {kind: template.at(kind) for kind in ("draft", "slot", "label", "item")}
    ids = tokens_of(template).labels
    nothing = [0] * len(ids)

    def logps(draft, labels, item, kind):
        return place_logps(model, prompt, template, draft, labels, item, codes, normaliser)[at[kind]]

    def search(starts: dict, of) -> list:
        """{draft: (score, has it ended?)} -> the best pairs of draft and item."""
        pairs = [(score, draft, draft if ended else None, codes[:, :0]) for draft, (score, ended) in starts.items()]
        for level in range(levels):
            grown = []
            for score, draft, ended, _ in pairs:
                if ended is not None:
                    grown.append((score, draft, ended, None))
            for score, draft, ended, prefix in pairs:
                if ended is not None:
                    continue
                own = tuple(prefix[0]) if level else ()
                for code in np.unique(codes[(codes[:, :level] == np.array(own, int)).all(axis=1), level]):
                    row = int(np.flatnonzero((codes[:, : level + 1] == [*own, code]).all(axis=1))[0])
                    grown.append((score + float(of(draft, row)[level]), draft, None, np.array([[*own, code]])))
            pairs = sorted(grown, key=lambda pair: -pair[0])[:beams]
        return [
            (score, draft, int(np.flatnonzero((codes == prefix[0]).all(axis=1))[0]) if ended is None else ended)
            for score, draft, ended, prefix in pairs
        ]

    as_draft = {row: logps(codes[row].tolist(), nothing, codes[row].tolist(), "draft") for row in range(len(codes))}
    drafts = search({0: (0.0, False)}, lambda _, row: as_draft[row])
    labels, entropies, starts, corrections = [], [], {}, {}
    for score, _, row in drafts:
        draft, said, doubts = codes[row].tolist(), list(nothing), []
        for slot in range(len(ids)):  # one after another: in the causal layout each depends on those before
            logits = whole_logits(model, prompt, template, draft, said, draft)[at["label"][slot]][ids[slot]]
            said[slot] = int(logits.argmax())
            doubts.append(float(torch.distributions.Categorical(logits=logits).entropy()))
        labels.append(said)
        entropies.append(doubts)
        ended = skip and bool(ids) and said[0] == levels
        starts[row] = (score + weight * (float(np.mean(doubts)) if doubts else 0.0), ended)
        if not ended:
            corrections[row] = [logps(draft, said, codes[item].tolist(), "item") for item in range(len(codes))]
    pairs = search(starts, lambda draft, row: corrections[draft][row])
    rows = [row for _, _, row in drafts]
    return rows, labels, entropies, [starts[row][1] for row in rows], [starts[row][0] for row in rows], pairs


def listed(rows, starts, pairs, beams):
    """The ranking by hand: each item once with its best score, then the drafts that are not there."""
    seen = {}
    for score, draft, row in pairs:
        if row not in seen:
            seen[row] = (score, rows.index(draft))
    for place, (row, score) in enumerate(zip(rows, starts)):
        if row not in seen and len(seen) < beams:
            seen[row] = (min(score, *(value for value, _ in seen.values())), place)
    return list(seen), [score for score, _ in seen.values()], [place for _, place in seen.values()]


def force(ours: Reflector, label: int) -> None:
    """Every draft gets this label of the first slot."""
    plain = type(ours.head).logits.__get__(ours.head)

    def logits(hidden: Tensor, slot: int) -> Tensor:
        found = plain(hidden, slot)
        if slot == 0:
            found = found.clone()
            found[..., label] = 1e3
        return found

    ours.head.logits = logits
