"""Tables of what can be wrong with the meaning of a LoRA file whose bytes are good: tensors, alphas, words about it.

A row changes a draft (tests/bad_files.py) in place: change(draft, component), and says the words of the refusal, in
which {down}, {up}, {alpha} stand for the keys of the changed layer and {layer} for its canonical path.
"""

import json

import torch

from tests.bad_files import PLACES, WIDTH


def place(component: str, role: str, n: int = 0):
    return component, PLACES[component][n], role


def _set(role, make):
    """The tensor of a role becomes make(it)."""
    return lambda d, c: d.update({place(c, role): make(d[place(c, role)].clone())})


def _one(value):
    def change(tensor):
        tensor.view(-1)[5] = value
        return tensor

    return change


def _drop(role):
    return lambda d, c: d.pop(place(c, role))


def _elsewhere(d, c):
    for role in ("down", "up"):
        d[c, PLACES[c][0].replace("0.", "7.", 1), role] = d.pop(place(c, role))


def _alpha(value):
    return lambda d, c: d.update({place(c, "alpha"): torch.tensor(value)})


def _extra(role, *shape):
    return lambda d, c: d.update({place(c, role): torch.ones(shape)})


TENSORS = {
    "no down": (_drop("down"), "{up} has no partner"),
    "no up": (_drop("up"), "{down} has no partner"),
    "ranks differ": (_set("down", lambda t: t[:3]), "key {down}: ranks differ"),
    "too narrow": (_set("down", lambda t: t[:, :-1]), "Key {layer}: expected a weight update of shape [32, 32]"),
    "too wide": (_set("down", lambda t: torch.cat([t, t], 1)), "found [32, 64]"),
    "too few outputs": (_set("up", lambda t: t[:-1]), "found [31, 32]"),
    "transposed": (_set("down", lambda t: t.T), "key {down}: ranks differ"),
    "down a number": (_set("down", lambda t: t[0, 0]), "key {down}: factors [] and [32, 4]"),
    "down a vector": (_set("down", lambda t: t[0]), "key {down}: factors [32] and [32, 4]"),
    "up a vector": (_set("up", lambda t: t[:, 0]), "key {down}: factors [4, 32] and [32]"),
    "3 x 3 kernel": (_set("down", lambda t: t[:, :, None, None].repeat(1, 1, 3, 3)), "found [32, 32, 3, 3]"),
    "kernel on up": (_set("up", lambda t: t[:, :, None, None].repeat(1, 1, 3, 3)), "key {down}: up [32, 4, 3, 3]"),
    "one NaN": (_set("down", _one(float("nan"))), "key {down} has 1 values that are NaN or infinite, of 128"),
    "one NaN in float16": (_set("up", lambda t: _one(float("nan"))(t.half())), "key {up} has 1 values that are NaN"),
    "one infinity": (_set("up", _one(float("inf"))), "key {up} has 1 values that are NaN or infinite, of 128"),
    "one minus infinity": (_set("up", _one(float("-inf"))), "key {up} has 1 values that are NaN or infinite"),
    "all NaN": (_set("down", lambda t: t * float("nan")), "key {down} has 128 values that are NaN or infinite"),
    "1e30": (_set("down", _one(1e30)), "{layer}: its down holds 1e+30, above the limit value=65504"),
    "-1e30": (_set("down", _one(-1e30)), "{layer}: its down holds 1e+30, above the limit value=65504"),
    "1e300 in float64": (_set("down", lambda t: _one(1e300)(t.double())), "above the limit value=65504"),
    "65505": (_set("up", _one(65536.0)), "{layer}: its up holds 6.55e+04, above the limit value=65504"),
    "10^4 times too large": (_set("up", lambda t: 1e4 * t), "of its update is above the limit norm=1000"),
    "rank 1025": (
        lambda d, c: d.update({place(c, "down"): torch.zeros(1025, WIDTH), place(c, "up"): torch.zeros(WIDTH, 1025)}),
        "{layer}: rank 1025 is above the limit rank=1024",
    ),
    "layer that is not there": (_elsewhere, "{match} modules match. Key {gone}: the base has no such layer"),
    "unknown end": (_extra("lora_C", 4, 32), "key {lora_C}: no name of a LoRA tensor"),
    "a whole weight": (_extra("weight", 32, 32), "key {weight}: no name of a LoRA tensor"),
    "int weight": (_set("up", lambda t: (100 * t).int()), "key {up} is torch.int32 (I32)"),
    "bool weight": (_set("up", lambda t: t > 0), "key {up} is torch.bool (BOOL)"),
    "float8 weight": (_set("up", lambda t: t.to(torch.float8_e4m3fn)), "key {up} is torch.float8_e4m3fn (F8_E4M3)"),
    "complex weight": (_set("up", lambda t: t.to(torch.complex64)), "key {up} is torch.complex64 (C64)"),
    "factors and a difference": (_extra("diff", 32, 32), "key {down}: two kinds of update for one layer"),
    "a bias too long": (_extra("diff_b", 33), "[33]"),
    "LoHa beside it": (_extra("hada_w1_a", 32, 4), "two kinds of update for one layer"),
    "LoKr beside it": (_extra("lokr_w1", 4, 4), "two kinds of update for one layer"),
    "a magnitude beside one layer": (_extra("dora_scale", 32, 1), "an incomplete DoRA, 1 of 2 layers"),
    "OFT": (_extra("oft_blocks", 4, 8, 8), "key {oft_blocks}: this is OFT, which is not read here"),
    "BOFT": (_extra("boft_R", 4, 8, 8), "key {boft_R}: this is BOFT, which is not read here"),
    "IA3": (_extra("ia3_l", 32, 1), "key {ia3_l}: this is IA3, which is not read here"),
    "VeRA": (_extra("vera_lambda_d", 4), "key {vera_lambda_d}: this is VeRA, which is not read here"),
    "modules_to_save": (_extra("modules_to_save.weight", 32, 32), "this is modules_to_save, which is not read here"),
    "trainable tokens": (_extra("trainable_tokens_delta", 2, 32), "this is trainable tokens, which is not read here"),
    "textual inversion": (_extra("emb_params", 2, 32), "this is textual inversion, which is not read here"),
    "GLoRA": (_extra("a1.weight", 4, 32), "this is GLoRA, which is not read here"),
}
# Alphas beside the factors, as kohya files have them.
ALPHAS = {
    "NaN": (_alpha(float("nan")), "key {alpha} has 1 values that are NaN or infinite, of 1"),
    "infinity": (_alpha(float("inf")), "key {alpha} has 1 values that are NaN or infinite, of 1"),
    "1e9": (_alpha(1e9), "alpha 1e+09 at rank 4 is a scale of 2.5e+08, the limit is 10000"),
    "-1e9": (_alpha(-1e9), "the limit is 10000"),
    "2^40 as a whole number": (_alpha(2**40), "the limit is 10000"),
    "too large for the norm": (_alpha(30_000.0), "of its update is above the limit norm=1000"),
    "a vector": (_alpha([4.0, 4.0, 4.0]), "its alpha has shape [3], wanted one number"),
    "a matrix": (_alpha([[4.0, 4.0]]), "its alpha has shape [1, 2], wanted one number"),
    "complex": (_alpha(4j), "key {alpha} is torch.complex64"),
    "alone": (
        lambda d, c: [d.pop(place(c, "down")), d.pop(place(c, "up")), _alpha(4.0)(d, c)],
        "an alpha without its factors",
    ),
}


