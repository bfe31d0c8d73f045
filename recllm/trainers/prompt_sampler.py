"""The order of prompts: each G times side by side, a batch of them as often as its answers are used.

Differences from TRL's RepeatSampler: the order is a function of seed and epoch, so that it is the same after a resume.
"""

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler

from recllm.decoding.decoder import generator_of


class PromptSampler(Sampler[int]):
    """Of N prompts, `batch` at a time; a last batch that is not full is left out."""

    def __init__(self, count: int, batch: int, group: int, uses: int, seed: int, shuffled: bool = True):
        self.count, self.batch, self.group, self.uses = count, batch, group, uses
        self.seed, self.shuffled, self.epoch = seed, shuffled, 0

    def __len__(self) -> int:
        return self.count // self.batch * self.batch * self.group * self.uses

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        order = list(range(self.count))
        if self.shuffled:
            generator = generator_of(self.seed, "prompts", self.epoch)
            order = torch.randperm(self.count, generator=generator).tolist()
        for start in range(0, self.count - self.batch + 1, self.batch):
            for _ in range(self.uses):
                for prompt in order[start : start + self.batch]:
                    yield from [prompt] * self.group
