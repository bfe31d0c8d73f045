"""SASRec: the loss against torch's own, who sees whom, what is trained on, and a run that is killed."""

import dataclasses
import json

import numpy as np
import polars as pl
import pytest
import torch
from helpers import write_catalogue
from torch.nn import functional as F

from recllm.catalogue import Catalogue
from recllm.errors import UserError
from recllm.models import sasrec, sasrec_training
from recllm.models.sasrec import MeanLogPartition, SASRec, SASRecConfig, SASRecRanker, blocks, load_sasrec, padded
from recllm.models.sasrec_training import Training, Validation, Windows, learning_rate, train_sasrec

ITEMS = [f"i{row}" for row in range(12)]
SMALL = SASRecConfig(width=16, layers=1, heads=2, max_length=6, dropout=0.1, batch=64, epochs=4, validation_users=20)


def walk(start: int, events: int) -> list[str]:
    """Each item is followed by the one three further on: what there is to learn."""
    return [f"i{(start + 3 * step) % 12}" for step in range(events)]


@pytest.fixture
def catalogue(tmp_path) -> Catalogue:
    return write_catalogue(tmp_path / "data", ITEMS, {f"u{user}": walk(user, 3 + user % 7) for user in range(40)})


@pytest.fixture
def model() -> SASRec:
    torch.manual_seed(0)
    made = SASRec(12, SMALL).eval()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3)  # so that every part has a say
    return made


# ---- the maths


def test_the_loss_and_its_gradients_are_those_of_cross_entropy(model, monkeypatch):
    monkeypatch.setattr(sasrec, "LOGITS", 12 * 4)  # four states at a time
    model = model.double()
    table = model.items.weight
    states = torch.randn(10, 16, dtype=torch.double, requires_grad=True)
    targets = torch.randint(12, (10,))
    expected = F.cross_entropy(states @ table.T, targets)
    found = model.loss(states, targets)
    assert torch.allclose(found, expected)
    of_expected = torch.autograd.grad(expected, (states, table))
    of_found = torch.autograd.grad(3 * found, (states, table))
    for one, other in zip(of_expected, of_found):
        assert torch.allclose(3 * one, other)


def test_large_logits_do_not_overflow():
    states, table = torch.full((2, 4), 100.0), torch.full((3, 4), 100.0)
    assert MeanLogPartition.apply(states, table).item() == pytest.approx(40_000 + np.log(3))


def test_an_event_is_not_seen_by_those_before_it(model):
    rows = torch.randint(12, (3, 6))
    changed = rows.clone()
    changed[:, 4] = (changed[:, 4] + 1) % 12
    before, after = model.states(rows), model.states(changed)
    assert torch.allclose(before[:, :4], after[:, :4], atol=1e-6)
    assert not torch.allclose(before[:, 5], after[:, 5], atol=1e-3)


def test_what_fills_up_a_history_does_not_matter(model):
    rows, lengths = torch.randint(12, (3, 6)), torch.tensor([1, 4, 6])
    scores = model.scores(rows, lengths)
    assert scores.shape == (3, 12)
    for case, length in enumerate(lengths.tolist()):
        alone = model.states(rows[case : case + 1, :length])[0, -1] @ model.items.weight.T
        assert torch.allclose(scores[case], alone, atol=1e-5)


# ---- histories


def test_padded_keeps_the_last_events():
    rows, lengths = padded(np.array([7, 8, 9, 1, 2]), np.array([3, 0, 2]), 2)
    assert rows.tolist() == [[8, 9], [0, 0], [1, 2]]
    assert lengths.tolist() == [2, 0, 2]


def test_every_case_is_in_one_block_of_a_width_of_its_own_length():
    lengths = torch.tensor([0, 1, 8, 9, 16, 17, 50] + [3] * 130)
    found = [(width, block.tolist()) for width, block in blocks(lengths, 50)]
    width_of = {case: width for width, block in found for case in block}
    assert [width_of.get(case) for case in range(7)] == [None, 8, 8, 16, 16, 32, 50]
    assert sorted(case for _, block in found for case in block) == list(range(1, 137))
    assert max(len(block) for _, block in found) == 64


def test_ranking_is_by_score_whoever_else_is_ranked(model, catalogue):
    ranker = SASRecRanker(model, catalogue.item_ids)
    cases = catalogue.targets("test")
    together = ranker.rank(cases, 5)
    for case, history in enumerate(cases["history"]):
        alone = ranker.rank(cases[case : case + 1], 5)
        assert torch.equal(alone.rows[0], together.rows[case])
        assert torch.equal(alone.scores[0], together.scores[case])
        read = torch.tensor([[catalogue.row_of[item] for item in history][-6:]])
        with torch.no_grad():
            scores = model.scores(read, torch.tensor([read.size(1)]))
        assert together.rows[case].tolist() == scores[0].topk(5).indices.tolist()