def _whole(component: str, **roles):
    """The first layer of a component by other tensors than down and up."""

    def change(d, c):
        d.pop(place(c, "down"))
        d.pop(place(c, "up"))
        d.update({place(c, role): torch.ones(shape) * 0.01 for role, shape in roles.items()})

    return change


_LOHA = {"hada_w1_a": (32, 2), "hada_w1_b": (2, 32), "hada_w2_a": (32, 2), "hada_w2_b": (2, 32)}
_LOKR = {"lokr_w1": (4, 4), "lokr_w2_a": (8, 2), "lokr_w2_b": (2, 8)}


def _without(roles, *names, **others):
    return _whole("", **{n: s for n, s in {**roles, **others}.items() if n not in names})


PRODUCTS = {
    **{f"LoHa without {n}": (_without(_LOHA, n), n) for n in _LOHA},
    "LoHa of two ranks": (_without(_LOHA, hada_w1_b=(3, 32)), "ranks differ: hada_w1_a"),
    "LoHa of two shapes": (_without(_LOHA, hada_w2_b=(2, 31)), "different shapes"),
    "LoHa of another layer": (_without(_LOHA, hada_w1_b=(2, 30), hada_w2_b=(2, 30)), "found [32, 30]"),
    "LoHa of vectors": (_without(_LOHA, hada_w1_a=(32,)), "hada_w1_a has shape [32], wanted a matrix"),
    "LoHa with one core": (_without(_LOHA, hada_t1=(2, 2, 3, 3)), "hada_t2"),
    "LoHa of 10^10 values": (
        _without(_LOHA, hada_w1_a=(10**5, 1), hada_w1_b=(1, 10**5), hada_w2_a=(10**5, 1), hada_w2_b=(1, 10**5)),
        "would have 10,000,000,000 values, above the limit expanded=134,217,728",
    ),
    "LoKr without w1": (_without(_LOKR, "lokr_w1"), "lokr_w1"),
    "LoKr without w2_a": (_without(_LOKR, "lokr_w2_a"), "lokr_w2"),
    "LoKr without w2_b": (_without(_LOKR, "lokr_w2_b"), "lokr_w2"),
    "LoKr of two ranks": (_without(_LOKR, lokr_w2_b=(3, 8)), "ranks differ: lokr_w2_a"),
    "LoKr of another layer": (_without(_LOKR, lokr_w1=(4, 5)), "found [32, 40]"),
    "LoKr with w2 twice": (_without(_LOKR, lokr_w2=(8, 8)), "lokr_w2"),
    "LoKr of 10^10 values": (
        _without(_LOKR, "lokr_w2_a", "lokr_w2_b", lokr_w1=(316, 317), lokr_w2=(316, 317)),
        "above the limit expanded=134,217,728",
    ),
    "a difference of another shape": (_whole("", diff=(32, 31)), "found [32, 31]"),
    "a difference with 1e30": (
        lambda d, c: [_whole("", diff=(32, 32))(d, c), d[place(c, "diff")].fill_(1e30)],
        "its weight holds 1e+30, above the limit value=65504",
    ),
    "a core of another rank": (
        lambda d, c: [_extra("lora_mid.weight", 3, 3, 3, 3)(d, c)],
        "kernel",
    ),
}
_REDOS = "([a-z_.0-9]+)+X"
# PEFT configurations and diffusers' metadata that must be refused.
CONFIGS = {
    **{f"peft_type {k}": ({"peft_type": k}, f"peft_type={k}") for k in ("VERA", "IA3", "OFT", "PREFIX_TUNING")},
    "peft_type a number": ({"peft_type": 3}, "peft_type"),
    "modules_to_save": ({"modules_to_save": ["conv_in"]}, "sets modules_to_save"),
    "trainable_token_indices": ({"trainable_token_indices": [1, 2]}, "sets trainable_token_indices"),
    "layer_replication": ({"layer_replication": [[0, 4]]}, "sets layer_replication"),
    "target_parameters": ({"target_parameters": ["a"]}, "sets target_parameters"),
    "megatron": ({"megatron_config": {"a": 1}, "megatron_core": "os"}, "sets megatron_config"),
    "aLoRA": ({"alora_invocation_tokens": [1]}, "sets alora_invocation_tokens"),
    "pissa": ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
    "olora": ({"init_lora_weights": "olora"}, "init_lora_weights='olora'"),
    "use_dora": ({"use_dora": True}, "an incomplete DoRA: use_dora is set"),
    "use_dora a word": ({"use_dora": "no"}, "use_dora is 'no', wanted true or false"),
    "use_rslora a number": ({"use_rslora": 1}, "use_rslora is 1, wanted true or false"),
    **{f"r {r!r}"[:20]: ({"r": r}, f"rank {r}, its tensors have 4") for r in (2**31, 10**6, 0, -4, 8)},
    "r of 400 digits": ({"r": 10**400}, "wanted a number"),
    **{f"r {r!r}": ({"r": r}, "wanted a number") for r in ("4", [4], {"a": 4}, True)},
    "r NaN": ({"r": float("nan")}, "rank nan, its tensors have 4"),
    **{f"lora_alpha {a!r}": ({"lora_alpha": a}, "wanted a number") for a in ("8", [8], {}, True)},
    "lora_alpha infinite": ({"lora_alpha": float("inf")}, "alpha is a finite number"),
    "lora_alpha NaN": ({"lora_alpha": float("nan")}, "alpha is a finite number"),
    "lora_alpha 1e9": ({"lora_alpha": 1e9}, "the limit is 10000"),
    "lora_alpha of 400 digits": ({"lora_alpha": 10**400}, "wanted a number"),
    **{f"{n} a pattern": ({n: {_REDOS: 4}}, f"{n} {_REDOS}: only plain module paths are read")
       for n in ("rank_pattern", "alpha_pattern")},
    **{f"{n} a {type(v).__name__}": ({n: v}, f"{n} holds a {type(v).__name__}, wanted an object")
       for n in ("rank_pattern", "alpha_pattern") for v in ([1], "x", 3)},
    "rank_pattern of another rank": ({"rank_pattern": {"to_q": 8, "q_proj": 8}}, "rank 8, its tensors have 4"),
    "nested 9 deep": ({"x": [[[[[[[[[1]]]]]]]]]}, "nested too deep, the limit is json_depth=8"),
    "1 MB": ({"x": "y" * 10**6}, "above the limit text_bytes=1,000,000"),
}  # fmt: skip
# The text of metadata "lora_adapter_metadata" that must be refused.
TEXTS = {
    "no JSON": ("{", "is no JSON"), "empty": ("", "is no JSON"), "a web page": ("<html>", "is no JSON"),
    "a list": ("[1]", "holds a list"), "a text": ('"x"', "holds a str"), "null": ("null", "holds a NoneType"),
    "deep": ("[" * 100_000, "nested too deep"), "9 deep": ('{"a":' + "[" * 9 + "]" * 9 + "}", "json_depth=8"),
    "a name twice": ('{"unet.r":4,"unet.r":4}', "key unet.r occurs twice"),
    "number of 5,000 digits": ('{"unet.r":' + "1" * 5000 + "}", "no JSON that is read"),
}  # fmt: skip
# Metadata that must change nothing at all.
HARMLESS = {
    "html": {"name": "<img src=x onerror=alert(1)>"}, "javascript": {"a": "](javascript:alert(1))"},
    "own words deep": {"multilora": "[" * 50_000}, "own words a list": {"multilora": "[1]"},
    "own words no JSON": {"multilora": "{"}, "own words 5,000 digits": {"multilora": '{"a":' + "1" * 5000 + "}"},
    "tags no JSON": {"ss_tag_frequency": "{"}, "tags deep": {"ss_tag_frequency": "[" * 50_000},
    "tags 5,000 digits": {"ss_tag_frequency": '{"a":{"b":' + "1" * 5000 + "}}"},
    "tags of tags": {"ss_tag_frequency": '{"a":{"b":{"c":1}},"d":[1],"e":null}'},
    "kohya's rank": {"ss_network_dim": "2147483648", "ss_network_alpha": "1e9"},
    "kohya's module": {"ss_network_module": "os; import os"}, "surrogate": {"ss_output_name": "\ud800"},
    "half a megabyte": {"x": "y" * 500_000}, "empty name": {"": ""}, "bidi": {"ss_output_name": "\u202egpj.exe"},
    **{f"adapter {n}": {"lora_adapter_metadata": json.dumps({f"unet.{n}": v})} for n, v in {
        "lora_dropout": 0.5, "target_modules": ".*", "bias": "all", "unknown": {"a": [1]}, "inference_mode": False,
        "init_lora_weights": True, "exclude_modules": _REDOS, "fan_in_fan_out": True, "base_model_name_or_path": "/",
        "auto_mapping": {"parent_library": "os"}, "revision": "../..", "layers_pattern": _REDOS}.items()},
}  # fmt: skip
