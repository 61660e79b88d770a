"""Every family: text to image by every method equals the reference with dense weights, call by call."""

import copy
import functools
import itertools

import pytest
import torch

from multilora.lora import Lora
from multilora.pipelines.composing import composing, member
from tests import dense, families, scene, tiny

FAMILIES = list(families.PIPES)
METHODS = ("merge", "switch", "composite")
ONE = 1e-5
EXACT = {torch.float32: ONE, torch.float64: 1e-12}
# Guidance, prompts, images of each prompt.
SETTINGS = {
    "one": (True, 1, 1),
    "two_images": (True, 1, 2),
    "lists": (True, 2, 2),
    "unguided": (False, 1, 1),
    "unguided_two": (False, 1, 2),
}


def rows(*columns, quick):
    """All combinations of the columns; those that `quick` does not choose are long."""
    return [
        pytest.param(*each, marks=() if quick(*each) else pytest.mark.long, id="-".join(map(str, each)))
        for each in itertools.product(*columns)
    ]


@functools.cache
def models(family, setting, dtype=torch.float32):
    pipe = families.pipe(family) if dtype == torch.float32 else families.pipe(family, dtype)
    make = families.call(family, *SETTINGS[setting])
    return dense.Dense(pipe, families.loras(family), families.WEIGHTS, make)


def compared(family, setting, method, dtype=torch.float32, **options):
    known = models(family, setting, dtype)
    return dense.compare(
        known.pipe, families.loras(family), families.WEIGHTS, method, known.call, models=known, **options
    )


@pytest.mark.parametrize(
    ("family", "setting", "method"),
    rows(FAMILIES, SETTINGS, METHODS, quick=lambda f, s, m: s == "lists" or (s, m) == ("unguided", "composite")),
)
def test_equals_the_reference(family, setting, method):
    guided = SETTINGS[setting][0]
    result = compared(family, setting, method)
    result.check(ONE)
    assert result.runs == [2 if method == "composite" else 1] * len(result.differences)
    assert len(result.differences) == 2 * (2 if guided and family in ("flux", "qwen") else 1)


@pytest.mark.parametrize(
    ("family", "method"), rows(FAMILIES, METHODS, quick=lambda f, m: (f, m) == ("qwen", "composite"))
)
def test_equals_the_reference_in_float64(family, method):
    compared(family, "lists", method, torch.float64).check(1e-12)


@pytest.mark.parametrize(
    ("family", "form"), rows(FAMILIES, ["side", "bank"], quick=lambda f, form: (f, form) == ("zimage", "side"))
)
def test_passes_in_turn_equal_the_reference(family, form):
    compared(family, "lists", "composite", passes_per_call=1, form=form).check(ONE)


@pytest.mark.long
def test_flux_with_guidance_embeddings():
    pipe = tiny.flux(guidance_embeds=True)
    make = families.call("flux", False, 1, 2, guidance_scale=3.5)
    for method in METHODS:
        dense.compare(pipe, families.loras("flux"), families.WEIGHTS, method, make).check(ONE)


BENT = {
    "sd15": {"guidance_rescale": 0.7},
    "sdxl": {"guidance_rescale": 0.7},
    "qwen": {},  # its guidance keeps the norm of the prompt's own prediction
    "zimage": {"cfg_normalization": 0.6, "cfg_truncation": 0.4},
}


@pytest.mark.parametrize(
    "family", [*(pytest.param(f, marks=pytest.mark.long) for f in ("sd15", "sdxl")), "qwen", "zimage"]
)
def test_guidance_that_is_not_linear_acts_on_the_averages(family):
    pipe, loras = families.pipe(family, torch.float64), families.loras(family)
    make = families.call(family, True, 1, 2, 3, **BENT[family])
    expected = dense.reference(pipe, loras, families.WEIGHTS, "composite", make)
    with composing(pipe, list(loras), "composite", weights=families.WEIGHTS):
        picture = make(pipe)
    # Z-Image's pipeline rounds to float32 between the steps.
    assert scene.apart(picture, expected) < (ONE if family == "zimage" else 1e-10)
    assert scene.apart(picture, make(pipe)) > 0.02
    if BENT[family]:
        linear = families.call(family, True, 1, 2, 3)
        assert scene.apart(picture, dense.reference(pipe, loras, families.WEIGHTS, "composite", linear)) > 0.02


