"""The full-size table's counts: on the meta device what a real run at small size has, and by hand."""

import sys
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import full_size
from gpu_pictures import SMALL


def unet(device):
    with torch.device(device):
        return UNet2DConditionModel(**SMALL).eval()


def llama(device):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    with torch.device(device):
        return LlamaForCausalLM(LlamaConfig(vocab_size=50, **sizes)).eval()


def unet_costs(device):
    model = unet(device)
    pair, many = full_size.unet_call(model, 2), full_size.unet_call(model, 6)
    layers = full_size.adapted(model, full_size.BLOCKS)
    return [
        full_size.cost(pair), full_size.all_active(model, pair, layers, 3),
        full_size.composite(model, many, layers, 3), full_size.cached(model, pair, 3),
    ]  # fmt: skip


def llama_costs(device):
    model = llama(device)
    call, layers = full_size.llama_call(model, 3), full_size.adapted(model, full_size.LLAMA)
    return [full_size.cost(call), full_size.all_active(model, call, layers, 2)]


@pytest.mark.parametrize("costs", [unet_costs, llama_costs])
@torch.no_grad()
def test_the_meta_device_counts_what_a_real_run_does(costs):
    with sdpa_kernel(SDPBackend.MATH):  # the meta device has no fused attention
        assert costs("meta") == costs("cpu")


@torch.no_grad()
def test_the_arithmetic_of_a_token_is_that_of_its_matmuls():
    model, rank, k = llama("meta"), full_size.RANK, 3
    layers, call = full_size.adapted(model, full_size.LLAMA), full_size.llama_call(model)
    attention = 2 * 2 * 2 * 32  # queries by keys and by values, a token, two layers
    assert len(layers) == 14
    head = 32 * 50
    assert full_size.cost(call).flops == 2 * (full_size.numbers(layers) + head) + attention
    more = full_size.all_active(model, call, layers, k).flops - full_size.cost(call).flops
    assert more == 2 * k * rank * sum(sum(m.weight.shape) for m in layers.values())


def test_bytes_of_a_token_by_hand():
    layers = {"x": torch.nn.Linear(3, 5, bias=False)}
    found = full_size.decoding_bytes(15 + 10, layers, experts=4, top=2, rank=2)
    assert list(found.values()) == [(25 + 32) / 25, (25 + 96) / 25, (25 + 64) / 25, (25 + 30 + 32) / 25]
