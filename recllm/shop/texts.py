"""What the catalogue and the customers say. Every sentence is made of the item's own facts; hidden ones stay untold."""

import numpy as np

from recllm.shop.world import BRANDS, FAMILY, TIERS, World

# department, then five leaf categories: plural, how a title calls one, base price
DEPARTMENTS = (
    ("Photography", ("Cameras", "Camera", 400), ("Lenses", "Lens", 280), ("Memory Cards", "Memory Card", 25),
     ("Camera Bags", "Camera Bag", 60), ("Tripods", "Tripod", 90)),
    ("Running", ("Running Shoes", "Running Shoes", 80), ("Running Socks", "Running Socks", 9),
     ("Hydration Packs", "Hydration Pack", 50), ("Sports Watches", "Sports Watch", 120),
     ("Running Jackets", "Running Jacket", 70)),
    ("Kitchen", ("Espresso Machines", "Espresso Machine", 250), ("Coffee Grinders", "Coffee Grinder", 90),
     ("Milk Frothers", "Milk Frother", 35), ("Coffee Cups", "Coffee Cup Set", 20),
     ("Kitchen Scales", "Kitchen Scale", 25)),
    ("Camping", ("Tents", "Tent", 150), ("Sleeping Bags", "Sleeping Bag", 80), ("Camping Mats", "Camping Mat", 40),
     ("Camping Stoves", "Camping Stove", 45), ("Headlamps", "Headlamp", 25)),
    ("Music Making", ("Electric Guitars", "Electric Guitar", 300), ("Guitar Amplifiers", "Guitar Amplifier", 180),
     ("Effect Pedals", "Effect Pedal", 80), ("Instrument Cables", "Instrument Cable", 12),
     ("Guitar Straps", "Guitar Strap", 18)),
    ("Office", ("Desks", "Desk", 180), ("Office Chairs", "Office Chair", 150), ("Desk Lamps", "Desk Lamp", 35),
     ("Monitor Arms", "Monitor Arm", 60), ("Keyboards", "Keyboard", 55)),
    ("Cycling", ("Road Bikes", "Road Bike", 700), ("Bike Helmets", "Bike Helmet", 50),
     ("Bike Lights", "Bike Light", 25), ("Cycling Shoes", "Cycling Shoes", 85), ("Bike Locks", "Bike Lock", 30)),
    ("Garden", ("Lawn Mowers", "Lawn Mower", 220), ("Hedge Trimmers", "Hedge Trimmer", 90),
     ("Garden Hoses", "Garden Hose", 30), ("Watering Cans", "Watering Can", 15),
     ("Garden Gloves", "Garden Gloves", 10)),
)  # fmt: skip
STYLES = (
    "", "Compact", "Professional", "Junior", "Travel", "Heavy-Duty", "Classic", "Outdoor", "Lightweight", "Studio",
    "Everyday", "Racing", "Winter", "Summer", "Urban", "Alpine", "Vintage", "Silent", "Smart", "Foldable",
)  # fmt: skip
BRAND_NAMES = ("Nordvik", "Castellan", "Haruna", "Bluefin", "Tamarack", "Oriole", "Vesper", "Quarry")
BRAND_LEVEL = (1.0, 1.4, 1.2, 0.7, 0.9, 0.8, 1.6, 1.1)
BRAND_SAYS = (
    "plain northern design", "old-school craftsmanship", "precise engineering", "honest low prices",
    "rugged build", "cheerful colours", "quiet luxury", "parts that can be repaired",
)  # fmt: skip
LINES = (  # two of each brand, in its order
    ("Trail", "all weathers"), ("Fjord", "cold days"), ("Heritage", "a lifetime of use"),
    ("Regent", "special occasions"),
    ("Sora", "low weight"), ("Kaze", "speed"), ("Dash", "small budgets"), ("Basic", "simplicity"),
    ("Summit", "rough handling"), ("Grizzly", "heavy loads"), ("Sunny", "beginners"), ("Breeze", "hot days"),
    ("Eclipse", "quiet evenings"), ("Opal", "comfort"), ("Granite", "easy repair"), ("Chisel", "long service"),
)  # fmt: skip
TIER_SAYS = (
    "an entry model for occasional use", "a solid model for every day", "an advanced model for people who use it hard",
    "the top of its line, made for professionals",
)  # fmt: skip
TIER_PRICE = (1.0, 1.5, 2.2, 3.2)
COLOURS = ("Teal", "Black", "Sand", "Crimson", "Slate", "Olive", "White", "Navy", "Amber", "Plum")


