"""The guider on small modular pipelines of SDXL and Qwen-Image: against dense weights, the hook, itself reloaded."""

import json
import threading
import warnings
from dataclasses import replace

import pytest
import torch
from diffusers import (
    AdaptiveProjectedGuidance,
    ClassifierFreeGuidance,
    ComponentsManager,
    HeunDiscreteScheduler,
    SkipLayerGuidance,
)
from diffusers.hooks import LayerSkipConfig
from diffusers.utils import logging
from PIL import Image

from multilora import files
from multilora.method import UnknownName
from multilora.pipelines.composing import composing, member
from multilora.pipelines.denoise import Cancelled
from multilora.pipelines.guider import MultiLoraGuider
from multilora.pipelines.lanes import lane
from multilora.strength import TooStrong
from tests import dense, modular, scene, tiny
from tests.modular import draw, guided

FAMILIES = ("sdxl", "qwen")
METHODS = {"merge": {}, "switch": {"every": 1}, "composite": {}}
WEIGHTS = [1.0, 0.7]


@pytest.fixture(scope="module", autouse=True)
def quiet():
    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()


@pytest.fixture(scope="module")
def pipes():
    """(family, dtype) -> (standard pipeline, modular pipeline with the same components, two LoRAs)."""
    made = {}

    def get(family, dtype=torch.float32):
        if (family, dtype) not in made:
            pipe = modular.standard(family, dtype)
            loras = [tiny.lora_for(pipe, seed=i, name=n, strength=1.5) for i, n in enumerate(("fox", "robe"))]
            made[family, dtype] = pipe, modular.modular(pipe, family), loras
            draw(made[family, dtype][1], steps=1)  # models of transformers keep attributes from their first call on
        return made[family, dtype]

    return get


@pytest.fixture
def files_of(tmp_path):
    """Saves LoRAs; gives their paths."""

    def save(loras):
        for lora in loras:
            files.save(lora, tmp_path / f"{lora.card.name}.safetensors", format="diffusers")
        return [str(tmp_path / f"{lora.card.name}.safetensors") for lora in loras]

    return save


# -- what it computes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_dense_weights(pipes, family, method):
    """Two pictures per prompt; the reference's means go through the pipeline's own guidance."""
    _, pipe, loras = pipes(family, torch.float64)

    def call(p):
        return draw(p, steps=2, num_images_per_prompt=2)

    wanted = dense.reference(pipe, loras, WEIGHTS, method, call)
    guider = MultiLoraGuider(loras, method, METHODS[method], weights=WEIGHTS, guidance=pipe.guider.new())
    base = call(pipe)
    with guided(pipe, guider):
        ours = call(pipe)
    assert ours.shape[0] == 2
    assert scene.apart(ours, wanted) < 1e-6
    assert scene.apart(wanted, base) > 0.03
    assert guider.passes == [2 if method == "composite" else 1] * 4


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_agrees_with_the_hook(pipes, family, method):
    """On the same modular pipeline bit for bit, on the standard pipeline within 1e-5."""
    standard, pipe, loras = pipes(family)
    guider = MultiLoraGuider(loras, method, METHODS[method], weights=WEIGHTS, guidance=pipe.guider.new())
    with guided(pipe, guider):
        ours = draw(pipe)
    with composing(pipe, loras, method, weights=WEIGHTS, **METHODS[method]):
        hook = draw(pipe)
    with composing(standard, loras, method, weights=WEIGHTS, **METHODS[method]):
        other = modular.draw_standard(standard, family)
    assert torch.equal(ours, hook)
    assert scene.apart(ours, other) < 1e-5
    assert scene.apart(draw(pipe), ours) > 0.03


GUIDANCE = {
    "rescaled": lambda: ClassifierFreeGuidance(guidance_scale=6.0, guidance_rescale=0.7),
    "projected": lambda: AdaptiveProjectedGuidance(
        guidance_scale=6.0, eta=0.2, adaptive_projected_guidance_rescale=3.0, adaptive_projected_guidance_momentum=-0.5
    ),
}


