"""A prepared shop with conversions held out, and untrained checkpoints that are asked for them."""

import dataclasses
import json
import shutil
from pathlib import Path

import torch
from events_for_tests import random_shop, write_events

from recllm.event_prompts import TEMPLATE
from recllm.models.build import BuildModelConfig, build_model
from recllm.models.prefix_module import PrefixModule, PrefixSettings
from recllm.prompting import PromptStyle

STYLE = PromptStyle(TEMPLATE, max_history=4, events=True)  # some histories are longer


def repeating_shop(users: int) -> dict[str, list[tuple[str, str]]]:
    """Every second user had clicked what they buy last, and half of those had put it into the cart."""
    sequences = random_shop(users)
    for user, events in sequences.items():
        bought = [item for item, _ in events if item.startswith("test")]
        if bought and int(user[1:]) % 2 == 0:
            events.insert(0, (bought[0], "click"))
            if int(user[1:]) % 4 == 0:
                events.insert(1, (bought[0], "cart"))
    return sequences


def write_stage_1(folder: str | Path, users: int = 30) -> tuple[Path, Path]:
    """(data, model): the model reads events of every behaviour."""
    folder = Path(folder)
    data = write_events(folder / "shop", repeating_shop(users), target_behaviour="pay").folder
    model = folder / "stage_1"
    build_model(
        BuildModelConfig(data=str(data), output=str(model), tiny_width=64, tiny_layers=2, tiny_vocabulary=512)
    )  # fmt: skip
    say(model, prompt=dataclasses.asdict(STYLE))
    return data, model


def write_stage_2(start: Path, folder: Path, users: tuple[str, ...] = ("u01", "u05"), **settings) -> Path:
    """The same weights with a prefix module whose query differs from user to user."""
    settings = PrefixSettings(**{"k": 2, "user_width": 8, **settings})
    shutil.copytree(start, folder)
    say(folder, conversion={"settings": settings.as_json(), "prompt": dataclasses.asdict(STYLE)})
    if settings.selection != "none":
        module = PrefixModule(settings, 64, users)
        if module.learned:
            generator = torch.Generator().manual_seed(1)
            with torch.no_grad():
                module.user_embedding.weight[1:] = 3 * torch.randn(len(users), 8, generator=generator)
        module.save(folder)
    return folder


def say(folder: Path, **more) -> None:
    path = folder / "recllm.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | more))
