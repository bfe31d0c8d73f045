"""Trainers that take single steps for `rl.py`: TRL's own and ours, with one model, the same prompts and answers."""

import contextlib
import dataclasses
import gc
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import actor
import numpy as np
import torch
from actor import DEVICE, SIZES, TEXT
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging
from trl import GRPOConfig, GRPOTrainer

from recllm.checkpoint import REPORT, TABLE, Checkpoint
from recllm.files import write_json
from recllm.prompting import PromptStyle
from recllm.rewards import PrefixReward, reward_functions
from recllm.semantic_ids import SemanticIdTable
from recllm.tokenization import add_tokens
from recllm.trainers.groups import RolloutGroups, Rollouts, Signal
from recllm.trainers.grpo import GRPOSettings, RecGRPO
from recllm.trainers.recast import ReCast, ReCastSettings
from recllm.trainers.rollouts import RolloutSettings, RolloutSource

SIDES = ("TRL", "GRPO", "ReCast")
Spent = dict[str, float]  # seconds by phase


@dataclass(frozen=True)
class Work:
    """What a step is of."""

    prompts: int  # P
    prompt: int  # tokens of one
    answer: int  # C
    group: int  # G
    parts: int  # that TRL's padded batch goes in
    items: int  # N
    normaliser: str
    seed: int


# ---- the same for all: a model that holds the items, prompts, answers


