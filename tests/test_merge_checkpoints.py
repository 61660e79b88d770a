"""Merges of whole checkpoints: the published formula by Fisher, the mean without, and nothing left by bad ones."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from multilora.checkpoint_merge import merge_checkpoints
from multilora.fishers import Fisher, save_fisher
from multilora.lab.train.fisher import estimate
from tests.fisher_formula import published, random
from tests.handfisher import relative


def checkpoint(m, dtype=torch.float32):
    return {
        "body.weight": random(5, 4, seed=m, dtype=dtype), "body.bias": random(5, seed=m + 5, dtype=dtype),
        "norm.weight": 1 + 0.1 * random(5, seed=m + 7, dtype=dtype), "steps": torch.tensor([3]),
        "head.weight": random(2 + m, 5, seed=m + 9, dtype=dtype), "scalar": torch.tensor(1.5 + m, dtype=dtype),
    }  # fmt: skip


BODY = ("body.weight", "body.bias", "norm.weight", "scalar")


def checkpoint_fisher(m):
    made = {n: random(*checkpoint(m)[n].shape, seed=30 + m + 10 * i).square() for i, n in enumerate(BODY)}
    made["body.weight"][0] = 0.0
    return made


@pytest.fixture
def stored(tmp_path):
    """Two folders with two shards each, beside a configuration; and Fisher files."""
    for m in (0, 1):
        where = tmp_path / f"model{m}"
        where.mkdir()
        tensors = checkpoint(m)
        first = {n: t for n, t in tensors.items() if n.startswith("body")}
        save_file(first, where / "model-00001-of-00002.safetensors")
        save_file({n: t for n, t in tensors.items() if n not in first}, where / "model-00002-of-00002.safetensors")
        (where / "config.json").write_text(json.dumps({"model": m}))
        (where / "model.safetensors.index.json").write_text("{}")
        (where / "pytorch_model.bin").write_bytes(b"pickle")
        save_fisher(Fisher(checkpoint_fisher(m)), tmp_path / f"fisher{m}.safetensors")
    return tmp_path


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("favor_target", [True, False])
def test_merged_checkpoints_are_the_published_formula(stored, normalize, favor_target):
    options = {"head": ["head.*"], "normalize": normalize, "favor_target": favor_target}
    out = merge_checkpoints(
        [stored / "model0", stored / "model1"], [0.4, 0.6], [stored / f"fisher{m}.safetensors" for m in (0, 1)],
        stored / "both", **options,
    )  # fmt: skip
    found = {n: t for p in sorted(out.glob("*.safetensors")) for n, t in load_file(p).items()}
    models, fishers = [checkpoint(m) for m in (0, 1)], [checkpoint_fisher(m) for m in (0, 1)]
    want = published(
        [[x[n].double().numpy() for n in BODY] for x in models], [[f[n].numpy() for n in BODY] for f in fishers],
        [0.4, 0.6], normalize, 1e-6, favor_target,
    )  # fmt: skip
    for n, expected in zip(BODY, want, strict=True):
        assert found[n].dtype == torch.float32
        assert found[n].shape == models[0][n].shape
        assert relative(found[n], torch.as_tensor(expected)) < 1e-6
        assert relative(found[n], 0.4 * models[0][n] + 0.6 * models[1][n]) > 1e-3
    assert torch.equal(found["head.weight"], models[0]["head.weight"])
    assert torch.equal(found["steps"], models[0]["steps"])
    assert sorted(p.name for p in out.iterdir()) == [
        "config.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
        "model.safetensors.index.json"]  # fmt: skip
    assert json.loads((out / "config.json").read_text()) == {"model": 0}
    again = merge_checkpoints(models, [0.4, 0.6], fishers, **options)
    assert all(torch.equal(again[n], found[n]) for n in found)


def test_without_fishers_it_is_the_mean_and_a_base_gives_the_head(tmp_path):
    models = [checkpoint(m, torch.bfloat16) for m in (0, 1)]
    base = checkpoint(2)
    seen = []
    out = merge_checkpoints(models, [1, 3], None, tmp_path / "m.safetensors", head=["head.*"], base=base,
                            echo=lambda *now: seen.append(now))  # fmt: skip
    found = load_file(out)
    for n in BODY:
        mean = (models[0][n].double() + 3 * models[1][n].double()) / 4
        assert found[n].dtype == torch.bfloat16
        assert relative(found[n], mean) < 4e-3
        wide = merge_checkpoints(models, [1, 3], head=["head.*"], dtype=torch.float32)
        assert relative(wide[n], mean) < 1e-6
    assert torch.equal(found["head.weight"], base["head.weight"])
    assert len(seen) == 6
    assert seen[-1][1:] == (6, 6)


def test_estimated_fishers_merge_whole_models(tmp_path):
    """From estimate() without a LoRA to a merged state dict; a component's prefix is taken care of."""
    models = [nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)) for _ in range(2)]
    fishers = [estimate(m, None, random(6, 4, dtype=torch.float32), examples=6) for m in models]
    states = [m.state_dict() for m in models]
    found = merge_checkpoints(states, None, fishers)
    assert set(found) == set(states[0]) == set(fishers[0])
    prefixed = [Fisher({f"unet.{n}": t for n, t in f.items()}) for f in fishers]
    again = merge_checkpoints(states, None, prefixed, component="unet")
    assert all(torch.equal(found[n], again[n]) for n in found)
    with pytest.raises(ValueError, match=r"no '0\.weight'"):
        merge_checkpoints(states, None, prefixed)


