"""Charts: a phone's width whatever is drawn, bars and cells as long and as dark as their numbers say."""

import pytest
import torch
from PIL import Image

from multilora.compare import compare
from multilora.lab import chart
from multilora.lora import Card, Lora, LowRank


def lora(seed, blocks=3, rank=3, name="a lora with a name that is longer than its place"):
    g = torch.Generator().manual_seed(seed)
    keys = [f"transformer.single_transformer_blocks.{i}.attn.to_q" for i in range(blocks)]
    return Lora(
        {k: LowRank(torch.randn(rank, 9, generator=g), torch.randn(7, rank, generator=g)) for k in keys},
        Card(f"{name} {seed}"),
    )


@pytest.mark.parametrize(("k", "blocks", "rank"), [(1, 1, 1), (2, 3, 3), (9, 70, 3), (3, 2, 200)])
def test_any_number_of_loras_and_blocks_fits(k, blocks, rank):
    picture = chart.draw_comparison(compare([lora(i, blocks, rank) for i in range(k)]))
    assert picture.width == chart.WIDTH <= 800
    edge = picture.crop((chart.WIDTH - 8, 0, chart.WIDTH, picture.height))
    assert edge.getcolors() == [(8 * picture.height, chart.PAPER)], "nothing runs out of the page"


def test_bars_are_as_long_as_their_shares():
    picture = chart.draw_energy("x", {"a": 3.0, "b": 1.0}, [0.5, 1.0])
    lengths = []
    pixels = picture.load()
    for y in range(picture.height // 2):
        run = sum(pixels[x, y] == chart.COLOURS[0] for x in range(picture.width))
        if run > 20 and (not lengths or lengths[-1] != run):
            lengths.append(run)
    assert lengths[0] / lengths[1] == pytest.approx(3.0, rel=0.02)


def test_an_empty_lora_is_drawn():
    zero = 0.0 * lora(1)
    assert isinstance(chart.draw_comparison(compare([zero, lora(2)])), Image.Image)
    assert isinstance(chart.draw_energy("nothing", {}, []), Image.Image)
