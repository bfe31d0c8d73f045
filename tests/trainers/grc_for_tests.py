"""GRC the slow way: each answer by itself through the plain model, and the spec's sums written out; tiny trainers."""

import dataclasses

import torch
from rl_for_tests import QUIET, SavesGradients
from torch import Tensor

from recllm.catalogue import Catalogue
from recllm.checkpoint import Checkpoint
from recllm.mixtures.targets import rl_prompts
from recllm.reflection import NOTHING, PROMPT
from recllm.trainers.grc import GRC, PARTS, GRCSettings
from recllm.trainers.trajectories import TrajectoryReward, TrajectorySource

G, P = 4, 4
SETTINGS = {name: value for name, value in QUIET.items() if name not in ("rewards", "normaliser")}


def slow_logps(
    checkpoint: Checkpoint, prompt: list[int], answer: list[int], held: list[int] | None = None,
    normaliser: str = "full", temperature: float = 1.0,
) -> Tensor:  # fmt: skip
    """Of the tokens at the held places (None: all), by one run of the model with a mask that is written out. (F,)"""
    form, levels = checkpoint.reflection.template.form, checkpoint.tokens.levels
    held = list(range(form.places)) if held is None else held
    size, own = len(prompt) + len(held), torch.tensor(held)
    sees = torch.ones(size, size).tril().bool()
    sees[len(prompt) :, len(prompt) :] = form.sees[own][:, own]
    positions = torch.cat([torch.arange(len(prompt)), len(prompt) + form.offsets[own]])
    ids = torch.tensor([[*prompt, *(answer[place] for place in held)]])
    logits = checkpoint.model(input_ids=ids, attention_mask=sees[None, None], position_ids=positions[None]).logits[0]
    found = [torch.zeros(())] * form.places
    for place in held:
        before, kind = int(form.before[place]), int(form.kinds[place])
        if before == NOTHING:
            continue
        state = logits[len(prompt) - 1 if before == PROMPT else len(prompt) + held.index(before)] / temperature
        over = torch.arange(len(state))
        if normaliser == "children":
            over = [*levels, *checkpoint.reflection.tokens.labels][kind]
            if kind < len(levels):  # the children of the codes before it, of the draft or of the item
                start = [levels[level].tolist().index(answer[place - kind + level]) for level in range(kind)]
                codes = checkpoint.table.codes.tolist()
                over = over[sorted({some[kind] for some in codes if some[:kind] == start})]
        found[place] = state[over].log_softmax(0)[over.tolist().index(answer[place])]
    return torch.stack(found)


@dataclasses.dataclass(frozen=True)
class Weights:
    """Of the spec's R; a term's weight of 0 leaves it out."""

    task: float = 1.0
    last: float = 2.0
    cor: float = 2.2
    loc: float = 1.0
    sem: float = 0.8
    delta: float = 1.0


def slow_reward(
    draft: list[int], loc: int, said: list[int], item: list[int], target: list[int], attributes: list[list],
    weights: Weights = Weights(),
) -> float:  # fmt: skip
    """R of one trajectory. loc 1 … L + 1, said 0/1; attributes of draft, item and target, None where unknown."""
    levels = range(len(target))
    hit0, hit1 = ([codes[t] == target[t] for t in levels] for codes in (draft, item))
    right = next((t + 1 for t in levels if not hit0[t]), len(target) + 1)
    edited = [t for t in levels if t + 1 >= loc]
    fixed = [t for t in edited if hit1[t] and not hit0[t]]
    r_loc = (loc == right) + len(fixed) / (len(edited) + 1e-6)
    same0, same1 = ([a is not None and a == b for a, b in zip(own, attributes[2])] for own in attributes[:2])
    r_sem = sum(bool(a) == b for a, b in zip(said, same0)) / len(said)
    r_sem += sum(not a and not before and after for a, before, after in zip(said, same0, same1)) / len(said)
    r_cor = weights.loc * r_loc + weights.sem * r_sem + weights.delta * max(0, sum(hit1) - sum(hit0))
    return weights.task * (sum(hit0) + weights.last * sum(hit1)) + weights.cor * r_cor


def slow_ranks(returns: list[float]) -> list[float]:
    """(rank − mean) / unbiased std, ranks of ties shared; 0 where all are tied."""
    ranks = [sum(b < a for b in returns) + (sum(b == a for b in returns) + 1) / 2 for a in returns]
    mean = sum(ranks) / len(ranks)
    std = (sum((rank - mean) ** 2 for rank in ranks) / (len(ranks) - 1)) ** 0.5
    return [(rank - mean) / std if std else 0.0 for rank in ranks]


def facts_of(checkpoint: Checkpoint, codes: list[int]) -> list:
    """An item's attributes, from the checkpoint's items themselves; the leaf category and the brand."""
    place = checkpoint.table.codes.tolist().index(list(codes))
    row = checkpoint.items.row(place, named=True)
    return [(row["categories"] or [None])[-1], row["brand"] or None]


def returns_of(checkpoint: Checkpoint, rollouts, targets, weights: Weights = Weights()) -> list[list[float]]:
    """Of every group. `targets`: codes, one a group"""
    found = []
    for place, target in enumerate(targets):
        rows = range(place * rollouts.group, (place + 1) * rollouts.group)
        found.append([
            slow_reward(
                rollouts.drafts[row].tolist(), int(rollouts.labels[row, 0]) + 1, rollouts.labels[row, 1:].tolist(),
                rollouts.codes[row].tolist(), list(target),
                [facts_of(checkpoint, some) for some in (rollouts.drafts[row].tolist(), rollouts.codes[row].tolist(),
                                                         target)], weights,
            )
            for row in rows
        ])  # fmt: skip
    return found


def grc_trainer(made, output, *, count: int = P, lora=None, trainer=GRC, **given) -> GRC:
    """Ready to train; `.gradients` holds those of each step, `.start` is its checkpoint."""
    data, path = made
    checkpoint = Checkpoint.load(path, "cpu")
    args = GRCSettings(output_dir=str(output), **{**SETTINGS, **given})
    rows = rl_prompts(
        Catalogue.load(data), checkpoint, which="all", mode="direct", limit=count, seed=0, new_tokens=10
    )  # fmt: skip
    source = TrajectorySource(checkpoint, args.temperature, args.top_p)
    rewards = [TrajectoryReward(part, source, args.beta_last) for part in PARTS]
    gradients = SavesGradients()
    ready = trainer(checkpoint, args, rows, source, rewards, peft_config=lora, callbacks=[gradients])
    ready.gradients, ready.start = gradients.steps, checkpoint
    return ready
