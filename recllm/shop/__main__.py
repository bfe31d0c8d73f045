"""Print a shop's size and the best figures any model can reach on it.

python -m recllm.shop --items 600 --users 2000 --seed 0
"""

from recllm import launch
from recllm.shop import ShopConfig, make_shop


def main(config: ShopConfig) -> None:
    shop = make_shop(config)
    events, floor = shop.events, shop.floor
    shares = events["behaviour"].value_counts(sort=True, normalize=True)
    distinct = events.unique(["user", "item"]).group_by("user").len()["len"]
    print(f"items {config.items}   users {config.users}   events {len(events)}   seed {config.seed}")
    print("events  " + "   ".join(f"{name} {share:.1%}" for name, share in shares.iter_rows()))
    print(f"new items a user {distinct.mean():.1f}; under 5: {(distinct < 5).mean():.1%} of users")
    print(f"last new item of {floor.users} users   Recall@10  NDCG@10  (Recall@10 scored)")
    for name in ("oracle", "observer"):
        recall, ndcg, scored = (getattr(floor, f"{name}_{figure}") for figure in ("recall", "ndcg", "scored"))
        print(f"{name:<33}{recall:>9.3f}{ndcg:>9.3f}{scored:>12.3f}")
    print(f"{'clicks reader':<51}{floor.clicks_scored:>12.3f}")


if __name__ == "__main__":
    launch.run(main, ShopConfig, description=__doc__)