def catalogue_items(world: World, ids: list[str], seed: int) -> list[dict]:
    """item, title, description, brand, categories, price, tier, color: one dict an item, in the order of `ids`."""
    colours = np.random.default_rng([seed, 2]).integers(len(COLOURS), size=world.items)
    return sorted(
        (_item(world, number, ids[number], COLOURS[colours[number]]) for number in range(world.items)),
        key=lambda record: record["item"],
    )


def _item(world: World, number: int, item: str, colour: str) -> dict:
    leaf, tier = int(world.leaf[number]), int(world.tier[number])
    department, plural, singular, price, path = _leaf(leaf)
    line, purpose = _line(world.brand[number], int(world.line[number]))
    brand = BRAND_NAMES[world.brand[number]]
    steps = len([1 for other in world.members[leaf] if other >= 0 and world.line[other] == world.line[number]])
    model = f"{line} {tier + 1}00"
    price = max(1, round(price * BRAND_LEVEL[world.brand[number]] * TIER_PRICE[tier])) - 0.01
    place = (
        f"It is number {tier + 1} of the {steps} in {brand}'s {line} line"
        if steps > 1
        else "It is the only one in its line"
    )
    return {
        "item": item,
        "title": f"{brand} {model} {singular}, {colour}",
        "description": (
            f"The {model} by {brand} is {TIER_SAYS[tier]}. It is built for {purpose} and comes in "
            f"{colour.lower()}. {place} of {plural.lower()}. "
            f"{brand} is known for {BRAND_SAYS[world.brand[number]]}. Department: {department}."
        ),
        "brand": brand,
        "categories": path,
        "price": f"{price:.2f}",
        "tier": f"{tier + 1}00",
        "color": colour,
    }


def _leaf(leaf: int) -> tuple[str, str, str, int, list[str]]:
    """Department, plural, singular, base price and path. Families beyond the departments come in styles."""
    family, place = divmod(leaf, FAMILY)
    style, row = divmod(family, len(DEPARTMENTS))
    department, (plural, singular, price) = DEPARTMENTS[row][0], DEPARTMENTS[row][1 + place]
    word = STYLES[style % len(STYLES)] + (f" {style // len(STYLES) + 1}" if style >= len(STYLES) else "")
    path = [department, plural] + ([f"{word} {plural}"] if word else [])
    return department, f"{word} {plural}".strip(), f"{word} {singular}".strip(), price, path


def _line(brand: int, line: int) -> tuple[str, str]:
    """Name and purpose. A brand has a second line in a leaf of more than BRANDS lines, and then a number."""
    turn = line // BRANDS
    name, purpose = LINES[2 * brand + turn % 2]
    return name + (f" {turn // 2 + 1}" if turn >= 2 else ""), purpose


def review(world: World, number: int, rating: int, turn: int) -> str:
    """What a buyer writes; `turn` chooses among the phrasings."""
    brand, tier, leaf = BRAND_NAMES[world.brand[number]], int(world.tier[number]), int(world.leaf[number])
    line, purpose = _line(world.brand[number], int(world.line[number]))
    verdict = ("Broke my heart", "Disappointed", "Does its job", "Happy with it", "Could not be happier")[rating - 1]
    facts = (
        f"It is built for {purpose}, and that is true",
        f"It is {TIER_SAYS[tier]}, as they say",
        f"Typical {brand}: {BRAND_SAYS[world.brand[number]]}",
    )
    return (
        f"{verdict}. {facts[turn % len(facts)]}. The {line} {tier + 1}00 is my choice among {_leaf(leaf)[1].lower()}."
    )


assert (len(BRAND_NAMES), len(LINES), len(TIER_SAYS)) == (BRANDS, 2 * BRANDS, TIERS)