def test_checkpoints_that_do_not_fit_leave_nothing_behind(stored):
    models, fishers = [checkpoint(0), checkpoint(1)], [checkpoint_fisher(0), checkpoint_fisher(1)]
    head = {"head": ["head.*"]}
    wide = {**models[1], "body.weight": torch.ones(5, 3)}
    infinite = {**models[1], "body.bias": torch.full((5,), float("inf"))}
    cases = [
        ((models,), {}, r"'head\.weight' of model number 2 is \[3, 5\], in model number 1 \[2, 5\]"),
        (([models[0], {k: v for k, v in models[1].items() if k != "norm.weight"}],), head, r"lacks 'norm\.weight'"),
        (([models[0], {**models[1], "extra": torch.ones(1)}],), head, "has 'extra'"),
        (([models[0], wide],), head, "body.weight"),
        (([models[0], infinite],), head, r"'body\.bias' has values that are not finite"),
        (([models[0], {**models[1], "steps": torch.tensor([4])}],), head, "'steps' holds torch.int64 and differs"),
        ((models, [1.0]), head, "1 weights for 2"),
        ((models, [1.0, -1.0]), head, "weight number 2"),
        ((models, [0.0, 0.0]), head, "all weights are 0"),
        ((models, None, fishers[:1]), head, "1 Fishers for 2"),
        ((models, None, [fishers[0], {"body.weight": torch.ones(5, 4)}]), head, r"model number 2 has no 'body\.bias'"),
        ((models, None, [fishers[0], {**fishers[1], "body.bias": torch.ones(4)}]), head, "body.bias"),
        ((models,), {"head": ["haed.*"]}, "haed"),
        ((models,), {"head": "head.*"}, "list of globs"),
        (([models[0], 3],), head, "wanted a .safetensors file"),
        (([],), {}, "no models"),
    ]  # fmt: skip
    before = sorted(stored.rglob("*"))
    for arguments, options, message in cases:
        for out in ("new.safetensors", "new"):
            with pytest.raises(ValueError, match=message):
                merge_checkpoints(*arguments, out=stored / out, **options)
            assert sorted(stored.rglob("*")) == before, message


def test_inputs_are_never_written_over(stored):
    paths = [stored / "model0", stored / "model1"]
    shard = paths[1] / "model-00001-of-00002.safetensors"
    content = shard.read_bytes()
    for out in (paths[1], paths[0] / "merged.safetensors", shard, stored, stored / "model0" / ".." / "model1"):
        with pytest.raises(ValueError, match=r"input|new or empty"):
            merge_checkpoints(paths, out=out, head=["head.*"])
    with pytest.raises(ValueError, match="input"):
        merge_checkpoints(paths, None, [stored / "fisher0.safetensors"] * 2, stored / "fisher0.safetensors",
                          head=["head.*"])  # fmt: skip
    assert shard.read_bytes() == content
    link = stored / "link"
    link.symlink_to(paths[1])
    with pytest.raises(ValueError, match="input"):
        merge_checkpoints(paths, out=link, head=["head.*"])
