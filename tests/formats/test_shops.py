"""RetailRocket, Tmall, Taobao and JData: what each calls click, favourite, cart and pay, its times, its items."""

from datetime import UTC, datetime

import pytest

from recllm.errors import UserError
from recllm.formats import BadLines
from recllm.preparation import PrepareConfig, prepare

ROCKET = "timestamp,visitorid,event,itemid,transactionid"
PROPERTIES = "timestamp,itemid,property,value"
TMALL = "user_id,item_id,cat_id,seller_id,brand_id,time_stamp,action_type"
JD_2019 = "user_id,sku_id,action_time,module_id,type"
JD_2016 = "user_id,sku_id,time,model_id,type,cate,brand"


def told(frame) -> list[tuple]:
    return list(frame.select("user", "item", "behaviour", "timestamp").iter_rows())


def at(*moment) -> float:
    return datetime(*moment, tzinfo=UTC).timestamp()


def test_retailrocket(write, events):
    lines = [
        ROCKET,
        "1433221332117,257597,view,355908,",
        "1433221332118,257597,addtocart,355908,",
        "1433221999827,992329,transaction,248676,4000",
    ]
    assert told(events("retailrocket", write("events.csv", lines))) == [
        ("257597", "355908", "click", 1433221332.117),
        ("257597", "355908", "cart", 1433221332.118),
        ("992329", "248676", "pay", 1433221999.827),
    ]


def test_retailrocket_keeps_the_category_an_item_had_first(write, items):
    """Two parts laid one after the other, whose weeks are in no order; an item may have no category."""
    part1 = [PROPERTIES, "1435460400000,460429,categoryid,1338", "1441508400000,206783,888,1116713 n277.200"]
    part2 = [PROPERTIES, "1431831600000,460429,categoryid,1207", "1439089200000,460429,categoryid,9"]
    found = items("retailrocket", write("item_properties.csv", part1 + part2))
    assert {record["item"]: record["categories"] for record in found} == {"460429": ["c1207"], "206783": []}


def test_tmall(write, events, items):
    lines = [TMALL, "328862,323294,833,2882,2661,829,0", "328862,844400,1271,2882,2661,1111,1"]
    lines += ["7,844400,1,1,,511,2", "7,323294,833,2882,2661,511,3"]
    path = write("user_log_format1.csv", lines)
    assert told(events("tmall", path)) == [
        ("328862", "323294", "click", at(2014, 8, 29)),
        ("328862", "844400", "cart", at(2014, 11, 11)),
        ("7", "844400", "pay", at(2014, 5, 11)),
        ("7", "323294", "favourite", at(2014, 5, 11)),
    ]
    first, second = items("tmall", path)  # each once, as its first line says
    assert first == {
        "item": "323294", "title": None, "description": None, "brand": "b2661",
        "categories": ["c833"], "seller": "s2882",
    }  # fmt: skip
    assert (second["item"], second["categories"], second["seller"]) == ("844400", ["c1271"], "s2882")


def test_taobao(write, events, items):
    lines = ["1,2268318,2520377,pv,1511544070", "1,2268318,2520377,fav,1511561733", "1,230380,411153,cart,1511572885"]
    path = write("UserBehavior.csv", [*lines, "100,2971043,4869428,buy,1511617549"])
    assert told(events("taobao", path)) == [
        ("1", "2268318", "click", 1511544070.0),
        ("1", "2268318", "favourite", 1511561733.0),
        ("1", "230380", "cart", 1511572885.0),
        ("100", "2971043", "pay", 1511617549.0),
    ]
    assert [(record["item"], *record["categories"]) for record in items("taobao", path)] == [
        ("2268318", "c2520377"), ("230380", "c411153"), ("2971043", "c4869428")
    ]  # fmt: skip


def test_jdata_of_2019(write, events, items):
    kinds = ["click", "pay", "favourite", "comment", "cart"]
    lines = [f"937922,357022,2018-02-04 08:28:{kind:02d},6190659,{kind}" for kind in range(1, 6)]
    path = write("jdata_action.csv", [JD_2019, *lines])
    assert told(events("jdata", path)) == [
        ("937922", "357022", word, at(2018, 2, 4, 8, 28, kind)) for kind, word in enumerate(kinds, 1)
    ]
    products = ["sku_id,brand,shop_id,cate,market_time", "226519,6302,2399,79,2015-07-02 11:19:04.0"]
    [record] = items("jdata", write("jdata_product.csv", products))
    assert (record["item"], record["brand"], record["categories"], record["seller"]) == (
        "226519",
        "b6302",
        ["c79"],
        "s2399",
    )
    with pytest.raises(UserError, match="item '226519' was already on line 2"):
        items("jdata", write("twice.csv", [*products, products[1]]))


def test_jdata_of_2016_means_other_things_by_its_types(write, events, items):
    lines = [f"266079.0,138778,2016-01-31 23:59:0{kind},,{kind},8,403" for kind in range(1, 7)]
    found = told(events("jdata", write("JData_Action_201602.csv", [JD_2016, *lines])))
    assert [event[2] for event in found] == ["click", "cart", "cart removal", "pay", "favourite", "click"]
    assert found[3] == ("266079", "138778", "pay", at(2016, 1, 31, 23, 59, 4))
    products = ["sku_id,a1,a2,a3,cate,brand", "10,3,1,1,8,489", "100002,3,2,2,8,-1"]
    found = items("jdata", write("JData_Product.csv", products))
    assert [(record["item"], record["brand"], record["categories"]) for record in found] == [
        ("10", "b489", ["c8"]), ("100002", None, ["c8"])
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "header", "missing"),
    [
        ("retailrocket", TMALL, "visitorid"),
        ("tmall", ROCKET, "user_id"),
        ("tmall", "user_id,age_range,gender,merchant_id,label,activity_log", "item_id"),  # format2
        ("jdata", "user_id,item_id,action_time,type", "sku_id"),
    ],
)
def test_another_log_is_refused_by_its_header(name, header, missing, write, events):
    path = write("log.csv", [header, "1,2,3,4,5"])
    with pytest.raises(UserError, match=f"no {missing} column; the header has {header.split(',')[0]}") as error:
        events(name, path)
    assert (error.value.file, error.value.line) == (path, 1)


def test_a_log_is_prepared_with_its_own_items(tmp_path, write):
    """Days in the order of time, within a day in the file's."""
    lines = [f"1,{item},8,5,3,{day},{kind}" for item, day, kind in [(12, 1111, 2), (11, 1110, 0), (12, 1111, 0)]]
    path = str(write("user_log_format1.csv", [TMALL, *lines]))
    catalogue = prepare(
        PrepareConfig(
            str(tmp_path / "data"), "tmall", interactions=[path], items=[path], user_core=1, item_core=1
        )
    )  # fmt: skip
    assert catalogue.interactions.select("item", "behaviour").rows() == [
        ("11", "click"),
        ("12", "pay"),
        ("12", "click"),
    ]
    assert catalogue.items["brand"].to_list() == ["b3", "b3"]


def test_a_bad_line_of_a_log_is_named_when_its_items_are_read(write, items):
    path, bad = write("UserBehavior.csv", ["1,i1,9,pv,7", "1,,9,pv,7", "1,i1"]), BadLines("skip")
    assert [record["item"] for record in items("taobao", path, bad)] == ["i1"]
    assert [(entry["line"], entry["reason"]) for entry in bad.listed] == [
        (2, "item is empty"), (3, "has 2 fields, and there are 5 columns")
    ]  # fmt: skip
