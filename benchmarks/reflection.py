"""Reflect and correct against plain beam search of the same width, in one process, alternating; medians.

    python benchmarks/reflection.py --output reflection.json     # CPU: a 4-layer Qwen3 of width 256; CUDA: 0.6B-shaped
    python benchmarks/reflection.py --model runs/shop/grc --data runs/shop          # a trained model's share of skips

Random weights know nothing, so how many drafts they would call right means nothing: `all corrected` skips none, the
most that reflecting can cost; `half of them` reflects on the B / 2 best drafts (`reflect_on`). The positions that go
through the model are beside the times: behind a prompt of T tokens plain search takes (L − 1) B, reflecting with K
attributes (2 L + 2 K + 1) B. With --model the times are of its own validation prompts, and what it skips is what it
calls right.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from decoding import CODES, DEVICE, LEVELS, TEXT, level_ids, model_of, some_codes
from rich.table import Table

from recllm import launch
from recllm.catalogue import Catalogue
from recllm.checkpoint import Checkpoint
from recllm.decoding import Decoder
from recllm.decoding.reflecting import Reflector
from recllm.errors import UserError
from recllm.files import write_json
from recllm.reflection import ReflectionTokens, Template
from recllm.trie import SemanticIdTrie

CASES = [(20, 100), (20, 200), (20, 800), (200, 200)]  # beams, tokens of a prompt


@dataclass
class ReflectionBenchmark:
    users: int = field(default=16, metadata={"help": "Prompts in a batch (P)."})
    items: int = field(default=12_000, metadata={"help": "N."})
    rounds: int = field(default=5, metadata={"help": "Times that each side runs; the median counts."})
    seed: int = field(default=0, metadata={"help": "Of weights, prompts and items."})
    model: str | None = field(default=None, metadata={"help": "A checkpoint of recipes/grc_sft.py or grc.py instead."})
    data: str | None = field(default=None, metadata={"help": "With --model: whose validation users are asked."})
    output: str | None = field(default=None, metadata={"help": "JSON file for the figures."})

    def __post_init__(self):
        if bool(self.model) != bool(self.data):
            raise UserError("--model and --data belong together", fix="give both, or neither for random weights")
        if self.rounds < 1 or self.users < 1:
            raise UserError(f"rounds {self.rounds} and users {self.users} must be at least 1")


def random_model(config: ReflectionBenchmark) -> Reflector:
    """One attribute, as the paper has on public data."""
    template = Template(LEVELS, ("category",))
    model = model_of("9k", config.seed)
    names = iter(range(TEXT["9k"] - len(template.new_tokens), TEXT["9k"]))  # text tokens that no prompt is made of
    slots = torch.tensor([next(names) for _ in template.slots])
    labels = tuple(torch.tensor([next(names) for _ in some]) for some in template.label_tokens)
    trie = SemanticIdTrie.from_codes(some_codes(config.items, config.seed), (CODES,) * LEVELS)
    decoder = Decoder(model, level_ids("9k"), trie, batch_size=config.users)
    return Reflector(decoder, ReflectionTokens(template, slots, labels))


def random_prompts(config: ReflectionBenchmark, tokens: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(config.seed)
    return torch.randint(0, TEXT["9k"] // 2, (config.users, tokens), generator=generator).tolist()


def race(reflector: Reflector, prompts: list[list[int]], beams: int, rounds: int, skip: bool) -> dict:
    found = {}

    def reflected(name: str, **settings) -> Callable[[], None]:
        def run():
            found[name] = reflector.scheduled(prompts, beams, **settings)

        return run

    sides = {
        "plain": lambda: reflector.decoder.beams(prompts, beams),
        "all corrected": reflected("all corrected", skip=False),
        "half of them": reflected("half of them", skip=False, reflect_on=beams // 2),
    }
    if skip:
        sides["what it calls right skipped"] = reflected("skipped")
    times: dict[str, list[float]] = {name: [] for name in sides}
    for round_ in range(rounds + 1):
        for name, work in sides.items():
            start = time.perf_counter()
            work()
            if DEVICE == "cuda":
                torch.cuda.synchronize()
            if round_:  # threads and kernels are up by then
                times[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values) / len(prompts) for name, values in times.items()}
    return {
        "beams": beams,
        "tokens": statistics.mean(map(len, prompts)),
        "milliseconds_a_user": {name: 1000 * value for name, value in medians.items()},
        "of_plain": {name: value / medians["plain"] for name, value in medians.items()},
        "skipped": float(found["skipped"].kept.double().mean()) if skip else 0.0,
        "filled": float(found["skipped" if skip else "all corrected"].filled.double().mean()),
    }


def positions(template: Template, beams: int, tokens: float) -> float:
    """That go through the model, against plain search's."""
    plain = tokens + (template.levels - 1) * beams
    return (plain + (len(template.places) - template.levels) * beams) / plain


def main(config: ReflectionBenchmark) -> None:
    if config.model:
        checkpoint, catalogue = Checkpoint.load(config.model), Catalogue.load(config.data)
        histories = catalogue.targets("valid", checkpoint.style.max_history)["history"].to_list()
        prompts = checkpoint.writer.ids(histories[: 8 * config.users])
        decoder = Decoder(checkpoint.model, checkpoint.tokens, prefix=checkpoint.writer.prefix, batch_size=config.users)
        reflector = Reflector(decoder, checkpoint.reflection.tokens)
        widths = [beams for beams in (20, 200) if beams <= len(checkpoint.table)]
        results = [race(reflector, prompts, beams, config.rounds, True) for beams in widths]
    else:
        reflector = random_model(config)
        results = [
            race(reflector, random_prompts(config, tokens), beams, config.rounds, False) for beams, tokens in CASES
        ]
    names = list(results[0]["of_plain"])
    table = Table(
        "beams", "tokens", "plain, ms a user", *names[1:], "positions", "drafts skipped", "filled up", title="of plain"
    )
    for result in results:
        ratio = positions(reflector.template, result["beams"], result["tokens"])
        table.add_row(
            str(result["beams"]), f"{result['tokens']:.0f}", f"{result['milliseconds_a_user']['plain']:.1f}",
            *(f"{result['of_plain'][name]:.2f}" for name in names[1:]), f"{ratio:.2f}", f"{result['skipped']:.1%}",
            f"{result['filled']:.1%}",
        )  # fmt: skip
    launch.results.print(table)
    if config.output:
        write_json(config.output, {"device": DEVICE, "threads": torch.get_num_threads(), "results": results})


if __name__ == "__main__":
    launch.run(main, ReflectionBenchmark, description=__doc__)