def test_an_empty_history_and_a_list_longer_than_the_catalogue(model, catalogue):
    cases = pl.DataFrame({"history": [[], ["i1"]]}, schema={"history": pl.List(pl.String)})
    ranking = SASRecRanker(model, catalogue.item_ids).rank(cases, 14)
    assert ranking.rows[0].tolist() == [-1] * 14
    assert sorted(ranking.rows[1].tolist()) == [-1, -1, *range(12)]


def test_the_whole_history_is_left_out_when_asked_also_what_is_not_read(model, catalogue):
    cases = pl.DataFrame({"history": [["i1"], walk(0, 4) + ["i1"] * 6]})  # 10 events, of which the last 6 are read
    ranker = SASRecRanker(model, catalogue.item_ids)
    without = dataclasses.replace(ranker, exclude_history=True).rank(cases, 12)
    own = ({1}, {0, 3, 6, 9, 1})
    for case, all_rows in enumerate(ranker.rank(cases, 12).rows.tolist()):
        kept = [row for row in all_rows if row not in own[case]]
        assert without.rows[case].tolist() == kept + [-1] * len(own[case])


# ---- what is learnt from


def test_each_training_event_but_a_users_first_is_predicted_once(tmp_path):
    sequences = {"a": walk(0, 4), "b": walk(1, 10), "c": ["i5"], "d": walk(2, 7)}
    catalogue = write_catalogue(tmp_path, ITEMS, sequences, split="train")
    windows = Windows.of(catalogue, longest=4)
    # a: 3 to predict; b: 9 = 1 + 4 + 4, the latest windows full; c: none; d: 6 = 2 + 4.   b starts at event 4, d at 15.
    spans = sorted(zip(windows.starts.tolist(), windows.lengths.tolist()))
    assert spans == [(0, 3), (4, 1), (5, 4), (9, 4), (15, 2), (17, 4)]
    predicted = sorted(start + step + 1 for start, length in spans for step in range(length))
    assert predicted == [*range(1, 4), *range(5, 14), *range(16, 22)]


def test_batches_hold_every_window_once_and_targets_follow_inputs(catalogue):
    windows = Windows.of(catalogue, longest=4)
    seen = []
    for inputs, targets, counted in windows.batches(20, torch.Generator().manual_seed(0)):
        assert counted.sum() <= 20 + 4
        assert ((inputs[counted] + 3) % 12 == targets[counted]).all()
        seen += counted.sum(dim=1).tolist()
    assert sorted(seen) == sorted(windows.lengths.tolist())


def test_the_seed_decides_the_batches(catalogue):
    windows = Windows.of(catalogue, longest=4)
    first, same, other = (
        [inputs.tolist() for inputs, _, _ in windows.batches(20, torch.Generator().manual_seed(seed))]
        for seed in (0, 0, 1)
    )
    assert first == same
    assert first != other


def test_a_user_with_one_event_teaches_nothing(tmp_path):
    catalogue = write_catalogue(tmp_path, ITEMS, {"a": ["i1"], "b": ["i2", "i3", "i4"]})
    with pytest.raises(UserError, match="no user has two training events"):
        Windows.of(catalogue, 5)


# ---- training


def test_what_follows_what_is_learnt(tmp_path, catalogue):
    config = dataclasses.replace(SMALL, lr=0.01, epochs=30, patience=30)
    model = train_sasrec(catalogue, config, tmp_path / "model")
    cases = catalogue.targets("test")
    best = SASRecRanker(model, catalogue.item_ids).rank(cases, 1).rows[:, 0]
    assert (best == torch.tensor([catalogue.row_of[item] for item in cases["item"]])).double().mean() > 0.9


def test_the_learning_rate_falls_as_a_cosine():
    config = dataclasses.replace(SMALL, lr=0.4, epochs=10)
    rates = [learning_rate(config, epoch) for epoch in (0, 2.5, 5, 10)]
    assert rates == pytest.approx([0.4, 0.2 * (1 + 0.5**0.5), 0.2, 0])


def test_the_epoch_is_the_one_validation_likes_best(tmp_path, catalogue, monkeypatch):
    likes = iter([0.1, 0.4, 0.2, 0.3, 0.9])
    monkeypatch.setattr(Validation, "figures", lambda self, model: {"ndcg@10": next(likes), "recall@10": 1.0})
    weights = []
    judge = Training.judge
    monkeypatch.setattr(
        Training, "judge", lambda self, v: (weights.append(self.model.items.weight.detach().clone()), judge(self, v))
    )
    model = train_sasrec(catalogue, dataclasses.replace(SMALL, epochs=9, patience=2), tmp_path / "model")
    report = json.loads((tmp_path / "model" / "sasrec.json").read_text())
    assert (report["best_epoch"], len(report["validation"])) == (2, 4)  # two epochs without a better one, then the end
    assert torch.equal(model.items.weight, weights[1])


