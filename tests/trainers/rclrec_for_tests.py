"""RCLRec the slow way: one conversion after the other, each as one sequence through the plain model; tiny trainers."""

import dataclasses
import json
from pathlib import Path

import torch
from events_for_tests import random_shop, write_events
from torch import Tensor

from recllm.checkpoint import Checkpoint
from recllm.event_prompts import TEMPLATE, EventWriter
from recllm.mixtures.conversions import Conversions, ConversionsConfig, build_conversions
from recllm.models.build import BuildModelConfig, build_model
from recllm.models.prefix_module import PrefixModule
from recllm.objectives.rclrec import straight_through
from recllm.prompting import PromptStyle
from recllm.trainers.prefixed import NLL_BASE
from recllm.trainers.rclrec import RCLRecConfig, RCLRecTrainer
from recllm.trainers.rclrec_run import RCLRecData, conversions_of, rows_of

FAST = {
    "per_device_train_batch_size": 8, "max_steps": 2, "bf16": False, "learning_rate": 1e-2, "validation_users": 0,
    "report_to": "none", "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1, "use_cpu": True,
    "lr_scheduler_type": "constant", "user_width": 4, "user_dropout": 0.0, "query_start": "random",
}  # fmt: skip
SMALL = {"tiny_width": 64, "tiny_layers": 2, "tiny_vocabulary": 512}


def write_stage_1(folder: str | Path, users: int = 30) -> tuple[Path, Path]:
    """(data, model): 13 items of two levels, one of which has one code; weights so large that context matters."""
    folder = Path(folder)
    write_events(folder, random_shop(users))
    data, path = folder / "data", folder / "model"
    build_model(BuildModelConfig(data=str(data), output=str(path), **SMALL))
    report = json.loads((path / "recllm.json").read_text())
    report["prompt"] = dataclasses.asdict(PromptStyle(TEMPLATE, events=True))
    (path / "recllm.json").write_text(json.dumps(report))
    checkpoint, generator = Checkpoint.load(path, "cpu"), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in checkpoint.model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    checkpoint.model.save_pretrained(path)
    build_conversions(ConversionsConfig(data=str(data), stage="target"))
    return data, path


def trainer_of(made: tuple[Path, Path], output: Path, lora=None, callbacks=None, **settings) -> RCLRecTrainer:
    """With ℓ_base as the slow way finds it, and a module whose users differ."""
    checkpoint = Checkpoint.load(made[1], "cpu", "float32")
    args = RCLRecConfig(output_dir=str(output), **{**FAST, "eval_strategy": "no", **settings})
    conversions: Conversions = conversions_of(RCLRecData(data=str(made[0])), checkpoint)
    rows = rows_of(conversions, checkpoint, args.k)
    opening = EventWriter(conversions.style, checkpoint.table, checkpoint.tokenizer).opening("pay")
    nlls = [slow_nll(checkpoint, row, opening, [])[1].item() for row in rows]
    module = PrefixModule(args.prefix("pay"), 64, sorted(set(rows["user"])))
    if module.learned:
        with torch.no_grad():
            module.user_embedding.weight[1:].normal_(generator=torch.Generator().manual_seed(1))
    trainer = RCLRecTrainer(
        checkpoint, args, rows.add_column(NLL_BASE, nlls), opening, module, peft_config=lora, callbacks=callbacks
    )
    trainer.checkpoint, trainer.opening = checkpoint, opening
    return trainer


def batch_of(trainer: RCLRecTrainer, places=None) -> dict:
    rows = trainer.train_dataset
    return trainer.data_collator([rows[place] for place in (range(len(rows)) if places is None else places)])


def ids_of(checkpoint: Checkpoint, codes) -> list[int]:
    return [int(checkpoint.tokens.levels[level][code]) for level, code in enumerate(codes) if code >= 0]


def slow_nll(checkpoint: Checkpoint, row, opening: int, chosen: list[int], gates=None) -> tuple[Tensor, Tensor]:
    """Mean NLL of prefix and target, and of the target alone, behind the items at these places of the history."""
    model, table = checkpoint.model, checkpoint.table
    prefix = [(place, id) for place in chosen for id in ids_of(checkpoint, table.codes[row["rows"][place]].tolist())]
    target = ids_of(checkpoint, row["target"])
    ids = torch.tensor([[*row["prompt_ids"], opening, *(id for _, id in prefix), *target]])
    start, size = len(row["prompt_ids"]) + 1, ids.size(1)
    item = [-1] * start + [place for place, _ in prefix] + [-1] * len(target)
    mask = torch.full((size, size), torch.finfo(model.dtype).min, dtype=model.dtype)
    rows = [
        torch.stack([
            mask[0, 0] if seen > token
            else gates[item[seen]].log() if gates is not None and item[seen] >= 0 and item[token] != item[seen]
            else torch.zeros((), dtype=model.dtype)
            for seen in range(size)
        ])
        for token in range(size)
    ]  # fmt: skip
    logps = type(model).forward(model, input_ids=ids, attention_mask=torch.stack(rows)[None, None])
    logps = logps.logits[0, :-1].log_softmax(-1)
    nll = -logps.gather(1, ids[0, 1:, None]).squeeze(1)[len(row["prompt_ids"]) :]
    return nll.mean(), nll[-len(target) :].mean()


def slow_choice(trainer: RCLRecTrainer, row, module: PrefixModule) -> tuple[list[int], Tensor]:
    """Places of the chosen items, least relevant first, and the gate of every item, from the prompt by itself."""
    model, settings = trainer.checkpoint.model, module.settings
    hidden = model.model(input_ids=torch.tensor([row["prompt_ids"]])).last_hidden_state[0]
    states, behaviour = hidden[row["ends"]], model.get_input_embeddings().weight[trainer.opening]
    user = module.user_embedding.weight[module.users.index(row["user"]) + 1]
    features = module.features(torch.cat([user, hidden[-1], states.mean(dim=0)]))
    query = module.query(torch.cat([features, behaviour]))
    scores = torch.stack([query @ state for state in states]) / len(query) ** 0.5
    chosen = sorted(range(len(states)), key=lambda place: (scores[place].item(), place))[-settings.k :]
    hard = torch.tensor([float(place in chosen) for place in range(len(states))])
    return chosen, straight_through(hard, (scores / settings.temperature).softmax(0))


def slow_loss(trainer: RCLRecTrainer, places, weight: float = 0.5, margin: float = 0.1) -> Tensor:
    """Of a learned selection: the spec's formula."""
    losses, module = [], trainer.data_collator.module
    for place in places:
        row = trainer.train_dataset[place]
        chosen, gates = slow_choice(trainer, row, module)
        nll, current = slow_nll(trainer.checkpoint, row, trainer.opening, chosen, gates)
        quality = (current - row.get(NLL_BASE, 0.0) + margin).clamp(min=0)
        losses.append(nll + weight * quality)
    return torch.stack(losses).mean()
