"""What `recllm/trainers/base.py` relies on inside TRL. A failure is one sentence: what to look at on an upgrade."""

import ast
import inspect
import textwrap

import pytest
from transformers import Trainer
from trl import GRPOConfig, GRPOTrainer
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer import utils

SEAM = "recllm/trainers/base.py"
ARGUMENTS = {
    "_get_train_sampler": ["dataset"],
    "_prepare_inputs": ["generation_batch"],
    "_generate": ["prompts"],
    "_generate_and_score_completions": ["inputs"],
    "_calculate_rewards": ["inputs", "prompts", "completions", "completion_ids_list"],
    "_get_per_token_logps_and_entropies": [
        "model", "input_ids", "attention_mask", "logits_to_keep", "batch_size", "compute_entropy",
    ],
    "_compute_loss": ["model", "inputs"],
    "compute_loss": ["model", "inputs", "return_outputs", "num_items_in_batch"],
    "training_step": ["model", "inputs", "num_items_in_batch"],
    "log": ["logs", "start_time"],
    "_save_checkpoint": ["model", "trial"],
    "_load_optimizer_and_scheduler": ["checkpoint"],
}  # fmt: skip
ATTRIBUTES = (
    "_step", "_buffered_inputs", "_metrics", "reward_weights", "reward_funcs", "num_iterations", "num_generations",
    "shuffle_dataset", "beta", "ref_model", "loss_type", "use_vllm", "rollout_func",
    "vllm_importance_sampling_correction",
)  # fmt: skip


def source(name: str) -> str:
    return textwrap.dedent(inspect.getsource(getattr(GRPOTrainer, name)))


def calls(name: str) -> list[str]:
    """Names of the methods that a method calls, in the order of the text."""
    nodes = [node for node in ast.walk(ast.parse(source(name))) if isinstance(node, ast.Call)]
    nodes.sort(key=lambda node: (node.lineno, node.col_offset))
    return [ast.unparse(node.func).removeprefix("self.") for node in nodes]


def keys_read(name: str) -> set[str]:
    """Of `inputs`, by [] or .get()."""
    tree, found = ast.parse(source(name)), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Subscript) and ast.unparse(node.value) == "inputs":
            found.add(node.slice.value)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "inputs.get":
            found.add(node.args[0].value)
    return found


def assert_says(name: str, *texts: str) -> None:
    flat = " ".join(source(name).split())
    for text in texts:
        assert text in flat, f"TRL's {name} no longer says `{text}`: see what {SEAM} makes of it"


@pytest.mark.parametrize("name", ARGUMENTS)
def test_a_method_is_there_with_its_arguments(name):
    method = getattr(GRPOTrainer, name, None)
    assert method is not None, f"TRL has no GRPOTrainer.{name} any more: {SEAM} overrides or calls it"
    found = list(inspect.signature(method).parameters)[1:]
    expected = ARGUMENTS[name]
    assert found[: len(expected)] == expected, f"TRL's {name} takes {found} now, and {SEAM} gives it {expected}"


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_the_trainer_still_sets(name):
    assert f"self.{name} = " in source("__init__") or f"self.{name}: " in source("__init__"), (
        f"TRL's __init__ no longer sets self.{name}, which {SEAM} reads or writes"
    )


def test_the_tokenizer_is_still_there():
    everything = inspect.getsource(GRPOTrainer)
    assert "self._tokenizer.pad_token_id" in everything, f"TRL has no self._tokenizer any more: {SEAM} pads with it"
    assert '"train"' in source("log"), "TRL's log keeps its figures otherwise: see MISLEADING and _answered"


def test_the_methods_of_the_seam_override_what_is_there():
    """A method of ours with a private name is TRL's or Trainer's, or it is listed here as our own."""
    from recllm.trainers.base import RecGRPOTrainer

    own = {
        "_every", "_generation", "_answered", "_roll_out", "_refilled", "_other_prompts", "_only_answers",
        "_actor_batches", "_add_log_probs", "_reference", "_logps",
        "_expected",
    }  # fmt: skip
    ours = {
        name for name, value in vars(RecGRPOTrainer).items()
        if name.startswith("_") and not name.startswith("__") and (callable(value) or isinstance(value, property))
    }  # fmt: skip
    for name in ours - own:
        assert hasattr(GRPOTrainer, name), f"{SEAM} overrides {name}, which TRL does not have any more"
    for name in own & ours:
        assert not hasattr(GRPOTrainer, name), f"TRL has a {name} of its own now: rename that of {SEAM}"