@pytest.mark.parametrize("kind", GUIDANCE)
def test_inner_guidance_acts_on_the_means(pipes, kind):
    """Guidance that is not linear sees the average of the raw predictions, as with the reference in the loop."""
    _, pipe, loras = pipes("sdxl", torch.float64)
    inner = GUIDANCE[kind]
    with guided(pipe, inner()):
        wanted = dense.reference(pipe, loras, WEIGHTS, "composite", lambda p: draw(p, steps=2))
    with guided(pipe, MultiLoraGuider(loras, "composite", weights=WEIGHTS, guidance=inner())):
        ours = draw(pipe, steps=2)
    with guided(pipe, MultiLoraGuider(loras, "composite", weights=WEIGHTS, guidance={"guidance_scale": 6.0})):
        linear = draw(pipe, steps=2)
    assert scene.apart(ours, wanted) < 1e-6
    assert scene.apart(linear, wanted) > 0.02


def test_a_guidance_of_three_conditions(pipes):
    """Skip-layer guidance puts its own hooks on the denoiser for the third; they are off again afterwards."""
    _, pipe, loras = pipes("sdxl")

    def inner():
        return SkipLayerGuidance(
            guidance_scale=4.0,
            skip_layer_config=LayerSkipConfig([0], fqn="mid_block.attentions.0.transformer_blocks"),
            skip_layer_guidance_start=0.0,
            skip_layer_guidance_stop=1.0,
        )

    before = scene.digest(pipe), scene.traces(pipe)
    guider = MultiLoraGuider(loras, "composite", weights=WEIGHTS, guidance=inner())
    with guided(pipe, guider):
        ours = draw(pipe, steps=2)
    assert guider.passes == [2] * 5  # diffusers skips layers after the first step only
    with guided(pipe, inner()):
        base = draw(pipe, steps=2)
        with composing(pipe, loras, "composite", weights=WEIGHTS):
            hook = draw(pipe, steps=2)
    assert torch.equal(ours, hook)
    assert scene.apart(ours, base) > 0.02
    assert (scene.digest(pipe), unhooked(scene.traces(pipe))) == (before[0], unhooked(before[1]))


def unhooked(traces):
    """Without the attribute that diffusers' own hooks leave on modules that ever had one."""
    return {
        k: tuple(tuple(n for n in part if n not in ("_diffusers_hook", "forward")) if i == 2 else part
                 for i, part in enumerate(v)) if k != "pipe" and k != "scheduler" else None
        for k, v in traces.items()
    }  # fmt: skip


def test_options_of_a_lora(pipes, tmp_path):
    """Schedule, positive branch only, blocks and a mask, against the hook with the same options."""
    _, pipe, loras = pipes("sdxl")
    left = str(tmp_path / "left.png")
    Image.linear_gradient("L").rotate(90).resize((8, 8)).save(left)
    first = {"positive_only": True, "weight": "0.2@0,1@1"}
    second = {"blocks": {"*attn2*": 0.5}, "weight": 0.9, "mask": left}
    guider = MultiLoraGuider([{"lora": loras[0], **first}, {"lora": loras[1], **second}], guidance=pipe.guider.new())
    with guided(pipe, guider):
        ours = draw(pipe)
    members = [member(pipe, loras[0], **first), member(pipe, loras[1], **second)]
    with composing(pipe, members):
        assert torch.equal(draw(pipe), ours)
    for lora, options in ((0, first), (1, second)):
        for left_out in set(options) - {"weight"}:
            fewer = {k: v for k, v in options.items() if k != left_out}
            changed = [member(pipe, loras[0], **first), member(pipe, loras[1], **second)]
            changed[lora] = member(pipe, loras[lora], **fewer)
            with composing(pipe, changed):
                assert scene.apart(draw(pipe), ours) > 0.01, left_out
    Image.new("L", (8, 8), 255).save(left)
    with pytest.raises(ValueError, match=r"mask of LoRA 'robe': .*left\.png is not the picture of the config"):
        guider.new(loras=[guider.config.loras[1] | {"lora": loras[1]}])


