"""What a log gives reason to look at. A warning names the figures, so that its reader can judge."""

import math
from collections.abc import Callable, Iterator, Sequence

from recllm.health.log import PARTS, RunLog

NOISE = 2.0  # standard errors by which a mean of many steps has to move
LOST = 0.05  # of validation's best figure
COLLAPSED = 0.5  # of the different items at the start
NONE = 0.01  # share of the groups that counts as none
CODES_ALONE = 8  # tokens: a longer answer reasons first
NUMBERS = ("loss", "grad_norm", "kl", "reward")


def warnings_of(log: RunLog) -> list[str]:
    checks: Sequence[Callable[[RunLog], Iterator[str]]] = (
        not_a_number, reward_without_recall, fewer_items, no_signal, invalid_answers,
    )  # fmt: skip
    return [sentence for check in checks for sentence in check(log)]


def not_a_number(log: RunLog) -> Iterator[str]:
    for metric in NUMBERS:
        if metric in log.broken:
            yield f"{metric} is no finite number at step {log.broken[metric]:,}"


def reward_without_recall(log: RunLog) -> Iterator[str]:
    """Since validation was best, at the start or in the middle, the reward rises by more than its noise."""
    reward, recall = log.fifths("reward"), log.fifths("eval_recall@10")
    if reward is None or recall is None or len(log.values("eval_recall@10")) < 2:
        return
    best = int(recall[1] > recall[0])
    rises = reward[2] - reward[best] > NOISE * _error(log.values("reward"))
    if rises and recall[2] < (1 - LOST) * recall[best]:
        since = "the middle" if best else "the start"
        yield (
            f"since {since} the reward rises from {reward[best]:.4g} to {reward[2]:.4g} while validation Recall@10 "
            f"falls from {recall[best]:.4f} to {recall[2]:.4f}"
        )


def _error(values: Sequence[float]) -> float:
    """Standard error of the difference between the means of the first and of the last fifth."""
    size = math.ceil(len(values) / PARTS)
    if size < 2:
        return 0.0
    return math.sqrt(sum(_variance(part) for part in (values[:size], values[-size:])) / size)


def _variance(values: Sequence[float]) -> float:
    mean = math.fsum(values) / len(values)
    return math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)


def fewer_items(log: RunLog) -> Iterator[str]:
    distinct = log.fifths("rollout/distinct")
    if distinct is not None and distinct[2] < COLLAPSED * distinct[0]:
        yield f"answers repeat each other: {distinct[0]:.1%} different items at the start, {distinct[2]:.1%} at the end"


def no_signal(log: RunLog) -> Iterator[str]:
    """At the end: at the start of a sparse task it is what repair is for."""
    trainable, repaired = log.fifths("group/trainable"), log.fifths("recast/repaired")
    if trainable is None or trainable[2] >= NONE:
        return
    if repaired is not None and repaired[2] > 0:
        yield f"at the end {trainable[2]:.1%} of the groups have a signal of their own: repair alone teaches"
    else:
        yield f"at the end {trainable[2]:.1%} of the groups have a signal: all answers of a group earn the same"


def invalid_answers(log: RunLog) -> Iterator[str]:
    """Answers of codes alone walk the trie, so every one names an item."""
    validity, length = log.values("rollout/validity"), log.values("rollout/length")
    if validity and length and max(length) <= CODES_ALONE and min(validity) < 1 - 1e-6:
        yield f"an answer of codes alone always names an item, and {min(validity):.2%} did at the worst step"
