"""The seam over TRL's GRPOTrainer:  rollout → score → signal → log-probs → loss.

The only file that touches TRL's private methods (`tests/trainers/test_trl_contract.py` guards them). A method of a
paper overrides `build_signal` and nothing else. Differences from GRPOTrainer:

1. Answers come from `RolloutSource`: the engine's constrained ones, or vLLM's chains with the engine's item.
2. The signal is asked for before any log-probability is computed. Inactive answers are dropped; injected ones get
   log-probabilities of their own; groups without a signal contribute nothing.
3. A prompt is computed once for the answers to it (`recllm.actor`), with the loss and gradients of the padded batch.
4. Groups stay whole: on one process, and in one batch. A generation that is still in use is saved with the steps, so
   that a killed run goes on to the same bits.
5. Evaluation decodes (`recllm.evaluation.validation`).
"""

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from torch import Tensor
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import GRPOTrainer
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import use_adapter

from recllm.actor import AnswerScorer
from recllm.checkpoint import Checkpoint
from recllm.decoding.decoder import generator_of
from recllm.evaluation.validation import EvaluatesByDecoding, Validation
from recllm.files import read_object, write_json
from recllm.health import group_figures
from recllm.trainers.batches import (
    Batch,
    Batching,
    actor_batch,
    chosen,
    load_batches,
    rows_of,
    save_batches,
    scales,
    with_anchors,
)
from recllm.trainers.callbacks import add_callbacks
from recllm.trainers.expected import expectation_of, path_logps, taught
from recllm.trainers.groups import RolloutGroups, Signal
from recllm.trainers.health_log import HealthLog, LogsHealth
from recllm.trainers.importance import importance_ratio
from recllm.trainers.prompt_sampler import PromptSampler
from recllm.trainers.rl_config import RecGRPOConfig
from recllm.trainers.rollouts import RolloutSource
from recllm.trie import SemanticIdTrie
from recllm.vllm_chains import TRLChains

STATE, IN_USE = "rl_state.json", "rollouts_{}.safetensors"  # beside the steps; of each process
OVER_ROWS = ("grpo", "sapo", "dr_grpo", "luspo")  # losses that are a mean over the rows of a batch
MISLEADING = ("clipped_ratio", "mean_terminated_length", "min_terminated_length", "max_terminated_length")


