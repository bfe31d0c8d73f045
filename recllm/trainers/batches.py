"""Scored groups and their signal → the batches that the actor is updated with: survivors alone, in TRL's names.

The loss of a batch is a mean over its rows; rows that only fill it up are inert (no token counts), and `scale` makes
the sum over batches and processes the mean over all answers that train.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from recllm.actor import AnswerRows
from recllm.files import write_whole
from recllm.reflection import NOTHING, Form
from recllm.trainers.groups import RolloutGroups, Rollouts, Signal

Batch = dict[str, Any]  # tensors, and the AnswerRows made of them
Anchor = Callable[[Mapping, list[int], int], tuple[list[int], int]]  # row, answer, where its codes begin


@dataclass(frozen=True)
class Batching:
    """Which answers go into which of S batches: a list of rows each, all of one group in one batch where possible."""

    batches: list[list[int]]

    @classmethod
    def of(cls, active: Tensor, count: int) -> "Batching":
        """Groups that train are spread evenly, whole; only where there are fewer than batches are they cut. (P, G)"""
        group = active.size(1)
        rows = [[place * group + row for row in of_group.nonzero().flatten().tolist()]
                for place, of_group in enumerate(active)]  # fmt: skip
        rows = [some for some in rows if some]
        if len(rows) < count:
            rows = [[row] for some in rows for row in some]
        bounds = [len(rows) * batch // count for batch in range(count + 1)]
        return cls([list(chain.from_iterable(rows[start:end])) for start, end in pairwise(bounds)])

    @property
    def widths(self) -> list[int]:
        return [len(rows) for rows in self.batches]


def actor_batch(
    rollouts: Rollouts, signal: Signal, drawn: Tensor, rows: Sequence[int], width: int, pad: int, device: torch.device,
    form: Form | None = None,
) -> Batch:  # fmt: skip
    """The answers `rows` and inert rows up to `width`.   `drawn` (R,) bool: was the answer the policy's own?"""
    inert = [rows[-1] if rows else 0] * (width - len(rows))  # whose prompt is there already, without its answer
    places = [*rows, *inert]
    answers = [rollouts.answers[row] for row in rows] + [[] for _ in inert]
    prompts = [rollouts.prompts[row // rollouts.group] for row in places]
    # At least 2: TRL's figures take a width of 1 for one number an answer, padding included.
    longest = form.places if form else max(2, *map(len, answers))
    advantages = signal.advantages.flatten(0, 1)[places]  # (R,) or (R, T)
    if advantages.dim() == 2:
        advantages = torch.nn.functional.pad(advantages, (0, longest))[:, :longest]
    starts = torch.tensor([rollouts.starts[row] for row in places])
    mask = padded([[1] * len(ids) for ids in answers], 0, width=longest)
    batch = {
        "prompt_ids": padded(prompts, pad, left=True),
        "prompt_mask": padded([[1] * len(ids) for ids in prompts], 0, left=True),
        "completion_ids": padded(answers, pad, width=longest),
        "completion_mask": mask,
        "advantages": advantages.float(),
        "starts": starts,
        # free text of the policy's own: what a sampler other than the engine has drawn
        "free": mask * drawn[places].unsqueeze(1) * (torch.arange(longest) < starts.unsqueeze(1)),
    }
    if form is not None:  # TRL's name: what the policy chose, where `completion_mask` has all that stands there
        batch["tool_mask"] = (form.before != NOTHING).long().expand(len(places), -1)
    if rollouts.logps is not None:
        logps = [rollouts.logps[row] for row in rows] + [[] for _ in inert]
        # What vLLM did not draw has none: TRL takes nan for no evidence.
        batch["sampling_per_token_logps"] = padded(logps, 0.0, width=longest).masked_fill(batch["free"] == 0, torch.nan)
    return {name: tensor.to(device) for name, tensor in batch.items()}


def rows_of(batch: Batch, form: Form | None = None) -> AnswerRows:
    """What the scorer wants to know of a batch; one object for all calls, since it remembers how the rows lie."""
    if "rows" not in batch:
        names = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "starts")
        batch["rows"] = AnswerRows(*(batch[name] for name in names), form=form)
    return batch["rows"]


def chosen(batch: Batch) -> Tensor:
    """The tokens that the loss is over. (R, T)"""
    return batch["completion_mask"] * batch.get("tool_mask", 1)


def padded(rows: Sequence[Sequence[float]], value: float, left: bool = False, width: int | None = None) -> Tensor:
    """Lists of numbers → (R, T), T the longest."""
    width = max(map(len, rows)) if width is None else width
    fill = [[value] * (width - len(row)) for row in rows]
    return torch.tensor([[*gap, *row] if left else [*row, *gap] for row, gap in zip(rows, fill)])


def scales(active: Sequence[int], widths: Sequence[int], window: int, processes: int) -> list[float]:
    """What each batch's mean over its rows is multiplied with, so that an update is the mean over answers that train.

    An optimizer step averages `window` batches a process, and the processes: with n_w answers in the window w,
    Σ_b (scale_b / (window · processes)) · (1 / width_b) · Σ_rows l = (1 / n_w) Σ l.     (S,), (S,) -> (S,)
    `active`: answers of each batch on all processes together.
    """
    found = []
    for batch, width in enumerate(widths):
        start = batch // window * window
        in_window = active[start : start + window]  # fewer at the end, where a step goes on with another generation
        found.append(width * len(in_window) * processes / sum(in_window) if sum(in_window) else 0.0)
    return found


def with_anchors(groups: RolloutGroups, signal: Signal, anchor: Anchor) -> tuple[Rollouts, Tensor]:
    """The truth in place of the answers that the signal names, and which answers are the policy's own. (R,) bool

    `anchor` writes the truth in the prompt's own answer format: ids, and where its codes begin.
    """
    rollouts = groups.rollouts
    drawn = torch.ones(len(rollouts.answers), dtype=torch.bool)
    if signal.replaced is None:
        return rollouts, drawn
    for place, which in enumerate(signal.replaced.tolist()):
        if which >= 0:
            row = place * rollouts.group + which
            ids, start = anchor(groups.rows[place], rollouts.answers[row], rollouts.starts[row])
            rollouts = rollouts.with_answer(row, ids, start, groups.targets[place])
            drawn[row] = False
    return rollouts, drawn


# ---- a generation that is still in use, on disk


def save_batches(batches: Sequence[Batch], path: Path) -> None:
    tensors = {
        f"{number}/{name}": tensor.contiguous().cpu().clone()  # one may be in several batches
        for number, batch in enumerate(batches)
        for name, tensor in batch.items()
        if isinstance(tensor, Tensor)
    }
    with write_whole(path) as partial:
        save_file(tensors, partial)


def load_batches(path: Path, device: torch.device) -> list[Batch]:
    found: dict[int, Batch] = defaultdict(dict)
    for name, tensor in load_file(path).items():
        number, _, which = name.partition("/")
        found[int(number)][which] = tensor.to(device)
    return [found[number] for number in sorted(found)]