def write_checkpoint(work: Work, folder: Path) -> None:
    """A random Qwen3 with a word for each text token, and items of random codes."""
    random = np.random.default_rng(work.seed)
    codes = np.unique(random.integers(0, SIZES, (work.items, len(SIZES))), axis=0).astype(np.int32)
    table = SemanticIdTable(tuple(f"i{row}" for row in range(len(codes))), codes, SIZES)
    backend = Tokenizer(models.WordLevel({f"w{word}": word for word in range(TEXT)}, unk_token="w2"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="w0", eos_token="w1", unk_token="w2")
    add_tokens(tokenizer, table.all_tokens())
    words = work.prompt - work.prompt // len(SIZES) * len(SIZES) + len(SIZES)
    template = " ".join(f"w{3 + word}" for word in range(words)) + " {history}"
    style = PromptStyle(template, max_history=(work.prompt - words) // len(SIZES))
    model = actor.model_of(work.seed)
    transformers_logging.disable_progress_bar()
    model.save_pretrained(folder), tokenizer.save_pretrained(folder), table.save(folder / TABLE)
    write_json(folder / REPORT, {"semantic_ids": table.fingerprint, "prompt": dataclasses.asdict(style)})


def prompts_of(work: Work, checkpoint: Checkpoint) -> Dataset:
    random, table = np.random.default_rng(work.seed), checkpoint.table
    length, rows = checkpoint.style.max_history, []
    for _ in range(work.prompts):
        *history, item = [table.items[row] for row in random.integers(len(table), size=length + 1)]
        text = checkpoint.style.text(history, table, checkpoint.tokenizer)
        (ids,) = checkpoint.writer.ids([history])
        assert len(ids) == work.prompt
        rows.append({"prompt": text, "prompt_ids": ids, "target": list(table.codes_of(item)), "mode": "direct"})
    return Dataset.from_list(rows)


@dataclass(frozen=True, eq=False)
class Given:
    """A source of answers that are there already: items after random text, of each group one the target."""

    own: RolloutSource
    rollouts: Rollouts

    form, labels = RolloutSource.form, RolloutSource.labels

    @classmethod
    def of(cls, work: Work, own: RolloutSource, prompts: Dataset) -> "Given":
        random, (table, levels) = np.random.default_rng(work.seed), (own.checkpoint.table, own.checkpoint.tokens.levels)
        count, said = len(prompts) * work.group, work.answer - len(SIZES)
        codes = torch.from_numpy(table.codes[random.integers(len(table), size=count)].astype(np.int64))
        codes[:: work.group] = torch.tensor(prompts["target"])
        tokens = torch.stack([ids[codes[:, level]] for level, ids in enumerate(levels)], dim=1)
        text = torch.from_numpy(random.integers(3, TEXT, (count, said)))
        answers, zeros = torch.cat([text, tokens], dim=1).tolist(), [[0.0] * work.answer] * count
        return cls(own, Rollouts([list(ids) for ids in prompts["prompt_ids"]], answers, [said] * count, codes, zeros))

    def __call__(self, rows, answers, seed, keys) -> Rollouts:
        return self.rollouts

    def formed(self, found, rows) -> list[bool]:
        return [True] * len(found.answers)

    def anchor(self, row, answer, start):
        return self.own.anchor(row, answer, start)


class AllAnswers(RecGRPO):
    """GRPO with TRL's advantages: no answer is dropped, so that its work and its loss are TRL's."""

    def build_signal(self, groups: RolloutGroups) -> Signal:
        rewards = groups.rewards
        advantages = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)
        return Signal(advantages, torch.ones_like(rewards, dtype=torch.bool))


# ---- the sides


class Side:
    """A trainer that takes single steps, and how long it was in each of its phases."""

    def __init__(self, trainer: GRPOTrainer, prompts: Dataset, given: Callable, drawn: Callable | None, names: dict):
        """`given`, `drawn`: where answers come from. `names`: its methods of rollout and of log-probabilities."""
        self.trainer, self.sources, self.parts = trainer, (given, drawn), trainer.args.gradient_accumulation_steps
        self.rows = [dict(row) for row in prompts for _ in range(trainer.num_generations)]
        self.attribute = "rollout_func" if type(trainer) is GRPOTrainer else "source"
        self.clock = time.process_time if DEVICE == "cpu" else time.perf_counter
        self.spent: Spent = defaultdict(float)
        trainer.current_gradient_accumulation_steps = self.parts
        trainer.create_optimizer()
        self._watch("_prepare_inputs", lambda *_: "prepare")
        self._watch(names["rollout"], lambda *_: "rollout")
        self._watch("_calculate_rewards", lambda *_: "score")
        self._watch(names["logps"], self._of_logps)

    def _of_logps(self, model, *_) -> str | None:
        if torch.is_grad_enabled():  # TRL's loss has it by the same name
            return None
        return "reference" if model is self.trainer.ref_model else "old"

    def _watch(self, method: str, phase_of: Callable[..., str | None]) -> None:
        own = getattr(self.trainer, method)

        def watched(*args, **settings):
            with self.phase(phase_of(*args)):
                return own(*args, **settings)

        setattr(self.trainer, method, watched)

    def now(self) -> float:
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        return self.clock()

    @contextlib.contextmanager
    def phase(self, name: str | None) -> Iterator[None]:
        start = self.now() if name else 0.0
        yield
        if name:
            self.spent[name] += self.now() - start

    def accumulate(self, anew: bool = True) -> float:
        """Loss and gradients of all rows; `anew`: their answers are asked for first."""
        if anew:
            self.trainer._step = 0  # of TRL's, with a generation due
        return sum(float(self.trainer.training_step(self.trainer.model, self.rows, None)) for _ in range(self.parts))

    def step(self, given: bool) -> Spent:
        """Seconds of each phase of a step of the optimizer; `update` and `step` are sums of them."""
        setattr(self.trainer, self.attribute, self.sources[0] if given else self.sources[1])
        gc.collect()
        self.spent.clear()
        wall, model = time.perf_counter(), self.trainer.model
        with self.phase("training"):
            self.accumulate()
        with self.phase("optimizer"):
            torch.nn.utils.clip_grad_norm_(model.parameters(), self.trainer.args.max_grad_norm)
            self.trainer.optimizer.step()
            model.zero_grad()
        wall = time.perf_counter() - wall
        found = {name: self.spent[name] for name in ("rollout", "score", "old", "reference")}
        found["other"] = self.spent["prepare"] - sum(found.values())
        found["loss"] = self.spent["training"] - self.spent["prepare"]
        found["optimizer"] = self.spent["optimizer"]
        found["update"] = found["old"] + found["reference"] + found["loss"]
        return found | {"step": self.spent["training"] + self.spent["optimizer"], "wall": wall}

    def update(self) -> None:
        """On given answers, without the optimizer: what memory is measured of."""
        setattr(self.trainer, self.attribute, self.sources[0])
        self.accumulate()
        self.trainer.model.zero_grad()

    def moved(self, seed: int) -> tuple[float, torch.Tensor]:
        """Loss and gradient at the second use of given answers, the weights having moved at random; then put back."""
        self.update()
        generator, model = torch.Generator(DEVICE).manual_seed(seed), self.trainer.model
        before = [parameter.detach().clone() for parameter in model.parameters()]
        with torch.no_grad():
            for parameter in model.parameters():
                noise = torch.randn(parameter.shape, generator=generator, device=DEVICE)
                parameter += (0.03 * noise).to(parameter)
        loss = self.accumulate(anew=False)
        gradient = torch.cat([parameter.grad.flatten().float() for parameter in model.parameters()])
        model.zero_grad()
        with torch.no_grad():
            for parameter, kept in zip(model.parameters(), before):
                parameter.copy_(kept)
        return loss, gradient


def side_of(name: str, work: Work, folder: Path) -> Side:
    checkpoint = Checkpoint.load(folder, DEVICE)
    prompts = prompts_of(work, checkpoint)
    rows, parts = len(prompts) * work.group, work.parts if name == "TRL" else 1
    settings = {
        "output_dir": str(folder / "run"), "per_device_train_batch_size": rows // parts, "num_generations": work.group,
        "gradient_accumulation_steps": parts, "num_iterations": 2, "beta": 0.04, "loss_type": "grpo",
        "temperature": 1.0, "max_completion_length": work.answer, "learning_rate": 1e-6, "bf16": False,
        "gradient_checkpointing": False, "report_to": "none", "save_strategy": "no", "disable_tqdm": True,
        "seed": work.seed, "use_cpu": DEVICE == "cpu",
    }  # fmt: skip
    drawn = RolloutSource.of(checkpoint, RolloutSettings())
    given = Given.of(work, drawn, prompts)
    if name == "TRL":
        return stock_side(checkpoint, GRPOConfig(**settings), prompts, given)
    ours = {"rewards": ["hit" if name == "ReCast" else "prefix"], "normaliser": work.normaliser}
    ours |= {"validation_users": 0}
    args = (ReCastSettings if name == "ReCast" else GRPOSettings)(**settings, **ours)
    kind = ReCast if name == "ReCast" else AllAnswers
    trainer = kind(checkpoint, args, prompts, given, reward_functions(args.rewards, args.reward_beta))
    return Side(trainer, prompts, given, drawn, {"rollout": "_roll_out", "logps": "_logps"})


def stock_side(checkpoint: Checkpoint, args: GRPOConfig, prompts: Dataset, given: Given) -> Side:
    """TRL's trainer; answers are given by its `rollout_func`, or drawn by HF generate without one."""
    code_of = [dict(zip(ids.tolist(), range(len(ids)))) for ids in checkpoint.tokens.levels]

    def prefix(prompts, completions, completion_ids, *, target, **_) -> list[float]:
        codes = [[own.get(token, -1) for own, token in zip(code_of, ids[-len(SIZES) :])] for ids in completion_ids]
        return PrefixReward()(prompts, completions, completion_ids, codes=codes, target=target)

    def roll_out(texts: Sequence[str], trainer: GRPOTrainer) -> dict[str, list | None]:
        found = given.rollouts
        repeated = [ids for ids in found.prompts for _ in range(found.group)]
        return {"prompt_ids": repeated, "completion_ids": found.answers, "logprobs": None}

    trainer = GRPOTrainer(checkpoint.model, prefix, args, prompts, processing_class=checkpoint.tokenizer)
    names = {"rollout": "_generate", "logps": "_get_per_token_logps_and_entropies"}
    return Side(trainer, prompts, roll_out, None, names)
