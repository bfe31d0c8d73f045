"""A tiny checkpoint that has learnt to reason, in seconds: a stage's title is one token, and all chains are alike."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import torch
from helpers import write_small_model

from recllm.checkpoint import Checkpoint
from recllm.models.build import BuildModelConfig, build_model
from recllm.prompting import PromptStyle
from recllm.reasoning import RECOMMEND, REWRITE, SHORT_TEMPLATE, STEPS, Chain

STYLE = PromptStyle(SHORT_TEMPLATE)


def write_reasoning_model(folder: str | Path, users: int = 30, steps: int = 120) -> tuple[Path, Path]:
    """(data, model). It rewrites the history's last two items and recommends the last one again."""
    data, _ = write_small_model(folder, users=users)
    path = Path(folder) / "reasoning"
    marks = [*STEPS.values(), REWRITE, RECOMMEND]
    build_model(
        BuildModelConfig(
            data=str(data), output=str(path), tiny_width=64, tiny_layers=2, tiny_vocabulary=512, extra_tokens=marks
        )
    )  # fmt: skip
    report = json.loads((path / "recllm.json").read_text())
    report["reasoning_prompt"] = dataclasses.asdict(STYLE)
    (path / "recllm.json").write_text(json.dumps(report))
    checkpoint = Checkpoint.load(path, "cpu")
    teach(checkpoint, steps)
    checkpoint.model.save_pretrained(path)
    return data, path


def chain_of(history: list[str]) -> Chain:
    return Chain("A and B", "x or y", "A", tuple(history[-2:]), history[-1], "so")


def teach(checkpoint: Checkpoint, steps: int) -> None:
    """Loss on the chains alone, by plain AdamW."""
    model, tokenizer, random = checkpoint.model, checkpoint.tokenizer, np.random.default_rng(0)
    writer = checkpoint.writer_of(checkpoint.reasoning)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    model.train()
    for _ in range(steps):
        histories = [random.permutation(checkpoint.table.items)[: random.integers(2, 6)].tolist() for _ in range(8)]
        ends = [chain_of(history).text(checkpoint.table) + tokenizer.eos_token for history in histories]
        pairs = list(zip(writer.ids(histories), tokenizer(ends, add_special_tokens=False)["input_ids"]))
        width = max(len(prompt) + len(end) for prompt, end in pairs)
        ids = torch.zeros(len(pairs), width, dtype=torch.int64)
        labels = torch.full_like(ids, -100)
        for row, (prompt, end) in enumerate(pairs):
            ids[row, : len(prompt) + len(end)] = torch.tensor([*prompt, *end])
            labels[row, len(prompt) : len(prompt) + len(end)] = torch.tensor(end)
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
