"""RCLRec's loss against one conversion at a time, its gradient against the surrogate written out, its edge cases."""

import pytest
import torch
from peft import LoraConfig
from rclrec_for_tests import FAST, batch_of, ids_of, slow_loss, slow_nll, trainer_of, write_stage_1
from transformers import Qwen3Config, Qwen3ForCausalLM
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from recllm.errors import UserError
from recllm.trainers import prefixed
from recllm.trainers.prefixed import NLL_BASE, answer_of, gated, gates_of, module_of
from recllm.trainers.rclrec import RCLRecConfig


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return write_stage_1(tmp_path_factory.mktemp("rclrec"))


def named(trainer) -> dict[str, torch.Tensor]:
    return {name: each.grad.clone() for name, each in trainer.model.named_parameters() if each.grad is not None}


def assert_same(one: dict, other: dict, tolerance: float = 1e-4) -> None:
    assert one.keys() == other.keys()
    largest = max(float(each.norm()) for each in other.values())
    for name in one:
        scale = max(float(other[name].norm()), 1e-3 * largest)
        assert float((one[name] - other[name]).norm()) <= tolerance * scale, name


# ---- a batch


def test_the_data_have_what_is_hard(made, tmp_path):
    rows = trainer_of(made, tmp_path, k=3).train_dataset
    assert len({len(row["prompt_ids"]) for row in rows}) > 2, "nothing is padded"
    assert min(len(row["rows"]) for row in rows) < 3 < max(len(row["rows"]) for row in rows)
    assert any(12 in row["rows"] for row in rows), "no item of one code in a history"


def test_an_end_is_the_place_of_an_items_last_code(made, tmp_path):
    trainer = trainer_of(made, tmp_path)
    batch = batch_of(trainer)
    for row, own in enumerate(trainer.train_dataset):
        there = batch["there"][row]
        assert int(there.sum()) == len(own["rows"])
        found = batch["prompt_ids"][row][batch["ends"][row][there]].tolist()
        codes = trainer.checkpoint.table.codes[own["rows"]].tolist()
        assert found == [ids_of(trainer.checkpoint, some)[-1] for some in codes]


def test_what_follows_a_prompt():
    """Two items of a history of three; the second item has one code; the other prompt has no item at all."""
    items = torch.tensor([[[1, 2], [3, -1], [5, 6]], [[-1, -1]] * 3])
    chosen, target = torch.tensor([[2, 1], [-1, -1]]), torch.tensor([[7, 8], [9, -1]])
    answer = answer_of(torch.tensor([[50], [50]]), items, chosen, target)
    assert answer.ids.tolist() == [[50, 5, 6, 3, 7, 8], [50, 9, 0, 0, 0, 0]]
    assert answer.present.long().tolist() == [[1] * 6, [1, 1, 0, 0, 0, 0]]
    assert answer.target.long().tolist() == [[0, 0, 0, 0, 1, 1], [0, 1, 0, 0, 0, 0]]
    assert answer.source[0].tolist() == [-1, 2, 2, 1, -1, -1]
    assert answer.source[1][:2].tolist() == [-1, -1]


def test_a_gate_is_one_and_its_gradient_the_softmaxs():
    scores = torch.tensor([[0.0, 2.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0]], requires_grad=True)
    there = torch.tensor([[True, True, True, False], [False] * 4])
    gates = gates_of(scores, there, torch.tensor([[2, 1], [-1, -1]]), 0.5)
    assert gates.tolist() == [[0, 1, 1, 0], [0, 0, 0, 0]]
    (gradient,) = torch.autograd.grad(gates[0, 1] + gates[1].sum(), scores)
    p = torch.tensor([0.0, 4.0, 2.0]).softmax(0)  # s / τ
    expected = p[1] * (torch.tensor([0.0, 1.0, 0.0]) - p) / 0.5
    assert torch.allclose(gradient[0, :3], expected)
    assert gradient[0, 3] == 0
    assert gradient[1].abs().max() < 1e-6