def test_positive_only_leaves_the_negative_prediction(pipes):
    """In a call per condition the negative one is the base model's, bit for bit."""
    _, pipe, loras = pipes("sdxl")
    plain, ours, hook = [], [], []

    def seen(into):
        return pipe.unet.register_forward_hook(lambda m, a, out: into.append(out[0].clone()))

    for into, context in (
        (plain, guided(pipe, pipe.guider)),
        (ours, guided(pipe, MultiLoraGuider([{"lora": loras[0], "positive_only": True}]))),
        (hook, composing(pipe, [member(pipe, loras[0], positive_only=True)])),
    ):
        handle = seen(into)
        try:
            with context:
                draw(pipe, steps=1)
        finally:
            handle.remove()
    for found in (ours, hook):
        assert torch.equal(found[1], plain[1])
        assert scene.apart(found[0], plain[0]) > 0.02


def test_a_stack_that_is_too_strong_is_told(pipes):
    """As under the hook: by the plan's rows, so not for the same LoRAs one at a time."""
    _, pipe, loras = pipes("sdxl")
    for method, expected in (("merge", 1), ("composite", 0)):
        with (
            guided(pipe, MultiLoraGuider(loras, method, weights=[2.4, 2.4])),
            warnings.catch_warnings(record=True) as w,
        ):
            warnings.simplefilter("always")
            draw(pipe, steps=1)
        told = [str(x.message) for x in w if x.category is TooStrong]
        assert len(told) == expected
        assert all("fox at 2.4, robe at 2.4: together 3.4 times" in text for text in told), told


# -- pictures in a row, errors, cancels -----------------------------------------------------------------------------


def test_the_method_is_called_once_per_picture(pipes):
    """Three pictures in a row, each as alone; the plan is asked at each call and told the steps."""
    _, pipe, loras = pipes("sdxl")
    guider = MultiLoraGuider(loras, "switch", {"every": 1}, guidance=pipe.guider.new())
    plans, moments = [], []
    bound = guider.bound

    def counting(loras, **options):
        plans.append(len(loras))
        plan = bound.record.fn(loras, **options)
        return lambda moment: (moments.append((moment.step, moment.steps)), plan(moment))[1]

    guider.bound = replace(bound, record=replace(bound.record, fn=counting))
    with guided(pipe, guider):
        pictures = [draw(pipe), draw(pipe, seed=1), draw(pipe)]
    assert plans == [2, 2, 2]
    assert moments == [(s, 3) for _ in range(3) for s in (0, 0, 1, 1, 2, 2)]
    assert torch.equal(pictures[0], pictures[2])
    assert not torch.equal(pictures[0], pictures[1])
    with guided(pipe, guider.new()):
        assert torch.equal(draw(pipe), pictures[0])


class Trap(RuntimeError):
    pass


def break_at(module, name, n, error):
    """Make the n-th call of a method raise; gives what undoes it."""
    original, count = getattr(module, name), [0]

    def broken(*args, **kwargs):
        count[0] += 1
        if count[0] == n:
            raise error
        return original(*args, **kwargs)

    module.__dict__[name] = broken
    return lambda: module.__dict__.pop(name)


