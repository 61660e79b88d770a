"""The 40 rows of bad input and faults: every case says its words and changes nothing; docs/errors.md is what they say.

A sample of the cases runs by default, all of them in the long suite.
"""

from pathlib import Path

import pytest

from tests import bad_files, bad_loras, fault_rows
from tests.fault_files import Bench
from tests.fault_rows import PAGE, Row, line, page, rows, said

HERE = Path(__file__).parent
CASES = [(row, case) for row in rows() for case in row.cases]
QUICK = [(row, case) for row, case in CASES if not case.slow][::13]
SLOW = [(row, case) for row, case in CASES if (row, case) not in QUICK]


@pytest.fixture(scope="module")
def bench():
    return Bench()


@pytest.fixture(scope="module")
def written():
    return PAGE.read_text(encoding="utf-8").splitlines()


def named(cases):
    return [f"{row.number}-{case.name}"[:60].encode("ascii", "replace").decode() for row, case in cases]


def check(bench, written, row: Row, case, folder):
    assert line(case, said(case, bench, folder)) in written, "run python -m tests.fault_rows, and read what changed"


@pytest.mark.parametrize(("row", "case"), QUICK, ids=named(QUICK))
def test_a_case_says_what_the_page_says(bench, written, row, case, tmp_path):
    check(bench, written, row, case, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize(("row", "case"), SLOW, ids=named(SLOW))
def test_every_other_case_says_what_the_page_says(bench, written, row, case, tmp_path):
    check(bench, written, row, case, tmp_path)


def test_forty_rows_and_at_least_three_hundred_cases():
    assert [row.number for row in rows()] == list(range(1, 41))
    assert len(CASES) >= 300
    assert all(row.cases or row.tests for row in rows())
    names = [(row.number, case.name) for row, case in CASES]
    assert len(set(names)) == len(names)


def test_the_page_has_every_case_and_no_other(written):
    """With the words of each case for its message, page() has as many lines, and its own text, as what is written."""
    made = page({(row.number, case.name): "?" for row, case in CASES}).splitlines()
    assert len(made) == len(written)
    for wanted, found in zip(made, written, strict=True):
        assert found == wanted or found.startswith(wanted.removesuffix("? |")), (found, wanted)


def test_the_tests_that_it_names_are_there():
    for row in rows():
        for name in row.tests:
            file, _, function = name.partition("::")
            assert f"\ndef {function}(" in (HERE / file).read_text(encoding="utf-8"), name


def test_every_row_of_the_tables_of_bad_files_is_a_case():
    """A bad file that is added to those tables gets a row here, too."""
    source = " ".join(case.name for _, case in CASES)
    for kind, table in (("file: ", bad_files.BYTES), ("header: ", bad_files.ENTRIES), (": ", bad_loras.TENSORS),
                        (": ", bad_loras.ALPHAS), (": ", bad_loras.PRODUCTS), ("json: ", bad_loras.CONFIGS),
                        ("metadata: ", bad_loras.TEXTS)):  # fmt: skip
        missing = [name for name in table if kind + name not in source]
        assert not missing, missing


def test_a_case_that_says_nothing_or_changes_something_is_found(bench, tmp_path):
    """The checks themselves: a file that is good is no refusal, and a changed weight is seen."""
    good = next(iter(fault_rows.f.whole_files("1 byte too long")))
    make, words = bad_files.BYTES["1 byte too long"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(bad_files.BYTES, "1 byte too long", (lambda g: g, words))
        with pytest.raises(pytest.fail.Exception):
            said(good, bench, tmp_path)
        patch.setitem(bad_files.BYTES, "1 byte too long", (make, "other words"))
        with pytest.raises(AssertionError):
            said(good, bench, tmp_path)
    weight = bench.files.pipe.unet.conv_in.weight.data
    kept, weight[0, 0, 0, 0] = weight[0, 0, 0, 0].clone(), 7.0
    with pytest.raises(AssertionError):
        said(good, bench, tmp_path)
    weight[0, 0, 0, 0] = kept
    said(good, bench, tmp_path)
