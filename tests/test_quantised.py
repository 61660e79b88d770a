"""LoRAs on quantised denoisers (quanto, torchao, bitsandbytes, GGUF) and on denoisers that are stored elsewhere.

On a quantised layer the picture is that of the layer's own output plus the dense update, written out in
tests/hosts.py. Offloading only moves weights, so every picture is the plain one, bit for bit. tests/test_hosts.py has
what is common to all hosts, text encoders included. Offloading is run with the CPU as its accelerator.
"""

import copy
import itertools

import pytest
import torch
from accelerate import cpu_offload
from torch import nn

from multilora import files
from multilora.attach import attached
from multilora.bases import base_of
from multilora.dora import base_weight
from multilora.pipelines.composing import composing
from tests import hosts, scene, tiny
from tests.hosts import by_hand, quantised, raw

CPU = torch.device("cpu")
PER_STEP = {"sd15": 1, "sdxl": 1, "flux": 2}  # calls of the denoiser: FLUX runs the negative prompt in its own
STEPS = 4


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    """(family, kind) -> (quantised pipeline, LoRAs for its denoiser); made once."""
    made = {}

    def make(family, kind):
        if (family, kind) not in made:
            pipe = getattr(tiny, family)()
            sets = scene.loras(pipe, 2)
            made[family, kind] = quantised(pipe, kind, tmp_path_factory.mktemp("host")), sets
            scene.draw(pipe, steps=1)  # bitsandbytes moves its scales when a layer is called first
        return made[family, kind]

    return make


ON_UNETS = ("quanto int8", "torchao int8", "bitsandbytes nf4", "gguf Q8_0")
HOSTS = [("flux", kind) for kind in hosts.KINDS] + list(itertools.product(["sd15", "sdxl"], ON_UNETS))
QUICK = {("sd15", "bitsandbytes nf4", "merge"), ("sdxl", "gguf Q8_0", "switch")}
# bitsandbytes' int8 layers round their inputs too: the last bit of a number may move what comes after it by 1/127.
LIMITS = {"bitsandbytes int8": 0.03}


def pictures():
    for (family, kind), method in itertools.product(HOSTS, ("merge", "switch", "composite")):
        quick = (family == "flux" and method == "composite") or (family, kind, method) in QUICK
        yield pytest.param(family, kind, method, marks=() if quick else pytest.mark.long)


def some(pairs, quick):
    return [pytest.param(*pair, marks=() if pair in quick else pytest.mark.long) for pair in pairs]


@pytest.mark.parametrize(("family", "kind"), some(HOSTS, [*HOSTS[:10], ("sd15", "bitsandbytes nf4")]))
def test_each_layer_is_its_quantised_output_plus_the_dense_update(host, family, kind):
    """Within 1e-5 of float64, layer by layer, with a row of both signs; every byte of the base stays."""
    pipe, sets = host(family, kind)
    model, component = scene.denoiser(pipe), scene.name_of(pipe)
    before, seen, found = raw(model), {}, {}
    layers = {path: model.get_submodule(path) for path in sets[0].part(component)}
    # A hook placed before the LoRAs' own sees the layer's output, one placed after sees theirs.
    handles = [m.register_forward_hook(_keep(seen, path)) for path, m in layers.items()]
    try:
        with attached(model, sets, component=component) as bank:
            assert bank.form == "side"
            bank.row = [0.8, -0.6]
            handles += [m.register_forward_hook(_keep(found, path)) for path, m in layers.items()]
            scene.draw(pipe, steps=1)
            bank.check_called()
    finally:
        for handle in handles:
            handle.remove()
    assert len(seen) == len(layers) > 5
    for path, (x, own) in seen.items():
        parts = [lora[f"{component}.{path}"] for lora in sets]
        delta = sum(w * (p.up.double() @ p.down.double()) for w, p in zip([0.8, -0.6], parts, strict=True))
        wanted = own.double() + x.double() @ delta.T
        assert scene.apart(found[path][1], wanted) <= 1e-5, path
        assert scene.apart(own, wanted) > 0.01, path
    assert raw(model) == before


def _keep(where, path):
    def hook(module, args, output):
        where[path] = args[0].detach().clone(), output.detach().clone()

    return hook


