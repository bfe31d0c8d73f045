"""A tiny checkpoint that reflects: untrained, and yet it says different things of different drafts."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from helpers import write_small_model

from recllm.attributes import ItemAttributes, attributes_of
from recllm.catalogue import Catalogue
from recllm.checkpoint import REFLECTION, REPORT, Checkpoint
from recllm.reflection import Layout, Reflection, ReflectionTokens, Template
from recllm.tokenization import add_tokens, initialise, resize


def write_reflecting_model(
    folder: str | Path, items: int = 12, users: int = 30, attributes: Sequence[str] = ("categories", "brand"),
    layout: Layout = "parallel", labels: bool = True, seed: int = 0,
) -> tuple[Path, Path]:  # fmt: skip
    """(data, model) as `write_small_model` has them; the model reflects on `attributes`, or with `labels` false is GC.

    12 or 16 items: others have branches of one item.
    """
    data, path = write_small_model(folder, items, users, seed)
    plain = Checkpoint.load(path, "cpu")
    found = attributes_of(attributes, plain.items)
    template = Template(plain.table.levels, tuple(one.name for one in found), layout, labels)
    new = add_tokens(plain.tokenizer, template.new_tokens)
    resize(plain.model, plain.tokenizer)
    initialise(plain.model, plain.tokenizer, new, "random", seed=seed)
    tokens = ReflectionTokens.of(plain.tokenizer, template)
    with torch.no_grad():
        for parameter in plain.model.parameters():
            if parameter.dim() > 1:
                parameter *= 8  # as they are, a draft would hardly move what is said of it
        of_two_minds(plain, tokens, Catalogue.load(data).targets("test")["history"].to_list()[:15])
    plain.model.save_pretrained(path)
    plain.tokenizer.save_pretrained(path)
    taught = Reflection(template, tokens, ItemAttributes.of(found, plain.items))
    report = json.loads((path / REPORT).read_text()) | {REFLECTION: taught.as_json()}
    (path / REPORT).write_text(json.dumps(report))
    return data, path


def of_two_minds(checkpoint: Checkpoint, tokens: ReflectionTokens, histories: Sequence[Sequence[str]]) -> None:
    """Make a slot's labels equally probable in its mean state h̄, so that the draft decides: w_y · h̄ is w̄ · h̄."""
    rows = checkpoint.model.get_input_embeddings().weight
    drafts = [checkpoint.tokens.ids_of(item) for item in checkpoint.table.items]
    prompts = checkpoint.writer.ids(histories)
    for slot, labels in zip(tokens.slots.tolist(), tokens.labels):
        asked = (torch.tensor([[*prompt, *draft, slot] for draft in drafts]) for prompt in prompts)
        states = [checkpoint.model(ids, output_hidden_states=True).hidden_states[-1][:, -1] for ids in asked]
        mean, own = torch.cat(states).mean(0), rows[labels]
        rows[labels] = own - ((own - own.mean(0)) @ mean / mean.dot(mean)).unsqueeze(1) * mean
