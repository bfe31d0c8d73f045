"""Every method as a weight over the target's probability P: theory as lines, measured on drawn groups as dots.

    python benchmarks/signals.py --output docs             (signals.svg and a table; under a minute on one CPU thread)

A softmax policy gives the target probability P. Many groups of G answers are drawn from it, go through the functions
that the trainers ask for their signal, repair and dropping included, and the mean gradient at the target's logits is
divided by that of log P: the weight W(P) of `recllm.objectives.curves`. An item is one code in the first three charts
and two in the last, where each code of the target has the probability √P. For the exact expectations nothing is drawn:
autograd differentiates them.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from recllm import launch
from recllm.decoding.decoder import generator_of
from recllm.errors import UserError
from recllm.files import write_whole
from recllm.objectives import curves
from recllm.objectives.exact import expected_prefix_reward, expected_success
from recllm.objectives.group import common_prefix, group_normalised, has_signal, is_hit
from recllm.objectives.recast import boundary_signal, repair_groups, structural_score
from recllm.objectives.srpo import bonus_advantage, prefix_reward, srpo_advantage
from recllm.plots import Chart, Series, chart_grid

GROUP, K = 16, 4  # G, and k of SRPO's bonus
CODES = 32  # of a level
DOTS = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.2, 0.3, 0.5, 0.7, 0.8, 0.9, 0.97, 0.99)
COLUMNS = (1e-3, 1e-2, 0.1, 0.5, 0.9)  # of the table
AT_ONCE = 10_000  # groups in memory
CODE = ", code {}"  # of a curve's name, where the levels have one each


@dataclass
class SignalsConfig:
    output: str = field(default="docs", metadata={"help": "Folder for signals.svg."})
    groups: int = field(default=100_000, metadata={"help": "Groups drawn at each P."})
    seed: int = field(default=0, metadata={"help": "Of policies and draws."})

    def __post_init__(self) -> None:
        if self.groups < 2:
            raise UserError(f"groups is {self.groups}: a standard error needs 2 or more")


# ---- what the trainers make of a group


class Update(NamedTuple):
    advantages: Tensor  # (P, G)
    active: Tensor  # (P, G) bool
    replaced: Tensor | None = None  # (P,) the answer that the target stands in for, or -1


Signal = Callable[[Tensor, Tensor], Update]  # codes (P, G, L), target (P, L)


def whole(advantages: Tensor, active: Tensor, replaced: Tensor | None = None) -> Update:
    return Update(advantages, active.unsqueeze(1).expand_as(advantages), replaced)


def reinforce(codes: Tensor, target: Tensor) -> Update:
    hits = is_hit(codes, target).double()
    return whole(hits, torch.ones(len(hits), dtype=torch.bool))


def prefix_reinforce(codes: Tensor, target: Tensor) -> Update:
    rewards = prefix_reward(codes, target)
    return whole(rewards, torch.ones(len(rewards), dtype=torch.bool))


def grpo(codes: Tensor, target: Tensor) -> Update:
    hits = is_hit(codes, target).double()
    return whole(group_normalised(hits), has_signal(hits))


def bonus(codes: Tensor, target: Tensor) -> Update:
    advantages = bonus_advantage(is_hit(codes, target).double(), K)
    return whole(advantages, (advantages != 0).any(dim=1))


def srpo(codes: Tensor, target: Tensor) -> Update:
    advantages = srpo_advantage(codes, target, K)
    return whole(advantages, (advantages != 0).any(dim=1))


def scored(codes: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """ReCast's two scores."""
    return is_hit(codes, target).double(), structural_score(codes.unsqueeze(2), target)


def repair_only(codes: Tensor, target: Tensor) -> Update:
    found = repair_groups(*scored(codes, target))
    return whole(group_normalised(found.rewards), has_signal(found.rewards), found.replaced)


def recast(codes: Tensor, target: Tensor) -> Update:
    found = boundary_signal(*scored(codes, target))
    return Update(found.advantages, found.active, found.replaced)


def boundary_only(codes: Tensor, target: Tensor) -> Update:
    found = boundary_signal(*scored(codes, target), repair=False)
    return Update(found.advantages, found.active)


# ---- weights


