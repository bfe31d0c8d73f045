"""The prefix module by itself: its formula, its choices, and what it is on disk."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from recllm.errors import UserError
from recllm.models.prefix_module import SETTINGS, WEIGHTS, PrefixModule, PrefixSettings

D, USERS = 8, ("ann", "bob")


def made(**settings) -> PrefixModule:
    """Whose users differ, with a query of random weights."""
    settings = {"k": 2, "user_width": 3, "query_start": "random", **settings}
    module = PrefixModule(PrefixSettings(**settings), D, USERS)
    if module.learned and module.settings.user_width:
        with torch.no_grad():
            module.user_embedding.weight[1:] = torch.randn(2, module.settings.user_width)
    return module


@pytest.fixture
def asked():
    """Three histories of 4, 1 and no items, left-padded with what must not matter."""
    torch.manual_seed(0)
    there = torch.tensor([[True] * 4, [False, False, False, True], [False] * 4])
    states = torch.randn(3, 4, D).masked_fill(~there.unsqueeze(2), 1e6)
    return {"states": states, "mask": there, "last": torch.randn(3, D), "behaviour": torch.randn(D)}


def test_relevance_is_the_formula(asked):
    module = made()
    scores = module.relevance(**asked, users=module.user_rows(["bob", "ann", "nobody"]))
    states, last, behaviour = asked["states"][0], asked["last"][0], asked["behaviour"]
    f = torch.cat([module.user_embedding.weight[2], last, states.mean(dim=0)])
    projected = module.features.weight @ f + module.features.bias
    first, _, second = module.query
    hidden = torch.nn.functional.silu(first.weight @ torch.cat([projected, behaviour]) + first.bias)
    q = second.weight @ hidden + second.bias
    expected = torch.stack([q @ state / D**0.5 for state in states])
    assert torch.allclose(scores[0], expected, atol=1e-5)
    assert scores.isfinite().all()


def test_a_prompt_alone_gets_the_same(asked):
    module = made()
    users = module.user_rows(["ann", "bob", None])
    together = module.relevance(**asked, users=users)
    alone = module.relevance(
        asked["states"][1:2, 3:], asked["mask"][1:2, 3:], asked["last"][1:2], asked["behaviour"], users[1:2]
    )
    assert torch.allclose(together[1, 3], alone[0, 0], atol=1e-6)
    chosen = module.choose(**asked, users=users)
    assert chosen[0].tolist() == together[0].argsort()[-2:].tolist(), "least relevant first"
    assert chosen[1:].tolist() == [[-1, 3], [-1, -1]]


def test_the_first_query_is_the_prompts_last_state(asked):
    module = made(query_start="context")
    with torch.no_grad():
        module.user_embedding.weight.zero_()
    scores = module.relevance(**asked, users=module.user_rows(["bob", "ann", None]))
    expected = (asked["states"] @ asked["last"].unsqueeze(2)).squeeze(2) / D**0.5
    torch.testing.assert_close(scores[asked["mask"]], expected[asked["mask"]])
    scores[0, 1].backward()
    learning = [*module.features.parameters(), *module.query.parameters(), module.user_embedding.weight]
    assert all(part.grad.any() for part in learning), "and all of it learns"


def test_users(asked):
    fresh = PrefixModule(PrefixSettings(user_width=3), D, USERS)
    assert fresh.user_rows(["bob", "nobody", None, "ann"]).tolist() == [2, 0, 0, 1]
    rows = [fresh.user_rows([name] * 3) for name in ("ann", "nobody")]
    known, unknown = (fresh.relevance(**asked, users=some) for some in rows)
    assert torch.equal(known, unknown), "nothing is known of a user at first"
    module = made()
    known, unknown = (module.relevance(**asked, users=some) for some in rows)
    assert not torch.allclose(known[0], unknown[0])
    unknown.sum().backward()
    assert not module.user_embedding.weight.grad.any(), "the unknown user learns nothing"
    nobody = made(user_width=0)
    assert nobody.user_rows(["ann", "nobody"]).tolist() == [0, 0]
    assert nobody.choose(**asked, users=nobody.user_rows(["ann"] * 3))[0].min() >= 0


def test_training_takes_some_users_for_unknown_and_asking_none(asked):
    module = made()
    known, unknown = (
        module.relevance(**asked, users=module.user_rows([name] * 3))[0, 0].item() for name in ("ann", "nobody")
    )
    module.user_dropout = 0.3
    users = module.user_rows(["ann"] * 3)
    seen = [module.train().relevance(**asked, users=users)[0, 0].item() for _ in range(200)]
    share = sum(abs(value - unknown) < 1e-6 for value in seen) / len(seen)
    assert 0.15 < share < 0.45
    assert all(min(abs(value - known), abs(value - unknown)) < 1e-6 for value in seen)
    assert all(abs(module.eval().relevance(**asked, users=users)[0, 0].item() - known) < 1e-6 for _ in range(20))


def test_autocast_makes_no_ties(asked):
    module, users = made(), torch.zeros(3, dtype=torch.int64)
    plain = module.relevance(**asked, users=users)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(module.relevance(**asked, users=users), plain)


def test_recent_random_and_none(asked):
    users = torch.zeros(3, dtype=torch.int64)
    assert made(selection="recent").choose(**asked, users=users).tolist() == [[2, 3], [-1, 3], [-1, -1]]
    assert made(selection="none").choose(**asked, users=users).tolist() == [[-1, -1]] * 3
    mask = torch.ones(50, 6, dtype=torch.bool)
    users, keys = torch.zeros(50, dtype=torch.int64), list(range(50))
    module = made(selection="random", seed=1)
    chosen = module.without_query(mask, users, keys)
    assert all(len(set(row)) == 2 for row in chosen.tolist())
    assert len(set(map(tuple, chosen.tolist()))) > 15, "of 30 possible"
    assert torch.equal(module.without_query(mask[:5], users[:5], keys[:5]), chosen[:5]), "it is the key that decides"
    assert not torch.equal(made(selection="random", seed=2).without_query(mask, users, keys), chosen)
    left = torch.tensor([[False, False, True, True, True]])
    placed = module.without_query(left, users[:1], keys[:1])
    assert torch.equal(placed, module.without_query(left[:, 2:], users[:1], keys[:1]) + 2), "padding does not"


def test_the_weights_are_a_function_of_the_seed():
    state = torch.random.get_rng_state()
    one, again, other = (PrefixModule(PrefixSettings(seed=seed), D).features.weight for seed in (0, 0, 1))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert torch.equal(torch.random.get_rng_state(), state), "and nobody else's are"


@pytest.mark.parametrize("selection", ["learned", "recent", "random", "none"])
def test_saved_and_loaded_it_chooses_the_same(asked, tmp_path, selection):
    module = made(selection=selection, temperature=0.5, target_behaviour="cart", seed=3)
    module.save(tmp_path)
    found = PrefixModule.load(tmp_path)
    assert found.settings == module.settings
    assert found.users == module.users
    assert not found.training
    users = module.user_rows(["ann", "nobody", "bob"])
    assert torch.equal(found.user_rows(["ann", "nobody", "bob"]), users)
    assert torch.equal(found.choose(**asked, users=users), module.choose(**asked, users=users))
    assert all(torch.equal(one, other) for one, other in zip(module.parameters(), found.parameters()))


def test_a_folder_that_does_not_hold_it(tmp_path):
    with pytest.raises(UserError, match=r"does not exist.*recipes/rclrec\.py"):
        PrefixModule.load(tmp_path)
    made().save(tmp_path)
    about = json.loads((tmp_path / SETTINGS).read_text())
    (tmp_path / SETTINGS).write_text(json.dumps(about | {"width": 4}))
    with pytest.raises(UserError, match="does not hold the module of"):
        PrefixModule.load(tmp_path)
    (tmp_path / SETTINGS).write_text(json.dumps(about | {"settings": about["settings"] | {"heads": 2}}))
    with pytest.raises(UserError, match="update recllm"):
        PrefixModule.load(tmp_path)
    (tmp_path / SETTINGS).write_text("{}")
    with pytest.raises(UserError, match="says not what the prefix module is"):
        PrefixModule.load(tmp_path)
    (tmp_path / SETTINGS).write_text(json.dumps(about))
    tensors = load_file(tmp_path / WEIGHTS)
    save_file({name: tensor for name, tensor in tensors.items() if "query" not in name}, tmp_path / WEIGHTS)
    with pytest.raises(UserError, match="does not hold the module of"):
        PrefixModule.load(tmp_path)
    (tmp_path / WEIGHTS).write_bytes(b"cut off")
    with pytest.raises(UserError, match="does not hold the module of"):
        PrefixModule.load(tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"k": 0}, "is 0.*1 or more"),
        ({"k": 1.5}, r"is 1\.5"),
        ({"temperature": 0.0}, "must be above 0"),
        ({"temperature": float("nan")}, "must be above 0"),
        ({"selection": "oldest"}, "not one of learned, recent, random, none"),
        ({"user_width": -1}, "whole number from 0"),
        ({"target_behaviour": ""}, "has no name"),
        ({"query_start": "zero"}, "not one of context, random"),
    ],
)
def test_settings_fail_at_construction(settings, message):
    with pytest.raises(UserError, match=message):
        PrefixSettings(**settings)


def test_settings_as_json():
    settings = PrefixSettings(k=5, selection="recent", target_behaviour="cart")
    assert PrefixSettings.read(json.loads(json.dumps(settings.as_json()))) == settings
