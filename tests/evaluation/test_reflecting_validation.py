"""Validation by reflection: the figures of the corrected lists, on the users that the direct one takes."""

import pytest
import torch
from reflecting_for_tests import write_reflecting_model

from recllm import metrics
from recllm.catalogue import Catalogue
from recllm.checkpoint import Checkpoint
from recllm.decoding import Decoder
from recllm.decoding.reflecting import Reflector
from recllm.evaluation.validation import EvaluatesByDecoding, ReflectingValidation, Validation
from recllm.objectives.grc import first_divergence


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    data, model = write_reflecting_model(tmp_path_factory.mktemp("validation"))
    return Catalogue.load(data), Checkpoint.load(model, "cpu")


def test_figures_of_corrected_lists(made):
    catalogue, checkpoint = made
    judge = ReflectingValidation.of(catalogue, checkpoint, checkpoint.style, 20, 6, entropy_weight=0.5, skip=False)
    direct = Validation.of(catalogue, checkpoint, checkpoint.style, 20, 6)
    assert (judge.prompts, judge.beams) == (direct.prompts, 6)
    found = Reflector(Decoder(checkpoint.model, checkpoint.tokens), checkpoint.reflection.tokens).scheduled(
        judge.prompts, 6, entropy_weight=0.5, skip=False
    )
    ranks = metrics.ranks(found.found.rows, judge.targets)
    codes = torch.tensor(checkpoint.table.codes).long()[judge.targets]
    right = found.labels[..., 0] + 1 == first_divergence(found.drafts.codes, codes)
    assert judge(checkpoint.model) == {
        "recall@10": pytest.approx(float((ranks < 10).double().mean())),
        "ndcg@10": pytest.approx(float(metrics.ndcg_at_k(ranks, 10).mean())),
        "acc_loc@10": pytest.approx(float(right.double().mean())),
    }
    assert judge(checkpoint.model)["ndcg@10"] != direct(checkpoint.model)["ndcg@10"]
    assert set(direct(checkpoint.model)) == {"recall@10", "ndcg@10"}
    plain = ReflectingValidation.of(catalogue, checkpoint, checkpoint.style, 20, 6)
    assert (plain.entropy_weight, plain.skip) == (0.2, True)


def test_only_ten_drafts_count_for_the_accuracy(made):
    catalogue, checkpoint = made
    judge = ReflectingValidation.of(catalogue, checkpoint, checkpoint.style, 20, 12)
    found = Reflector(Decoder(checkpoint.model, checkpoint.tokens), checkpoint.reflection.tokens).scheduled(
        judge.prompts, 12
    )
    codes = torch.tensor(checkpoint.table.codes).long()[judge.targets]
    right = (found.labels[..., 0] + 1 == first_divergence(found.drafts.codes, codes)).double()
    assert judge(checkpoint.model)["acc_loc@10"] == pytest.approx(float(right[:, :10].mean()))
    assert float(right[:, :10].mean()) != pytest.approx(float(right.mean()))


def test_without_labels_there_is_no_accuracy(tmp_path):
    data, model = write_reflecting_model(tmp_path, labels=False)
    checkpoint = Checkpoint.load(model, "cpu")
    judge = ReflectingValidation.of(Catalogue.load(data), checkpoint, checkpoint.style, 5, 4)
    assert set(judge(checkpoint.model)) == {"recall@10", "ndcg@10"}


class TwoProcesses:
    """accelerate's part, where the other process's values are known: each of n has its own share."""

    def __init__(self, judge, model, index: int, count: int):
        self.device, self.num_processes, self.process_index = torch.device("cpu"), count, index
        self.shares = [judge.values(model, slice(place, None, count)) for place in range(count)]
        self.names = iter(self.shares[0])

    def unwrap_model(self, model):
        return model

    def pad_across_processes(self, value, pad_index):
        self.width, self.pad = max(len(next(iter(share.values()))) for share in self.shares), pad_index
        return torch.nn.functional.pad(value, (0, self.width - len(value)), value=pad_index)

    def gather(self, value):
        name = next(self.names)
        parts = [share[name] for share in self.shares]
        padded = [torch.nn.functional.pad(part, (0, self.width - len(part)), value=self.pad) for part in parts]
        assert torch.equal(padded[self.process_index], value)
        return torch.cat(padded)


@pytest.mark.parametrize("kind", [Validation, ReflectingValidation])
@pytest.mark.parametrize("users", [7, 1])
def test_processes_share_the_users(made, kind, users):
    """Of one user, the second process has none."""
    catalogue, checkpoint = made

    class Trainer(EvaluatesByDecoding):
        validation, model = kind.of(catalogue, checkpoint, checkpoint.style, users, 12), checkpoint.model

    trainer = Trainer()
    for index in range(2):
        trainer.accelerator = TwoProcesses(trainer.validation, trainer.model, index, 2)
        assert trainer._decoded() == pytest.approx(trainer.validation(trainer.model))
