"""Three pictures in a row (base, composed, composed) under every way in which diffusers hosts a model.

Each equals the one of the plain pipeline in memory. Two traps of hosts: a hook that is added after a compilation is
ignored, and model offload drops the denoiser's hooks after the first picture.
"""

import copy
import shutil

import pytest
import torch
from torch import nn

from multilora.pipelines.composing import composing
from multilora.pipelines.image import Composer
from tests import scene, tiny

CPU = torch.device("cpu")


def three(pipe, sets, method="composite", **options):
    """Base, composed, composed by Switch with the LoRAs in the other order."""
    pictures = [scene.draw(pipe, steps=2)]
    with composing(pipe, sets, method, **options):
        pictures.append(scene.draw(pipe, steps=2))
    with composing(pipe, sets[::-1], "switch", every=1, **options):
        pictures.append(scene.draw(pipe, steps=2))
    return pictures


@pytest.fixture(scope="module")
def plain():
    """family -> (pipeline, LoRAs with text parts, method -> the three pictures by weights added up by hand)."""
    found = {}
    for family in scene.FAMILIES:
        pipe = getattr(tiny, family)()
        sets = scene.loras(pipe, 2, text=True)
        found[family] = pipe, sets, {m: three(pipe, sets, m) for m in ("merge", "composite")}
    return found


def check(pictures, wanted, limit=1e-5):
    for i, (ours, theirs) in enumerate(zip(pictures, wanted, strict=True)):
        assert scene.apart(ours, theirs) < limit, i
    assert scene.apart(pictures[1], pictures[0]) > 0.02
    assert scene.apart(pictures[2], pictures[1]) > 0.005


def test_plain_merge_is_plain_addition(plain):
    pipe, sets, wanted = plain["sd15"]
    assert scene.apart(wanted["merge"][1], scene.draw(scene.baked(pipe, sets, [1, 1]), steps=2)) < 1e-5


# -- offload --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["sd15", "sd3"])
@pytest.mark.parametrize("method", ["merge", "composite"])
def test_model_offload(plain, family, method):
    """accelerate's hooks move each model in and out, and `maybe_free_model_hooks` takes all hooks off and on again."""
    _, sets, wanted = plain[family]
    pipe = getattr(tiny, family)()
    pipe.enable_model_cpu_offload(device="cpu")
    assert type(scene.denoiser(pipe)._hf_hook).__name__ == "CpuOffload"
    freed = []
    original = pipe.maybe_free_model_hooks
    pipe.maybe_free_model_hooks = lambda: (original(), freed.append(scene.denoiser(pipe)._hf_hook))[0]
    bytes_before = scene.digest(pipe)
    check(three(pipe, sets, method), wanted[method])
    assert len(set(map(id, freed))) == 3  # hooks were placed anew after each picture
    assert scene.digest(pipe) == bytes_before


def test_model_offload_with_several_pictures_in_one_block(plain):
    _, sets, wanted = plain["sd15"]
    pipe = tiny.sd15()
    pipe.enable_model_cpu_offload(device="cpu")
    with composing(pipe, sets, "composite"):
        first, second = scene.draw(pipe, steps=2), scene.draw(pipe, steps=2)
    assert torch.equal(first, second)
    assert scene.apart(first, wanted["composite"][1]) < 1e-5


def test_model_offload_refuses_exchanged_weights(plain):
    _, sets, _ = plain["sd15"]
    pipe = tiny.sd15()
    pipe.enable_model_cpu_offload(device="cpu")
    with pytest.raises(ValueError, match=r"offload.*side"), composing(pipe, sets, form="rebuilt"):
        raise AssertionError("entered")


@pytest.mark.parametrize("kind", ["leaf_level", "block_level"])
@pytest.mark.parametrize("family", ["sd15", "sd3"])
def test_group_offload(plain, family, kind):
    _, sets, wanted = plain[family]
    pipe = getattr(tiny, family)()
    blocks = {"num_blocks_per_group": 1} if kind == "block_level" else {}
    pipe.enable_group_offload(onload_device=CPU, offload_device=CPU, offload_type=kind, **blocks)
    hooked = [m for m in scene.denoiser(pipe).modules() if getattr(m, "_diffusers_hook", None)]
    assert any("group_offloading" in m._diffusers_hook.hooks for m in hooked)
    check(three(pipe, sets), wanted["composite"])


# -- compiled -------------------------------------------------------------------------------------------------------


def compiled(pipe, how, backend):
    name = scene.name_of(pipe)
    model = scene.denoiser(pipe)
    if how == "wrapped":
        setattr(pipe, name, torch.compile(model, backend=backend))
    elif how == "in place":
        model.compile(backend=backend)
    else:
        model.compile_repeated_blocks(backend=backend)


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


COMPILED = [
    ("sd15", "wrapped"),
    ("sd15", "in place"),
    ("sd15", "repeated blocks"),
    ("sd3", "wrapped"),
    ("flux", "repeated blocks"),
]


