"""The shop does what docs/shop.md says of it: each claim is measured on the log, and gone when switched off."""

import functools
import hashlib
import json

import numpy as np
import polars as pl
import pytest

from recllm import formats
from recllm.errors import UserError
from recllm.files import read_json, read_lines
from recllm.formats.records import BadLines
from recllm.shop import Shop, ShopConfig, is_written, make_shop, write
from recllm.shop.__main__ import main

make = functools.cache(lambda **settings: make_shop(ShopConfig(**settings)))


@functools.cache
def shop() -> Shop:
    return make()


@functools.cache
def first_events(made: Shop) -> dict[str, np.ndarray]:
    """Each user's first event of each item: user, item (its number in the world), session, later (its cart or pay)."""
    number = {name: row for row, name in enumerate(made.ids)}
    events = made.events.with_columns(
        opens=(pl.col("timestamp").diff().over("user").fill_null(10**9) > 6 * 3600).cast(pl.Int64)
    ).with_columns(session=pl.col("opens").cum_sum())
    wanted = events.filter(pl.col("behaviour").is_in(["cart", "pay"])).unique(["user", "item"]).select("user", "item")
    first = events.unique(["user", "item"], keep="first", maintain_order=True)
    first = first.join(wanted.with_columns(wanted=True), on=["user", "item"], how="left", maintain_order="left")
    return {
        "user": first["user"].rank("dense").to_numpy().astype(int) - 1,
        "item": np.array([number[item] for item in first["item"]]),
        "session": first["session"].to_numpy(),
        "wanted": first["wanted"].fill_null(False).to_numpy(),
    }


def _world_rows(made: Shop) -> np.ndarray:
    """Place in `items` → number in the world."""
    number = {name: row for row, name in enumerate(made.ids)}
    return np.array([number[item["item"]] for item in made.items])


