"""The embedded data set: a seeded shop with structure that history tells and popularity does not.

    shop = make_shop(ShopConfig(items=600, users=2000, seed=0))
    shop.items, shop.events, shop.decisions, shop.floor
    write(shop, "data/raw")

docs/shop.md tells the story, the floor and how methods separate on it.
"""

from recllm.shop.floor import Floor, entropy_floor
from recllm.shop.making import Shop, is_written, make_shop, write
from recllm.shop.world import ShopConfig

__all__ = ["Floor", "Shop", "ShopConfig", "entropy_floor", "is_written", "make_shop", "write"]