@pytest.mark.parametrize(
    ("family", "how"),
    [case if case in (("sd15", "in place"), ("sd3", "wrapped")) else pytest.param(*case, marks=pytest.mark.long)
     for case in COMPILED],
)  # fmt: skip
def test_compiled(plain, fresh_compiler, family, how):
    """Compiled and run before the LoRAs come, so that a hook placed afterwards is one that the graph does not know."""
    _, sets, wanted = plain[family]
    pipe = getattr(tiny, family)()
    compiled(pipe, how, "eager")
    bytes_before = scene.digest(pipe)
    check(three(pipe, sets, "merge"), wanted["merge"])
    with composing(pipe, sets, "composite"):
        assert scene.apart(scene.draw(pipe, steps=2), wanted["composite"][1]) < 1e-5
    assert torch.equal(scene.draw(pipe, steps=2), scene.draw(pipe, steps=2))
    assert scene.apart(scene.draw(pipe, steps=2), wanted["merge"][0]) < 1e-5
    assert scene.digest(pipe) == bytes_before


def test_compiled_on_the_side(plain, fresh_compiler):
    _, sets, wanted = plain["sd15"]
    pipe = tiny.sd15()
    compiled(pipe, "in place", "eager")
    check(three(pipe, sets, "merge", form="side"), wanted["merge"])


def test_composed_before_the_first_compiled_picture(plain, fresh_compiler):
    """The graph must not keep anything of a composition that ran first."""
    _, sets, wanted = plain["sd15"]
    pipe = tiny.sd15()
    compiled(pipe, "in place", "eager")
    with composing(pipe, sets, "merge"):
        assert scene.apart(scene.draw(pipe, steps=2), wanted["merge"][1]) < 1e-5
    assert scene.apart(scene.draw(pipe, steps=2), wanted["merge"][0]) < 1e-5


@pytest.mark.long
@pytest.mark.parametrize(("family", "how"), COMPILED)
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_by_other_backends(plain, fresh_compiler, family, how, backend):
    assert backend != "inductor" or shutil.which("g++"), "inductor wants a C++ compiler; install g++"
    _, sets, wanted = plain[family]
    pipe = getattr(tiny, family)()
    compiled(pipe, how, backend)
    check(three(pipe, sets, "merge"), wanted["merge"], 1e-4)
    check(three(pipe, sets, "composite"), wanted["composite"], 1e-4)


# -- other layers and dtypes ----------------------------------------------------------------------------------------


class Int8Linear(nn.Module):
    """Weights in int8 with a scale per row; not an nn.Linear, no float weight."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scale = linear.weight.abs().amax(1, keepdim=True) / 127
        self.register_buffer("weight", (linear.weight / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def forward(self, x):
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale.to(x.dtype), self.bias)

    def dense(self) -> nn.Linear:
        linear = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None)
        linear.weight.data = self.weight.float() * self.scale
        linear.bias = self.bias
        return linear.requires_grad_(False)


def swapped(pipe, paths, made):
    """Replace the denoiser's layers at these paths."""
    for path in paths:
        parent, _, name = path.rpartition(".")
        holder = scene.denoiser(pipe).get_submodule(parent)
        holder._modules[name] = made(holder._modules[name])


@pytest.mark.parametrize("family", ["sd15", "sd3"])
def test_quantised_like_foreign_linear(family):
    pipe = getattr(tiny, family)()
    sets = scene.loras(pipe)
    adapted = {k.split(".", 1)[1] for k in sets[0]}
    swapped(pipe, adapted, Int8Linear)
    dense = copy.deepcopy(pipe)
    swapped(dense, adapted, Int8Linear.dense)
    bytes_before = scene.digest(pipe)
    check(three(pipe, sets), three(dense, sets))
    check(three(pipe, sets, "merge"), three(dense, sets, "merge"))
    assert scene.digest(pipe) == bytes_before


@pytest.mark.parametrize("family", ["sd15", "sd3", "flux"])
def test_bfloat16(family):
    """Between the bfloat16 picture and the float32 one lies only rounding; every byte comes back."""
    exact = getattr(tiny, family)()
    pipe = getattr(tiny, family)(torch.bfloat16)
    sets = scene.loras(exact, 2, text=True, strength=2.0)
    bytes_before = scene.digest(pipe)
    ours, wanted = three(pipe, sets, "merge"), three(exact, sets, "merge")
    rounding = scene.apart(ours[0], wanted[0])
    for picture, theirs in zip(ours, wanted, strict=True):
        assert picture.dtype == torch.bfloat16
        assert scene.apart(picture, theirs) < max(0.02, 3 * rounding)
        assert scene.apart(picture, theirs) < 0.5 * scene.apart(wanted[1], wanted[0])
    assert scene.digest(pipe) == bytes_before
    assert torch.equal(scene.draw(pipe, steps=2), ours[0])


def test_offloaded_composer(plain):
    """The Composer over an offloaded pipeline, twice, and its recipe names what ran."""
    _, sets, _ = plain["sd15"]
    images = []
    for offload in (False, True):
        pipe = tiny.sd15()
        if offload:
            pipe.enable_model_cpu_offload(device="cpu")
        composer = Composer(pipe)
        for lora in sets:
            composer.add(lora)
        for _ in range(2):
            out = composer("a fox", seed=1, num_inference_steps=2, form="side")
            images.append(torch.frombuffer(bytearray(out.images[0].tobytes()), dtype=torch.uint8).int())
            assert out.recipe.resolved.form == "side"
    assert torch.equal(images[0], images[1])
    assert torch.equal(images[2], images[3])
    assert (images[0] - images[2]).abs().max() <= 1
