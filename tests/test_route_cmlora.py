"""CMLoRA: who leads at which step, written by hand, and the paper's shares."""

import pytest

from multilora.lora import Card
from multilora.method import resolve
from multilora.plan import Moment, shares


def leaders(categories, steps, **options):
    """Index of the LoRA with the largest share at each step."""
    k, found = len(categories), []
    cards = tuple(c and Card(name=str(i), category=c) for i, c in enumerate(categories))
    plan = resolve("route", "cmlora", **options)([object()] * k)
    for step in range(steps):
        passes = plan(Moment(step, steps, 500.0, None, (0.5,) * k, cards))
        mix = shares(passes)
        found.append(max(range(k), key=mix.__getitem__))
        assert sum(mix) == pytest.approx(1.0)
        assert [tuple(p.row) for p in passes] == [tuple(0.5 * (i == j) for j in range(k)) for i in range(k)]
    return found


@pytest.mark.parametrize(
    ("categories", "options", "wanted"),
    [
        (["background", "character", "style"], {}, [1, 2, 1, 2, 0, 0, 0, 0]),
        (["background", "character", "style"], {"every": 2, "turn": 0.75}, [1, 1, 2, 2, 1, 1, 0, 0]),
        (["object", "background", "background"], {}, [0, 0, 0, 0, 1, 2, 1, 2]),
        (["object", None, ""], {}, [0, 1, 2, 0, 1, 2, 0, 1]),
        (["background", "background"], {}, [0, 1, 0, 1, 0, 1, 0, 1]),
        (["background", "character"], {"turn": 0.0}, [0] * 8),
        (["background", "character"], {"turn": 1.0}, [1] * 8),
    ],
)
def test_backgrounds_lead_late(categories, options, wanted):
    assert leaders(categories, 8, **options) == wanted


@pytest.mark.parametrize(("k", "dominant", "other"), [(1, 1.0, None), (2, 1.2, 0.8), (5, 2.65, 0.59)])
def test_shares_are_the_papers(k, dominant, other):
    """Times k, as published: 1.2 and 0.8 for two LoRAs, 2.65 and 0.59 for five."""
    passes = resolve("route", "cmlora")([object()] * k)(Moment(0, 4, 500.0, None, (1.0,) * k, (None,) * k))
    wanted = [dominant, *[other] * (k - 1)]
    assert [s * k for s in shares(passes)] == pytest.approx(wanted, abs=0.005)
