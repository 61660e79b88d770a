"""Family x task x method: each call is that of dense weights in the pipeline's own loop (docs/families/table.md)."""

import pytest

from benchmarks import cells as table
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


def test_the_table_has_every_cell_and_keeps_its_word():
    """docs/families/table.md, written by benchmarks/cells.py: of these cells, and every number in it is in bounds."""
    lines = [line for line in table.TABLE.read_text().splitlines() if line.startswith("| ")][1:]
    assert [line.split("|")[1:4] for line in lines] == [table.name(cell).split("|")[1:4] for cell in CELLS]
    for line in lines:
        *_, merge, switch, composite, effect, apart, latents = (part.strip() for part in line.strip("|").split("|"))
        assert all(float(n) <= cells.ONE for n in (merge, switch, composite) if n != "-"), line
        assert min(float(effect), float(apart)) >= 0.015, line
        assert not latents or float(latents) <= 10 * cells.ONE, line
