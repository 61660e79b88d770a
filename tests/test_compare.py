"""Comparing LoRAs: every number against whole float64 matrices, at odd sizes and unequal ranks."""

import itertools
import math

import pytest
import torch

from multilora.compare import block_of, compare, energies, energy_kept, grams, in_words, inner, shares_of, spectrum_of
from multilora.lora import Card, Dense, Lora, LowRank

KEYS = {
    "unet.down_blocks.0.attentions.0.to_q": ("linear", (13, 7)),
    "unet.down_blocks.0.resnets.1.conv1": ("conv", (9, 5, 3, 3)),
    "unet.mid_block.attentions.0.proj": ("linear", (11, 17)),
    "text_encoder.encoder.layers.1.q_proj": ("linear", (7, 7)),
    "text_encoder.embeddings.token_embedding": ("embedding", (19, 6)),
}


def part(key, rank, seed):
    kind, shape = KEYS[key]
    g = torch.Generator().manual_seed(seed)
    if kind == "embedding":
        return LowRank(torch.randn(rank, shape[0], generator=g), torch.randn(shape[1], rank, generator=g), kind=kind)
    return LowRank(torch.randn(rank, *shape[1:], generator=g), torch.randn(shape[0], rank, generator=g), kind=kind)


def lora(seed, rank, name="", keys=tuple(KEYS)):
    return Lora({k: part(k, rank + i % 2, 10 * seed + i) for i, k in enumerate(keys)}, Card(name or f"lora{seed}"))


def matrix(p):
    delta = p.delta(torch.float64)
    return delta.T if p.kind == "embedding" else delta.flatten(1)


def whole(lora, keys=tuple(KEYS)):
    zero = {k: torch.zeros(math.prod(KEYS[k][1]), dtype=torch.float64) for k in keys}
    return torch.cat([lora[k].delta(torch.float64).flatten() if k in lora else zero[k] for k in keys])


def cos(a, b):
    return float(a @ b / (a.norm() * b.norm()))


def test_cosines_and_norms_equal_those_of_whole_matrices():
    a, b = lora(1, 3), lora(2, 2, keys=list(KEYS)[:4])
    c = 0.3 * a + lora(3, 4)
    found = compare([a, b, c])
    for i, j in itertools.product(range(3), repeat=2):
        assert found.cosine[i][j] == pytest.approx(cos(*(whole(x) for x in ([a, b, c][i], [a, b, c][j]))), abs=1e-6)
    assert found.norms == pytest.approx([float(whole(x).norm()) for x in (a, b, c)], rel=1e-6)
    assert (found.modules, found.shared) == ([5, 4, 5], 4)
    by_block = {}
    for key in KEYS:
        by_block.setdefault(block_of(key), []).append(key)
    assert list(found.blocks) == list(by_block)
    for name, keys in by_block.items():
        block = found.blocks[name]
        assert block.modules == len(keys)
        assert block.norms == pytest.approx([float(whole(x, keys).norm()) for x in (a, b, c)], rel=1e-6)
        assert block.cosine[0][2] == pytest.approx(cos(whole(a, keys), whole(c, keys)), abs=1e-6)
    assert found.blocks["text_encoder.embeddings"].cosine[0][1] is None
    assert compare([a, -2 * a]).cosine[0][1] == pytest.approx(-1.0)


@pytest.mark.parametrize("dense", [(0,), (1,), (0, 1)])
def test_whole_differences_are_compared_too(dense):
    pair = [lora(1, 3), lora(2, 2)]
    mixed = [Lora({k: p.dense() for k, p in x.items()}, x.card) if i in dense else x for i, x in enumerate(pair)]
    for key, gram in grams(mixed).items():
        deltas = [x[key].delta(torch.float64).flatten() for x in pair]
        want = [[float(p @ q) for q in deltas] for p in deltas]
        assert torch.allclose(torch.tensor(gram), torch.tensor(want), rtol=1e-5)
    norm = Lora({"unet.n": Dense(torch.tensor([3.0, 4.0])), "unet.b": Dense(bias=torch.ones(2))})
    assert compare([norm]).norms == pytest.approx([5.0])
    assert spectrum_of(norm) == pytest.approx([16 / 25, 1.0])


def test_the_spectrum_is_that_of_the_svd():
    a = lora(4, 5)
    squares = [torch.linalg.svdvals(matrix(p)).square() for p in a.values()]
    total = float(sum(s.sum() for s in squares))
    want = [sum(float(s[:r].sum()) for s in squares) / total for r in range(1, 7)]
    found = compare([a])
    assert found.spectrum[0] == pytest.approx(want, abs=1e-9)
    assert len(found.spectrum[0]) == 6
    for share, rank in found.ranks[0].items():
        assert want[rank - 1] >= float(share) - 1e-9
        assert rank == 1 or want[rank - 2] < float(share)
    cut = a.truncate(rank=2)
    assert spectrum_of(cut)[-1] == 1.0
    assert energy_kept(a, cut)[0] == pytest.approx(want[1], abs=1e-6)


