"""After a picture, an error at any step, a cancel or an interrupt the pipeline is what it was, to the byte."""

import threading

import pytest
import torch

from multilora.pipelines import denoise
from multilora.pipelines.composing import composing, member
from multilora.pipelines.image import Cancelled, Composer
from tests import scene, tiny

STEPS = 3


class Fault(Exception):
    pass


@pytest.fixture(scope="module")
def worlds():
    """family -> (pipeline, its LoRAs, what it was)."""
    found = {}
    for family in scene.FAMILIES:
        pipe = getattr(tiny, family)()
        found[family] = (pipe, scene.loras(pipe, text=True), scene.Witness(pipe))
    return found


def raising(error, at):
    """A hook of any signature that raises at its call number `at`."""
    count = iter(range(10**6))

    def hook(*args, **kwargs):
        if next(count) == at:
            raise error

    return hook


def failing(pipe, place, error, at):
    """Arrange for `error` at a place: returns (options of the pipeline, undo)."""
    if place == "callback":
        hook = raising(error, at)

        def step_end(pipe, i, t, tensors):
            hook()
            return tensors

        return {"callback_on_step_end": step_end}, lambda: None
    module = {
        "denoiser": lambda: scene.denoiser(pipe),
        "layer": lambda: next(m for n, m in scene.denoiser(pipe).named_modules() if n.endswith("to_q")),
        "encode_prompt": lambda: pipe.text_encoder,
    }[place]()
    handle = module.register_forward_hook(raising(error, at))
    return {}, handle.remove


CASES = [
    *[(place, Fault, at) for place in ("denoiser", "callback") for at in range(STEPS)],
    ("layer", Fault, 1),
    ("encode_prompt", Fault, 0),
    ("encode_prompt", Fault, 1),
    ("denoiser", KeyboardInterrupt, 1),
    ("layer", KeyboardInterrupt, 2),
    ("callback", KeyboardInterrupt, 0),
    ("encode_prompt", KeyboardInterrupt, 0),
    ("encode_prompt", KeyboardInterrupt, 3),
]


@pytest.mark.parametrize(("place", "error", "at"), CASES)
def test_nothing_is_left_after_an_error(worlds, place, error, at):
    pipe, sets, witness = worlds["sd15"]
    method, form = [("composite", "auto"), ("switch", "rebuilt"), ("merge", "side")][at % 3]
    options = {"every": 1} if method == "switch" else {}
    with pytest.raises(error), composing(pipe, sets, method, form=form, **options):
        given, undo = failing(pipe, place, error, at)
        try:
            scene.draw(pipe, steps=STEPS, **given)
        finally:
            undo()
    witness.check()


@pytest.mark.parametrize("family", ["sd3", "flux"])
@pytest.mark.parametrize(("place", "error"), [("denoiser", Fault), ("layer", KeyboardInterrupt)])
def test_nothing_is_left_in_a_transformer(worlds, family, place, error):
    pipe, sets, witness = worlds[family]
    for at in range(2):
        with pytest.raises(error), composing(pipe, sets, "composite"):
            given, undo = failing(pipe, place, error, at)
            try:
                scene.draw(pipe, steps=STEPS, **given)
            finally:
                undo()
        witness.check(picture=at == 1)


@pytest.mark.parametrize("family", scene.FAMILIES)
@pytest.mark.parametrize("form", ["side", "rebuilt", "bank"])
def test_nothing_is_left_after_success(worlds, family, form):
    pipe, sets, witness = worlds[family]
    with composing(pipe, sets, "switch", every=1, form=form):
        composed = scene.draw(pipe)
    assert scene.apart(composed, witness.before) > 0.01
    witness.check()


def test_an_error_in_the_body_and_bad_arguments_leave_nothing(worlds):
    pipe, sets, witness = worlds["sd15"]
    with pytest.raises(Fault), composing(pipe, sets):
        raise Fault
    for bad in ({"text_encoder": "both"}, {"scale": float("nan")}, {"form": "fast"}, {"every": 2}):
        with pytest.raises(ValueError), composing(pipe, sets, **bad):
            raise AssertionError("entered")
    witness.check(picture=False)