def test_a_gates_gradient_knows_what_the_item_is_worth():
    """d NLL / d gate against what leaving the item out does, over random prompts of a random model with two layers."""
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "head_dim": 8}
    model = Qwen3ForCausalLM(Qwen3Config(vocab_size=96, num_hidden_layers=2, num_key_value_heads=2, **shape)).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 2:
                weight.copy_(torch.randn_like(weight) * (1.5 / weight.size(1) ** 0.5 if weight.size(0) != 96 else 0.3))
    items, prompt = 3, 12
    source = torch.tensor(
        [[-1, 0, 0, 1, 1, 2, 2, -1]]
    )  # the opening, three items of two codes, a target of two less one
    ids = torch.randint(96, (40, prompt + source.size(1) + 1))

    def nll(some, gates):
        mask = gated(torch.ones(len(some), prompt, dtype=torch.long), source.expand(len(some), -1), gates, torch.float)
        above = torch.full((prompt, prompt), torch.finfo(torch.float).min).triu(1)
        top = torch.nn.functional.pad(above, (0, source.size(1)), value=torch.finfo(torch.float).min)
        whole = torch.cat([top.expand(len(some), 1, -1, -1), mask], dim=2)
        logps = model(input_ids=some[:, :-1], attention_mask=whole).logits[:, -2:].log_softmax(-1)
        return -logps.gather(2, some[:, -2:, None]).mean(dim=(1, 2))

    gates = torch.ones(len(ids), items, requires_grad=True)
    (gradient,) = torch.autograd.grad(nll(ids, gates).sum(), gates)
    with torch.no_grad():
        before = nll(ids, gates)
        worth = []
        for item in range(items - 1):  # the last item's last token predicts the target itself
            out = torch.ones(len(ids), items)
            out[:, item] = 1e-9
            worth.append(before - nll(ids, out))
    found = torch.stack([gradient[:, : items - 1].flatten(), torch.stack(worth, dim=1).flatten()])
    assert torch.corrcoef(found)[0, 1] > 0.7


# ---- loss and gradient


@pytest.mark.parametrize("settings", [{}, {"k": 1, "temperature": 0.3}, {"margin": 1.0, "quality_weight": 2.0}])
def test_loss_and_gradient_are_those_of_one_conversion_at_a_time(made, tmp_path, settings):
    trainer = trainer_of(made, tmp_path, **settings)
    places = range(min(12, len(trainer.train_dataset)))
    loss = trainer.compute_loss(trainer.model, batch_of(trainer, places))
    loss.backward()
    fast = named(trainer)
    trainer.model.zero_grad()
    slow = slow_loss(trainer, places, trainer.args.quality_weight, trainer.args.margin)
    slow.backward()
    assert loss.item() == pytest.approx(slow.item(), rel=1e-5)
    assert_same(fast, named(trainer))
    assert all(fast[f"prefix_module.{name}"].norm() > 1e-6 for name in ("features.weight", "query.0.weight"))
    assert trainer.health.shares["rclrec/helped"][0] + trainer.health.shares["rclrec/quality"][0] > 0


def test_without_the_quality_loss_there_is_no_baseline(made, tmp_path):
    trainer = trainer_of(made, tmp_path, quality_weight=0.0)
    batch = batch_of(trainer, range(6))
    assert NLL_BASE not in batch
    loss = trainer.compute_loss(trainer.model, batch)
    assert loss.item() == pytest.approx(slow_loss(trainer, range(6), 0.0).item(), rel=1e-5)


def test_the_gradient_is_that_of_the_soft_path_by_finite_differences(made, tmp_path, monkeypatch):
    """Of m + p(θ) − p(θ₀), m and θ₀ fixed: what the surrogate says. Of query, user and state, in double precision."""
    trainer = trainer_of(made, tmp_path, k=2, quality_weight=0.0)
    model, module = trainer.model.double(), trainer.data_collator.module
    batch, scorer = batch_of(trainer, range(6)), trainer.scorer
    # transformers norms in single precision, whatever the weights are in
    monkeypatch.setattr(
        Qwen3RMSNorm, "forward",
        lambda own, x: own.weight * x * (x.pow(2).mean(-1, keepdim=True) + own.variance_epsilon).rsqrt(),
    )  # fmt: skip
    kept: list[torch.Tensor] = []

    def soft(mask, p):
        kept.append(p.detach())
        return mask + p - kept[0]

    monkeypatch.setattr(prefixed, "straight_through", soft)
    states = []
    monkeypatch.setattr(
        prefixed, "states_of", lambda hidden, ends, own=prefixed.states_of: own(hidden, ends) + states[0]
    )  # fmt: skip
    shape = (*batch["there"].shape, module.width)
    states.append(torch.zeros(shape, dtype=torch.double, requires_grad=True))

    def loss():
        return -scorer.score(model, batch).logps.sum()

    value = loss()
    choice = scorer.score(model, batch).chosen
    moved = {
        "query": module.query[2].weight, "features": module.features.weight, "user": module.user_embedding.weight,
        "states": states[0],
    }  # fmt: skip
    gradients = dict(zip(moved, torch.autograd.grad(value, list(moved.values()))))
    generator = torch.Generator().manual_seed(3)
    for name, tensor in moved.items():
        direction = torch.randn(tensor.shape, generator=generator, dtype=torch.double)
        if name == "user":
            direction[0] = 0  # the unknown user's row is no parameter
        size, found = 1e-4, []
        for sign in (1, -1):
            with torch.no_grad():
                tensor += sign * size * direction
                found.append(loss().item())
                assert torch.equal(scorer.score(model, batch).chosen, choice), "the choice has changed"
                tensor -= sign * size * direction
        slope = (gradients[name] * direction).sum().item()
        assert abs(slope) > 1e-4, name
        assert slope == pytest.approx((found[0] - found[1]) / (2 * size), rel=1e-4), name


