"""Recogniser B's false alarms held down: by how much, what changes in the file, on pictures without a LoRA."""

import json
import shutil

import pytest
import torch

from multilora.lab.score.presence import load_recogniser
from multilora.lab.world import calibrate
from multilora.lab.world.designs import DESIGNS
from multilora.pipelines.load import assets, load_pipeline


@pytest.mark.parametrize(
    ("margins", "allowed", "wanted"),
    [
        ([0.5, -1.0, 0.3], 2, 0.0),
        ([0.5, -1.0, 0.3, 0.1], 2, 0.2),  # between .3, which stays, and .1, which goes
        ([3.0, 0.5, 0.4], 1, 1.75),
        ([3.0], 0, 4.5),  # nothing above it to halve
        ([], 0, 0.0),
    ],
)
def test_a_logit_falls_halfway_between_the_last_that_stays_and_the_first_that_goes(margins, allowed, wanted):
    fall = calibrate.excess(margins, allowed)
    assert fall == pytest.approx(wanted)
    assert sum(m > fall for m in margins) <= allowed


@pytest.fixture
def copy(tmp_path):
    for ending in ("safetensors", "json"):
        shutil.copy(assets() / f"recogniser_b.{ending}", tmp_path)
    return tmp_path / "recogniser_b.safetensors"


def test_holding_back_a_design_lowers_its_logit_alone_and_says_so(copy):
    before = load_recogniser("b")
    found = {"korv": [0.8] * 5 + [0.2], "gorm": [0.3]}  # 3 of 100 may stay
    done = calibrate.hold_back(copy, found, count=100)
    after = load_recogniser(copy)
    noise = torch.rand(4, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        old, new = before.net(noise), after.net(noise)
    at = before.index("character", "korv")
    assert done["korv"] == {"alarms": 6, "pictures": 100, "lower": 0.8}
    assert done["gorm"]["lower"] == 0.0
    torch.testing.assert_close(
        old["character"][:, at] - new["character"][:, at], torch.full((4,), 0.8), atol=0.01, rtol=0
    )
    old["character"][:, at] = new["character"][:, at]
    for head in old:
        torch.testing.assert_close(old[head], new[head], atol=0, rtol=0)
    assert json.loads(copy.with_suffix(".json").read_text())["held_back"] == done


def test_the_shipped_recogniser_was_held_back_and_a_was_not():
    held = {which: json.loads((assets() / f"recogniser_{which}.json").read_text()).get("held_back") for which in "ab"}
    assert held["a"] is None
    assert set(held["b"]) == set(DESIGNS)
    for one in held["b"].values():
        assert (one["lower"] > 0) == (one["alarms"] > calibrate.ALLOWED * one["pictures"])


def test_margins_are_those_of_the_probabilities_and_of_pictures_without_the_lora():
    pipe = load_pipeline("embedded", device="cpu")
    pipe.set_progress_bar_config(disable=True)
    seen = []

    class Watched:
        def __init__(self, real):
            self.real, self.index = real, real.index

        def probabilities(self, images):
            seen.extend(images)
            return self.real.probabilities(images)

    eyes = load_recogniser("b")
    found = calibrate.margins(pipe, "corno", Watched(eyes), count=3, steps=2)
    for image, margin in zip(seen, found, strict=True):
        p = eyes.probabilities([image])["garment"][0].double()
        own = p[eyes.index("garment", "corno")].item()
        rest = max(v for i, v in enumerate(p.tolist()) if i != eyes.index("garment", "corno"))
        assert margin == pytest.approx(torch.tensor(own / rest).log().item(), abs=1e-3)
