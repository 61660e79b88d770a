"""Methods with predictions of their own on every family: batches, separate halves, packed tokens and lists.

Each has a setting in which it is another method, which tests/test_families.py holds to dense weights; the stale forms
are exact in the first step (how near they stay: benchmarks/stale.py).
"""

import pytest

from multilora.pipelines.composing import composing
from tests import families
from tests.handloop import relative

pytestmark = pytest.mark.long


def drawn(family, method, steps, **options):
    """(final latents, model runs of every call)"""
    pipe = families.pipe(family)
    make = families.call(family, prompts=2, steps=steps)
    if method is None:
        return make(pipe), []
    with composing(pipe, families.loras(family), method, weights=families.WEIGHTS, **options) as conductor:
        return make(pipe), list(conductor.passes)


@pytest.mark.parametrize("family", list(families.PIPES))
def test_settings_that_are_another_method(family):
    plain, _ = drawn(family, "composite", 2)
    assert relative(drawn(family, "loratorio", 2, temperature=1e9)[0], plain) < 1e-4
    assert relative(drawn(family, "loratorio", 2, temperature=1e-3)[0], plain) > 1e-4
    plain, _ = drawn(family, "sum_of_differences", 2)
    assert relative(drawn(family, "sum_of_differences", 2, guard=1e6)[0], plain) < 1e-4
    assert relative(drawn(family, "sum_of_differences", 2, guard=0.5)[0], plain) > 1e-4
    assert relative(drawn(family, "frequency_split", 2, sharpness=0.0)[0], plain) < 1e-4
    assert relative(drawn(family, "frequency_split", 2, sharpness=8.0)[0], plain) > 1e-4


@pytest.mark.parametrize("family", list(families.PIPES))
def test_stale_forms_are_exact_in_the_first_step_and_run_fewer_rows_after_it(family):
    calls = 2 if family in ("flux", "qwen") else 1
    for method, exact, rows in (("stale_sum", "sum_of_differences", 2), ("stale_sum", "sum_of_differences", 1),
                                ("stale_composite", "composite", 1)):  # fmt: skip
        found, runs = drawn(family, method, 4, rows=rows)
        assert runs == [3] * calls + [rows] * calls * 3
        assert relative(found, drawn(family, exact, 4)[0]) > 1e-5
        assert relative(drawn(family, method, 1, rows=rows)[0], drawn(family, exact, 1)[0]) < 1e-5