def test_loras_gradient_reaches_the_module_and_the_adapter(made, tmp_path):
    trainer = trainer_of(made, tmp_path, lora=LoraConfig(r=4, target_modules="all-linear"))
    assert not any("lora" in name for name, _ in module_of(trainer.model).named_parameters())
    loss = trainer.compute_loss(trainer.model, batch_of(trainer, range(6)))
    loss.backward()
    gradients = named(trainer)
    assert any("lora_B" in name and each.norm() > 0 for name, each in gradients.items())
    assert any("prefix_module" in name and "query" in name and each.norm() > 0 for name, each in gradients.items())
    expected = trainer_of(made, tmp_path)
    assert loss.item() == pytest.approx(
        expected.compute_loss(expected.model, batch_of(expected, range(6))).item(), rel=1e-5
    )


# ---- ablations and edge cases


@pytest.mark.parametrize("selection", ["recent", "random", "none"])
def test_selections_without_a_query(made, tmp_path, selection):
    trainer = trainer_of(made, tmp_path, selection=selection, k=2)
    batch = batch_of(trainer)
    with torch.no_grad():
        scores = trainer.model(conversions=batch)
    for place, row in enumerate(trainer.train_dataset):
        count = len(row["rows"])
        width = batch["there"].size(1)
        chosen = [int(one) - (width - count) for one in scores.chosen[place] if one >= 0]
        wanted = {"recent": list(range(count))[-2:], "none": []}.get(selection, chosen)
        assert chosen == wanted
        assert len(set(chosen)) == (0 if selection == "none" else min(2, count))
        nll, current = slow_nll(trainer.checkpoint, row, trainer.opening, chosen)
        own = scores.present[place]
        assert -scores.logps[place][own].mean().item() == pytest.approx(nll.item(), rel=1e-4)
        assert -scores.logps[place][scores.target[place]].mean().item() == pytest.approx(current.item(), rel=1e-4)
    assert not any("prefix_module" in name for name, _ in trainer.model.named_parameters())
    if selection == "none":
        nlls = torch.tensor([-scores.logps[row][own].mean() for row, own in enumerate(scores.present)])
        assert trainer.compute_loss(trainer.model, batch).item() == pytest.approx(nlls.mean().item(), rel=1e-5)


def test_a_history_without_items_is_answered_plainly(made, tmp_path):
    trainer = trainer_of(made, tmp_path, quality_weight=0.0)
    full = trainer.train_dataset[0]
    empty = full | {"prompt_ids": full["prompt_ids"][:3], "ends": [], "rows": [], "user": "nobody"}
    for rows in ([empty], [empty, full]):
        batch = trainer.data_collator(rows)
        scores = trainer.model(conversions=batch)
        assert scores.chosen[0].tolist() == [-1] * 3
        nll, _ = slow_nll(trainer.checkpoint, empty, trainer.opening, [])
        assert -scores.logps[0][scores.present[0]].mean().item() == pytest.approx(nll.item(), rel=1e-4)
        trainer.model.zero_grad()
        scores.logps.sum().backward()
        assert all(each.isfinite().all() for each in named(trainer).values())


def test_the_module_has_a_learning_rate_of_its_own(made, tmp_path):
    trainer = trainer_of(made, tmp_path, learning_rate=1e-5, module_learning_rate=0.5, weight_decay=0.1)
    trainer.create_optimizer()
    rates = {id(each): group["lr"] for group in trainer.optimizer.param_groups for each in group["params"]}
    for name, each in trainer.model.named_parameters():
        assert rates[id(each)] == (0.5 if name.startswith("prefix_module.") else 1e-5), name
    assert len(rates) == len(list(trainer.model.parameters()))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"user_dropout": 1.0}, r"user_dropout must be in"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\)"),
        ({"k": 0}, "k, the items of a prefix, is 0"),
        ({"temperature": 0.0}, "τ of the selection, must be above 0"),
        ({"temperature": -1.0}, "τ of the selection, must be above 0"),
        ({"margin": -0.1}, "margin, m, must not be below 0"),
        ({"quality_weight": -1.0}, "quality_weight, λ, must not be below 0"),
        ({"quality_weight": float("nan")}, "quality_weight, λ, must not be below 0"),
        ({"module_learning_rate": -1.0}, "module_learning_rate"),
        ({"selection": "best"}, "selection 'best' is not one of learned, recent"),
        ({"user_width": -1}, "user_width must be a whole number from 0"),
        ({"query_start": "zero"}, "query_start 'zero' is not one of context, random"),
        ({"gradient_checkpointing": True}, "gradient_checkpointing keeps no prompt"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size must be"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor"),
    ],
)
def test_a_config_fails_at_construction(tmp_path, settings, message):
    with pytest.raises(UserError, match=message):
        RCLRecConfig(output_dir=str(tmp_path), **{**FAST, **settings})
