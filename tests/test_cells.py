"""Family x task x method: each call is that of dense weights in the pipeline's own loop (docs/families/table.md)."""

import pytest

from tests import cells
from tests.cells import CELLS

HERE = [cell for cell in CELLS if not cell.elsewhere]


@pytest.mark.parametrize("cell", [pytest.param(c, id=c.id, marks=[pytest.mark.long] if c.long else []) for c in HERE])
def test_each_call_is_that_of_dense_weights(cell):
    setting = cell.make()
    for method, result in cells.results(setting).items():
        try:
            result.check(setting)
        except AssertionError as error:
            raise AssertionError(f"{method}: {error}") from None
