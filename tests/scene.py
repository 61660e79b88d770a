"""What the tests of options, lifecycle, hosts, composer and bad input share: pictures, witnesses of change."""

from __future__ import annotations

import copy
import hashlib
import inspect
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from multilora.lora import Lora
from tests import handloop, tiny

FAMILIES = ("sd15", "sd3", "flux")
PROMPT, NEGATIVE = "a fox", "blur"
LENGTHS = {"sd15": {}, "sdxl": {}, "sd3": {"max_sequence_length": 16}, "flux": {"max_sequence_length": 16}}


def family_of(pipe) -> str:
    names = {"StableDiffusionPipeline": "sd15", "StableDiffusion3Pipeline": "sd3", "FluxPipeline": "flux"}
    return {**names, "StableDiffusionXLPipeline": "sdxl"}[type(pipe).__name__]


def denoiser(pipe) -> nn.Module:
    return getattr(pipe, name_of(pipe))


def name_of(pipe) -> str:
    return "unet" if hasattr(pipe, "unet") else "transformer"


def loras(pipe, k: int = 2, text: bool = False, **options) -> list[Lora]:
    names = ("fox", "robe", "ink")
    return [tiny.lora_for(pipe, seed=i, text_encoder=text, name=names[i], **options) for i in range(k)]


def draw(pipe, seed: int = 0, steps: int = 3, guidance: float = 4.0, **options) -> Tensor:
    """Latents of one picture by the pipeline itself."""
    scale = {"true_cfg_scale": guidance} if family_of(pipe) == "flux" else {"guidance_scale": guidance}
    generator = torch.Generator().manual_seed(seed)
    wanted = {"prompt": PROMPT, "negative_prompt": NEGATIVE, "output_type": "latent", **scale, **options}
    lengths = LENGTHS[family_of(pipe)]
    return pipe(num_inference_steps=steps, generator=generator, **lengths, **wanted).images


def apart(a: Tensor, b: Tensor) -> float:
    """Relative Frobenius distance."""
    return float((a.double() - b.double()).norm() / b.double().norm())


def baked(pipe, sets, weights, text_weights=None):
    """A copy of the pipeline whose weights are W + sum_i w_i delta_i, by the reference that uses none of our code."""
    pipe = copy.deepcopy(pipe)
    factors = [handloop.factors(lora) for lora in sets]
    for component, module in list(pipe.components.items()):
        if not isinstance(module, nn.Module) or component == "vae":
            continue
        given = weights if component in ("unet", "transformer") or text_weights is None else text_weights
        setattr(pipe, component, handloop.dense(module, factors, given, component))
    return pipe


def pixels(image) -> Tensor:
    """The bytes of a PIL picture."""
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)


# -- witnesses ------------------------------------------------------------------------------------------------------


def modules(pipe) -> dict[str, nn.Module]:
    return {n: m for n, m in pipe.components.items() if isinstance(m, nn.Module)}


def digest(pipe) -> dict[str, str]:
    """sha256 of the bytes of all parameters and buffers, by component."""
    found = {}
    for component, module in modules(pipe).items():
        sha = hashlib.sha256()
        tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        for name in sorted(tensors):
            tensor = tensors[name].detach().cpu().contiguous()
            sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            sha.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
        found[component] = sha.hexdigest()
    return found


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_forward_hooks_with_kwargs")


def traces(pipe) -> dict[str, object]:
    """Everything that could be left behind: classes, hooks, attributes of instances, storage of every weight."""
    found: dict[str, object] = {"pipe": (type(pipe), tuple(sorted(pipe.__dict__)))}
    found["scheduler"] = (
        type(pipe.scheduler),
        tuple(sorted(n for n, v in vars(pipe.scheduler).items() if callable(v))),
    )
    for component, module in modules(pipe).items():
        for path, layer in module.named_modules():
            hooks = tuple(tuple(getattr(layer, h)) for h in _HOOKS)
            weights = tuple((n, p.data_ptr(), p.requires_grad) for n, p in layer._parameters.items() if p is not None)
            own = tuple(sorted(layer.__dict__))
            found[f"{component}.{path}"] = (type(layer), hooks, own, weights, layer.training)
    return found


class Witness:
    """A pipeline before something happened; `check()` afterwards."""

    def __init__(self, pipe):
        self.pipe = pipe
        self.before = draw(pipe)
        self.bytes, self.traces = digest(pipe), traces(pipe)

    def check(self, picture: bool = True) -> None:
        assert digest(self.pipe) == self.bytes
        now = traces(self.pipe)
        assert now.keys() == self.traces.keys()
        changed = {k: (self.traces[k], v) for k, v in now.items() if v != self.traces[k]}
        assert not changed, changed
        if picture:
            assert torch.equal(draw(self.pipe), self.before)


@contextmanager
def listening(module: nn.Module) -> Iterator[list[dict]]:
    """Every run of a denoiser inside the block: its arguments by name and its prediction, copied."""
    runs: list[dict] = []

    def hook(module, args, kwargs, output):
        names = list(inspect.signature(module.forward).parameters)
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        runs.append({**{n: _kept(v) for n, v in given.items()}, "out": _kept(output[0])})

    handle = module.register_forward_hook(hook, with_kwargs=True)
    try:
        yield runs
    finally:
        handle.remove()


def _kept(value):
    return value.detach().clone() if isinstance(value, Tensor) else copy.copy(value)


@contextmanager
def conducted(monkeypatch) -> Iterator[list[dict]]:
    """Every answer of the Conductor: the denoiser's arguments and the prediction that the pipeline gets."""
    from multilora.pipelines import denoise, inputs

    calls: list[dict] = []
    original = denoise.Conductor.__call__

    def spy(self, model, args, kwargs):
        given = {n: _kept(v) for n, v in inputs.bound_arguments(self.forward, args, kwargs).items()}
        answer = original(self, model, args, kwargs)
        calls.append({**given, "out": _kept(answer[0]), "row": self.bank.row, "clock": self.clock.step})
        return answer

    with monkeypatch.context() as patch:
        patch.setattr(denoise.Conductor, "__call__", spy)
        yield calls
