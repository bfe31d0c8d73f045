"""From groups and their signal to batches: who is in them, what fills them up, and what that weighs."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from trl import GRPOConfig

from recllm.trainers.batches import Batching, actor_batch, padded, rows_of, scales, with_anchors
from recllm.trainers.groups import RolloutGroups, Rollouts, Signal
from recllm.trainers.importance import importance_ratio
from recllm.trainers.prompt_sampler import PromptSampler

CPU = torch.device("cpu")


def masks(processes=1, least=1, most=6):
    """Active answers of every process. List of (P, G) bool"""

    @st.composite
    def drawn(draw):
        count, p, g = draw(st.integers(1, processes)), draw(st.integers(least, most)), draw(st.integers(2, 4))
        bits = draw(st.lists(st.booleans(), min_size=count * p * g, max_size=count * p * g))
        return torch.tensor(bits).view(count, p, g).unbind()

    return drawn()


# ---- who is in which batch


@given(masks(), st.integers(1, 5))
def test_every_active_answer_is_in_one_batch_and_no_other_is(found, count):
    (active,) = found
    batching = Batching.of(active, count)
    assert len(batching.batches) == count
    rows = [row for batch in batching.batches for row in batch]
    assert sorted(rows) == active.flatten().nonzero().flatten().tolist()
    assert rows == sorted(rows), "the order of prompts is kept, so that a prompt's answers stand side by side"


@given(masks(least=2, most=8), st.integers(1, 4))
def test_a_group_stays_in_one_batch_where_there_are_groups_enough(found, count):
    (active,) = found
    group = active.size(1)
    if int(active.any(dim=1).sum()) >= count:
        of_batches = [{row // group for row in batch} for batch in Batching.of(active, count).batches]
        assert sum(map(len, of_batches)) == len(set().union(*of_batches))
        sizes = [len(groups) for groups in of_batches]
        assert max(sizes) - min(sizes) <= 1


def test_a_lone_group_is_cut_into_as_many_batches_as_there_are():
    active = torch.zeros(3, 4, dtype=torch.bool)
    active[1] = True
    assert Batching.of(active, 4).batches == [[4], [5], [6], [7]]
    assert Batching.of(torch.zeros(2, 4, dtype=torch.bool), 3).batches == [[], [], []]


# ---- the mean over answers that train


@given(masks(processes=3), st.integers(1, 6), st.integers(1, 6), st.integers(0, 10**6))
def test_an_update_is_the_mean_over_the_answers_of_its_batches(found, count, accumulation, seed):
    """As the trainers do it: a mean over the rows of a batch, over the batches of a step, over the processes.

    Steps that take the batches of one generation alone are the mean over the answers in them; with more accumulation
    than batches a step is the mean of its generations'.
    """
    processes, generator = len(found), torch.Generator().manual_seed(seed)
    losses = [torch.randn(active.numel(), generator=generator, dtype=torch.double) for active in found]
    layouts = [Batching.of(active, count) for active in found]
    widths = [max(1, *some) for some in zip(*(layout.widths for layout in layouts))]
    active = [sum(some) for some in zip(*(layout.widths for layout in layouts))]
    window = min(count, accumulation)
    factors = scales(active, widths, window, processes)
    for start in range(0, count, window):
        batches = range(start, min(start + window, count))
        update = sum(
            factors[batch] * losses[process][layouts[process].batches[batch]].sum() / widths[batch]
            for process in range(processes)
            for batch in batches
        ) / (processes * len(batches))  # fmt: skip
        chosen = [losses[p][layouts[p].batches[batch]] for p in range(processes) for batch in batches]
        chosen = torch.cat(chosen)
        assert float(update) == pytest.approx(float(chosen.mean()) if len(chosen) else 0.0, abs=1e-9)


def test_a_step_that_goes_on_with_another_generation_weighs_all_batches_alike():
    """Six batches a generation, four a step: step 2 is half of one generation's end, half of the next one's start."""
    assert scales([4] * 6, [4] * 6, 4, 1) == [1.0] * 6
    assert scales([4, 0, 4, 0, 3, 1], [4] * 6, 4, 1) == [2.0] * 4 + [2.0, 2.0]


def test_by_hand():
    """Two processes, two batches a step; 3 + 1 answers in the first batches, 2 + 0 in the second: 6 in all.

    Weight of an answer: scale / (window · processes · width) = 1/6 wherever it is.
    """
    first, second = scales([4, 2], [3, 2], window=2, processes=2)
    assert first / (2 * 2 * 3) == pytest.approx(1 / 6)
    assert second / (2 * 2 * 2) == pytest.approx(1 / 6)
    assert scales([0, 0], [1, 1], 2, 2) == [0.0, 0.0]


# ---- what stands in a batch


def rollouts() -> Rollouts:
    """Two prompts of three answers, of one to three tokens; the last names no item."""
    answers = [[11, 12], [13], [11, 14], [15, 16, 11], [11, 12], [17]]
    codes = torch.tensor([[1, 2], [3, -1], [1, 4], [1, -1], [1, 2], [-1, -1]])
    return Rollouts(
        [[1, 2, 3], [4]], answers, [0, 0, 0, 2, 0, 1], codes, [[-0.5 * len(ids)] * len(ids) for ids in answers]
    )  # fmt: skip


def groups_of(found: Rollouts) -> RolloutGroups:
    rows = ({"target": [9, 8], "name": "first"}, {"target": [7, -1], "name": "second"})
    targets = torch.tensor([row["target"] for row in rows])
    return RolloutGroups(found, targets, torch.arange(6.0).view(2, 3), rows, ("a", "b"))


def test_answers_stand_behind_their_prompts_and_the_rest_is_inert():
    signal = Signal(torch.arange(6.0).view(2, 3), torch.tensor([[1, 0, 1], [1, 0, 0]]).bool())
    drawn = torch.tensor([True, True, False, True, True, True])
    batch = actor_batch(rollouts(), signal, drawn, [0, 2, 3], 5, 0, CPU)
    assert batch["prompt_ids"].tolist() == [[1, 2, 3], [1, 2, 3], [0, 0, 4], [0, 0, 4], [0, 0, 4]]
    assert batch["prompt_mask"].tolist() == [[1, 1, 1], [1, 1, 1], [0, 0, 1], [0, 0, 1], [0, 0, 1]]
    assert batch["completion_ids"].tolist()[:3] == [[11, 12, 0], [11, 14, 0], [15, 16, 11]]
    assert batch["completion_mask"].tolist() == [[1, 1, 0], [1, 1, 0], [1, 1, 1], [0, 0, 0], [0, 0, 0]]
    assert batch["advantages"].tolist()[:3] == [0.0, 2.0, 3.0]
    # Text that the policy wrote itself; not codes, and nothing of an injected answer.
    assert batch["free"].tolist() == [[0, 0, 0], [0, 0, 0], [1, 1, 0], [0, 0, 0], [0, 0, 0]]
    sampled = batch["sampling_per_token_logps"]
    assert sampled.nan_to_num(9).tolist() == [[9, 9, 9], [9, 9, 9], [-1.5, -1.5, 9], [9] * 3, [9] * 3]
    packed = rows_of(batch).packed
    assert packed.rows.tolist() == [0, 1, 2]
    assert packed.group.tolist() == [0, 0, 1]


def test_a_batch_without_answers_costs_no_token():
    signal = Signal(torch.zeros(2, 3), torch.zeros(2, 3).bool())
    batch = actor_batch(rollouts(), signal, torch.ones(6).bool(), [], 2, 0, CPU)
    assert batch["completion_mask"].tolist() == [[0, 0], [0, 0]]  # of two: TRL counts rows where there is one
    assert len(rows_of(batch).packed.rows) == 0


def test_advantages_may_differ_between_tokens():
    advantages = torch.arange(12.0).view(2, 3, 2)
    signal = Signal(advantages, torch.ones(2, 3).bool())
    batch = actor_batch(rollouts(), signal, torch.ones(6).bool(), [1, 3], 2, 0, CPU)
    assert batch["advantages"].tolist() == [[2.0, 3.0, 0.0], [6.0, 7.0, 0.0]]  # as wide as the longest answer
    batch = actor_batch(rollouts(), signal, torch.ones(6).bool(), [1], 1, 0, CPU)
    assert batch["advantages"].tolist() == [[2.0, 3.0]]


def test_an_anchor_takes_the_place_of_one_answer():
    found = rollouts()
    signal = Signal(torch.zeros(2, 3), torch.ones(2, 3).bool(), torch.tensor([-1, 2]))
    seen = []

    def anchor(row, answer, start):
        seen.append((row["name"], answer, start))
        return [20, 21, 22], 2

    after, drawn = with_anchors(groups_of(found), signal, anchor)
    assert seen == [("second", [17], 1)]
    assert after.answers[:5] == found.answers[:5]
    assert after.answers[5] == [20, 21, 22]
    assert (after.starts[5], after.codes[5].tolist(), after.logps[5]) == (2, [7, -1], [0.0] * 3)
    assert drawn.tolist() == [True] * 5 + [False]
    assert found.answers[5] == [17], "the groups that were scored stay as they are"


def test_padding():
    assert padded([[1], [2, 3]], 0).tolist() == [[1, 0], [2, 3]]
    assert padded([[1], [2, 3]], 9, left=True).tolist() == [[9, 1], [2, 3]]
    assert padded([[], [0.5]], 0.0).dtype == torch.float32


def test_groups_are_exchanged_whole():
    one, other = groups_of(rollouts()), groups_of(rollouts().take([1, 0]))
    both = one.exchanged([0, 1], other, [0])
    assert both.rollouts.answers == [*one.rollouts.answers[3:], *one.rollouts.answers[3:]]
    assert both.rollouts.prompts == [[4], [4]]
    assert both.rewards.tolist() == [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]
    assert one.exchanged([], other, [0, 1]).rollouts.answers == one.rollouts.answers


# ---- order of the prompts


@pytest.mark.parametrize("shuffled", [True, False])
def test_prompts_come_whole_and_once_an_epoch(shuffled):
    sampler = PromptSampler(count=11, batch=3, group=4, uses=2, seed=5, shuffled=shuffled)
    epochs = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        places = list(sampler)
        assert len(places) == len(sampler) == 9 * 4 * 2
        batches = [places[start : start + 12] for start in range(0, len(places), 12)]
        assert all(one == other for one, other in zip(batches[::2], batches[1::2])), "used twice in a row"
        prompts = [prompt for batch in batches[::2] for prompt in batch[::4]]
        assert len(set(prompts)) == 9
        assert [prompt for prompt in prompts for _ in range(4)] == [one for batch in batches[::2] for one in batch]
        epochs.append(prompts)
        assert list(sampler) == places, "a function of seed and epoch"
    assert shuffled == (len({tuple(prompts) for prompts in epochs}) == 3)


def test_orders_of_seeds_and_epochs_do_not_meet():
    orders = set()
    for seed in range(5):
        for epoch in range(5):
            sampler = PromptSampler(30, 3, 1, 1, seed)
            sampler.set_epoch(epoch)
            orders.add(tuple(sampler))
    assert len(orders) == 25


# ---- correction of a sampler's log-probabilities


def settings(tmp_path, mode, low=None, high=None):
    return GRPOConfig(
        output_dir=str(tmp_path), use_cpu=True, bf16=False, vllm_importance_sampling_mode=mode,
        vllm_importance_sampling_clip_min=low, vllm_importance_sampling_clip_max=high,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        # Ratios of the tokens are 2, 1/8, and 3 for a token that nobody drew; together 1/4.
        ("token_truncate", [[1.5, 0.5, 1.0]]),
        ("token_mask", [[0.0, 0.0, 1.0]]),
        ("sequence_truncate", [[0.5]]),
        ("sequence_mask", [[0.0]]),
    ],
)
def test_the_ratio_to_the_sampler(tmp_path, mode, expected):
    old = torch.tensor([[2.0, 0.125, 3.0]]).log()
    counted = torch.tensor([[1, 1, 0]])
    found = importance_ratio(old, torch.zeros(1, 3), counted, settings(tmp_path, mode, 0.5, 1.5))
    assert found.tolist() == [pytest.approx(expected[0])]


def test_a_token_that_the_sampler_could_not_score_is_not_corrected(tmp_path):
    sampled = torch.tensor([[float("nan"), 0.0]])
    found = importance_ratio(torch.zeros(1, 2) - 1, sampled, torch.ones(1, 2), settings(tmp_path, "token_mask", 0.1))
    assert found.tolist() == [pytest.approx([1.0, 0.3678794])]


def test_an_injected_answer_is_not_corrected_at_all(tmp_path):
    for mode, shape in (("token_truncate", (1, 3)), ("sequence_mask", (1, 1))):
        old, sampled = torch.full((1, 3), -7.0), torch.zeros(1, 3)
        found = importance_ratio(old, sampled, torch.zeros(1, 3), settings(tmp_path, mode, 0.5, 1.5))
        assert torch.equal(found, torch.ones(shape))
