"""RCLRec's maths: the order of the prefix, the straight-through mask, the hinge. Arithmetic that a reader can redo."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from recllm.objectives.rclrec import ascending_top_k, average_nll, quality_loss, straight_through

# ---- the most relevant items, the best last


def test_the_best_item_stands_last():
    scores = torch.tensor([[0.1, 2.0, -1.0, 0.5]])
    assert ascending_top_k(scores, 3, torch.ones(1, 4, dtype=torch.bool)).tolist() == [[0, 3, 1]]
    assert ascending_top_k(scores, 1).tolist() == [[1]]


def test_absent_items_are_never_chosen_and_a_short_history_begins_with_nothing():
    scores = torch.tensor([[9.0, 1.0, 3.0], [9.0, 1.0, 3.0], [9.0, 1.0, 3.0]])
    mask = torch.tensor([[False, True, True], [False, False, True], [False, False, False]])
    assert ascending_top_k(scores, 2, mask).tolist() == [[1, 2], [-1, 2], [-1, -1]]
    assert ascending_top_k(scores, 5, mask).tolist() == [[-1, -1, -1, 1, 2], [-1, -1, -1, -1, 2], [-1] * 5]
    assert ascending_top_k(torch.zeros(2, 0), 2).tolist() == [[-1, -1], [-1, -1]]


def test_an_item_of_score_minus_infinity_goes_before_none_at_all():
    scores, mask = torch.tensor([[-math.inf, 0.0, 5.0]]), torch.tensor([[True, True, False]])
    assert ascending_top_k(scores, 2, mask).tolist() == [[0, 1]]


def test_of_equal_scores_the_more_recent_is_the_more_relevant():
    assert ascending_top_k(torch.zeros(1, 5), 3).tolist() == [[2, 3, 4]]


@given(st.lists(st.tuples(st.integers(-3, 3), st.booleans()), max_size=8), st.integers(1, 9))
def test_top_k_equals_a_slow_reference(items, k):
    scores = torch.tensor([[float(score) for score, _ in items]])
    mask = torch.tensor([[present for _, present in items]], dtype=torch.bool)
    chosen = sorted((score, place) for place, (score, present) in enumerate(items) if present)[-k:]
    expected = [-1] * (k - len(chosen)) + [place for _, place in chosen]
    assert ascending_top_k(scores.reshape(1, -1), k, mask.reshape(1, -1)).tolist() == [expected]


def test_a_prefix_of_no_item_is_refused():
    with pytest.raises(ValueError, match="k is 0"):
        ascending_top_k(torch.zeros(1, 2), 0)


# ---- the mask


def test_straight_through_has_the_hard_value_and_the_soft_gradient():
    scores = torch.tensor([[0.3, -0.2, 1.1]], dtype=torch.double, requires_grad=True)
    hard = torch.tensor([[True, False, True]])
    worth = torch.tensor([[2.0, -1.0, 0.5]], dtype=torch.double)  # what each item contributes
    through = straight_through(hard, scores.softmax(dim=1))
    assert through.tolist() == [[1.0, 0.0, 1.0]]
    (through * worth).sum().backward()
    soft = scores.detach().softmax(dim=1)
    expected = soft * (worth - (soft * worth).sum())  # of Σ_j p_j w_j, by hand: p_j (w_j − Σ_i p_i w_i)
    torch.testing.assert_close(scores.grad, expected)
    assert (scores.grad.abs() > 1e-3).all()  # also of the item that was not chosen


def test_the_gradient_is_that_of_finite_differences_of_the_soft_path():
    start, hard = torch.tensor([0.4, -0.7, 0.2], dtype=torch.double), torch.tensor([1, 0, 1])
    worth = torch.tensor([1.5, 0.3, -0.8], dtype=torch.double)

    def soft(scores):
        return (scores.softmax(dim=0) * worth).sum()

    scores = start.clone().requires_grad_()
    (straight_through(hard, scores.softmax(dim=0)) * worth).sum().backward()
    step = 1e-6
    for j in range(3):
        move = torch.eye(3, dtype=torch.double)[j] * step
        difference = (soft(start + move) - soft(start - move)) / (2 * step)
        assert scores.grad[j].item() == pytest.approx(difference.item(), abs=1e-8)


@given(st.lists(st.floats(0, 1, width=32), min_size=1, max_size=6))
def test_the_value_is_the_mask_to_the_last_bit(values):
    p = torch.tensor(values)
    hard = torch.arange(len(values)) % 2 == 0
    assert straight_through(hard, p).equal(hard.float())


# ---- the loss


def test_average_nll_by_hand():
    logps = torch.tensor([[0.5, 0.25, 0.125], [0.5, 0.5, 1.0]]).log()
    assert average_nll(logps).tolist() == pytest.approx([2 * math.log(2), 2 / 3 * math.log(2)])  # (1+2+3)/3, (1+1+0)/3
    mask = torch.tensor([[True, False, True], [False, False, False]])
    assert average_nll(logps, mask).tolist() == pytest.approx([2 * math.log(2), 0.0])  # (1+3)/2


def test_a_token_that_does_not_count_has_no_say_and_no_gradient():
    logps = torch.tensor([[-1.0, -math.inf]], requires_grad=True)
    found = average_nll(logps, torch.tensor([[True, False]]))
    found.sum().backward()
    assert found.item() == 1.0
    assert logps.grad.tolist() == [[-1.0, 0.0]]


def test_quality_loss_by_hand():
    nll, base = torch.tensor([1.0, 2.0, 1.9, 2.5]), torch.full((4,), 2.0)
    # 1.0 − 2 + .1 < 0;   2 − 2 + .1 = .1;   1.9 − 2 + .1 = 0;   2.5 − 2 + .1 = .6
    assert quality_loss(nll, base, 0.1).tolist() == pytest.approx([0.0, 0.1, 0.0, 0.6], abs=1e-6)


def test_only_the_current_model_is_moved_and_only_where_the_prefix_is_not_worth_the_margin():
    nll = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    base = torch.full((3,), 2.0, requires_grad=True)
    quality_loss(nll, base, 0.1).sum().backward()
    assert nll.grad.tolist() == [0.0, 1.0, 1.0]
    assert base.grad is None
