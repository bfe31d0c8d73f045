"""Through wrappers, whose hooks sit on forward: PEFT, DDP, FSDP2.

Under PEFT gradients reach the new rows of embedding and head, and the reference is the model without its adapter.
"""

import copy

import pytest
import torch
from answers import TRIE, gradient, mixed_rows, rows_of, slow_scores
from decoding.reference import LEVELS, some_model
from peft import LoraConfig, get_peft_model
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from recllm.actor import AnswerScorer
from recllm.errors import UserError


def adapted(tied: bool, layout: str, **settings):
    """(the model under LoRA with the scorer, the same without it, the scorer), its adapter away from zero."""
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], ensure_weight_tying=tied, **settings)
    model = get_peft_model(some_model(tied=tied), config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    plain = copy.deepcopy(model).eval()
    scorer = AnswerScorer(model, LEVELS, TRIE, layout=layout)
    scorer.install(model)
    return model.eval(), plain, scorer


@pytest.mark.parametrize("layout", ["row", "cache", "padded"])
@pytest.mark.parametrize("tied", [True, False])
def test_new_rows_train_in_embedding_and_head(tied, layout):
    saved = ["embed_tokens"] if tied else ["embed_tokens", "lm_head"]
    model, plain, _ = adapted(tied, layout, modules_to_save=saved)
    rows = mixed_rows()
    found, wanted = model(answer_rows=rows)[0], slow_scores(plain, rows, "children")[0]
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    theirs = gradient(plain, wanted)
    assert (gradient(model, found) - theirs).norm() <= 1e-5 * theirs.norm()
    whole = [p for name, p in model.named_parameters() if p.requires_grad and "modules_to_save" in name]
    assert len(whole) == (1 if tied else 2)
    for weight in whole:
        assert weight.grad[LEVELS[0]].abs().sum() > 0  # the codes' rows, fed and predicted


@pytest.mark.parametrize("layout", ["row", "padded"])
def test_rows_that_train_alone(layout):
    """`trainable_token_indices`, which keeps new rows apart from the matrix."""
    model, plain, _ = adapted(True, layout, trainable_token_indices={"embed_tokens": list(range(10, 36))})
    rows = mixed_rows()
    found, wanted = model(answer_rows=rows)[0], slow_scores(plain, rows, "children")[0]
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    theirs = gradient(plain, wanted)
    assert (gradient(model, found) - theirs).norm() <= 1e-5 * theirs.norm()


def test_without_adapter_it_is_the_model_as_it_was():
    model, _, _ = adapted(True, "auto", modules_to_save=["embed_tokens"])
    rows = mixed_rows()
    with torch.no_grad():
        wanted = slow_scores(some_model(), rows, "children")[0]
        assert not torch.allclose(model(answer_rows=rows)[0], wanted, atol=1e-3)
        with model.disable_adapter():
            torch.testing.assert_close(model(answer_rows=rows)[0], wanted, atol=1e-5, rtol=1e-5)


def test_lora_on_the_head_is_refused():
    model = get_peft_model(some_model(tied=False), LoraConfig(r=4, target_modules=["lm_head"]))
    scorer = AnswerScorer(model, LEVELS, TRIE)
    scorer.install(model)
    with pytest.raises(UserError, match="LoRA on the head"):
        model(answer_rows=mixed_rows())


@pytest.fixture
def one_process(tmp_path):
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'meet'}", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.usefixtures("one_process")
def test_ddp_and_fsdp2(tied):
    rows, plain = mixed_rows(), some_model(tied=tied)
    wanted = slow_scores(plain, rows, "children")[0]
    theirs = gradient(plain, wanted)
    for wrap in ("ddp", "fsdp2"):
        model = some_model(tied=tied)
        AnswerScorer(model, LEVELS, TRIE).install(model)
        if wrap == "ddp":
            called = torch.nn.parallel.DistributedDataParallel(model)
        else:
            mesh = init_device_mesh("cpu", (1,))
            for layer in model.model.layers:
                fully_shard(layer, mesh=mesh)
            called = fully_shard(model, mesh=mesh)
        for _ in range(2):
            model.zero_grad()
            logps = called(answer_rows=rows)[0]
            torch.testing.assert_close(logps, wanted, atol=1e-5, rtol=1e-5)
            (logps * torch.linspace(-1, 2, logps.numel()).view_as(logps)).sum().backward()
            ours = [whole(parameter.grad).flatten().double() for parameter in model.parameters()]
            assert (torch.cat(ours) - theirs).norm() <= 1e-5 * theirs.norm()
            # A process whose share holds no answer still takes part.
            called(answer_rows=rows_of([[1, 2], [3]], [[], []], [0, 0]))[0].sum().backward()


def whole(gradient: torch.Tensor) -> torch.Tensor:
    return gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
