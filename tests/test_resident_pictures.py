"""60 LoRAs, room for 8: every picture is that of a fresh Composer with only its LoRAs, and memory does not grow."""

import gc
import random
import tracemalloc
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch._subclasses.fake_tensor import FakeTensor

import multilora
from multilora import files
from multilora.lora import Lora
from multilora.pipelines.composing import composing
from multilora.pipelines.image import Composer
from multilora.resident import Library
from tests import scene, tiny
from tests.test_resident import WAIT, Watch

COUNT, ROOM = 60, 8
CHECKPOINTS = (50, 100, 150, 200)  # requests after which memory is measured
ROOT = Path(multilora.__file__).resolve().parents[1]
OWN = [tracemalloc.Filter(True, f"{ROOT / folder}/*") for folder in ("multilora", "pipelines", "kernels")]
METHODS = (("merge", "auto"), ("composite", "side"), ("switch", "rebuilt"), ("composite", "auto"), ("merge", "side"))


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    """(folder of 60 LoRAs for tests.tiny.sd15, bytes of the tensors of the largest)."""
    folder, pipe = tmp_path_factory.mktemp("shelf"), tiny.sd15()
    for i in range(COUNT):
        lora = tiny.lora_for(pipe, seed=i, text_encoder=i % 3 == 0, modules=None if i % 3 == 0 else _denoiser)
        lora = Lora({k: p for k, p in lora.items() if i % 3 or "unet" not in k or "attn1" in k})
        files.save(lora, folder / f"l{i}.safetensors", format="diffusers")
    return folder, max(sum(t.nbytes for t in load_file(path).values()) for path in folder.iterdir())


def _denoiser(key):
    return key.startswith("unet.") and key.endswith(("to_q", "to_k", "to_v"))


def requests(count, seed=5):
    """Random requests: names with weights, method, form, seed; some by tags, some by keyword."""
    draw = random.Random(seed)
    for at in range(count):
        names = draw.sample([f"l{i}" for i in range(COUNT)], draw.randint(1, 4))
        method, form = METHODS[at % len(METHODS)]
        weights = {name: round(draw.uniform(0.4, 1.2), 2) for name in names}
        yield at, weights, {"method": method, "form": form, "seed": at, "num_inference_steps": 4, "every": 1}


def asked(weights, options, by_tag):
    every = {"every": options["every"]} if options["method"] == "switch" else {}
    rest = {k: v for k, v in options.items() if k != "every"} | every
    if by_tag:
        tags = " ".join(f"<lora:{name}:{weight}>" for name, weight in weights.items())
        return f"a fox {tags}", rest
    return "a fox", {**rest, "loras": weights}


def lone(pipe, folder, weights, options):
    composer = Composer(pipe)
    for name, weight in weights.items():
        composer.add(folder / f"{name}.safetensors", weight=weight)
    prompt, rest = asked({}, options, True)
    return composer(prompt.strip(), **rest)