def weights(codes: Tensor, target: Tensor, p: Tensor, signal: Signal) -> Tensor:
    """What each group puts on ∇log p_h of the target's codes.   (P, G, L), (P, L), (L,) -> (P, L)

    p_h is a softmax over codes, so that its target's logit is moved by 1[ℓ ≥ h] − p_h under an answer that shares the
    target's first ℓ ≥ h − 1 codes, not at all under another, and by 1 − p_h under log p_h itself. Mean over the active
    answers, as the loss is; 0 for a group without any.
    """
    advantages, active, replaced = signal(codes, target)
    if replaced is not None:
        anchor = torch.arange(codes.size(1)) == replaced.unsqueeze(1)  # (P, G)
        codes = torch.where(anchor.unsqueeze(2), target.unsqueeze(1), codes)
    shared, level = common_prefix(codes, target.unsqueeze(1)).unsqueeze(2), torch.arange(1, len(p) + 1)  # (P, G, 1)
    moved = (shared >= level).double() - p * (shared >= level - 1)  # (P, G, L)
    total = ((advantages * active).double().unsqueeze(2) * moved).sum(dim=1)
    return total / (active.sum(dim=1, keepdim=True).clamp(min=1) * (1 - p))


class Policy:
    """The target's code h has the probability p_h; the other codes of a level share the rest unevenly."""

    def __init__(self, p: Sequence[float], generator: torch.Generator):
        self.p = torch.tensor(p, dtype=torch.double)  # (L,)
        self.target = torch.randint(CODES, (1, len(p)), generator=generator)
        logits = torch.randn(len(p), CODES, generator=generator, dtype=torch.double)
        others = logits.scatter(1, self.target.T, -torch.inf).logsumexp(dim=1)
        logits = logits.scatter(1, self.target.T, (self.p.logit() + others).unsqueeze(1))
        self.upto = logits.softmax(dim=1).cumsum(dim=1)  # (L, V)

    def answers(self, count: int, generator: torch.Generator) -> Tensor:
        """-> (count, G, L)"""
        drawn = torch.rand(len(self.p), count * GROUP, generator=generator, dtype=torch.double)
        codes = torch.searchsorted(self.upto, drawn).clamp(max=CODES - 1)
        return codes.T.reshape(count, GROUP, -1)


def drawn_weights(
    signals: Mapping[str, Signal], p: Sequence[float], groups: int, seed: int
) -> dict[str, tuple[Tensor, Tensor]]:
    """Mean and standard error over the same drawn groups, of each signal.   -> (L,), (L,) each"""
    generator = generator_of(seed, "signals", *p)
    policy = Policy(p, generator)
    found: dict[str, list[Tensor]] = {name: [] for name in signals}
    for start in range(0, groups, AT_ONCE):
        codes = policy.answers(min(AT_ONCE, groups - start), generator)
        target = policy.target.expand(len(codes), -1)
        for name, signal in signals.items():
            found[name].append(weights(codes, target, policy.p, signal))
    return {name: mean_and_error(torch.cat(some)) for name, some in found.items()}


def mean_and_error(values: Tensor) -> tuple[Tensor, Tensor]:
    """0 is the error where all groups weigh the same but for rounding.   (P, L) -> (L,), (L,)"""
    mean, error = values.mean(dim=0), values.std(dim=0) / math.sqrt(len(values))
    return mean, torch.where(error > 1e-12 * mean.abs(), error, 0.0)


def expected_weights(signal: Signal, p: Tensor) -> Tensor:
    """E of `weights` where an item has two codes: over the numbers of answers with ℓ = 2, 1, 0.   (n, 2) -> (n, 2)

    What is drawn besides, which wrong code it is and in which order they come, changes no weight.
    """
    counts = [(c, m, GROUP - c - m) for c in range(GROUP + 1) for m in range(GROUP + 1 - c)]
    kinds = torch.tensor([[0, 0], [0, 1], [1, 0]])  # the target is (0, 0)
    codes = torch.stack([kinds.repeat_interleave(torch.tensor(each), dim=0) for each in counts])  # (153, G, 2)
    target, several = torch.zeros(len(counts), 2, dtype=torch.long), torch.tensor(counts, dtype=torch.double)
    ways = math.lgamma(GROUP + 1) - torch.lgamma(several + 1).sum(dim=1)
    rows = []
    for first, second in p.tolist():
        each = torch.tensor([first * second, first * (1 - second), 1 - first], dtype=torch.double)
        chances = (ways + torch.xlogy(several, each).sum(dim=1)).exp()  # (153,)
        rows.append(chances @ weights(codes, target, torch.tensor([first, second], dtype=torch.double), signal))
    return torch.stack(rows)