def test_one_method_generates_and_scores():
    called = calls("_generate_and_score_completions")
    for name in ("_generate", "_calculate_rewards"):
        assert called.count(name) == 1, f"_generate_and_score_completions calls {name} {called.count(name)} times now"
    assert called.index("_generate") < called.index("_calculate_rewards"), "rewards come before answers now"
    assert_says(
        "_generate_and_score_completions",
        "self.args.gradient_accumulation_steps % generate_every != 0",  # when old log-probs are computed: as ours
        "if self.beta != 0.0:",  # set to 0 by _only_answers: no reference is asked for
        "self.use_vllm and self.vllm_importance_sampling_correction",
    )
    asked = [name for name in called if name == "_get_per_token_logps_and_entropies"]
    assert len(asked) == 3, "log-probs are asked for in other places now: old, reference, reference under an adapter"
    assert "_answering" in inspect.getsource(
        __import__("recllm.trainers.base", fromlist=["x"]).RecGRPOTrainer._get_per_token_logps_and_entropies
    )


def test_answers_come_from_rollout_func():
    called = calls("_generate")
    assert "rollout_func" in called, "TRL's _generate no longer calls rollout_func: where do answers come from now?"
    assert_says(
        "_generate", "output = self.rollout_func(prompts, self)", '{"prompt_ids", "completion_ids", "logprobs"}',
        "extra_fields = {k: v for k, v in output.items() if k not in required_keys}",
    )  # fmt: skip
    assert called.index("vllm_generation.sync_weights") < called.index("rollout_func"), "vLLM gets the weights too late"
    assert_says("_generate_and_score_completions", "inp[key] = values[i]")  # codes, formed and rank reach the rewards


def test_rewards_of_all_processes_come_together():
    assert_says(
        "_calculate_rewards", "rewards_per_func = gather(rewards_per_func)", "return rewards_per_func",
        "completion_ids=completion_ids_list",
    )  # fmt: skip
    assert_says(
        "_generate_and_score_completions",
        "self.accelerator.process_index * len(prompts)",  # a process' rows stand together in what was gathered
        "(rewards_per_func * self.reward_weights.to(device).unsqueeze(0)).nansum(dim=1)",
    )


def test_a_generation_is_kept_for_its_steps():
    assert_says(
        "_prepare_inputs", "generate_every = self.args.steps_per_generation * self.num_iterations",
        "self._step % generate_every == 0 or self._buffered_inputs is None",
        "inputs = self._buffered_inputs[self._step % self.args.steps_per_generation]",
    )  # fmt: skip
    assert_says("training_step", "self._step += 1")
    assert_says(
        "get_train_dataloader", "self._train_batch_size * self.args.steps_per_generation", "self._get_train_sampler"
    )
    assert_says("_get_train_sampler", "mini_repeat_count=self.num_generations", "repeat_count=self.num_iterations")


def test_the_loss_reads_the_batch_in_these_names():
    expected = {
        "prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "advantages", "old_per_token_logps",
        "ref_per_token_logps", "importance_sampling_ratio", "num_items_in_batch", "sampling_per_token_logps",
    }  # fmt: skip
    missing = expected - keys_read("_compute_loss")
    assert not missing, f"TRL's _compute_loss no longer reads {sorted(missing)}: see actor_batch and _add_log_probs"
    new = keys_read("_compute_loss") - expected - {
        "tool_mask", "pixel_values", "image_grid_thw", "num_images", "pixel_attention_mask", "spatial_shapes",
        "num_tiles", "image_sizes", "token_type_ids", "mm_token_type_ids", "image_position_ids",
    }  # fmt: skip
    assert not new, f"TRL's _compute_loss reads {sorted(new)} too now: should our batches hold it?"
    called = calls("_compute_loss")
    assert called.count("_get_per_token_logps_and_entropies") == 1, "the loss asks for log-probs in another way now"
    assert calls("compute_loss") == ["ValueError", "_compute_loss"], "compute_loss does more than _compute_loss now"


