"""The kernel distance against a plain double sum; what it says of renders and of spoilt pictures."""

import itertools
import random

import numpy as np
import pytest
import torch
from PIL import ImageFilter

from multilora.lab.evaluate.quality import SCALE, kernel_distance, scene_of
from multilora.lab.score.presence import load_recogniser
from multilora.lab.world.render import render
from multilora.lab.world.report import composed_scene
from multilora.lab.world.scene import sample_scene


def test_the_distance_is_the_double_sum_of_the_paper():
    rng = np.random.default_rng(3)
    x, y = rng.normal(0, 1, (7, 5)), rng.normal(0.7, 1, (9, 5))

    def k(a, b):
        return (float(a @ b) / 5 + 1) ** 3

    wanted = sum(k(a, b) for a, b in itertools.permutations(x, 2)) / (7 * 6)
    wanted += sum(k(a, b) for a, b in itertools.permutations(y, 2)) / (9 * 8)
    wanted -= 2 * sum(k(a, b) for a in x for b in y) / (7 * 9)
    found = kernel_distance(x, y)
    assert found.value == pytest.approx(SCALE * wanted)
    assert found.low < found.value < found.high
    assert found.n == 7


def test_it_has_no_bias_where_there_is_no_difference():
    """Mean over many small draws of one distribution is 0; each interval holds 0 in most of them."""
    rng = np.random.default_rng(0)
    found = [kernel_distance(rng.normal(0, 1, (20, 4)), rng.normal(0, 1, (20, 4)), 200, i) for i in range(60)]
    values = np.array([f.value for f in found])
    assert abs(values.mean()) < 3 * values.std() / len(values) ** 0.5
    assert np.mean([f.low <= 0 <= f.high for f in found]) > 0.8
    far = kernel_distance(rng.normal(0, 1, (20, 4)), rng.normal(1, 1, (20, 4)), 200)
    assert far.low > 0


def test_one_picture_is_no_distribution():
    with pytest.raises(ValueError, match="1 and 5 pictures: wanted two or more"):
        kernel_distance(np.zeros((1, 3)), np.zeros((5, 3)))


@pytest.mark.parametrize("name", ["a", "b"])
def test_features_are_what_the_heads_read(name):
    eyes = load_recogniser(name)
    images = [render(sample_scene(i)) for i in range(3)]
    features = torch.from_numpy(eyes.features(images))
    assert features.shape[0] == 3
    width, heads = features.shape[1] // len(eyes.heads), eyes.probabilities(images)
    for i, head in enumerate(eyes.heads):
        read = features[:, i * width : (i + 1) * width]
        torch.testing.assert_close(eyes.net.heads[head](read).softmax(1), heads[head], atol=1e-6, rtol=1e-5)
    assert not any(head._forward_pre_hooks for head in eyes.net.heads.values())


def test_spoilt_pictures_are_further_away_than_clean_ones():
    names = ["pandu", "flamo"]
    eyes = load_recogniser("b")
    real = [render(composed_scene(names, i)) for i in range(24)]
    other = [render(composed_scene(names, i)) for i in range(100, 124)]
    noise = random.Random(0)
    spoilt = [image.filter(ImageFilter.GaussianBlur(noise.uniform(3, 5))) for image in other]
    base = eyes.features(real)
    clean = kernel_distance(eyes.features(other), base, 200)
    blurred = kernel_distance(eyes.features(spoilt), base, 200)
    plain = kernel_distance(eyes.features([render(sample_scene(i)) for i in range(24)]), base, 200)
    assert blurred.low > clean.high
    assert plain.low > clean.high  # scenes without the designs


def test_the_scene_is_the_one_of_the_prompt():
    assert scene_of(["flamo", "pandu"], 3) == composed_scene(["pandu", "flamo"], 3)