@pytest.mark.parametrize(
    ("where", "error", "form"),
    [
        ("denoiser", Trap, "rebuilt"),
        ("denoiser", KeyboardInterrupt, "side"),
        ("scheduler", KeyboardInterrupt, "rebuilt"),
        ("scheduler", Trap, "bank"),
    ],
)
def test_an_error_leaves_the_model_as_it_was(pipes, where, error, form):
    """Inside a run, and outside of them, where a guider is told nothing; then others may use the model at once."""
    _, pipe, loras = pipes("sdxl")
    before = scene.digest(pipe), scene.traces(pipe)
    target = pipe.unet.mid_block.resnets[0] if where == "denoiser" else pipe.scheduler
    undo = break_at(target, "forward" if where == "denoiser" else "step", 3 if where == "denoiser" else 2, error("x"))
    guider = MultiLoraGuider(loras, "composite", form=form, passes_per_call=1)
    pipe.update_components(guider=guider)
    try:
        with pytest.raises(error):
            draw(pipe, steps=2)
    finally:
        undo()
    assert not hasattr(type(pipe.unet), "__multilora_of__")
    assert scene.digest(pipe) == before[0]
    pipe.update_components(guider=ClassifierFreeGuidance(guidance_scale=modular.SCALE))
    assert scene.traces(pipe) == before[1]
    with composing(pipe, loras):
        draw(pipe, steps=1)
    with guided(pipe, guider):
        again = draw(pipe, steps=1)
    with guided(pipe, guider.new()):
        assert torch.equal(draw(pipe, steps=1), again)


def test_cancelled(pipes):
    _, pipe, loras = pipes("sdxl")
    before = scene.digest(pipe)
    guider = MultiLoraGuider(loras, "composite")
    guider.cancel = threading.Event()
    calls = []

    def stop(*_):
        calls.append(1)
        if len(calls) == 3:
            guider.cancel.set()

    handle = pipe.unet.register_forward_hook(stop)
    try:
        with guided(pipe, guider), pytest.raises(Cancelled):
            draw(pipe)
    finally:
        handle.remove()
    assert len(calls) == 3
    assert scene.digest(pipe) == before


def test_an_error_between_prepare_and_call(pipes):
    """A ControlNet runs there. When the step's batches are gone, so is the interception, and the lane is free."""
    _, pipe, loras = pipes("sdxl")
    guider = MultiLoraGuider(loras)
    embeds = torch.zeros(1, 4)

    def step():
        guider.set_state(0, 2, torch.tensor(999.0))
        batches = guider.prepare_inputs({"prompt_embeds": (embeds, embeds)})
        guider.prepare_models(pipe.unet)
        assert hasattr(type(pipe.unet), "__multilora_of__")
        assert len(batches) == 2
        raise Trap

    with pytest.raises(Trap):
        try:
            step()
        except Trap as error:
            raise Trap from error.with_traceback(None)
    assert not hasattr(type(pipe.unet), "__multilora_of__")
    free = []

    def other():
        free.append(lane(pipe.unet).acquire(timeout=5))
        lane(pipe.unet).release()

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert free == [True]


def test_a_denoiser_that_is_not_called_and_a_second_one(pipes):
    """Neither is composed silently."""
    _, pipe, loras = pipes("sdxl")
    guider = MultiLoraGuider(loras)
    embeds = torch.zeros(1, 4)

    def prepare():
        guider.set_state(0, 2, torch.tensor(999.0))
        batches = guider.prepare_inputs({"prompt_embeds": (embeds, embeds)})
        guider.prepare_models(pipe.unet)
        return batches

    batches = prepare()
    with pytest.raises(RuntimeError, match="UNet2DConditionModel was prepared and never called"):
        guider.cleanup_models(pipe.unet)
    batches = prepare()
    with pytest.raises(RuntimeError, match="two denoisers in one picture"):
        guider.prepare_models(tiny.sdxl().unet)
    assert len(batches) == 2
    assert not hasattr(type(pipe.unet), "__multilora_of__")


def test_without_weights_nothing_is_touched(pipes):
    _, pipe, loras = pipes("sdxl")
    for none in ([], [{"lora": loras[0], "weight": 0}]):
        with guided(pipe, MultiLoraGuider(none, guidance=pipe.guider.new())):
            ours = draw(pipe)
        assert torch.equal(ours, draw(pipe))


