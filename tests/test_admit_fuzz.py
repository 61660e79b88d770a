"""Mutated files through the whole admission: a refusal in words or a sound LoRA, never anything else."""

import multiprocessing
import time

import pytest

from multilora import files, reading
from tests import fuzz_files
from tests.bad_files import Q


def check(report):
    assert not report["found"], "\n".join(map(str, report["found"][:20]))
    assert report["slowest"] < 2.0
    assert report["grown"] < 300 * 2**20
    # Neither all refused nor all accepted: the mutants reach past the header, and the faults are faults.
    assert 0.1 * report["count"] < report["accepted"] < 0.6 * report["count"]


def test_a_thousand_mutants():
    check(fuzz_files.run(0, 0, 1000))


def test_mutants_of_a_number_are_the_same_again(tmp_path):
    starts = fuzz_files.seeds()
    first = [fuzz_files.write(tmp_path, 3, n, starts) for n in range(30)]
    before = [p.read_bytes() for p in tmp_path.rglob("*.*") if p.is_file()]
    again = [fuzz_files.write(tmp_path, 3, n, fuzz_files.seeds()) for n in range(30)]
    assert first == again
    assert before == [p.read_bytes() for p in tmp_path.rglob("*.*") if p.is_file()]


@pytest.mark.parametrize(
    ("faults", "word"),
    [
        ({"broken": lambda tensor: 0, "within": lambda *args, **words: []}, "not finite"),
        ({"within": lambda *args, **words: []}, "accepted with norm"),
        ({"growth_within": lambda *args, **words: [][0]}, "IndexError"),
        ({"fits": lambda *args, **words: None}, "accepted with "),
    ],
)
def test_the_fuzzer_finds_planted_faults(monkeypatch, faults, word):
    for name, fault in faults.items():
        for module in (files, reading):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, fault)
    found = fuzz_files.run(0, 1000, 300)["found"]
    assert any(word in what for _, _, what in found), found


def test_the_fuzzer_sees_a_changed_pipeline(monkeypatch):
    plain = files.read

    def read(*args, **options):
        lora = plain(*args, **options)
        options["base"].modules[f"unet.{Q}"].weight.data[0, 0] += 1e-6
        return lora

    monkeypatch.setattr(files, "read", read)
    assert any("pipeline" in what for _, _, what in fuzz_files.run(0, 0, 60)["found"])


@pytest.mark.long
def test_twenty_thousand_mutants_in_two_minutes():
    began = time.monotonic()  # of the test; the bar is on computing, since the machine may be busy
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        reports = pool.starmap(fuzz_files.run, [(7, 0, 10_000), (7, 10_000, 10_000)])
    seconds = time.monotonic() - began
    for report in reports:
        check(report)
    print(f"20,000 mutants in {seconds:.0f} s, {reports}")
    assert max(report["cpu"] for report in reports) < 120
