"""Denoisers in quantised form, and the same in the hands of a reference that knows none of our code.

    quantised(pipe, kind, folder)   a pipeline whose denoiser is quantised by the library that `kind` names
    by_hand(pipe, sets)             rows by hand: every adapted layer's own output plus x times the dense update
    raw(module)                     sha256 of the numbers that a module holds, packed or not

bitsandbytes' layers are put in by hand: diffusers' loader for them asks for a GPU, the layers themselves do not.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from tests import handloop, scene

KINDS = (
    "quanto int8", "quanto float8", "torchao int8", "torchao float8", "bitsandbytes nf4", "bitsandbytes fp4",
    "bitsandbytes int8", "gguf Q8_0", "gguf Q5_1", "gguf Q4_0",
)  # fmt: skip


def quantised(pipe, kind: str, folder):
    """The pipeline with its denoiser quantised; `folder` is an empty one for files."""
    library, how = kind.split()
    model = scene.denoiser(pipe)
    made = {"quanto": _quanto, "torchao": _torchao, "bitsandbytes": _bitsandbytes, "gguf": _gguf}[library]
    if library != "bitsandbytes":
        model.save_pretrained(folder)
    setattr(pipe, scene.name_of(pipe), made(model, how, folder).eval().requires_grad_(False))
    return pipe


def _quanto(model, how, folder):
    from diffusers import QuantoConfig

    return type(model).from_pretrained(folder, quantization_config=QuantoConfig(how), dtype=torch.float32)


def _torchao(model, how, folder):
    from diffusers import TorchAoConfig
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig

    config = TorchAoConfig({"int8": Int8WeightOnlyConfig, "float8": Float8WeightOnlyConfig}[how]())
    return type(model).from_pretrained(folder, quantization_config=config, dtype=torch.float32)


def _bitsandbytes(model, how, folder):
    import bitsandbytes as bnb

    model = copy.deepcopy(model)
    for path, linear in list(model.named_modules()):
        if type(linear) is not nn.Linear:
            continue
        shape = {"input_features": linear.in_features, "output_features": linear.out_features}
        shape["bias"] = linear.bias is not None
        if how == "int8":
            new = bnb.nn.Linear8bitLt(**shape, has_fp16_weights=False)
            new.weight = bnb.nn.Int8Params(linear.weight.data, requires_grad=False, has_fp16_weights=False)
        else:
            new = bnb.nn.Linear4bit(**shape, compute_dtype=torch.float32, quant_type=how)
            new.weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type=how)
            # On processors with AVX512-BF16 it packs weights for bfloat16 at the first call, which fails for layers
            # that are narrower than a block of 64, as some here are.
            new.support_avx512bf16_for_cpu = False
        new.bias = linear.bias
        parent, _, name = path.rpartition(".")
        model.get_submodule(parent)._modules[name] = new.to("cpu")
    return model


def _gguf(model, how, folder):
    import gguf
    from diffusers import GGUFQuantizationConfig

    path = folder / "model.gguf"
    writer = gguf.GGUFWriter(path, "multilora")
    linears = {f"{n}.weight" for n, m in model.named_modules() if type(m) is nn.Linear}
    for key, tensor in model.state_dict().items():
        kind = gguf.GGMLQuantizationType[how]
        if key in linears and tensor.shape[1] % gguf.GGML_QUANT_SIZES[kind][0] == 0:
            writer.add_tensor(key, gguf.quants.quantize(tensor.numpy(), kind), raw_dtype=kind)
        else:
            writer.add_tensor(key, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    config = GGUFQuantizationConfig(compute_dtype=torch.float32)
    return type(model).from_single_file(str(path), config=str(folder), quantization_config=config, dtype=torch.float32)


# -- the reference --------------------------------------------------------------------------------------------------


class Rows:
    """Forward hooks that add row_i * delta_i x to the output of every adapted linear, in float64."""

    def __init__(self, model: nn.Module, component: str, sets):
        self.row = [0.0] * len(sets)
        self.handles = []
        for path, module in model.named_modules():
            parts = [handloop.factors(lora).get(f"{component}.{path}") for lora in sets]
            if any(part is not None for part in parts):
                deltas = [None if p is None else p[1].double() @ p[0].double() for p in parts]
                self.handles.append(module.register_forward_hook(self._added(deltas)))
        assert self.handles

    def _added(self, deltas):
        def hook(module, args, output):
            x = args[0].double()
            wanted = sum(w * (x @ d.T) for w, d in zip(self.row, deltas, strict=True) if d is not None)
            return (output.double() + wanted).to(output.dtype)

        return hook


@contextmanager
def by_hand(pipe, sets, method: str, calls_per_step: int) -> Iterator[None]:
    """Merge, Switch (every=1) or Composite written out, for LoRAs at weight 1 on the denoiser."""
    model, k = scene.denoiser(pipe), len(sets)
    rows, forward, count = Rows(model, scene.name_of(pipe), sets), model.forward, 0

    def one(i, args, kwargs):
        rows.row = [1.0 if j == i else 0.0 for j in range(k)]
        return forward(*args, **kwargs)

    def run(*args, **kwargs):
        nonlocal count
        step, count = count // calls_per_step, count + 1
        if method == "merge":
            rows.row = [1.0] * k
            return forward(*args, **kwargs)
        if method == "switch":
            return one(step % k, args, kwargs)
        outputs = [one(i, args, kwargs) for i in range(k)]
        return (sum(output[0] for output in outputs) / k,)

    model.forward = run
    try:
        yield
    finally:
        del model.forward
        for handle in rows.handles:
            handle.remove()


# -- witnesses ------------------------------------------------------------------------------------------------------


def _pieces(name: str, value) -> Iterator[tuple[str, Tensor]]:
    if hasattr(value, "__tensor_flatten__"):  # torchao and quanto: plain tensors inside one that only looks like one
        for inner in value.__tensor_flatten__()[0]:
            yield from _pieces(f"{name}.{inner}", getattr(value, inner))
        return
    yield name, value.detach().as_subclass(Tensor)
    for extra in ("quant_state", "SCB"):
        held = getattr(value, extra, None)
        held = getattr(held, "absmax", held)
        if isinstance(held, Tensor):
            yield f"{name}.{extra}", held


def raw(module: nn.Module) -> str:
    """sha256 of all numbers that a module holds."""
    sha = hashlib.sha256()
    for name, value in {**dict(module.named_parameters()), **dict(module.named_buffers())}.items():
        for inner, tensor in _pieces(name, value):
            sha.update(f"{inner} {tensor.dtype} {tuple(tensor.shape)}".encode())
            sha.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()