def test_an_interrupt_while_things_are_put_in_place_leaves_nothing(worlds, monkeypatch):
    """At every entry of composing's stack: the next context manager raises."""
    from multilora.pipelines import composing as module

    pipe, sets, witness = worlds["sd15"]
    for name in ("attached", "step_clock", "Conductor", "intercepted"):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, raising(KeyboardInterrupt, 0))
            with pytest.raises(KeyboardInterrupt), composing(pipe, sets):
                raise AssertionError("entered")
        witness.check(picture=False)
    with composing(pipe, sets):  # and the lane is free
        pass


@pytest.mark.long
def test_an_interrupt_at_any_line_leaves_nothing(worlds):
    """KeyboardInterrupt at the n-th executed line of the Conductor, spread over a picture."""
    import sys

    pipe, sets, witness = worlds["sd15"]
    here = denoise.__file__

    def interrupted(at):
        lines = iter(range(10**7))

        def local(frame, event, arg):
            if event == "line" and next(lines) == at:
                sys.settrace(None)
                raise KeyboardInterrupt
            return local

        def trace(frame, event, arg):
            return local if frame.f_code.co_filename == here and frame.f_code.co_name != "intercepted" else None

        sys.settrace(trace)
        try:
            with composing(pipe, sets, "composite"):
                scene.draw(pipe, steps=2)
        except KeyboardInterrupt:
            return True
        finally:
            sys.settrace(None)
        return False

    hit = 0
    for at in range(0, 400, 9):
        hit += interrupted(at)
        witness.check(picture=False)
    assert hit > 30
    witness.check()


# -- cancel ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", range(STEPS))
def test_cancel_at_each_step(worlds, at):
    pipe, sets, witness = worlds["sd15"]
    composer = Composer(pipe)
    for lora in sets:
        composer.add(lora)
    cancel, steps = threading.Event(), []

    def progress(step, of, info):
        steps.append(step)
        if step == at + 1:
            cancel.set()

    with pytest.raises(Cancelled):
        composer("a fox", seed=1, num_inference_steps=STEPS + 1, progress=progress, cancel=cancel)
    assert steps == list(range(1, at + 2))
    witness.check(picture=at == 0)
    assert composer("a fox", seed=1, num_inference_steps=1).images


def test_cancelled_before_it_starts(worlds):
    pipe, sets, witness = worlds["sd15"]
    composer = Composer(pipe)
    composer.add(sets[0])
    cancel = threading.Event()
    cancel.set()
    with scene.listening(pipe.unet) as runs, pytest.raises(Cancelled):
        composer("a fox", num_inference_steps=STEPS, cancel=cancel)
    assert not runs
    composer.remove("fox")
    with pytest.raises(Cancelled):
        composer("a fox", num_inference_steps=STEPS, cancel=cancel)
    witness.check(picture=False)


def test_cancel_between_passes(worlds):
    """With one pass per call a cancel does not wait for the rest of the step."""
    pipe, sets, witness = worlds["sd15"]
    cancel = threading.Event()
    with pytest.raises(Cancelled), composing(pipe, sets, "composite", passes_per_call=1, cancel=cancel):
        handle = pipe.unet.register_forward_hook(lambda *_: cancel.set())
        try:
            with scene.listening(pipe.unet) as runs:
                scene.draw(pipe)
        finally:
            handle.remove()
    assert len(runs) == 1
    witness.check(picture=False)


# -- several pictures, several threads ------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["switch", "composite"])
def test_several_pictures_in_one_block(worlds, method):
    pipe, sets, witness = worlds["sd15"]
    options = {"every": 2} if method == "switch" else {}
    alone = []
    for seed, prompt in ((0, "a fox"), (1, "a robe and a hat")):
        with composing(pipe, sets, method, **options):
            alone.append(scene.draw(pipe, seed, prompt=prompt))
    with composing(pipe, sets, method, **options) as conductor:
        together = [scene.draw(pipe, 0), scene.draw(pipe, 1, prompt="a robe and a hat"), scene.draw(pipe, 0)]
        assert conductor.passes == [2 if method == "composite" else 1] * STEPS
    assert torch.equal(together[0], alone[0])
    assert torch.equal(together[1], alone[1])
    assert torch.equal(together[2], alone[0])
    witness.check(picture=False)