def live():
    """(count, bytes) of all tensors that the collector knows; those that torch.compile left have no storage."""
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # other packages' deprecated objects complain when they are looked at
        tensors = [o for o in gc.get_objects() if isinstance(o, torch.Tensor) and not isinstance(o, FakeTensor)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return len(tensors), sum(storages.values())


def own_lines():
    """{file:line of the project: bytes} of what was allocated there and is alive; others keep bounded caches."""
    gc.collect()
    found = tracemalloc.take_snapshot().filter_traces(OWN).statistics("lineno")
    return {f"{one.traceback[0].filename}:{one.traceback[0].lineno}": one.size for one in found}


def grown(before, after):
    """{line: bytes more} of the lines that hold more than before."""
    return {line: size - before.get(line, 0) for line, size in after.items() if size > before.get(line, 0)}


def serve(shelf, count, monkeypatch, checkpoint=None):
    folder, size = shelf
    pipe, other = tiny.sd15(), tiny.sd15()
    before = scene.digest(pipe)
    watch = Watch(monkeypatch)
    library = watch.library = Library(folder, pipe, limit_bytes=ROOM * size, pinned=["l7"])
    composer = Composer(pipe, library=library)
    todo, futures = list(requests(count)), []
    plain = composer("a fox", seed=0, num_inference_steps=4).images[0]
    for at, weights, options in todo:
        prompt, rest = asked(weights, options, at % 2)
        for name in todo[at + 1][1] if at + 1 < count else ():
            futures.append(library.prefetch(name))  # while this picture runs
        out = composer(prompt, **rest)
        watch.sample()
        assert {use.name: use.weight for use in out.recipe.loras} == weights
        with monkeypatch.context() as patch:
            patch.setattr(files, "load", watch.original)
            wanted = lone(other, folder, weights, options)
        assert torch.equal(scene.pixels(out.images[0]), scene.pixels(wanted.images[0])), (at, weights, options)
        assert not torch.equal(scene.pixels(out.images[0]), scene.pixels(plain))
        assert composer.loras == {}
        loaded = len(library.resident)
        if checkpoint is not None and at + 1 in CHECKPOINTS:
            assert all(future.result(WAIT) in (True, False) for future in futures)
            futures.clear()
            with library._changed:  # which LoRAs are loaded decides how many objects there are
                for entry in library._entries.values():
                    if entry.lora is not None:
                        library._drop(entry)
            checkpoint(at + 1)
    assert watch.most <= library.limit_bytes
    assert watch.most_alive <= library.limit_bytes
    assert "multilora-library" in watch.threads
    assert loaded >= ROOM - 4
    assert scene.digest(pipe) == before
    return library, watch


@pytest.mark.long
def test_pictures_do_not_depend_on_what_is_loaded(shelf, monkeypatch):
    library, _ = serve(shelf, 25, monkeypatch)
    assert library.loads > 40  # 25 requests name more LoRAs than there is room for
    library.close()


@pytest.mark.long
def test_200_requests_and_no_growth(shelf, monkeypatch):
    """Of tensors; and no line of the project holds more and more: what grows in one stretch and not in the next is a
    cache that fills."""
    tensors, lines = {}, {}

    def checkpoint(at):
        if at == CHECKPOINTS[0]:
            tracemalloc.start()
        else:
            tensors[at], lines[at] = live(), own_lines()

    try:
        library, _ = serve(shelf, 200, monkeypatch, checkpoint)
    finally:
        tracemalloc.stop()
    (count, size), (later, later_size) = tensors[100], tensors[200]
    assert later_size - size <= 64_000
    assert later - count <= 20
    first, second = grown(lines[100], lines[150]), grown(lines[150], lines[200])
    steady = {line: (first[line], second[line]) for line in first.keys() & second.keys()}
    print(tensors, library.loads, steady)
    assert sum(min(each) for each in steady.values()) < 5_000, steady


@pytest.mark.parametrize("form", ["side", "rebuilt"])
def test_what_a_run_holds_beside_the_library(shelf, form):
    """One more copy of the factors in use, folded ones and siblings' side by side, or one copy of the weights; and the
    prompt's keys and values; all gone after the picture."""
    folder, size = shelf
    pipe = tiny.sd15()
    library = Library(folder, pipe, limit_bytes=ROOM * size)
    composer = Composer(pipe, library=library)
    weights = {"l1": 0.5, "l2": 0.9}
    options = {"form": form, "seed": 0, "num_inference_steps": 1}

    def while_drawing(**more):
        """Bytes of tensors at the end of the step, beyond those before the picture; none is left after it."""
        composer("a fox", **options, **more)
        before, during = live()[1], []
        composer("a fox", progress=lambda *_: during.append(live()[1]), **options, **more)
        assert live()[1] == before
        return during[0] - before

    extra = while_drawing(loras=weights, method="merge") - while_drawing()
    resident = library.resident_bytes
    base = sum(pipe.unet.get_submodule(path).weight.nbytes for path in _adapted(folder, weights))
    assert resident <= 2 * size
    keys = [path for path in _adapted(folder, weights) if path.endswith(("attn2.to_k", "attn2.to_v"))]
    outputs = sum(pipe.unet.get_submodule(path).out_features for path in keys)
    text = 2 * tiny.LENGTH * 4 * (outputs + 2 * pipe.unet.config.cross_attention_dim)
    print(f"\n{form}: {extra} bytes beside {resident}, weights {base}, text {text}")
    if form == "side":
        assert 0.9 * resident < extra < 2.1 * resident + text
    else:
        assert 0.9 * (base + resident) < extra < base + 2.1 * resident + text


def _adapted(folder, names):
    loras = [files.load(folder / f"{name}.safetensors") for name in names]
    return {key.removeprefix("unet.") for lora in loras for key in lora if key.startswith("unet.")}


def test_a_dora_that_is_read_while_merged_weights_are_in_place(tmp_path):
    """Its update depends on the base's own weights, not on those that another thread draws with meanwhile."""
    pipe = tiny.sd15()
    path = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    weight = pipe.unet.get_submodule(path.removeprefix("unet.")).weight
    part = tiny.lora_for(pipe)[path]
    layer = f"{path}.lora_"
    tensors = {f"{layer}A.weight": part.down, f"{layer}B.weight": part.up}
    tensors[f"{layer}magnitude_vector"] = (1.5 * weight.norm(dim=1)).contiguous()
    save_file(tensors, tmp_path / "dora.safetensors")
    wanted = files.load(tmp_path / "dora.safetensors", base=pipe)[path].delta()
    library = Library(tmp_path, pipe, limit_bytes=10**7)
    with composing(pipe, [tiny.lora_for(pipe, strength=3.0)], form="rebuilt"):
        got = []

        def read(*_):
            assert weight.data_ptr() != own
            assert library.prefetch("dora").result(WAIT)
            with library.using(["dora"]) as loras:
                got.append(loras["dora"][path].delta())

        own = weight.data_ptr()
        scene.draw(pipe, steps=1, callback_on_step_end=lambda pipe, i, t, tensors: read() or tensors)
    assert weight.data_ptr() == own
    assert torch.equal(got[0], wanted)
    assert wanted.norm() > 0.1