@pytest.mark.parametrize(("family", "kind", "method"), list(pictures()))
def test_pictures_are_those_of_the_hand_loop(host, family, kind, method):
    pipe, sets = host(family, kind)
    before, plain = raw(scene.denoiser(pipe)), scene.draw(pipe, steps=STEPS)
    with by_hand(pipe, sets, method, PER_STEP[family]):
        wanted = scene.draw(pipe, steps=STEPS)
    with composing(pipe, sets, method, **({"every": 1} if method == "switch" else {})) as conductor:
        assert conductor.bank.form == "side"
        ours = scene.draw(pipe, steps=STEPS)
    assert scene.apart(ours, wanted) <= LIMITS.get(kind, 1e-5)
    assert scene.apart(plain, wanted) > max(0.02, 2 * LIMITS.get(kind, 0))
    assert torch.equal(scene.draw(pipe, steps=STEPS), plain)
    assert raw(scene.denoiser(pipe)) == before


def test_quantising_did_something(host):
    exact = scene.draw(tiny.flux(), steps=STEPS)
    for kind in hosts.KINDS:
        pipe, _ = host("flux", kind)
        assert 1e-3 < scene.apart(scene.draw(pipe, steps=STEPS), exact) < 1, kind


@pytest.mark.parametrize("kind", hosts.KINDS)
def test_exchanged_forms_and_dora_are_refused_by_name(host, kind):
    pipe, sets = host("flux", kind)
    before = scene.traces(pipe)
    path = next(iter(sets[0].part("transformer")))
    for form in ("rebuilt", "bank"):
        wanted = rf"form '{form}': {path} is a quantised \w+ with a weight .*; use form='side' or 'auto'"
        with pytest.raises(ValueError, match=wanted), composing(pipe, sets, form=form):
            raise AssertionError("entered")
    with pytest.raises(ValueError, match=rf"DoRA.*transformer\.{path} is a quantised"):
        base_weight(base_of(pipe), [f"transformer.{path}"])
    assert scene.traces(pipe) == before


@pytest.mark.parametrize("kind", hosts.KINDS)
def test_files_are_admitted_against_a_quantised_base(host, tmp_path, kind):
    """Packed weights have shapes of their own; what counts is the layer's."""
    pipe, sets = host("flux", kind)
    files.save(sets[0], tmp_path / "fox.safetensors", format="diffusers")
    again = files.load(tmp_path / "fox.safetensors", base=pipe)
    assert set(again) == set(sets[0])
    wrong = tiny.lora_for(tiny.flux(), modules=["to_q"])
    wrong = type(wrong)({k: type(p)(p.down[:, :-8], p.up) for k, p in wrong.items()})
    files.save(wrong, tmp_path / "wrong.safetensors", format="diffusers")
    with pytest.raises(ValueError, match=r"wrong\.safetensors: does not fit .* \[32, 32\]"):
        files.load(tmp_path / "wrong.safetensors", base=pipe)


# -- denoisers that are stored elsewhere ------------------------------------------------------------------------------


def sequential(pipe, tmp_path):
    """What enable_sequential_cpu_offload does to each model. On a whole pipeline, accelerate 1.15 fails in the text
    encoders, LoRAs or not, when its accelerator is the CPU."""
    cpu_offload(scene.denoiser(pipe), CPU, offload_buffers=True)
    assert all(p.is_meta for p in scene.denoiser(pipe).parameters())


def whole_models(pipe, tmp_path):
    pipe.enable_model_cpu_offload(device="cpu")


def leaves(pipe, tmp_path):
    pipe.enable_group_offload(onload_device=CPU, offload_device=CPU, offload_type="leaf_level")


def blocks(pipe, tmp_path):
    options = {"offload_type": "block_level", "num_blocks_per_group": 1}
    pipe.enable_group_offload(onload_device=CPU, offload_device=CPU, **options)


def on_disk(pipe, tmp_path):
    scene.denoiser(pipe).enable_group_offload(
        onload_device=CPU, offload_device=CPU, offload_type="leaf_level", offload_to_disk_path=str(tmp_path)
    )