def gradient(objective: Callable[[Tensor], Tensor], p: Tensor) -> Tensor:
    """Of an exact expectation by the log-probabilities of the target's codes, by autograd.   (n, L) -> (n, L)"""
    logps = p.log().requires_grad_()
    (found,) = torch.autograd.grad(objective(logps).sum(), logps)
    return found


# ---- the curves


@dataclass(frozen=True)
class Curve:
    name: str
    theory: Callable[[Tensor], Tensor]  # (n,) -> (n,)
    measured: Mapping[float, tuple[float, float]] = field(default_factory=dict)  # P: mean, standard error
    kind: Literal["line", "dashed"] = "line"
    colour: int | None = None


def hit_over_std(logps: Tensor) -> Tensor:
    hit = expected_success(logps, 1)
    return hit / (hit * (1 - hit)).sqrt().detach()


HITS: dict[str, tuple[Callable[[Tensor], Tensor], Signal]] = {
    "REINFORCE": (curves.reinforce_weight, reinforce),
    f"GRPO, G = {GROUP}": (lambda p: curves.grpo_weight(p, GROUP), grpo),
    f"SRPO's bonus, k = {K}": (lambda p: curves.srpo_bonus_weight(p, GROUP, K), bonus),
    "ReCast": (lambda p: curves.recast_weight(p, GROUP), recast),
    "ReCast, repair only": (lambda p: curves.repair_only_weight(p, GROUP), repair_only),
    "ReCast, boundary only": (lambda p: curves.boundary_only_weight(p, GROUP), boundary_only),
}
EXACT: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "SFT": (curves.sft_weight, lambda logps: logps.sum(dim=1)),
    "hit": (curves.reinforce_weight, lambda logps: expected_success(logps, 1)),
    "hit over std = GRPO, G → ∞": (curves.grpo_limit_weight, hit_over_std),
    "success@4": (lambda p: curves.success_weight(p, 4), lambda logps: expected_success(logps, 4)),
    "success@64": (lambda p: curves.success_weight(p, 64), lambda logps: expected_success(logps, 64)),
}
LEVELS: dict[str, tuple[Callable[[Tensor], Tensor], Signal]] = {  # theory (n, 2) -> (n, 2)
    "prefix reward": (lambda p: gradient(expected_prefix_reward, p), prefix_reinforce),
    "SRPO": (lambda p: expected_weights(srpo, p), srpo),
    "ReCast": (lambda p: expected_weights(recast, p), recast),
    "ReCast, repair only": (lambda p: expected_weights(repair_only, p), repair_only),
}


def one_code(config: SignalsConfig) -> dict[str, Curve]:
    """HITS, drawn, and EXACT."""
    signals = {name: signal for name, (_, signal) in HITS.items()}
    drawn = {p: drawn_weights(signals, [p], config.groups, config.seed) for p in DOTS}
    found = {
        name: Curve(name, theory, {p: (mean.item(), error.item()) for p, (mean, error) in at(drawn, name).items()})
        for name, (theory, _) in HITS.items()
    }
    grid = torch.tensor(DOTS, dtype=torch.double).unsqueeze(1)
    for name, (theory, objective) in EXACT.items():
        values = gradient(objective, grid).flatten().tolist()
        found[name] = Curve(name, theory, {p: (value, 0.0) for p, value in zip(DOTS, values)})
    return found


def two_codes(config: SignalsConfig) -> dict[str, Curve]:
    """LEVELS, a curve for each code; the second's is dashed."""
    signals = {name: signal for name, (_, signal) in LEVELS.items()}
    drawn = {p: drawn_weights(signals, [math.sqrt(p)] * 2, config.groups, config.seed) for p in DOTS}
    found = {}
    for colour, (name, (theory, _)) in enumerate(LEVELS.items()):
        for level, kind in enumerate(("line", "dashed")):
            own = name + CODE.format(level + 1)
            measured = {p: (mean[level].item(), error[level].item()) for p, (mean, error) in at(drawn, name).items()}
            found[own] = Curve(own, of_level(theory, level), measured, kind, colour)
    return found