def test_losses_over_rows_and_losses_over_tokens_are_what_they_were():
    """`OVER_ROWS` are weighed by `scales`; the others count tokens, and rows that fill a batch up have none."""
    from recllm.trainers.base import OVER_ROWS

    assert_says(
        "_compute_loss",
        'if self.loss_type in ["grpo", "sapo"]: loss = ((per_token_loss * mask).sum(-1) / mask.sum(-1)'
        ".clamp(min=1.0)).mean()",
        '"bnpo": loss = (per_token_loss * mask).sum() / mask.sum().clamp(min=1.0)',
        '"dr_grpo": loss = (per_token_loss * mask).sum() / (per_token_loss.size(0) * self.max_completion_length)',
        'normalizer = inputs["num_items_in_batch"].clamp(min=1.0) / self.accelerator.num_processes',
        '"luspo": # `per_token_loss`',
        "loss = (per_token_loss * mask).sum(-1).mean()",
        "if advantages.dim() == 1: advantages = advantages.unsqueeze(1)",  # (R, T) goes through
        "old_per_token_logps = per_token_logps.detach() if old_per_token_logps is None else old_per_token_logps",
    )
    assert set(OVER_ROWS) == {"grpo", "sapo", "dr_grpo", "luspo"}
    tree = ast.parse(source("_compute_loss"))
    named = {
        constant.value for node in ast.walk(tree) if isinstance(node, ast.Compare)
        and ast.unparse(node.left) == "self.loss_type" for constant in ast.walk(node)
        if isinstance(constant, ast.Constant)
    }  # fmt: skip
    new = named - {*OVER_ROWS, "bnpo", "dapo", "cispo", "vespo"}
    assert not new, f"TRL has the losses {sorted(new)} now: does `scale` belong to them (OVER_ROWS)?"


def test_the_loss_is_divided_by_the_accumulated_batches_in_trl_and_not_by_trainer():
    assert GRPOTrainer.loss_is_scaled_for_ga is True, (
        "Trainer divides the loss by the accumulated batches once more now: see scales in recllm/trainers/batches.py"
    )
    assert "current_gradient_accumulation_steps" in source("_compute_loss"), (
        "TRL divides the loss by something else than Trainer's current_gradient_accumulation_steps: see scales"
    )


def test_the_reference_is_loaded_by_the_name_of_the_start():
    assert_says(
        "__init__", "self.ref_model = create_model_from_path(get_config_model_id(self.model.config)",
        "elif is_peft_model(model):",
    )  # fmt: skip
    assert list(inspect.signature(utils.use_adapter).parameters) == ["model", "adapter_name"]
    assert list(inspect.signature(disable_gradient_checkpointing).parameters)[:1] == ["model"]


def test_figures_of_a_batch_of_width_one_count_its_rows():
    """Inert rows too, which is why no batch of ours is narrower than 2."""
    assert_says(
        "_compute_loss", "if x.shape[1] == 1:", "local_sum, local_count = x.sum(), torch.tensor(float(x.shape[0])"
    )


def test_settings_are_still_there():
    fields = GRPOConfig.__dataclass_fields__
    expected = (
        "num_generations", "steps_per_generation", "generation_batch_size", "num_iterations", "beta", "loss_type",
        "scale_rewards", "reward_weights", "multi_objective_aggregation", "mask_truncated_completions",
        "vllm_structured_outputs_regex", "generation_kwargs", "top_k", "min_p", "repetition_penalty",
        "cache_implementation", "use_transformers_continuous_batching", "num_generations_eval", "router_aux_loss_coef",
        "vllm_importance_sampling_mode", "vllm_importance_sampling_clip_min", "vllm_importance_sampling_clip_max",
        "max_completion_length", "shuffle_dataset", "temperature", "top_p",
    )  # fmt: skip
    missing = [name for name in expected if name not in fields]
    assert not missing, f"TRL's GRPOConfig has no {missing} any more: see recllm/trainers/rl_config.py"


def test_steps_are_saved_and_loaded_where_the_seam_hooks_in():
    assert "self._load_optimizer_and_scheduler(resume_from_checkpoint)" in inspect.getsource(Trainer), (
        f"Trainer no longer loads its steps by _load_optimizer_and_scheduler: {SEAM} reads its own state there"
    )
    assert "_get_output_dir" in vars(Trainer), f"Trainer has no _get_output_dir any more: {SEAM} saves beside the steps"
    assert_says("_save_checkpoint", "super()._save_checkpoint(model, trial)")
