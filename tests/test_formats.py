"""Every format of every family, by its real writer, against updates computed by hand in float64."""


import numpy as np
import pytest
import torch

from multilora import files
from tests import writers

TOLERANCE = 1e-6  # of an update's Frobenius norm


def check(lora, want: dict, tolerance: float = TOLERANCE) -> None:
    assert set(lora) == set(want)
    for key, hand in want.items():
        delta = lora[key].delta(torch.float64)
        assert tuple(delta.shape) == hand.shape, key
        error = np.linalg.norm((delta.numpy() - hand).ravel()) / np.linalg.norm(hand.ravel())
        assert error <= tolerance, (key, error)


@pytest.mark.parametrize(("fmt", "family"), writers.CELLS)
def test_matrix(fmt, family, tmp_path):
    path, want, base = writers.write(fmt, family, tmp_path / "made")
    lora = files.load(path, base=base)
    check(lora, want)
    assert lora.card.family == files.family_of_model(base) == ("" if family == "llama" else family)
    _, label, algorithms = writers.FORMATS[fmt]
    provenance = lora.card.provenance
    assert algorithms <= set(provenance["algorithms"]) <= algorithms | {"locon", "norm"}
    assert provenance["format"] == label or not label
    assert provenance["trainer"]