class RecGRPOTrainer(LogsHealth, EvaluatesByDecoding, GRPOTrainer):
    """A method of a paper overrides `build_signal`."""

    _tag_names: ClassVar = ["trl", "grpo", "recllm"]
    _name = "RecGRPO"

    def __init__(
        self, checkpoint: Checkpoint, args: RecGRPOConfig, prompts: Dataset, source: RolloutSource, rewards: Sequence,
        validation: Validation | None = None, peft_config=None, callbacks=None,
    ):  # fmt: skip
        self.source, self.form, self.validation = source, source.form, validation
        super().__init__(
            model=checkpoint.model, reward_funcs=list(rewards), args=args, train_dataset=prompts,
            eval_dataset=prompts.select(range(0)) if validation else None,  # Trainer insists on one
            processing_class=checkpoint.tokenizer, peft_config=peft_config, callbacks=callbacks,
            rollout_func=lambda _, trainer: trainer._roll_out(),
        )  # fmt: skip
        if self.use_vllm:
            self.source = dataclasses.replace(source, vllm=TRLChains(self.vllm_generation))
        tokens, trie = checkpoint.tokens, SemanticIdTrie.from_codes(checkpoint.table.codes, checkpoint.table.sizes)
        self.scorer = AnswerScorer(
            checkpoint.model, tokens, trie, normaliser=args.normaliser, temperature=args.temperature,
            layout=args.layout, labels=source.labels,
        )  # fmt: skip
        policy = self.accelerator.unwrap_model(self.model)
        for model in (policy, self.ref_model):
            if model is not None:
                self.scorer.install(self.accelerator.unwrap_model(model))  # DeepSpeed has wrapped the reference by now
        self.health = HealthLog.of(self.accelerator, policy)
        self.running: dict[str, float] = {}  # what a method remembers from step to step; saved with the steps
        self._answering = False  # TRL's method runs, for its rollouts and rewards alone
        self._restored: list[Batch] | None = None
        add_callbacks(self)

    # ---- the one question

    def build_signal(self, groups: RolloutGroups) -> Signal:
        raise NotImplementedError

    # ---- rollout and score

    def _get_train_sampler(self, dataset: Dataset | None = None) -> PromptSampler:
        args, data = self.args, self.train_dataset if dataset is None else dataset
        batch = args.generation_batch_size // self.num_generations
        uses = self.num_iterations * args.steps_per_generation
        self.sampler = PromptSampler(len(data), batch, self.num_generations, uses, args.seed, self.shuffle_dataset)
        return self.sampler

    @property
    def _every(self) -> int:
        """Batches from one generation to the next."""
        return self.args.steps_per_generation * self.num_iterations

    def _prepare_inputs(self, generation_batch: list[dict[str, Any]]) -> Batch:
        """As TRL's, with batches of whole groups, where TRL shuffles single answers."""
        if self._step % self._every == 0 or self._buffered_inputs is None:
            with self.health.rest("other"):
                self._buffered_inputs = self._restored or self._generation(generation_batch)
            self._restored = None
        return self._buffered_inputs[self._step % self.args.steps_per_generation]

    def _generation(self, inputs: list[dict[str, Any]]) -> list[Batch]:
        groups = self._answered(inputs[:: self.num_generations], 0)
        self.health.all_shares(group_figures(groups.rewards, groups.hits, groups.named, groups.codes))
        answers = groups.rollouts.answers
        self.health.share("rollout/length", sum(map(len, answers)), len(answers))
        groups = self._refilled(groups)
        signal = self.build_signal(groups)
        if self.args.keep_zero_signal:
            nothing = ~signal.active.any(dim=1, keepdim=True)
            signal = dataclasses.replace(signal, active=signal.active | nothing)
        if signal.of_target is not None:
            groups, signal = taught(groups, signal, signal.of_target, self.scorer.levels)
        return self._actor_batches(groups, signal)

    def _answered(self, rows: Sequence[Mapping], attempt: int) -> RolloutGroups:
        """G answers to each of P prompts, scored. TRL's own method runs, so that its logs and rewards are as ever."""
        first, generation = self.accelerator.process_index * len(rows), self._step // self._every
        self._asked = list(rows)
        self._keys = tuple(f"{generation} {attempt} {first + place}" for place in range(len(rows)))
        with self._only_answers():
            super()._generate_and_score_completions([dict(row) for row in rows for _ in range(self.num_generations)])
        for name in MISLEADING:  # an answer has no end token here
            self._metrics["train"].pop(f"completions/{name}", None)
        rewards = self._rewards.view(len(rows), self.num_generations).cpu()
        targets = torch.tensor([row["target"] for row in rows])
        groups = RolloutGroups(self._rollouts, targets, rewards, tuple(rows), self._keys)
        return self._expected(groups) if self.args.expected else groups

    def _expected(self, groups: RolloutGroups) -> RolloutGroups:
        """With the expectation after each chain in place of the reward of the item that was drawn."""
        args, model = self.args, self.accelerator.unwrap_model(self.model)
        formed = torch.tensor(self._formed).view(groups.rewards.shape) if args.reward_gate else None

        with self.health.phase("expected"), torch.no_grad(), self.accelerator.autocast():
            logps = path_logps(
                groups, self.scorer.levels, lambda rows: model(answer_rows=rows)[0], self._tokenizer.pad_token_id,
                args.per_device_train_batch_size, self.accelerator.device,
            )  # fmt: skip
        groups = expectation_of(
            groups, self._each, args.rewards, self.reward_weights.tolist(), formed, logps, args.reward_beta
        )  # fmt: skip
        self.health.share("expected/reward", groups.rewards.sum(), groups.rewards.numel())
        self.health.share("expected/hit", groups.hit_weights[:, :, 0].sum(), groups.rewards.numel())
        return groups

    def _roll_out(self) -> dict[str, list]:
        """What TRL calls `rollout_func`; vLLM has the weights by now. `rank`: a beam's place in its group."""
        group, rows = self.num_generations, self._asked
        on_gpu = self.accelerator.device.type == "cuda"
        precision = self.accelerator.autocast() if on_gpu else contextlib.nullcontext()
        with self.health.phase("rollout"), torch.no_grad(), precision:
            self._rollouts = found = self.source(rows, group, self.args.seed, self._keys)
            self._formed = self.source.formed(found, rows)
        return {
            "prompt_ids": [ids for ids in found.prompts for _ in range(group)],
            "completion_ids": found.answers,
            "logprobs": found.logps,
            **found.facts(),
            "codes": found.codes.tolist(),
            "formed": self._formed,
            "rank": list(range(group)) * len(rows),
        }

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list) -> Tensor:
        with self.health.phase("score"):
            each = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)  # of all processes
        start = self.accelerator.process_index * len(prompts)
        self._each = own = each[start : start + len(prompts)]
        self._rewards = (own * self.reward_weights.to(own.device)).nansum(dim=1)
        return each

    def _refilled(self, groups: RolloutGroups) -> RolloutGroups:
        """Groups without a signal make room for those of other prompts; every process asks as often as the others."""
        for attempt in range(1, self.args.refill_tries + 1):
            lacking = (~groups.trainable).nonzero().flatten().tolist()
            most = max(gather_object([len(lacking)]))
            if not most:
                break
            others = self._answered(self._other_prompts(most, attempt), attempt)
            use = others.trainable.nonzero().flatten().tolist()
            groups = groups.exchanged(lacking, others, use)
            self.health.share("group/rejected", len(lacking), len(groups.rows))
            self.health.share("group/refilled", min(len(lacking), len(use)), len(groups.rows))
        return groups

    def _other_prompts(self, count: int, attempt: int) -> list[dict[str, Any]]:
        """Of the whole data, drawn for all processes together."""
        generator = generator_of(self.args.seed, "other prompts", self._step // self._every, attempt)
        drawn = torch.randperm(len(self.train_dataset), generator=generator)
        start = self.accelerator.process_index * count
        return [self.train_dataset[place] for place in drawn[start : start + count].tolist()]

    @contextlib.contextmanager
    def _only_answers(self):
        """No log-probability is computed while TRL generates: which answers need one is not known yet."""
        kept = self.beta, self.vllm_importance_sampling_correction
        self.beta, self.vllm_importance_sampling_correction, self._answering = 0.0, False, True
        try:
            yield
        finally:
            self.beta, self.vllm_importance_sampling_correction = kept
            self._answering = False

    # ---- survivors and their log-probabilities

    def _actor_batches(self, groups: RolloutGroups, signal: Signal) -> list[Batch]:
        """The S batches of a generation, equally wide on every process."""
        args, device = self.args, self.accelerator.device
        rollouts, drawn = with_anchors(groups, signal, self.source.anchor)
        batching = Batching.of(signal.active, args.steps_per_generation)
        everywhere = gather_object([batching.widths])
        widths = [max(1, *some) for some in zip(*everywhere)]
        batches = [
            actor_batch(rollouts, signal, drawn, rows, width, self._tokenizer.pad_token_id, device, self.form)
            for rows, width in zip(batching.batches, widths)
        ]
        window = min(len(batches), args.gradient_accumulation_steps)
        active = [sum(some) for some in zip(*everywhere)]
        factors = scales(active, widths, window, self.accelerator.num_processes)
        tokens = self.accelerator.gather(torch.stack([chosen(batch).sum() for batch in batches]).sum()).sum()
        for batch, factor in zip(batches, factors):
            batch["num_items_in_batch"] = tokens
            batch["scale"] = torch.tensor(factor if self.loss_type in OVER_ROWS else 1.0, device=device)
            self._add_log_probs(batch)
        self.health.amount("actor/active", signal.active.sum())
        self.health.share("actor/width", signal.active.sum(), len(signal.active))
        return batches

    def _add_log_probs(self, batch: Batch) -> None:
        """Old ones where the policy will have moved (or a sampler has to be corrected), and the reference's."""
        corrected = self.use_vllm and self.vllm_importance_sampling_correction
        with torch.no_grad(), disable_gradient_checkpointing(self.model, self.args.gradient_checkpointing_kwargs):
            if self.args.gradient_accumulation_steps % self._every or corrected:
                with self.health.phase("old_logps"):
                    batch["old_per_token_logps"] = self._logps(self.model, batch)
            if corrected:
                batch["importance_sampling_ratio"] = importance_ratio(
                    batch["old_per_token_logps"], batch["sampling_per_token_logps"], batch["free"], self.args
                )
            if self.beta != 0.0:
                with self.health.phase("reference"):
                    batch["ref_per_token_logps"] = self._reference(batch)

    def _reference(self, batch: Batch) -> Tensor:
        if self.ref_model is not None:
            return self._logps(self.ref_model, batch)
        model = self.accelerator.unwrap_model(self.model)
        with use_adapter(model, adapter_name="ref" if "ref" in model.peft_config else None):
            return self._logps(self.model, batch)

    def _logps(self, model, batch: Batch) -> Tensor:
        with self.accelerator.autocast():
            return model(answer_rows=rows_of(batch, self.form), entropy=False)[0]

    def _get_per_token_logps_and_entropies(
        self, model, input_ids, attention_mask, logits_to_keep, batch_size=None, compute_entropy=False, **_
    ):
        """TRL's loss calls this, for the batch that `_compute_loss` was given; while TRL generates, for nothing."""
        if self._answering:
            return torch.zeros(len(input_ids), logits_to_keep, device=input_ids.device), None, None
        with self.accelerator.autocast():
            logps, entropies = model(answer_rows=rows_of(self._batch, self.form), entropy=compute_entropy)
        self._logps_now = logps.detach()
        return logps, entropies, None

    # ---- loss

    def _compute_loss(self, model, inputs: Batch) -> Tensor:
        self._batch = inputs
        loss = super()._compute_loss(model, inputs) * inputs["scale"]
        self.health.amount("actor/tokens", self.scorer.tokens_run)
        if "old_per_token_logps" in inputs:
            mask = chosen(inputs)
            self.health.share("ppo_kl", ((inputs["old_per_token_logps"] - self._logps_now) * mask).sum(), mask.sum())
        return loss

    def log_evaluation(self, logs: dict[str, float], start_time: float | None = None) -> None:
        super(GRPOTrainer, self).log(logs, start_time)  # TRL would move the training's figures there

    # ---- going on after a kill

    def _save_checkpoint(self, model, trial) -> None:
        """A generation that has been used in part goes with the steps: with it the same bits come out."""
        folder = Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        folder.mkdir(parents=True, exist_ok=True)
        if self._step % self._every:
            save_batches(self._buffered_inputs, folder / IN_USE.format(self.accelerator.process_index))
        if self.accelerator.is_main_process:
            write_json(folder / STATE, {"step": self._step, "running": self.running})
        super()._save_checkpoint(model, trial)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        state = read_object(Path(checkpoint) / STATE)
        self._step, self.running = state["step"], state["running"]
        if self._step % self._every:
            kept = Path(checkpoint) / IN_USE.format(self.accelerator.process_index)
            self._restored = load_batches(kept, self.accelerator.device)
