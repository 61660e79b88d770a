"""The laws of DESIGN section 10, for every method in route/: no method is named here, a file dropped there is tested.

A law is a distance that is 0 where it holds. Each promised law must hold on a U-Net and on a transformer; one that
holds on both although it was not promised is an error too (the record would say less than is true). Everything runs
in float64, so that "holds" and "does not" lie many orders of magnitude apart.
"""

import functools
import hashlib
import math
import sys
import textwrap
import threading

import pytest
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin

import multilora.route
from multilora.lora import Lora, LowRank
from multilora.method import LAWS, methods
from multilora.pipelines.composing import composing
from multilora.pipelines.denoise import Cancelled
from multilora.pipelines.families import TABLE
from tests import handloop, tiny

HOLDS = 1e-9  # relative, float64
WEIGHTS, STEPS = (0.9, 0.6, 1.1), 3
TOYS = ("sd15", "sd3")


class LinearDenoiser(ModelMixin, ConfigMixin):
    """A denoiser that is linear in its weights: one matrix over the whole latent."""

    @register_to_config
    def __init__(self, in_channels: int = 4, sample_size: int = 8, time_cond_proj_dim: int | None = None):
        super().__init__()
        self.matrix = torch.nn.Linear(in_channels * sample_size**2, in_channels * sample_size**2)

    def forward(self, sample, timestep, encoder_hidden_states=None, return_dict=True, **more):
        assert all(v is None for v in more.values())
        return (self.matrix(sample.flatten(1)).reshape(sample.shape),)


@pytest.fixture(scope="module", autouse=True)
def _():
    """The linear denoiser is called as a U-Net is: methods know its halves."""
    with pytest.MonkeyPatch.context() as patch:
        yield patch.setitem(TABLE, "LinearDenoiser", TABLE["UNet2DConditionModel"])


class Toy:
    """A pipeline with three LoRAs and what its denoiser answers under a method."""

    def __init__(self, family):
        self.family = family
        if family == "linear":
            self.pipe = tiny.sd15(torch.float64)
            self.pipe.unet = tiny.seeded(LinearDenoiser(), 7).to(torch.float64)
        else:
            self.pipe = getattr(tiny, family)(torch.float64)
        text = family != "linear"
        wanted = {"modules": ["matrix"]} if family == "linear" else {}
        self.loras = []
        for i, (rank, trigger) in enumerate(((2, "fox"), (4, "a wizard robe"), (3, "red"))):
            lora = tiny.lora_for(self.pipe, rank=rank, seed=i, text_encoder=text and i != 1, **wanted)
            self.loras.append(lora.replace(card=lora.card.replace(triggers=(trigger,))))

    def draw(self, pipe=None, latents=None, **more):
        """(answers of the denoiser over a few guided steps, the latents after them)."""
        pipe = pipe or self.pipe
        name = "unet" if hasattr(pipe, "unet") else "transformer"
        extra = {} if name == "unet" else {"max_sequence_length": handloop.T5_LENGTH}
        return pipe(
            handloop.PROMPT,
            negative_prompt=handloop.NEGATIVE,
            guidance_scale=3.0,
            height=32,
            width=32,
            num_inference_steps=STEPS,
            latents=self.noise() if latents is None else latents,
            output_type="latent",
            **extra,
            **more,
        ).images

    def noise(self):
        channels = 8 if self.family == "sd3" else 4
        return torch.randn(1, channels, 8, 8, generator=torch.Generator().manual_seed(3)).double()

    def recorded(self, pipe):
        name = "unet" if hasattr(pipe, "unet") else "transformer"
        own = getattr(pipe, name)
        recorder = pipe.__dict__[name] = handloop.Recorder(own)
        try:
            latents = self.draw(pipe)
        finally:
            pipe.__dict__[name] = own
        return [*recorder.calls, latents]

    def composed(self, record, loras, weights):
        with composing(self.pipe, loras, record, weights=weights):
            return self.recorded(self.pipe)

    @functools.cached_property
    def base(self):
        return self.recorded(self.pipe)

    def usual(self, record):
        """The method on the three LoRAs at their weights."""
        return _usual(self, record)

    def dense(self, loras, weights):
        """The pipeline with W + sum_i w_i up_i @ down_i in every component, run as it is."""
        pipe = type(self.pipe)(**self.pipe.components, **_plain(self.pipe))
        numbers = [handloop.factors(lora) for lora in loras]
        for name in {key.split(".", 1)[0] for lora in loras for key in lora}:
            module = handloop.dense(getattr(self.pipe, name), numbers, weights, name)
            pipe.__dict__[name] = module
        pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
        pipe.set_progress_bar_config(disable=True)
        return self.recorded(pipe)


def _plain(pipe):
    return {"requires_safety_checker": False} if "requires_safety_checker" in pipe.config else {}


