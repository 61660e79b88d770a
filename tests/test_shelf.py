"""A Composer with a library: which names prompts and recipes may say, and that recipes stay within its limit too."""

import threading

import numpy as np
import pytest
import torch

from multilora import files
from multilora.method import UnknownName
from multilora.pipelines.image import Composer
from multilora.pipelines.running import fixed_randomness
from multilora.resident import Library
from tests import scene, tiny
from tests.test_resident import Watch

QUICK = {"num_inference_steps": 2, "seed": 3}


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    """(folder of four LoRAs, one more file elsewhere, bytes of a file)."""
    folder, elsewhere, pipe = tmp_path_factory.mktemp("shelf"), tmp_path_factory.mktemp("elsewhere"), tiny.sd15()
    for i in range(4):
        files.save(tiny.lora_for(pipe, seed=i), folder / f"l{i}.safetensors", format="diffusers")
    files.save(tiny.lora_for(pipe, seed=9), elsewhere / "own.safetensors", format="diffusers")
    return folder, elsewhere / "own.safetensors", (folder / "l0.safetensors").stat().st_size


def pixels(out):
    return np.asarray(out.images[0])


def test_a_prompt_opens_no_file_beside_the_library(shelf, monkeypatch):
    folder, elsewhere, size = shelf
    composer = Composer(tiny.sd15(), library=Library(folder, limit_bytes=4 * size))
    composer.add(elsewhere, name="mine", weight=0.7)
    opened, original = [], files.load
    monkeypatch.setattr(files, "load", lambda path, *a, **o: opened.append(str(path)) or original(path, *a, **o))
    for name in (str(elsewhere), str(folder / "l0.safetensors"), "../elsewhere/own.safetensors", "none"):
        with pytest.raises(UnknownName, match=r"unknown LoRA of the library .*l0, l1, l2, l3, mine.*paths=True"):
            composer(f"a fox <lora:{name}:0.8>", **QUICK)
        with pytest.raises(UnknownName, match=r"unknown LoRA of the library"):
            composer("a fox", loras={name: 0.8}, **QUICK)
    assert not opened
    out = composer("a fox <lora:mine:0.5> <lora:l1:0.8>", **QUICK)
    assert {use.name: use.weight for use in out.recipe.loras} == {"mine": 0.5, "l1": 0.8}
    free = Composer(composer.pipe, library=composer.library, paths=True)
    by_path = free(f"a fox <lora:{elsewhere}:0.5> <lora:l1:0.8>", **QUICK)
    assert [use.name for use in by_path.recipe.loras] == ["l1", "tiny9"]  # another order of the same sum
    assert np.abs(pixels(by_path).astype(int) - pixels(out)).max() <= 1


def test_a_recipe_takes_its_loras_from_the_library(shelf, monkeypatch):
    folder, elsewhere, size = shelf
    watch = Watch(monkeypatch)
    library = watch.library = Library(folder, tiny.sd15(), limit_bytes=2 * size)
    composer = Composer(tiny.sd15(), library=library)
    composer.add(elsewhere, name="mine", weight=0.7)
    out = composer("a fox <lora:l0:0.5> <lora:l1:0.8>", method="composite", **QUICK)
    loads = library.loads
    with library.using(["l2", "l3"]):
        pass
    again = composer.compose(out.recipe)
    assert library.loads == loads + 4
    assert library.resident[-2:] == ("l0", "l1")
    assert again.recipe == out.recipe
    assert np.array_equal(pixels(again), pixels(out))
    assert watch.most <= library.limit_bytes
    smaller = Composer(composer.pipe, library=Library(folder, limit_bytes=3 * size // 2))
    with pytest.raises(ValueError, match=r"above the limit limit_bytes"):
        smaller.compose(out.recipe)
    plain = Composer(composer.pipe)
    assert np.array_equal(pixels(plain.compose(out.recipe)), pixels(out))


def test_a_recipe_opens_no_file_beside_the_library(shelf):
    folder, elsewhere, size = shelf
    pipe = tiny.sd15()
    own = Composer(pipe)
    own.add(elsewhere, name="mine", weight=0.7)
    recipe = own("a fox", **QUICK).recipe
    closed = Composer(pipe, library=Library(folder, limit_bytes=4 * size))
    with pytest.raises(UnknownName, match=r"unknown LoRA of the library .*own.safetensors.*paths=True"):
        closed.compose(recipe)
    free = Composer(pipe, library=closed.library, paths=True)
    assert np.array_equal(pixels(free.compose(recipe)), pixels(own.compose(recipe)))
    closed.add(elsewhere, name="mine")
    assert closed.compose(recipe).recipe == recipe
    # Another file under a name of the library is not the recipe's.
    other = recipe.model_copy(update={"loras": [recipe.loras[0].model_copy(update={"name": "l1"})]})
    with pytest.raises(ValueError, match=r"LoRA 'l1' at .*l1.safetensors' is not the file of the recipe: sha256"):
        closed.compose(other)


def test_the_global_generator_is_as_it_was_whatever_overlaps():
    torch.manual_seed(17)
    wanted = torch.get_rng_state()
    first, second = fixed_randomness(torch.device("cpu")), fixed_randomness(torch.device("cpu"))
    with first:
        one = torch.rand(3)
        second.__enter__()
        two = torch.rand(3)
    second.__exit__(None, None, None)
    assert torch.equal(one, two)
    assert torch.equal(torch.get_rng_state(), wanted)
    with pytest.raises(KeyError), fixed_randomness(torch.device("cpu")):
        raise KeyError
    assert torch.equal(torch.get_rng_state(), wanted)


def test_two_threads_that_draw_leave_the_global_generator():
    composers = [Composer(tiny.sd15()) for _ in range(2)]
    torch.manual_seed(17)
    wanted = torch.get_rng_state()
    together = threading.Barrier(2, timeout=60)

    def draw(composer):
        composer("a fox", progress=lambda step, steps, info: together.wait() if step == 1 else None, **QUICK)

    threads = [threading.Thread(target=draw, args=(composer,)) for composer in composers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive()
    assert torch.equal(torch.get_rng_state(), wanted)


@pytest.mark.parametrize("method", ["weighted_composite", "weighted_switch"])
def test_a_prompt_is_encoded_once_for_its_weights_whatever_the_guard_asks(method):
    """Prompt and negative prompt, each as it is and in one form for each LoRA; also at weights that the guard plans
    with beforehand."""
    pipe = tiny.sd15()
    runs = []
    handle = pipe.text_encoder.register_forward_hook(lambda *_: runs.append(1))
    counts = []
    for weight in (0.3, 0.9):
        composer = Composer(pipe)
        for lora, word in zip(scene.loras(pipe, 3, strength=0.1), ("fox", "robe", "ink"), strict=True):
            lora = lora.replace(card=lora.card.replace(triggers=(word,)))
            composer.add(lora, weight=weight)
        runs.clear()
        composer("a fox, a robe and ink", method=method, num_inference_steps=3, seed=0)
        counts.append(len(runs))
    handle.remove()
    assert counts == [2 * (1 + 3)] * 2