# -- prompt encodings -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "method"), rows(FAMILIES, ["composite", "switch"], quick=lambda f, m: m == "composite")
)
def test_text_of_each_row_is_its_own_encoding(family, method):
    """Passes in turn get what dense text encoders, run apart, say under that row."""
    pipe, loras = families.pipe(family), families.loras(family)
    make = families.call(family, True, 2, 2)
    options = {"every": 1} if method == "switch" else {"passes_per_call": 1}
    with (
        scene.listening(scene.denoiser(pipe)) as runs,
        composing(pipe, list(loras), method, weights=families.WEIGHTS, **options),
    ):
        make(pipe)
    known = dense.Dense(pipe, loras, families.WEIGHTS, make)
    calls = 2 if family in ("flux", "qwen") else 1
    assert len(runs) == 2 * calls * (2 if method == "composite" else 1)
    for i, run in enumerate(runs):
        call, lora = divmod(i, 2) if method == "composite" else (i, i // calls)
        row = tuple(w if j == lora else 0.0 for j, w in enumerate(families.WEIGHTS))
        wanted = known.texts(row)[call]
        given = dense.texts_of(run)
        assert given.keys() == wanted.keys() != set()
        for name, value in wanted.items():
            assert dense.relative(given[name], value) < ONE, (i, name)
            assert dense.relative(value, known.texts((0.0, 0.0))[call][name]) > 1e-3, name


@pytest.mark.parametrize(
    ("family", "encoder", "moved"),
    [
        ("sd15", "text_encoder", {"encoder_hidden_states"}),
        ("sdxl", "text_encoder", {"encoder_hidden_states"}),
        ("sdxl", "text_encoder_2", {"encoder_hidden_states", "added_cond_kwargs.text_embeds"}),
        ("sd3", "text_encoder", {"encoder_hidden_states", "pooled_projections"}),
        ("sd3", "text_encoder_2", {"encoder_hidden_states", "pooled_projections"}),
        ("sd3", "text_encoder_3", {"encoder_hidden_states"}),
        ("flux", "text_encoder", {"pooled_projections"}),
        ("flux", "text_encoder_2", {"encoder_hidden_states"}),
        ("qwen", "text_encoder", {"encoder_hidden_states"}),
        ("zimage", "text_encoder", {"cap_feats"}),
    ],
)
def test_every_text_encoder_takes_its_part(family, encoder, moved):
    """A LoRA on one text encoder alone moves what that one says, as a dense one does, and nothing else."""
    pipe = families.pipe(family)
    lora = families.loras(family)[0]
    lora = Lora({k: p for k, p in lora.items() if k.startswith((f"{encoder}.", "transformer.", "unet."))}, lora.card)
    make = families.call(family, True, steps=1)
    known = dense.Dense(pipe, [lora], [0.9], make)
    with scene.listening(scene.denoiser(pipe)) as runs, composing(pipe, [lora], "composite", weights=[0.9]):
        make(pipe)
    for call, run in enumerate(runs):
        given, base = dense.texts_of(run), known.texts((0.0,))[call]
        assert {n for n in base if dense.relative(given[n], base[n]) > 1e-3} == moved
        for name in moved:
            assert dense.relative(given[name], known.texts((0.9,))[call][name]) < ONE


def test_prompts_of_the_caller_stay_as_they_are():
    """Z-Image's encode_prompt writes its template into the list that it is given."""
    pipe, loras = families.pipe("zimage"), families.loras("zimage")
    prompts = list(families.PROMPTS)
    options = {**families.ALWAYS["zimage"], "guidance_scale": 0.0, "num_inference_steps": 2, "output_type": "latent"}
    with composing(pipe, list(loras), "composite"):
        first = pipe(prompts, generator=torch.Generator().manual_seed(0), **options).images
        assert prompts == families.PROMPTS
        assert torch.equal(pipe(prompts, generator=torch.Generator().manual_seed(0), **options).images, first)


def test_embeddings_after_a_prompt_are_not_the_old_prompt():
    """Z-Image encodes nothing when embeddings are given; the text of the picture before must not come back."""
    pipe, loras = families.pipe("zimage"), families.loras("zimage")
    embeds, negative = pipe.encode_prompt("another text", negative_prompt="bad", max_sequence_length=64)
    options = {**families.ALWAYS["zimage"], "num_inference_steps": 2, "output_type": "latent", "guidance_scale": 4.0}
    given = {"prompt_embeds": embeds, "negative_prompt_embeds": negative, **options}

    def from_embeddings():
        return pipe(generator=torch.Generator().manual_seed(1), **given).images

    bare = [Lora({k: p for k, p in x.items() if k.startswith("transformer.")}, x.card) for x in loras]
    with composing(pipe, bare, "composite"):
        expected = from_embeddings()
    with composing(pipe, list(loras), "composite"):
        families.call("zimage")(pipe)
        with pytest.warns(UserWarning, match="embeddings"):
            picture = from_embeddings()
    assert scene.apart(picture, expected) < ONE


# -- which half is negative -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "images"), rows(FAMILIES, [1, 2], quick=lambda f, n: n == 2))
def test_positive_only_spares_the_negative_half(family, images):
    """Each call against dense models: merged for the positive samples, the base for the negative ones."""
    options = {"cfg_truncation": 0.4} if family == "zimage" else {}  # its second call has no negative half
    _positive_only(family, families.loras(family, False), families.call(family, True, 1, images, **options), images)


def test_positive_only_where_the_model_joins_the_tokens_of_all_samples():
    pipe = families.pipe("zimage")
    loras = [
        tiny.lora_for(pipe, rank=3, seed=i, strength=2.0, modules=["all_x_embedder.2-1", "cap_embedder.1", "to_q"])
        for i in range(2)
    ]
    assert any("all_x_embedder" in key for key in loras[0])
    for images in (1, 2):
        _positive_only("zimage", loras, families.call("zimage", True, 1, images), images)


def _positive_only(family, loras, make, images):
    pipe = families.pipe(family)
    known = dense.Dense(pipe, loras, families.WEIGHTS, make)
    known.prepare()
    members = [member(pipe, x, weight=w, positive_only=True) for x, w in zip(loras, families.WEIGHTS, strict=True)]
    differences, calls = [], []

    def answer(args, kwargs):
        arguments = dense.by_name(known.own, args, kwargs)
        known.advance(arguments)
        merged, base = (dense.tensors(known.run(m, arguments)[0]) for m in ("merge", "base"))
        if not isinstance(known.run("base", arguments)[0], list):
            merged, base = merged[0], base[0]
        calls.append(len(merged))
        if family in ("flux", "qwen"):
            wanted = list(merged if len(calls) % 2 == 1 else base)
        elif len(merged) == images:
            wanted = list(merged)
        elif family == "zimage":
            wanted = [*merged[:images], *base[images:]]
        else:
            wanted = [*base[:images], *merged[images:]]
        got = list(known.own(*copy.deepcopy(args), **copy.deepcopy(kwargs))[0])
        differences.append(dense.relative(got, wanted))
        assert dense.relative(list(merged), list(base)) > 0.02
        return known.run("merge", arguments)

    with composing(pipe, members, "merge"), dense.standing(pipe, known.name, dense.Stand(known.own, answer)):
        make(pipe)
    assert max(differences) <= ONE, differences


# -- masks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_mask_acts_per_latent_position(family):
    """Within its mask the merged model's prediction, outside of it the base's, of both pictures, in every layout."""
    pipe, lora = families.pipe(family), families.loras(family, False)[:1]
    make = families.call(family, True, 1, 2)
    known = dense.Dense(pipe, lora, [1.0], make)
    known.prepare()
    mask = torch.zeros(32, 32)
    mask[:8, 16:] = 1.0  # not symmetric: rows and columns must not be exchanged
    differences, effects = [], []

    def answer(args, kwargs):
        arguments = dense.by_name(known.own, args, kwargs)
        known.advance(arguments)
        merged, base = (dense.tensors(known.run(m, arguments)[0]) for m in ("merge", "base"))
        got = dense.tensors(known.own(*copy.deepcopy(args), **copy.deepcopy(kwargs))[0])
        cells = 4 if family in ("flux", "qwen") else 8
        inside = mask[:: 32 // cells, :: 32 // cells].bool()
        inside = inside.reshape(1, -1, 1) if cells == 4 else inside
        wanted = [torch.where(inside, m, b) for m, b in zip(merged, base, strict=True)]
        differences.append(dense.relative(got, wanted))
        effects.append(dense.relative(wanted, base))
        return known.run("merge", arguments)

    masked = [member(pipe, lora[0], weight=1.0, mask=mask)]
    with composing(pipe, masked, "merge"), dense.standing(pipe, known.name, dense.Stand(known.own, answer)):
        make(pipe)
    assert max(differences) <= ONE, differences
    assert min(effects) > 0.01, effects