@functools.cache
def toy(family):
    return Toy(family)


@functools.cache
def _usual(on, record):
    return on.composed(record, on.loras, WEIGHTS)


def distance(a, b):
    return max(handloop.relative(x, y) for x, y in zip(a, b, strict=True))


# -- the laws -------------------------------------------------------------------------------------------------------


def single(record, on):
    """One LoRA at weight w equals that LoRA alone at w."""
    return distance(on.composed(record, on.loras[:1], [0.7]), alone(on))


@functools.cache
def alone(on):
    return on.dense(on.loras[:1], [0.7])


def zero(record, on):
    """An empty set, and one in which every weight is 0, is the base to the bit."""
    for loras, weights in (([], []), (on.loras, [0.0] * 3)):
        if not all(torch.equal(x, y) for x, y in zip(on.composed(record, loras, weights), on.base, strict=True)):
            return math.inf
    return 0.0


def gauge(record, on):
    """(up inv(G), G down) changes nothing."""
    return distance(on.composed(record, regauged(on), WEIGHTS), on.usual(record))


@functools.cache
def regauged(on):
    generator = torch.Generator().manual_seed(5)

    def part(p):
        r = p.rank
        g = torch.eye(r).double() + 0.5 * torch.randn(r, r, generator=generator).double() / r**0.5
        down = (g @ p.down.double().flatten(1)).reshape(p.down.shape)
        return LowRank(down, p.up.double() @ torch.linalg.inv(g), kind=p.kind)

    return [Lora({key: part(p) for key, p in lora.items()}, lora.card) for lora in on.loras]


def permutation(record, on):
    """Reordering LoRAs together with their weights changes nothing."""
    order = (2, 0, 1)
    other = on.composed(record, [on.loras[i] for i in order], [WEIGHTS[i] for i in order])
    return distance(other, on.usual(record))


def mean_of_equals(record, on):
    """k equal LoRAs at 1/k equal one at 1."""
    one = on.composed(record, on.loras[:1], [1.0])
    return distance(on.composed(record, on.loras[:1] * 3, [1 / 3] * 3), one)


def linear(record, on):
    """On a denoiser linear in its weights: the sum of all LoRAs at their weights, or at weights / k."""
    found = on.usual(record)
    return min(distance(found, on.dense(on.loras, [w / k for w in WEIGHTS])) for k in (1, len(WEIGHTS)))


CHECKS = {f.__name__: f for f in (single, zero, gauge, permutation, mean_of_equals, linear)}


def check(record, law):
    """Fail when the record's promise about this law is not the truth."""
    families = ("linear",) if law == "linear" else TOYS
    far = max(CHECKS[law](record, toy(family)) for family in families)
    promised = law in record.laws
    assert far <= HOLDS or not promised, f"{record.name} promises {law!r}, but is {far:.1e} away from it"
    assert far > HOLDS or promised, f"{record.name} satisfies {law!r} ({far:.1e}) and does not promise it"


def cases():
    return [(name, law) for name in methods("route") for law in LAWS]


@pytest.mark.parametrize(("name", "law"), cases())
def test_law(name, law):
    check(methods("route")[name], law)


def test_every_law_has_a_check_and_every_method_promises_the_first_three():
    assert set(CHECKS) == set(LAWS)
    for record in methods("route").values():
        assert {"single", "zero", "gauge"} <= set(record.laws), record.name


# -- a file dropped into the folder ---------------------------------------------------------------------------------

DROPPED = """
    from multilora.method import method
    from multilora.plan import Pass, one_hot

    @method(title="The strongest LoRA only", paper="none", cost="1", laws={laws})
    def strongest(loras):
        def plan(moment):
            best = max(range(len(loras)), key=lambda i: moment.weights[i]) if {sound} else 0
            return [Pass(one_hot(moment.weights, best) if {sound} else (0.5,) * len(loras))]
        return plan
"""
TRUE_LAWS = ("single", "zero", "gauge", "permutation")


@pytest.fixture
def drop(tmp_path, monkeypatch):
    """A function that puts a method file into the route package for one test."""

    def dropped(laws, sound=True):
        (tmp_path / "strongest.py").write_text(textwrap.dedent(DROPPED.format(laws=laws, sound=sound)))
        monkeypatch.setattr(multilora.route, "__path__", [*multilora.route.__path__, str(tmp_path)])
        return methods("route")["strongest"]

    yield dropped
    sys.modules.pop("multilora.route.strongest", None)
    vars(multilora.route).pop("strongest", None)


def test_a_dropped_file_is_a_method_and_is_tested(drop):
    record = drop(TRUE_LAWS)
    assert [law for name, law in cases() if name == "strongest"] == list(LAWS)
    for law in LAWS:
        check(record, law)