def pairs(made: Shop, starts_session: bool | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(item, next new item, was the first put into the cart or paid) of one user, within a session or across."""
    log = first_events(made)
    same = log["user"][1:] == log["user"][:-1]
    if starts_session is not None:
        same &= (log["session"][1:] != log["session"][:-1]) == starts_session
    return log["item"][:-1][same], log["item"][1:][same], log["wanted"][:-1][same]


# -- the files --------------------------------------------------------------------------------------------------------


def test_the_same_seed_writes_the_same_bytes_and_another_seed_others(tmp_path):
    for folder, seed in (("a", 1), ("b", 1), ("c", 2)):
        write(make_shop(ShopConfig(items=80, users=40, seed=seed)), tmp_path / folder)
    for name in ("interactions.jsonl.gz", "items.jsonl.gz", "truth.json"):
        a, b, c = ((tmp_path / folder / name).read_bytes() for folder in "abc")
        assert a == b
        assert a != c
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [
        "interactions.jsonl.gz",
        "items.jsonl.gz",
        "truth.json",
    ]


def test_the_shop_of_a_seed_is_this_one_on_every_machine():
    made = make_shop(ShopConfig(items=80, users=40, seed=1))
    said = json.dumps([made.items, made.events.rows(), made.decisions.rows()])
    assert (
        hashlib.sha256(said.encode()).hexdigest() == "3964f9e8330219e85f813604036055685f1176cbadc3f04952cfc6472beb1c9d"
    )


def test_our_own_reader_reads_what_write_wrote(tmp_path):
    made = make_shop(ShopConfig(items=80, users=60, seed=3))
    write(made, tmp_path)
    reader, bad = formats.native.Jsonl(), BadLines()
    events = pl.concat(reader.events(tmp_path / "interactions.jsonl.gz", bad))
    for column in ("user", "item", "behaviour", "review"):
        assert events[column].to_list() == made.events[column].to_list()
    for column in ("timestamp", "helpful", "rating"):
        assert events[column].to_list() == made.events[column].cast(pl.Float64).to_list()
    items = list(reader.items(tmp_path / "items.jsonl.gz", bad))
    assert [(item["item"], item["title"]) for item in items] == [(item["item"], item["title"]) for item in made.items]
    truth = read_json(tmp_path / "truth.json")
    assert truth["config"]["users"] == 60
    assert truth["floor"]["users"] > 50
    assert len(truth["decisions"]) == (made.events["behaviour"] == "pay").sum()
    assert sum(1 for _ in read_lines(tmp_path / "interactions.jsonl.gz")) == len(made.events)


# -- size and shape ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_payments_are_as_sparse_as_real_ones_and_users_long_enough(seed):
    events = make(seed=seed).events
    assert 0.01 < (events["behaviour"] == "pay").mean() < 0.05
    distinct = events.unique(["user", "item"]).group_by("user").len()["len"]
    assert 12 < distinct.mean() < 20
    assert (distinct < 5).mean() < 0.05
    assert distinct.max() <= 40
    assert events["user"].n_unique() == 2000
    assert events["item"].n_unique() == 600
    assert events["item"].value_counts()["count"].min() >= 5


def test_time_runs_strictly_and_in_sessions():
    events = shop().events
    gap = events.select(gap=pl.col("timestamp").diff().over("user")).drop_nulls()["gap"]
    assert gap.min() >= 1
    assert ((gap < 300) | (gap >= 86_400)).all()
    assert 2 < events.select((pl.col("timestamp").diff().over("user") > 3600).sum())["timestamp"][0] / 2000 < 12


def test_a_cart_follows_a_click_and_a_late_payment_a_cart():
    events = shop().events.with_row_index("row")
    first = events.group_by("user", "item", "behaviour").agg(pl.col("row").min())
    first = first.pivot("behaviour", index=["user", "item"], values="row")
    assert (first["cart"] > first["click"]).drop_nulls().all()
    assert first.filter(pl.col("cart").is_not_null())["click"].is_not_null().all()
    assert (first["pay"] > first["cart"]).drop_nulls().all()
    counts = events.filter(pl.col("behaviour") == "pay").group_by("user", "item").len()["len"]
    assert counts.max() == 1  # nothing is bought twice


def test_every_item_has_a_title_of_its_own_and_true_text():
    made = shop()
    assert len({item["title"] for item in made.items}) == len(made.items) == 600
    assert len({item["description"] for item in made.items}) == 600
    for item in made.items:
        assert all(item[field] for field in ("item", "title", "description", "brand", "price", "tier", "color"))
        assert len(item["categories"]) in (2, 3)
        assert all(item["categories"])
        assert item["brand"] in item["title"]
        assert f" {item['tier']} " in item["title"]
        assert item["title"].endswith(item["color"])
        assert item["categories"][-1].lower() in item["description"]
        assert float(item["price"]) > 0


@pytest.mark.parametrize("items", [60, 61, 179, 1000, 5000])
def test_any_number_of_items_has_titles_of_its_own(items):
    made = make_shop(ShopConfig(items=items, users=3))
    assert len({item["title"] for item in made.items}) == items == len({item["item"] for item in made.items})
    price = {item["item"]: float(item["price"]) for item in made.items}
    better = [(made.ids[i], made.ids[j]) for i, j in enumerate(made.world.upgrade) if j >= 0]
    assert all(price[upgrade] > price[item] for item, upgrade in better)


def test_reviews_speak_of_the_item_that_was_paid():
    made = shop()
    title = {item["item"]: item["title"] for item in made.items}
    written = made.events.filter(pl.col("review").is_not_null())
    assert 300 < len(written) < 1500
    assert (written["behaviour"] == "pay").all()
    assert set(written["rating"]) <= {1, 2, 3, 4, 5}
    assert written["helpful"].min() >= 0
    for item, text in written.select("item", "review").iter_rows():
        brand, model = title[item].split(" ", 1)
        assert f"The {model[: model.index('00 ') + 2]} is my choice" in text, (brand, text)
    world, rows = made.world, _world_rows(made)
    quality = {item["item"]: world.quality[row] for item, row in zip(made.items, rows)}
    assert np.corrcoef([quality[item] for item in written["item"]], written["rating"])[0, 1] > 0.5


# -- the story's claims -----------------------------------------------------------------------------------------------


def complement_lift(made: Shop) -> float:
    """How much likelier a session opens in a leaf that goes with the last item's than one of a random customer does."""
    last, opened, _ = pairs(made, starts_session=True)
    world = made.world
    goes = (world.complements[world.leaf[last]] == world.leaf[opened][:, None]).any(axis=1)
    other = np.random.default_rng(0).permutation(opened)
    chance = (world.complements[world.leaf[last]] == world.leaf[other][:, None]).any(axis=1)
    return goes.mean() / chance.mean()


def system_lift(made: Shop) -> float:
    """Of items in a leaf that goes with the last item's: how much likelier one of its hidden standard (a quarter)."""
    last, opened, wanted = pairs(made, starts_session=True)
    world = made.world
    goes = wanted & (world.complements[world.leaf[last]] == world.leaf[opened][:, None]).any(axis=1)
    return (world.system[last] == world.system[opened])[goes].mean() / 0.25


def upgrade_lift(made: Shop) -> float:
    """The next tier of a line opens the session after the cart or payment, against the tier below."""
    last, opened, wanted = pairs(made, starts_session=True)
    down = np.full(made.config.items, -1)
    down[made.world.upgrade[made.world.upgrade >= 0]] = np.flatnonzero(made.world.upgrade >= 0)
    up = (made.world.upgrade[last] == opened)[wanted].sum()
    return (up + 1) / ((down[last] == opened)[wanted].sum() + 1)


def loyalty_lift(made: Shop) -> float:
    """Two items in a row, across sessions, are of one brand: against items of random customers."""
    last, opened, _ = pairs(made, starts_session=True)
    brand = made.world.brand
    return (brand[last] == brand[opened]).mean() / (
        brand[last] == np.random.default_rng(0).permutation(brand[opened])
    ).mean()


def tier_rise(made: Shop) -> float:
    """Mean tier of a customer's last third of items less that of the first."""
    log = first_events(made)
    place = np.arange(len(log["user"])) - np.searchsorted(log["user"], log["user"])
    share = place / np.bincount(log["user"])[log["user"]]
    tier = made.world.tier[log["item"]]
    return tier[share >= 2 / 3].mean() - tier[share < 1 / 3].mean()


def taste_stays(made: Shop) -> float:
    """How much less often a customer's late sessions open in a leaf of her first session than her second one does."""
    log = first_events(made)
    opens = np.append(True, log["session"][1:] != log["session"][:-1])
    user, leaf = log["user"][opens], made.world.leaf[log["item"][opens]]
    home = leaf[np.searchsorted(user, user)]
    place = np.arange(len(user)) - np.searchsorted(user, user)
    return (leaf == home)[(place >= 2) & (place <= 3)].mean() / (leaf == home)[place >= 8].mean()


def test_complements_follow_each_other_and_only_by_design():
    assert complement_lift(make()) > 2
    assert complement_lift(make(complement=0.0)) < 1.7  # what is left: customers come back to their interests
    assert system_lift(make()) > 2
    assert 0.8 < system_lift(make(complement=0.0)) < 1.3


def test_upgrades_are_sought_and_only_by_design():
    assert upgrade_lift(make()) > 10
    assert upgrade_lift(make(upgrade=0.0)) < 5  # a few by chance


def test_customers_are_loyal_to_a_brand_and_only_by_design():
    assert loyalty_lift(make()) > 1.5
    assert 0.9 < loyalty_lift(make(loyalty=1.0)) < 1.25


def test_budgets_and_tastes_drift_and_only_by_design():
    assert tier_rise(make(drift=0.3)) > tier_rise(make()) > 0.05
    assert abs(tier_rise(make(drift=0.0))) < 0.05
    assert taste_stays(make(drift=0.5, complement=0.0)) > taste_stays(make(drift=0.0, complement=0.0)) + 1


def test_bestsellers_sell_best():
    made = shop()
    counts = np.bincount(first_events(made)["item"], minlength=600)
    rank = lambda values: np.argsort(np.argsort(values))  # noqa: E731
    assert np.corrcoef(rank(counts), rank(made.world.popularity))[0, 1] > 0.3
    assert counts.max() < 0.02 * counts.sum()


# -- decisions --------------------------------------------------------------------------------------------------------


def test_decisions_point_at_true_earlier_evidence():
    made = shop()
    world = made.world
    row = {item["item"]: number for item, number in zip(made.items, _world_rows(made))}
    histories = {
        user: list(zip(items, behaviours))
        for user, items, behaviours in made.events.group_by("user").agg("item", "behaviour").iter_rows()
    }
    reasons = {"own": 0, "compared": 0, "anchor": 0}
    for user, position, item, repeat, evidence, why in made.decisions.iter_rows():
        history = histories[user]
        assert history[position] == (item, "pay")
        assert evidence
        assert evidence == sorted(set(evidence))
        assert evidence[-1] < position
        assert len(evidence) == len(why)
        assert repeat == any(seen == item for seen, _ in history[:position])
        for place, reason in zip(evidence, why):
            reasons[reason] += 1
            earlier, bought = row[history[place][0]], row[item]
            if reason == "own":
                assert earlier == bought
            elif reason == "compared":
                assert earlier != bought
                assert world.leaf[earlier] == world.leaf[bought]
            else:
                goes = world.leaf[bought] in world.complements[world.leaf[earlier]]
                assert world.upgrade[earlier] == bought or (goes and world.system[earlier] == world.system[bought])
    assert min(reasons.values()) > 200
    paid = made.events.with_columns(position=pl.int_range(pl.len()).over("user")).filter(pl.col("behaviour") == "pay")
    assert made.decisions.select("user", "position", "item").rows() == paid.select("user", "position", "item").rows()


def test_the_most_recent_events_are_not_the_evidence():
    """Otherwise step by step selection could not be told from recency."""
    recent = [
        len(set(evidence) & set(range(position - len(evidence), position))) / len(evidence)
        for position, evidence in shop().decisions.select("position", "evidence").iter_rows()
    ]
    assert 0.2 < np.mean(recent) < 0.75
    assert 0.05 < (~shop().decisions["repeat"]).mean() < 0.6


# -- bad settings -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"items": 0}, "items: the shop needs a whole number of 60 or more, not 0"),
        ({"items": 59}, "60 or more"),
        ({"items": 600.5}, "whole number"),
        ({"users": 0}, "users: the shop needs a whole number of 1 or more, not 0"),
        ({"users": True}, "whole number"),
        ({"seed": -1}, "seed"),
        ({"stay": 1.0}, "stay: the shop needs a number from 0 to 0.95, not 1.0"),
        ({"stay": float("nan")}, "stay"),
        ({"complement": -0.1}, "complement"),
        ({"upgrade": "much"}, "upgrade"),
        ({"loyalty": 0.5}, "loyalty: the shop needs a number from 1 to 100"),
        ({"thrift": 9}, "thrift"),
        ({"drift": 2}, "drift"),
        ({"front_page": 0.5}, "front_page"),
    ],
)
def test_a_bad_setting_is_refused_in_a_sentence(settings, said):
    with pytest.raises(UserError, match="Fix: set") as caught:
        ShopConfig(**settings)
    assert said in str(caught.value)


def test_the_smallest_shop_has_one_customer():
    made = make_shop(ShopConfig(items=60, users=1))
    assert made.events["user"].unique().to_list() == ["u0"]
    assert made.decisions.columns == ["user", "position", "item", "repeat", "evidence", "reasons"]


def test_the_command_prints_the_floor(capsys):
    main(ShopConfig(items=80, users=50))
    printed = capsys.readouterr().out
    assert "pay" in printed
    assert "oracle" in printed
    assert "observer" in printed


def test_a_written_shop_is_known_again(tmp_path):
    config = ShopConfig(items=60, users=20)
    assert not is_written(config, tmp_path)
    write(make_shop(config), tmp_path)
    assert is_written(config, tmp_path)
    assert not is_written(ShopConfig(items=60, users=20, seed=1), tmp_path)