def test_overlap_of_subspaces():
    a = lora(1, 3)
    assert compare([a, 5 * a]).overlap_in[0][1] == pytest.approx(1.0)
    b = Lora({k: LowRank(p.down, torch.randn_like(p.up), None, p.kind) for k, p in a.items()})
    found = compare([a, b])
    assert found.overlap_in[0][1] == pytest.approx(1.0), "the same input directions"
    want = []
    for key in KEYS:
        u, v = (torch.linalg.qr(x[key].up.double())[0] for x in (a, b))
        want.append(float((u.T @ v).square().sum()) / u.shape[1])
    assert found.overlap_out[0][1] == pytest.approx(sum(want) / len(want), abs=1e-9)
    assert found.overlap_out[1][1] == pytest.approx(1.0)
    # A zero column more is no direction.
    def wider(p):
        return LowRank(torch.cat([p.down, p.down[:1]]), torch.cat([p.up, 0 * p.up[:, :1]], 1), None, p.kind)

    padded = Lora({k: wider(p) for k, p in a.items()})
    assert compare([padded, b]).overlap_out[0][1] == pytest.approx(found.overlap_out[0][1], abs=1e-6)
    # Chance is what random directions give.
    many = [
        compare([Lora({"unet.x": part("unet.mid_block.attentions.0.proj", r, s + 100 * r)}) for r in (2, 5)])
        for s in range(200)
    ]
    mean = sum(m.overlap_in[0][1] for m in many) / len(many)
    assert many[0].chance_in[0][1] == pytest.approx(5 / 17)
    assert mean == pytest.approx(5 / 17, abs=0.03)


def test_energy_kept_is_measured_on_the_difference():
    a = lora(2, 6)
    for cut in (a.truncate(rank=2), a.truncate(energy=0.9), 0.5 * a, lora(7, 2)):
        share, by_key = energy_kept(a, cut)
        lost = {k: float((matrix(a[k]) - matrix(cut[k])).square().sum()) for k in KEYS}
        own = {k: float(matrix(a[k]).square().sum()) for k in KEYS}
        assert share == pytest.approx(1 - sum(lost.values()) / sum(own.values()), abs=1e-6)
        assert by_key == pytest.approx({k: 1 - lost[k] / own[k] for k in KEYS}, abs=1e-6)
    assert energy_kept(a, a)[0] == pytest.approx(1.0, abs=1e-12)
    assert energy_kept(a, Lora({}))[0] == 0.0


def test_shares_and_energies():
    a, b = lora(1, 3), lora(2, 3)
    mixed = 0.7 * a - 0.2 * b
    cross = float(whole(a) @ whole(b))
    want = [0.7 - 0.2 * cross / float(whole(a) @ whole(a)), -0.2 + 0.7 * cross / float(whole(b) @ whole(b))]
    assert shares_of(mixed, [a, b]) == pytest.approx(want, abs=1e-6)
    assert shares_of(mixed, [0 * a]) == [None]
    found = energies(a)
    assert sum(found.values()) == pytest.approx(a.norm() ** 2, rel=1e-6)
    assert found["unet.mid_block"] == pytest.approx(a["unet.mid_block.attentions.0.proj"].norm() ** 2, rel=1e-6)


@pytest.mark.parametrize(
    ("key", "block"),
    [
        ("unet.down_blocks.2.attentions.1.transformer_blocks.0.attn1.to_q", "unet.down_blocks.2"),
        ("unet.mid_block.resnets.1.conv2", "unet.mid_block"),
        ("unet.conv_in", "unet.conv_in"),
        ("transformer.single_transformer_blocks.37.attn.to_q", "transformer.single_transformer_blocks.37"),
        ("text_encoder.encoder.layers.11.mlp.fc1", "text_encoder.encoder.layers.11"),
        ("model.layers.3.self_attn.q_proj", "model.layers.3"),
        ("lm_head", "lm_head"),
    ],
)
def test_blocks(key, block):
    assert block_of(key) == block


def test_words_and_refusals():
    a, b = lora(1, 3, "fox"), lora(2, 3, "robe")
    assert in_words(compare([a, a]), 0, 1) == "fox and fox: cosine +1.000, nearly the same"
    assert "opposed" in in_words(compare([a, b - a]), 0, 1)
    with pytest.raises(ValueError, match="at least one"):
        compare([])
    other = Lora({"unet.mid_block.attentions.0.proj": part("unet.down_blocks.0.attentions.0.to_q", 2, 1)}, Card("xl"))
    with pytest.raises(ValueError, match=r"'xl' and LoRA 'fox'.*mid_block.*\[13, 7\] and \[11, 17\]"):
        compare([a, other])
    with pytest.raises(ValueError, match="different layers"):
        inner(a["unet.mid_block.attentions.0.proj"], other["unet.mid_block.attentions.0.proj"])
