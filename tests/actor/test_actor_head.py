"""Text in chunks, codes among codes: the same numbers and slopes as log_softmax over everything at once."""

import math

import pytest
import torch
from torch import Tensor

from recllm.actor import head
from recllm.actor.head import Matrix, code_scores, text_scores

N, D, V = 37, 6, 50


@pytest.fixture(autouse=True)
def many_chunks(monkeypatch):
    monkeypatch.setattr(head, "CELLS", {"cpu": 16 * V, "cuda": 16 * V})


def parts(bias: bool) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def some(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.double).requires_grad_()

    return some(N, D), some(V, D), some(V) if bias else None, torch.randint(V, (N,), generator=generator)


def capped(logits: Tensor) -> Tensor:
    return torch.tanh(logits / 2) * 2


@pytest.mark.parametrize("finish", [lambda logits: logits, capped])
@pytest.mark.parametrize("bias", [True, False])
def test_text_in_chunks_is_log_softmax_with_its_slopes(bias, finish):
    hidden, weight, some_bias, tokens = parts(bias)
    logps, entropies = text_scores(hidden, Matrix(weight, some_bias), tokens, 0.7, finish, True)
    all_logps = (finish(torch.nn.functional.linear(hidden, weight, some_bias)) / 0.7).log_softmax(-1)
    wanted = all_logps[torch.arange(N), tokens], -(all_logps.exp() * all_logps).sum(-1)
    torch.testing.assert_close(logps, wanted[0])
    torch.testing.assert_close(entropies, wanted[1])
    asked = [part for part in (hidden, weight, some_bias) if part is not None]
    weights = torch.linspace(-1, 2, N, dtype=torch.double)
    ours = torch.autograd.grad((weights * logps + weights.flip(0) * entropies).sum(), asked)
    theirs = torch.autograd.grad((weights * wanted[0] + weights.flip(0) * wanted[1]).sum(), asked)
    for our, their in zip(ours, theirs):
        torch.testing.assert_close(our, their)


def test_text_without_entropy_has_the_same_slopes():
    hidden, weight, _, tokens = parts(False)
    found = text_scores(hidden, Matrix(weight, None), tokens, 1.0, lambda logits: logits, False)
    assert found.entropies is None
    theirs = (hidden @ weight.T).log_softmax(-1)[torch.arange(N), tokens]
    (ours,) = torch.autograd.grad(found.logps.sum(), hidden)
    torch.testing.assert_close(ours, torch.autograd.grad(theirs.sum(), hidden)[0])


def test_a_frozen_head_gets_no_gradient_and_passes_it_on():
    hidden, weight, _, tokens = parts(False)
    found = text_scores(hidden, Matrix(weight.detach(), None), tokens, 1.0, lambda logits: logits, False)
    found.logps.sum().backward()
    assert hidden.grad.abs().sum() > 0
    assert weight.grad is None


def test_logits_are_never_kept_for_the_backward_pass():
    """A chunk holds 16 positions; what is saved is the hidden states, the matrix and a number for each position."""
    hidden, weight, _, tokens = parts(False)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()) or tensor, lambda t: t):
        text_scores(hidden, Matrix(weight, None), tokens, 1.0, lambda logits: logits, True)
    assert max(kept) == max(N * D, V * D) < N * V


def test_codes_by_hand():
    """Logits 0, ln 2, ln 4: shares 1/7, 2/7, 4/7 of the level; 1/5 and 4/5 among the first and the last."""
    logits = torch.tensor([[1.0, 2.0, 4.0]]).log()
    level = code_scores(logits, torch.tensor([2]), None, True)
    torch.testing.assert_close(level.logps.exp(), torch.tensor([4 / 7]))
    some = code_scores(logits, torch.tensor([2]), torch.tensor([[True, False, True]]), True)
    torch.testing.assert_close(some.logps.exp(), torch.tensor([4 / 5]))
    torch.testing.assert_close(some.entropies, -torch.tensor([0.2 * math.log(0.2) + 0.8 * math.log(0.8)]))


def test_a_code_without_alternative_is_certain_and_teaches_nothing():
    logits = torch.randn(1, 5, requires_grad=True)
    found = code_scores(logits, torch.tensor([3]), torch.arange(5).unsqueeze(0) == 3, True)
    assert found.logps.item() == found.entropies.item() == 0
    (slope,) = torch.autograd.grad(found.logps.sum() + found.entropies.sum(), logits)
    assert not slope.any()


def test_rows_of_the_matrix_side_by_side_or_not():
    matrix = Matrix(torch.arange(20.0).view(10, 2), torch.arange(10.0))
    for ids in ([3, 4, 5], [5, 3, 4], [9]):
        some = matrix.rows(torch.tensor(ids))
        assert torch.equal(some.weight, matrix.weight[ids])
        assert torch.equal(some.bias, matrix.bias[ids])