def at(drawn: Mapping, name: str) -> dict:
    return {p: each[name] for p, each in drawn.items()}


def of_level(theory: Callable[[Tensor], Tensor], level: int) -> Callable[[Tensor], Tensor]:
    """P stands for two codes of probability √P."""
    return lambda p: theory(p.sqrt().unsqueeze(1).expand(-1, 2).contiguous())[:, level]


# ---- drawing and printing


def picture(one: Mapping[str, Curve], two: Mapping[str, Curve]) -> str:
    limit = "hit over std = GRPO, G → ∞"
    drawn, finite = list(HITS), list(HITS)[1]
    panels = {
        "Hits and misses, as they are drawn": [one[name] for name in ("SFT", limit, *drawn[:3])],
        "Repair and boundary": [one[name] for name in ("SFT", finite, *drawn[3:])],
        "Exact expectations (nothing drawn)": [one[name] for name in EXACT],
        "Items of two codes, √P each": [curve for name, curve in two.items() if "repair" not in name],
    }
    across = "P, the target's probability (log)"
    charts = [
        Chart(title, across, "weight on ∇log P (log)", series_of(some), log_x=True, log_y=True)
        for title, some in panels.items()
    ]
    return chart_grid(charts, columns=2, width=520, height=400)


def series_of(some: Sequence[Curve]) -> list[Series]:
    """The dots before their line, so that the legend shows both beside the name."""
    low, high = math.log(DOTS[0]), math.log(0.5)
    grid = [math.exp(low + (high - low) * step / 60) for step in range(61)]
    grid = torch.tensor(grid[:-1] + [1 - p for p in reversed(grid) if p >= 1 - DOTS[-1]], dtype=torch.double)
    found = []
    for place, curve in enumerate(some):
        colour = place if curve.colour is None else curve.colour
        dots = [(p, mean) for p, (mean, _) in curve.measured.items()]
        found.append(Series("", dots, "dots", colour))
        found.append(Series(curve.name, list(zip(grid.tolist(), curve.theory(grid).tolist())), curve.kind, colour))
    return found


def table(some: Sequence[Curve]) -> str:
    """Markdown: theory; measured ± standard error."""
    lines = ["| | " + " | ".join(f"P = {p:g}" for p in COLUMNS) + " |", "| --- " * (len(COLUMNS) + 1) + "|"]
    for curve in some:
        theory = curve.theory(torch.tensor(COLUMNS, dtype=torch.double)).tolist()
        cells = [cell(value, *curve.measured[p]) for p, value in zip(COLUMNS, theory)]
        lines.append(f"| {curve.name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def cell(theory: float, mean: float, error: float) -> str:
    """With as many places as the error's first digit asks for; three digits of what has none; six places at most."""
    places = -math.floor(math.log10(error or max(theory, 1e-9) / 100))
    places = min(max(places, 0), 6)
    return f"{theory:.{places}f}; {mean:.{places}f}" + (f" ± {error:.{places}f}" if error else "")


def farthest(some: Sequence[Curve]) -> tuple[float, int]:
    """The largest distance of a dot from its line, in standard errors, and how many dots are drawn ones."""
    points = torch.tensor(DOTS, dtype=torch.double)
    far = [
        abs(mean - value) / error
        for curve in some
        for value, (mean, error) in zip(curve.theory(points).tolist(), curve.measured.values())
        if error
    ]
    return max(far), len(far)


def main(config: SignalsConfig) -> None:
    one, two = one_code(config), two_codes(config)
    with write_whole(Path(config.output) / "signals.svg") as path:
        path.write_text(picture(one, two), encoding="utf-8")
    distance, dots = farthest([*one.values(), *two.values()])
    for text in (
        table(list(one.values())),
        table(list(two.values())),
        f"The farthest of {dots} drawn dots lies {distance:.1f} standard errors from its line.",
    ):
        launch.results.print(text + "\n", markup=False, highlight=False)


if __name__ == "__main__":
    launch.run(main, SignalsConfig, description=__doc__)
