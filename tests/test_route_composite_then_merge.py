"""Composite early, Merge late: which steps are which, and that each part is the method itself."""

import pytest

from multilora.method import resolve
from multilora.plan import Moment


@pytest.mark.parametrize("early", ["composite", "sum_of_differences"])
@pytest.mark.parametrize(
    ("crossover", "steps", "first"), [(0.4, 10, 4), (0.4, 3, 1), (0.0, 5, 0), (1.0, 5, 5), (0.25, 50, 12)]
)
def test_the_first_steps_are_the_early_method_and_the_rest_is_merge(early, crossover, steps, first):
    loras, weights = [object()] * 3, (0.9, 0.6, 1.1)
    plan = resolve("route", "composite_then_merge", crossover=crossover, early=early)(loras)
    parts = [resolve("route", early)(loras), resolve("route", "merge")(loras)]
    for step in range(steps):
        moment = Moment(step, steps, 500.0, None, weights, (None,) * 3)
        assert plan(moment) == parts[step >= first](moment)
    assert parts[0](moment) != parts[1](moment)