def test_a_killed_run_goes_on_and_ends_in_the_same_bytes(tmp_path, catalogue, monkeypatch):
    train_sasrec(catalogue, SMALL, tmp_path / "whole")
    run_epoch, epochs = Training.run_epoch, []

    def killed_in_the_third(self, windows):
        epochs.append(self.epoch)
        if len(epochs) == 3:
            raise KeyboardInterrupt
        run_epoch(self, windows)

    monkeypatch.setattr(Training, "run_epoch", killed_in_the_third)
    with pytest.raises(KeyboardInterrupt):
        train_sasrec(catalogue, SMALL, tmp_path / "killed")
    assert not (tmp_path / "killed").exists()
    torch.manual_seed(99)  # what else the process drew does not matter
    train_sasrec(catalogue, SMALL, tmp_path / "killed")
    assert epochs == [0, 1, 2, 2, 3]
    for name in ("sasrec.safetensors", "sasrec.json"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "killed", "whole"]


def test_a_checkpoint_of_other_settings_or_a_damaged_one_is_not_gone_on_from(tmp_path, catalogue, monkeypatch):
    train_sasrec(catalogue, SMALL, tmp_path / "whole")
    checkpoint = tmp_path / "again.training.safetensors"
    other = dataclasses.replace(SMALL, seed=1)
    with monkeypatch.context() as patch:
        patch.setattr(sasrec_training, "write_folder_whole", lambda folder: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            train_sasrec(catalogue, other, tmp_path / "again")
    for left in (checkpoint.read_bytes(), checkpoint.read_bytes()[:100]):
        checkpoint.write_bytes(left)
        train_sasrec(catalogue, SMALL, tmp_path / "again", overwrite=True)
        weights = [(tmp_path / run / "sasrec.safetensors").read_bytes() for run in ("again", "whole")]
        assert weights[0] == weights[1]
        (tmp_path / "again" / "sasrec.json").write_text("{}")  # so that it is trained once more


def test_validation_and_test_events_do_not_reach_the_weights(tmp_path, catalogue):
    """With one epoch nothing is chosen, so other targets must give the same weights."""
    once = dataclasses.replace(SMALL, epochs=1)
    sequences = {f"u{user}": [*walk(user, 3 + user % 7)[:-2], "i0", "i1"] for user in range(40)}
    other = write_catalogue(tmp_path / "other", ITEMS, sequences)
    assert other.fingerprint != catalogue.fingerprint
    one, two = (train_sasrec(data, once, data.folder / "model").state_dict() for data in (catalogue, other))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_run_again_it_returns_at_once_and_other_settings_are_refused(tmp_path, catalogue, monkeypatch):
    folder = tmp_path / "model"
    trained = train_sasrec(catalogue, SMALL, folder)
    with monkeypatch.context() as patch:
        patch.setattr(Training, "run_epoch", None)  # would fail if called
        again = train_sasrec(catalogue, SMALL, folder)
    assert torch.equal(again.items.weight, trained.items.weight)
    other = dataclasses.replace(SMALL, seed=1)
    with pytest.raises(UserError, match="other settings"):
        train_sasrec(catalogue, other, folder)
    assert not torch.equal(train_sasrec(catalogue, other, folder, overwrite=True).items.weight, trained.items.weight)


def test_a_folder_of_something_else_is_never_replaced(catalogue):
    with pytest.raises(UserError, match="holds no SASRec model"):
        train_sasrec(catalogue, SMALL, catalogue.folder, overwrite=True)
    assert (catalogue.folder / "items.parquet").exists()


def test_a_model_of_other_data_or_a_damaged_one_is_refused(tmp_path, catalogue):
    folder = tmp_path / "model"
    with pytest.raises(UserError, match="does not exist"):
        load_sasrec(folder, catalogue)
    train_sasrec(catalogue, SMALL, folder)
    other = write_catalogue(tmp_path / "other", ITEMS, {"u": walk(0, 5)})
    with pytest.raises(UserError, match="other data"):
        load_sasrec(folder, other)
    weights = folder / "sasrec.safetensors"
    weights.write_bytes(weights.read_bytes()[:-50])
    with pytest.raises(UserError, match="damaged"):
        load_sasrec(folder, catalogue)


def test_data_without_validation_targets_is_refused(tmp_path):
    catalogue = write_catalogue(tmp_path / "data", ITEMS, {"a": walk(0, 5)}, split="train")
    with pytest.raises(UserError, match="no validation target"):
        train_sasrec(catalogue, SMALL, tmp_path / "model")


@pytest.mark.parametrize(
    ("bad", "problem"),
    [
        ({"width": 10, "heads": 4}, "4 heads do not divide"),
        ({"layers": 0}, "layers is 0"),
        ({"dropout": 1.0}, "dropout is 1"),
        ({"lr": 0.0}, "lr is 0"),
        ({"weight_decay": -0.1}, "weight_decay -0.1"),
    ],
)
def test_settings_that_mean_nothing_are_refused(bad, problem):
    with pytest.raises(UserError, match=problem):
        SASRecConfig(**bad)
