"""The offline writer of chains: short true statements about true items, composed of the catalogue's facts.

Short, since a tiny model learns and writes them token by token; and each stage narrows the item down: what the last
items were, what came most often in the history, and of what kind the next item is. Its title is never said.
"""

from collections import Counter
from collections.abc import Sequence

from recllm.mixtures.item_facts import Facts, phrase
from recllm.mixtures.teacher_answers import Answer

RECENT = 4  # items that the evidence names
NOTHING = "Nothing is known of the items."
OFFLINE_WORDS = (  # for a tokenizer of our own
    "The last items were ; Most often by Nothing came twice. Goes on with Comes back to Looks for Turns to Stays with "
    "and turns to It is what is looked for:"
)
UNRELATED = "shares no category or brand with the others or with what followed"


def compose(history: Sequence[Facts], target: Facts) -> Answer:
    """All five stages of an example whose target something is known of."""
    return Answer(
        evidence=evidence(history),
        preferences=preferences(history),
        intent=intent(history, target),
        justification=f"It is what is looked for: {target.said()}.",
        dropped=tuple((number, UNRELATED) for number in noise(history, target)),
    )


def evidence(history: Sequence[Facts]) -> str:
    """What the last items were, the newest last."""
    known = [facts.said() for facts in history if facts][-RECENT:]
    return f"The last items were {'; '.join(known)}." if known else NOTHING


def preferences(history: Sequence[Facts]) -> str:
    """Of each column the value that came most often, and at least twice; among equals the one seen last."""
    general = _most_often([facts.kinds[:1] for facts in history])
    specific = _most_often([facts.kinds[-1:] for facts in history])
    often = list(dict.fromkeys(kind for kind in (general, specific) if kind))
    for column in dict.fromkeys(column for facts in history for column, _ in facts.values):
        value = _most_often([[said for name, said in facts.values if name == column] for facts in history])
        often += [phrase(column, value)] if value else []
    if often:
        return f"Most often {', '.join(often)}."
    return "Nothing came twice." if any(history) else NOTHING


def intent(history: Sequence[Facts], target: Facts) -> str:
    """What is looked for now, and how it goes with what came before."""
    if not target.kinds:
        return f"Looks for {target.said()}."
    known = [facts for facts in history if facts.kinds]
    if known and known[-1].kind == target.kind:
        return f"Goes on with {target.said()}."
    if any(facts.kind == target.kind for facts in known):
        return f"Comes back to {target.said()}."
    general = target.kinds[0]
    if len(target.kinds) == 1:
        return f"Turns to {target.said()}."
    if any(general in facts.kinds for facts in known):
        return f"Stays with {general} and turns to {target.said()}."
    return f"Turns to {general}: {target.said()}."


def noise(history: Sequence[Facts], target: Facts) -> list[int]:
    """Numbers (from 1) of the items that share no category or brand with the target, nor with half of the others.

    An item without a category stays: too little is known to call it noise. If none stayed, the last one does.
    """
    traits = [_traits(facts) for facts in history]
    wanted = _traits(target)
    found = []
    for number, (facts, own) in enumerate(zip(history, traits), 1):
        friends = sum(bool(own & other) for other in traits) - 1  # without itself
        placed = facts.kinds and not facts.guessed
        if placed and not own & wanted and 2 * friends < len(traits) - 1:
            found.append(number)
    return found if len(found) < len(history) else found[:-1]


def _traits(facts: Facts) -> frozenset[tuple[str, str]]:
    return frozenset(fact for fact in facts.all if fact[0] in ("categories", "brand"))


def _most_often(said: Sequence[Sequence[str]]) -> str:
    last = {value: place for place, values in enumerate(said) for value in values}
    counts = Counter(value for values in said for value in values)
    best = max(counts, key=lambda value: (counts[value], last[value]), default="")
    return best if counts[best] > 1 else ""
