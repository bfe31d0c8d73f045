"""`AnswerRule` as a logits processor of vLLM 0.31: `--logits-processors recllm.vllm_processor:CatalogueProcessor`.

Settings of the engine stand in `additional_config={"recllm": {…}}` (see `AnswerSettings`), so that they reach worker
processes too; a request chooses its mode with `extra_args={"recllm_mode": "direct"}`, over HTTP with `vllm_xargs`.

vLLM has two model runners, and each wants an interface of its own: V2 where Triton runs (GPUs), V1 elsewhere (CPUs).
Which one it will be cannot be known from outside, so one class answers both; the rule and the settings are shared.
"""

import dataclasses
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.sampling_params import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate, process_dict_updates
from vllm.v1.sample.logits_processor import LogitsProcessor as V1Processor
from vllm.v1.worker.gpu.sample.logits_processor import LogitsContext
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as V2Processor

from recllm.errors import UserError
from recllm.pretrained import load_tokenizer
from recllm.rollouts import SETTINGS, AnswerRule, AnswerSettings, check_mode, keep_allowed

MODE = "recllm_mode"


@dataclasses.dataclass(frozen=True)
class Answer:
    """How a request is answered, and where its tokens are."""

    rule: AnswerRule
    one_token: bool  # a step of a search driven from outside, such as vLLM's beam search: the prompt holds the beam
    prompt: list[int]  # V1: its end, as far as it matters. V2 reads both off the device
    output: list[int]  # V1: vLLM's own running list

    def allowed_next(self, prompt: list[int], output: list[int]) -> torch.Tensor | None:
        """Of the end of the prompt and of the output. Without an opening the answer begins where the prompt ends; in a
        request for one token with the codes there, since the prompt's own end cannot be told from the beam's."""
        if self.rule.openings:
            return self.rule.allowed_next([*prompt, *output])
        beam = self.rule.codes_before(prompt, len(prompt)) if self.one_token else ()
        return self.rule.allowed_next([*prompt[len(prompt) - len(beam) :], *output])


class CatalogueProcessor(V1Processor, V2Processor):
    def __init__(self, vllm_config: VllmConfig, device_or_history: Any, is_pin_memory: bool = False):
        model = vllm_config.model_config
        if vllm_config.speculative_config:
            raise UserError("answers cannot be kept in the catalogue under speculative decoding", fix="switch it off")
        given = (vllm_config.additional_config or {}).get(SETTINGS, {})
        self.settings = AnswerSettings.from_dict(given, folder=model.model)
        tokenizer = load_tokenizer(model.tokenizer, model.tokenizer_revision)
        self.rule = self.settings.rule(tokenizer, model.revision)
        self.history = device_or_history  # V2: the tokens of every request, on the device
        self.answers: dict[int, Answer] = {}  # V1: by row of the batch. V2: by slot

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        try:
            _mode_of(sampling_params, "free")
        except UserError as error:
            raise ValueError(str(error)) from None  # what vLLM takes for a bad request

    def apply(self, logits: torch.Tensor, context: LogitsContext | None = None) -> torch.Tensor:
        allowed = self._allowed_v1() if context is None else self._allowed_v2(context)
        return keep_allowed(logits, {row: ids for row, ids in allowed.items() if ids is not None})

    def _answer(self, params: SamplingParams, prompt: list[int] | None, output: list[int]) -> Answer | None:
        mode = _mode_of(params, self.settings.mode)
        if mode == "free":
            return None
        rule = self.rule.direct if mode == "direct" else self.rule
        return Answer(rule, params.max_tokens == 1, (prompt or [])[-rule.reach :], output)

    # ---- V1: rows of the batch keep their requests, and vLLM says when they move

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        process_dict_updates(self.answers, batch_update, self._answer)

    def _allowed_v1(self) -> dict[int, torch.Tensor | None]:
        allowed = {}
        for row, answer in self.answers.items():
            reach = answer.rule.reach  # a long chain of thought is not copied at every step
            prompt = answer.prompt if len(answer.output) < reach else []
            allowed[row] = answer.allowed_next(prompt, answer.output[-reach:])
        return allowed

    # ---- V2: a request has a slot, rows are reordered at every step, and the tokens are on the device

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        self.answers.pop(req_idx, None)
        if (answer := self._answer(sampling_params, None, [])) is not None:
            self.answers[req_idx] = answer
        return answer is not None

    def _allowed_v2(self, context: LogitsContext) -> dict[int, torch.Tensor | None]:
        slots = context.idx_mapping_np.tolist()  # a row is a request: there is no speculative decoding
        rows = [row for row, slot in enumerate(slots) if slot in self.answers]
        if not rows:
            return {}
        reach, device = self.rule.reach, context.pos.device
        of_rows = torch.tensor(rows, device=device)
        ends = context.pos[of_rows] + 1  # (R,)
        places = ends.unsqueeze(1) + torch.arange(-reach, 0, device=device)  # (R, reach)
        ids = self.history.all_token_ids.gpu[context.expanded_idx_mapping[of_rows].unsqueeze(1), places.clamp(min=0)]
        allowed = {}
        for row, (end, *tail) in zip(rows, torch.cat([ends.unsqueeze(1), ids], 1).tolist()):
            tail = tail[max(0, reach - end) :]
            written = min(len(tail), max(0, end - int(self.history.prompt_len.np[slots[row]])))
            cut = len(tail) - written
            allowed[row] = self.answers[slots[row]].allowed_next(tail[:cut], tail[cut:])
        return allowed


def _mode_of(params: SamplingParams, default: str) -> str:
    extra = params.extra_args or {}
    if unknown := [name for name in extra if name.startswith("recllm_") and name != MODE]:
        raise UserError(f"extra_args has no {unknown[0]!r}", fix=f"the one of ours is {MODE!r}")
    mode = extra.get(MODE, default)
    check_mode(mode)
    return mode
