"""Boosted merge: its passes and shares."""

import pytest

from multilora.method import resolve
from multilora.plan import Moment, Pass, shares


@pytest.mark.parametrize(
    ("weights", "boost", "factor"), [((0.9, 0.6), 1.0, 1.5), ((0.9, 0.6, 1.1, 0.3), 0.4, 1.3), ((0.7, 0.2), 0.5, 1.25)]
)
def test_the_common_change_is_enlarged(weights, boost, factor):
    k = len(weights)
    passes = resolve("route", "boosted_merge", boost=boost)([object()] * k)(Moment(1, 4, 9.0, None, weights))
    assert [tuple(p.row) for p in passes] == [(0.0,) * k, weights]
    assert shares(passes) == pytest.approx([1 - factor, factor])


def test_one_lora_and_no_boost_are_one_pass():
    moment = Moment(0, 4, 9.0, None, (0.7,))
    assert resolve("route", "boosted_merge")([object()])(moment) == [Pass((0.7,))]
    moment = Moment(0, 4, 9.0, None, (0.7, 0.3))
    assert resolve("route", "boosted_merge", boost=0)([object()] * 2)(moment) == [Pass((0.7, 0.3))]