def three(pipe, sets, **options):
    """Composite, switch, composite again, then the base."""
    pictures = []
    for method in ("composite", "switch", "composite"):
        with composing(pipe, sets, method, **options, **({"every": 1} if method == "switch" else {})):
            pictures.append(scene.draw(pipe, steps=2))
    return [*pictures, scene.draw(pipe, steps=2)]


@pytest.fixture(scope="module")
def plain():
    """family -> (LoRAs, the pictures of the pipeline in memory, digest)."""
    found = {}
    for family in ("sd15", "sdxl", "flux"):
        pipe = getattr(tiny, family)()
        sets = scene.loras(pipe, 2)
        found[family] = sets, three(pipe, sets, form="side"), scene.digest(pipe)
    return found


FAMILIES, WAYS = ("sd15", "sdxl", "flux"), (whole_models, sequential, leaves, blocks, on_disk)
SOON = [*itertools.product(["flux"], WAYS), ("sd15", sequential), ("sdxl", whole_models), ("sd15", leaves)]


@pytest.mark.parametrize(("family", "how"), some(itertools.product(FAMILIES, WAYS), SOON))
def test_offloaded_pictures_are_the_plain_ones_bit_for_bit(plain, tmp_path, family, how):
    sets, wanted, digest = plain[family]
    pipe = getattr(tiny, family)()
    how(pipe, tmp_path)
    pictures = three(pipe, sets)
    if how is on_disk:  # FLUX's own picture differs by 7e-7 there, without a LoRA
        assert max(scene.apart(a, b) for a, b in zip(pictures, wanted, strict=True)) < 5e-6
    else:
        assert [torch.equal(a, b) for a, b in zip(pictures, wanted, strict=True)] == [True] * 4
    assert torch.equal(pictures[0], pictures[2])
    assert scene.apart(pictures[0], pictures[3]) > 0.02
    assert scene.apart(pictures[0], pictures[1]) > 0.005
    with pytest.raises(ValueError, match=r"form 'rebuilt'.*use form='side'"), composing(pipe, sets, form="rebuilt"):
        raise AssertionError("entered")
    if how is sequential:  # the weights are where accelerate keeps them
        fresh, count = scene.denoiser(getattr(tiny, family)()), 0
        for path, module in scene.denoiser(pipe).named_modules():
            for name, _ in module.named_parameters(recurse=False):
                kept = module._hf_hook.weights_map[name]
                count += torch.equal(kept, getattr(fresh.get_submodule(path), name))
        assert count == len(list(fresh.parameters())) > 50
    elif how is not on_disk:
        assert scene.digest(pipe) == digest


CASTS = itertools.product(FAMILIES, [torch.float32, torch.bfloat16])


@pytest.mark.parametrize(("family", "compute"), some(CASTS, [("sd15", torch.float32), ("flux", torch.bfloat16)]))
def test_layerwise_casting_equals_weights_rounded_to_float8(family, compute):
    """Stored in float8, computed in `compute`: the same as a model whose weights were rounded to float8 once."""
    pipe = getattr(tiny, family)(compute)
    sets = scene.loras(getattr(tiny, family)(), 2, text=True)
    rounded = copy.deepcopy(pipe)
    model = scene.denoiser(pipe)
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=compute)
    cast = [n for n, m in model.named_modules() if "layerwise_casting" in getattr(_registry(m), "hooks", ())]
    assert len(cast) > 10
    for path in cast:
        for parameter in scene.denoiser(rounded).get_submodule(path).parameters(recurse=False):
            parameter.data = parameter.data.to(torch.float8_e4m3fn).to(compute)
    wanted, before = three(rounded, sets, form="side"), scene.digest(pipe)
    pictures = three(pipe, sets)
    assert [torch.equal(a, b) for a, b in zip(pictures, wanted, strict=True)] == [True] * 4
    assert scene.apart(pictures[0], pictures[3]) > 0.02
    assert scene.digest(pipe) == before
    assert any(p.dtype == torch.float8_e4m3fn for p in model.parameters())
    with pytest.raises(ValueError, match=r"casting.*use form='side'"), composing(pipe, sets, form="rebuilt"):
        raise AssertionError("entered")


def _registry(module: nn.Module):
    return getattr(module, "_diffusers_hook", None)