# -- config ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_and_reloaded(pipes, files_of, tmp_path, family):
    """The same picture bit for bit from the saved config, from its component spec, and from a plain JSON round."""
    _, pipe, loras = pipes(family)
    paths = files_of(loras)
    guider = MultiLoraGuider(
        paths,
        "composite",
        weights=["0@0,1@1", 0.7],
        guidance=ClassifierFreeGuidance(5.0, guidance_rescale=0.3),
        scale=1.2,
    )
    with guided(pipe, guider):
        wanted = draw(pipe)
        spec = pipe.get_component_spec("guider")
    guider.save_pretrained(tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "guider_config.json").read_text())
    assert [entry["reference"] for entry in config["loras"]] == paths
    assert all(len(entry["sha256"]) == 64 for entry in config["loras"])
    assert config["guidance"]["_class_name"] == "ClassifierFreeGuidance"
    plain = {k: v for k, v in config.items() if not k.startswith("_")}
    for again in (MultiLoraGuider.from_pretrained(tmp_path / "saved"), spec.create(), MultiLoraGuider(**plain)):
        assert type(again) is MultiLoraGuider
        with guided(pipe, again):
            assert torch.equal(draw(pipe), wanted)
    merged = guider.new(method="merge", weights=[1, 1])
    with guided(pipe, merged):
        assert scene.apart(draw(pipe), wanted) > 0.02
    assert merged.config.guidance == guider.config.guidance


def test_skip_layer_guidance_is_saved(tmp_path, pipes, files_of):
    """Its config holds objects, not only numbers."""
    _, pipe, loras = pipes("sdxl")
    inner = SkipLayerGuidance(
        skip_layer_config=LayerSkipConfig([0], fqn="mid_block.attentions.0.transformer_blocks"),
        skip_layer_guidance_start=0.0,
        skip_layer_guidance_stop=1.0,
    )
    guider = MultiLoraGuider(files_of(loras), guidance=inner)
    guider.save_pretrained(tmp_path / "saved")
    again = MultiLoraGuider.from_pretrained(tmp_path / "saved")
    with guided(pipe, guider):
        wanted = draw(pipe, steps=2)
    with guided(pipe, again):
        assert torch.equal(draw(pipe, steps=2), wanted)


def test_relative_paths_and_a_components_manager(pipes, files_of, tmp_path, monkeypatch):
    standard, _, loras = pipes("sdxl")
    files_of(loras)
    monkeypatch.chdir(tmp_path)
    guider = MultiLoraGuider({"a": "fox.safetensors", "b": {"reference": "robe.safetensors", "weight": 0.5}})
    assert [u["name"] for u in guider.config.loras] == ["a", "b"]
    guider.save_pretrained("saved")
    monkeypatch.chdir("/")
    again = MultiLoraGuider.from_pretrained(tmp_path / "saved")
    managed = modular.modular(standard, "sdxl", ComponentsManager())
    with guided(managed, guider):
        wanted = draw(managed)
    with guided(managed, again):
        assert torch.equal(draw(managed), wanted)