def test_a_wrong_promise_is_caught(drop):
    record = drop((*TRUE_LAWS, "mean_of_equals", "linear"))
    for law in ("mean_of_equals", "linear"):
        with pytest.raises(AssertionError, match=f"strongest promises '{law}', but"):
            check(record, law)


def test_a_missing_promise_is_caught(drop):
    record = drop(("single", "zero", "gauge"))
    with pytest.raises(AssertionError, match="satisfies 'permutation'"):
        check(record, "permutation")


def test_a_method_that_ignores_the_weights_is_caught(drop):
    record = drop(TRUE_LAWS, sound=False)
    with pytest.raises(AssertionError, match="promises 'single'"):
        check(record, "single")


# -- nothing stays behind -------------------------------------------------------------------------------------------

KINDS = ("merge", "composite", "arrow", "stale_sum")  # one pass, several, a gate, a plan with predictions of its own


def hosts():
    """Every method on the U-Net; one of each kind on the transformer too, the others there in the long tests."""
    return [
        pytest.param(name, family, marks=pytest.mark.long if family != TOYS[0] and name not in KINDS else ())
        for name in methods("route")
        for family in TOYS
    ]


def state_of(pipe):
    """sha256 over every component's weights, and what else a composition touches."""
    digest, hooks = hashlib.sha256(), 0
    for name, module in sorted(pipe.components.items()):
        if isinstance(module, torch.nn.Module):
            for key, tensor in module.state_dict().items():
                digest.update(f"{name}.{key}".encode())
                digest.update(tensor.contiguous().numpy().tobytes())
            hooks += sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules())
    denoiser = getattr(pipe, "unet", None) or pipe.transformer
    overridden = [name for name in ("set_timesteps", "step") if name in pipe.scheduler.__dict__]
    return digest.hexdigest(), hooks, type(denoiser), "encode_prompt" in pipe.__dict__, overridden


class Interrupted(Exception):
    pass


@pytest.mark.parametrize(("name", "family"), hosts())
def test_base_is_untouched_after_success_error_cancel_and_interrupt(name, family):
    on = toy(family)
    pipe = on.pipe
    plain = on.base[-1]  # first: transformers hangs hooks of its own on a text encoder when it first runs
    before = state_of(pipe)
    denoiser = getattr(pipe, "unet", None) or pipe.transformer
    step = hash((name, family)) % STEPS  # another one in each test process
    with composing(pipe, on.loras, name, weights=WEIGHTS):
        assert not torch.equal(on.draw(), plain)
    assert state_of(pipe) == before

    def at(step, act):
        def callback(pipe, i, t, tensors):
            if i == step:
                act()
            return tensors

        return callback

    def raise_(error):
        raise error

    cancel = threading.Event()
    endings = [
        (Interrupted, at(step, lambda: raise_(Interrupted())), None),
        (KeyboardInterrupt, at(step, lambda: raise_(KeyboardInterrupt())), None),
        (Cancelled, at(min(step, STEPS - 2), cancel.set), cancel),
    ]
    for error, callback, flag in endings:
        with pytest.raises(error), composing(pipe, on.loras, name, weights=WEIGHTS, cancel=flag):
            on.draw(callback_on_step_end=callback)
        assert state_of(pipe) == before, error.__name__
    # An error from inside a forward, while rows, hooks and merged weights are in place.
    inside, calls = list(denoiser.modules())[-1], []

    def broken(*_):
        calls.append(1)
        if len(calls) > step:
            raise Interrupted

    with pytest.raises(Interrupted), composing(pipe, on.loras, name, weights=WEIGHTS):
        handle = inside.register_forward_hook(broken)
        try:
            on.draw()
        finally:
            handle.remove()
    assert state_of(pipe) == before, "error in a forward"
    assert torch.equal(on.draw(), plain)


@pytest.mark.parametrize(("name", "family"), hosts())
def test_users_in_threads_get_what_they_would_have_got_alone(name, family):
    """Two users with different LoRAs and one without any, on one pipeline at once."""
    on = toy(family)
    users = [(on.loras, WEIGHTS), (on.loras[1:], (1.0, 0.5)), ([], [])]

    def picture(user):
        loras, weights = users[user]
        with composing(on.pipe, loras, name, weights=weights):
            return on.draw()

    alone = [picture(user) for user in range(3)]
    assert not torch.equal(alone[0], alone[1])
    assert not torch.equal(alone[0], alone[2])
    together, errors = {}, []
    barrier = threading.Barrier(3)

    def work(user):
        try:
            barrier.wait(timeout=60)
            together[user] = picture(user)
        except BaseException as error:
            errors.append(error)
            raise

    threads = [threading.Thread(target=work, args=(user,)) for user in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=300)
    assert not errors
    for user in range(3):
        assert torch.equal(together[user], alone[user]), f"user {user}"