@pytest.mark.parametrize("family", ["sd15", "flux"])
def test_a_picture_that_failed_does_not_colour_the_next_one_in_its_block(worlds, family):
    """FLUX encodes the negative prompt in a second call: when that one fails, the first is no part of what follows."""
    pipe, sets, witness = worlds[family]
    with composing(pipe, sets, "switch", every=1):
        wanted = scene.draw(pipe)
    with composing(pipe, sets, "switch", every=1):
        for place, at in (("denoiser", 1), ("encode_prompt", 0), ("encode_prompt", 1), ("callback", 1)):
            given, undo = failing(pipe, place, Fault, at)
            with pytest.raises(Fault):
                scene.draw(pipe, prompt="something else", **given)
            undo()
            assert torch.equal(scene.draw(pipe), wanted), (place, at)
    witness.check(picture=False)


def test_composing_inside_composing_is_refused(worlds):
    pipe, sets, witness = worlds["sd15"]
    with composing(pipe, sets[:1]), pytest.raises(RuntimeError), composing(pipe, sets[1:]):
        raise AssertionError("entered")
    witness.check(picture=False)


def test_two_threads_with_one_composer_get_what_each_would_have_got_alone(worlds):
    pipe, sets, witness = worlds["sd15"]
    composer = Composer(pipe)
    for lora in sets:
        composer.add(lora)
    asks = [{"method": "merge", "seed": 1}, {"method": "switch", "every": 1, "seed": 2}]
    alone = [composer("a fox", num_inference_steps=STEPS, **ask).images[0] for ask in asks]
    found, wrong = {0: [], 1: []}, []

    def work(i):
        try:
            for _ in range(2):
                found[i].append(composer("a fox", num_inference_steps=STEPS, **asks[i]).images[0])
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong, wrong
    for i, pictures in found.items():
        assert len(pictures) == 2
        assert all(torch.equal(scene.pixels(p), scene.pixels(alone[i])) for p in pictures)
    witness.check(picture=False)


def test_two_composers_on_one_pipeline_in_two_threads(worlds):
    pipe, sets, witness = worlds["sd15"]
    composers = []
    for lora in sets:
        composers.append(Composer(pipe))
        composers[-1].add(lora)
    alone = [c("a fox", num_inference_steps=STEPS, seed=3).images[0] for c in composers]
    found: dict[int, object] = {}

    def work(i):
        found[i] = composers[i]("a fox", num_inference_steps=STEPS, seed=3).images[0]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(2):
        assert torch.equal(scene.pixels(found[i]), scene.pixels(alone[i]))
    assert not torch.equal(scene.pixels(alone[0]), scene.pixels(alone[1]))
    witness.check(picture=False)


def test_pipelines_that_share_a_text_encoder_or_scheduler_do_not_mix():
    """Two pipelines around other denoisers but one text encoder, in two threads: still each its own picture."""
    first = tiny.sd15()
    second = type(first)(**{**first.components, "unet": tiny.sd15().unet}, requires_safety_checker=False)
    second.set_progress_bar_config(disable=True)
    sets = scene.loras(first, 2, text=True, strength=2.0)
    composers = [Composer(first), Composer(second)]
    for composer, lora in zip(composers, sets, strict=True):
        composer.add(lora)
    alone = [c("a fox", num_inference_steps=2, seed=3).images[0] for c in composers]
    found, wrong = {}, []

    def work(i):
        try:
            found[i] = [composers[i]("a fox", num_inference_steps=2, seed=3).images[0] for _ in range(3)]
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong, wrong
    for i in range(2):
        assert all(torch.equal(scene.pixels(p), scene.pixels(alone[i])) for p in found[i])


def test_a_member_is_not_changed_by_a_picture(worlds):
    pipe, sets, _ = worlds["sd15"]
    chosen = member(pipe, sets[0], weight="0@0,1@1", blocks={"*": 0.5})
    before = {k: (p.down.clone(), p.up.clone()) for k, p in chosen.lora.items()}
    with composing(pipe, [chosen], scale=0.5):
        scene.draw(pipe, steps=2)
    assert str(chosen.weight) == "0@0,1@1"
    assert all(torch.equal(p.down, before[k][0]) and torch.equal(p.up, before[k][1]) for k, p in chosen.lora.items())