def test_refused(pipes, files_of, tmp_path):
    """Bad input, by name; nothing was touched."""
    _, _, loras = pipes("sdxl")
    paths = files_of(loras)
    with pytest.raises(UnknownName, match=r"unknown route method 'compsite'.*composite"):
        MultiLoraGuider(paths, "compsite")
    with pytest.raises(UnknownName, match=r"every_"):
        MultiLoraGuider(paths, "switch", {"every_": 2})
    with pytest.raises(ValueError, match=r"missing\.safetensors.*no such file"):
        MultiLoraGuider([str(tmp_path / "missing.safetensors")])
    with pytest.raises(UnknownName, match=r"unknown guidance 'Nope'"):
        MultiLoraGuider(paths, guidance={"_class_name": "Nope"})
    with pytest.raises(ValueError, match=r"ClassifierFreeGuidance.*guidance_scal"):
        MultiLoraGuider(paths, guidance={"_class_name": "ClassifierFreeGuidance", "guidance_scal": 2})
    with pytest.raises(UnknownName, match=r"field of LoRA .*'wieght'.*weight"):
        MultiLoraGuider([{"reference": paths[0], "wieght": 1}])
    with pytest.raises(ValueError, match=r"weight of LoRA 'fox'.*'a lot'"):
        MultiLoraGuider(paths, weights=["a lot", 1])
    with pytest.raises(ValueError, match=r"3 values for 2 LoRAs"):
        MultiLoraGuider(paths, weights=[1, 1, 1])
    with pytest.raises(UnknownName, match=r"text_encoder mode 'per row'"):
        MultiLoraGuider(paths, text_encoder="per row")
    with pytest.raises(ValueError, match="passes_per_call=0"):
        MultiLoraGuider(paths, passes_per_call=0)
    with pytest.raises(ValueError, match="inside another"):
        MultiLoraGuider(paths, guidance=MultiLoraGuider(paths))
    memory = MultiLoraGuider(loras)
    with pytest.raises(ValueError, match=r"LoRA 'fox' is in memory only"):
        memory.save_pretrained(tmp_path / "memory")
    assert not (tmp_path / "memory").exists()
    with pytest.raises(ValueError, match=r"'fox' has no reference"):
        MultiLoraGuider.from_config(dict(memory.config))

    class Own(ClassifierFreeGuidance):
        pass

    with pytest.raises(ValueError, match="guidance Own"):
        MultiLoraGuider(paths, guidance=Own()).save_pretrained(tmp_path / "own")


def test_a_changed_file_is_refused(pipes, files_of, tmp_path):
    """When the config is read, and when the file changes between that and the picture."""
    _, pipe, loras = pipes("sdxl")
    paths = files_of(loras)
    MultiLoraGuider(paths).save_pretrained(tmp_path / "saved")
    early = MultiLoraGuider.from_pretrained(tmp_path / "saved")
    files.save(0.5 * loras[0], paths[0], format="diffusers")
    wanted = (
        r"LoRA 'fox' at .*fox\.safetensors' is not the file of the config: its sha256 begins \w{12}, wanted \w{12}"
    )
    with pytest.raises(ValueError, match=wanted):
        MultiLoraGuider.from_pretrained(tmp_path / "saved")
    before = scene.digest(pipe)
    with guided(pipe, early), pytest.raises(ValueError, match=wanted):
        draw(pipe, steps=1)
    assert scene.digest(pipe) == before
    assert not hasattr(type(pipe.unet), "__multilora_of__")


def test_a_lora_of_another_model_is_refused(pipes, files_of):
    _, pipe, _ = pipes("sdxl")
    other = tiny.lora_for(tiny.sd3(), name="other")
    before = scene.digest(pipe)
    with guided(pipe, MultiLoraGuider([other])), pytest.raises(ValueError, match=r"other"):
        draw(pipe, steps=1)
    assert scene.digest(pipe) == before


# -- on a pipeline: scheduler and text encoders ---------------------------------------------------------------------


