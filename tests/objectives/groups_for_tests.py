"""Groups of answers that hypothesis draws: items of any depth, hits, near misses, answers that name nothing."""

import json
from pathlib import Path

import torch
from hypothesis import strategies as st
from torch import Tensor


def worked_examples(name: str) -> list[dict]:
    return json.loads((Path(__file__).parents[1] / "vectors" / f"{name}.json").read_text())


def in_float64(values) -> Tensor:
    return torch.tensor(values, dtype=torch.double)


@st.composite
def answered_groups(draw, levels: int = 3) -> tuple[Tensor, Tensor]:
    """codes (P, G, L), target (P, L): few values a level, so that common prefixes and hits are common."""
    prompts, group = draw(st.integers(1, 3)), draw(st.integers(1, 8))
    code = st.integers(0, 1)
    targets = [draw(st.lists(code, min_size=1, max_size=levels)) for _ in range(prompts)]
    answers = []
    for target in targets:
        answer = st.one_of(st.just(target), st.just([]), st.lists(code, min_size=1, max_size=levels))
        answers.append([draw(answer) for _ in range(group)])
    return torch.tensor([[fill(one, levels) for one in some] for some in answers]), torch.tensor(
        [fill(target, levels) for target in targets]
    )


def fill(codes: list[int], levels: int) -> list[int]:
    return [*codes, *[-1] * (levels - len(codes))]


def shuffled(values: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """The answers in another order, and that order."""
    order = torch.randperm(values.size(1), generator=torch.Generator().manual_seed(seed))
    return values[:, order], order


# Rewards a method may see: shares and sums of them, never closer to each other than what counts as a difference.
rewards = st.integers(1, 8).flatmap(
    lambda group: st.lists(
        st.lists(st.sampled_from([0.0, 0.25, 0.5, 0.7071, 1.0, 3.0]), min_size=group, max_size=group),
        min_size=1, max_size=3,
    )
).map(in_float64)  # fmt: skip