def test_text_encoder_parts(pipes):
    """Alone the guider cannot reach them and says so once; on the pipeline they act as "all", as under the hook."""
    standard, pipe, _ = pipes("sdxl")
    loras = [tiny.lora_for(standard, seed=i, text_encoder=True, name=n) for i, n in enumerate(("fox", "robe"))]
    guider = MultiLoraGuider(loras, "composite", guidance=pipe.guider.new())
    before = scene.digest(pipe), scene.traces(pipe)
    with guided(pipe, guider), pytest.warns(UserWarning, match="text encoders") as warned:
        without = draw(pipe)
    with guided(pipe, guider), warnings.catch_warnings():
        warnings.filterwarnings("error", "LoRA 'fox' has a part")
        assert torch.equal(draw(pipe), without)
    said = [str(w.message) for w in warned if "text encoders" in str(w.message)]
    assert len(said) == 1
    assert said[0].startswith("LoRA 'fox' has a part for the text encoders")
    assert "guider.on(pipe)" in said[0]
    with warnings.catch_warnings(record=True) as warned, guider.on(pipe) as same:
        warnings.simplefilter("always")
        assert same is guider
        assert pipe.guider is guider
        ours = [draw(pipe), draw(pipe)]
    assert sum("Running as 'all'" in str(w.message) for w in warned) == 1
    assert torch.equal(*ours)
    with composing(pipe, loras, "composite", text_encoder="all"):
        hook = draw(pipe)
    with composing(standard, loras, "composite", text_encoder="all"):
        other = modular.draw_standard(standard, "sdxl")
    assert torch.equal(ours[0], hook)
    assert scene.apart(ours[0], other) < 1e-5
    assert scene.apart(without, hook) > 0.01
    with guided(pipe, guider.new(text_encoder="none")):
        assert torch.equal(draw(pipe), without)
    assert (scene.digest(pipe), scene.traces(pipe)) == before


def test_second_order_and_sigma(pipes):
    """What only the scheduler knows: the intervals of Heun's half steps, and sigma; on the pipeline as the hook."""
    standard, _, loras = pipes("sdxl")
    pipe = modular.modular(standard, "sdxl")
    weights = ["1@14.6sigma,0.2@0sigma", 0.8]
    guider = MultiLoraGuider(loras, "switch", {"every": 1}, weights=weights, guidance=pipe.guider.new())
    with guided(pipe, guider), pytest.raises(ValueError, match=r"goes by sigma"):
        draw(pipe)
    pipe.update_components(scheduler=HeunDiscreteScheduler.from_config(standard.scheduler.config))
    with composing(pipe, loras, "switch", weights=weights, every=1) as conductor:
        hook = draw(pipe)
        steps = [step for _, step in conductor.clock.calls]
    assert len(set(steps)) == 3
    with guider.on(pipe):
        assert torch.equal(draw(pipe), hook)
    plain = guider.new(weights=[1, 1])
    with guided(pipe, plain), pytest.raises(ValueError, match=r"more than once per step.*guider\.on"):
        draw(pipe)


def test_image_to_image(pipes):
    """The first executed step is step 0."""
    _, pipe, loras = pipes("sdxl")
    image = Image.linear_gradient("L").convert("RGB").resize((32, 32))
    options = {"image": image, "strength": 0.5}
    guider = MultiLoraGuider(loras, "switch", {"every": 1}, guidance=pipe.guider.new())
    with guided(pipe, guider):
        ours = draw(pipe, steps=4, **options)
    assert len(guider.passes) == 4  # two steps, two conditions
    with composing(pipe, loras, "switch", every=1):
        hook = draw(pipe, steps=4, **options)
    assert torch.equal(ours, hook)
    assert scene.apart(draw(pipe, steps=4, **options), ours) > 0.01


def test_on_refuses(pipes):
    standard, pipe, loras = pipes("sdxl")
    guider = MultiLoraGuider(loras)
    with pytest.raises(ValueError, match=r"StableDiffusionXLPipeline has no guider.*composing"), guider.on(standard):
        raise AssertionError("entered")
    before = pipe.guider
    with guider.on(pipe), pytest.raises(RuntimeError, match="in use"), guider.on(pipe):
        raise AssertionError("entered")
    assert pipe.guider is before
    with composing(pipe, loras), guided(pipe, MultiLoraGuider(loras)), pytest.raises(RuntimeError, match="already"):
        draw(pipe, steps=1)
    assert torch.equal(draw(pipe, steps=1), draw(pipe, steps=1))
