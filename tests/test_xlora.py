"""X-LoRA through PEFT: its forward by hand, weights per token that sum to one also under top-k, refusals."""

import copy
import json
import shutil

import pytest
import torch
from peft import PeftConfig, XLoraConfig, get_peft_model
from safetensors.torch import save_file

from multilora import files
from multilora.pipelines.text import composing_text
from multilora.pipelines.xlora import load_xlora, token_weights
from tests import handgate, handloop, tiny_text

IDS = torch.tensor([[3, 9, 4, 11, 5, 7], [8, 3, 3, 20, 6, 10]])


def _base():
    return copy.deepcopy(tiny_text.model("llama"))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with three experts and an X-LoRA of PEFT's own making for each kind of its settings."""
    folder = tmp_path_factory.mktemp("xlora")
    for i, lora in enumerate(tiny_text.loras("llama", 3)):
        files.save(lora, folder / f"e{i}", format="peft", dtype=torch.float32, base=_base())
    kinds = {"dense": {}, "top": {"top_k_lora": 2, "enable_softmax": False, "enable_softmax_topk": True},
             "slip": {"top_k_lora": 2}}  # fmt: skip
    for name, more in kinds.items():
        base = _base()
        base.config.use_cache = False
        config = XLoraConfig(
            task_type="CAUSAL_LM", hidden_size=base.config.hidden_size, layerwise_scalings=True,
            adapters={str(i): str(folder / f"e{i}") for i in range(3)}, **more,
        )  # fmt: skip
        model = get_peft_model(base, config)
        with torch.no_grad():
            for i, p in enumerate(model.base_model.internal_xlora_classifier.parameters()):
                p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
        model.save_pretrained(folder / name)
        held = {k: t.contiguous() for k, t in model.state_dict().items() if "internal_xlora_classifier" in k}
        save_file(held, folder / name / "adapter_model.safetensors")  # PEFT leaves the classifier out
    return folder


def _by_hand(folder, name):
    """(logits, weights): the base's hidden state through the classifier, then every layer as a loop over experts."""
    from safetensors.torch import load_file

    base = _base()
    loras = [handloop.factors(files.load(folder / f"e{i}", base=base)) for i in range(3)]
    tensors = load_file(folder / name / "adapter_model.safetensors")
    weight, bias = (next(t for k, t in tensors.items() if k.endswith(end)) for end in ("weight", "bias"))
    with torch.no_grad():
        hidden = base(IDS, output_hidden_states=True).hidden_states[-1]
        logits = (hidden @ weight.T + bias).reshape(2, 6, -1, 3)
        if name == "top":
            least = logits.sort(-1).values[..., 1:2]
            kept = torch.where(logits >= least, logits.exp(), torch.zeros(()))
            weights = kept / kept.sum(-1, keepdim=True)
        else:
            weights = handgate.softmax(logits)
        # PEFT numbers the layers as modules() meets them
        paths = [p for p, _ in base.named_modules() if any(p in lora for lora in loras)]
        model = handgate.gated_copy(base, loras, lambda path, x, parts: weights[:, :, paths.index(path)])
        return model(IDS).logits, weights


@pytest.mark.parametrize("name", ["dense", "top"])
def test_it_runs_as_the_paper_has_it_and_weights_sum_to_one(made, name):
    """The original repository's top-k softmax shared one sum among all tokens; here each token has its own."""
    want, weights = _by_hand(made, name)
    running = load_xlora(made / name, _base())
    with torch.no_grad():
        got = running(IDS).logits
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    found = token_weights(running)
    torch.testing.assert_close(found, weights, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.sum(-1), torch.ones(found.shape[:-1]))
    assert ((found > 0).sum(-1) == (2 if name == "top" else 3)).all()
    assert handloop.relative(got, _base()(IDS).logits.detach()) > 0.05


def test_experts_of_any_names_and_in_other_places(made, tmp_path):
    """PEFT alone fails (KeyError) with other names than 0, 1, ...; here the names are the user's."""
    folder = tmp_path / "named"
    shutil.copytree(made / "dense", folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    config["adapters"] = {"fox": "gone/a", "robe": "gone/b", "hat": "gone/c"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"named: expert 'fox' at 'gone/a': no such folder .*experts=\{'fox'"):
        load_xlora(folder, _base())
    experts = {"fox": made / "e0", "robe": made / "e1", "hat": made / "e2"}
    with torch.no_grad():
        got = load_xlora(folder, _base(), experts=experts)(IDS).logits
    torch.testing.assert_close(got, _by_hand(made, "dense")[0], rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="experts fox given, wanted fox, robe, hat"):
        load_xlora(folder, _base(), experts={"fox": made / "e0"})


def test_generation_and_a_top_k_that_does_not_sum_to_one(made):
    with pytest.warns(UserWarning, match=r"slip: .*a token's weights do not sum to one"):
        running = load_xlora(made / "slip", _base())
    with pytest.raises(ValueError, match="has not run yet"):
        token_weights(running)
    said = running.generate(input_ids=IDS[:1], max_new_tokens=3, do_sample=False)
    assert said.shape == (1, 9)
    assert float(token_weights(running).sum(-1).max()) < 1
    with pytest.raises(ValueError, match="an X-LoRA weighs its own LoRAs"), composing_text(running, None, "merge"):
        pass
    with torch.no_grad():  # greedy, so each token follows from the whole text before it
        assert torch.equal(running(said[:, :-1]).logits.argmax(-1)[0, -3:], said[0, -3:])


def test_what_is_refused(made, tmp_path):
    base = _base()
    cases = {
        "e0": "peft_type='LORA', wanted XLORA; a LoRA is read by multilora.load",
        "none": "no adapter_config.json",
    }
    for name, message in cases.items():
        with pytest.raises(ValueError, match=message):
            load_xlora(made / name, base)
    with pytest.raises(ValueError, match=r"peft_type=XLORA, .*load_xlora"):
        files.load(made / "dense")
    with pytest.raises(ValueError, match="a causal language model, this is T5"):
        load_xlora(made / "dense", tiny_text.model("t5"))

    def other(name, tensors=None, expert=None, **change):
        folder = tmp_path / name
        shutil.copytree(made / "dense", folder)
        config = json.loads((folder / "adapter_config.json").read_text()) | change
        if expert:
            shutil.copytree(made / "e0", folder / "e0")
            about = json.loads((folder / "e0" / "adapter_config.json").read_text()) | expert
            (folder / "e0" / "adapter_config.json").write_text(json.dumps(about))
            config["adapters"]["0"] = "e0"
        (folder / "adapter_config.json").write_text(json.dumps(config))
        if tensors:
            save_file(tensors, folder / "adapter_model.safetensors")
        return folder

    for folder, message in (
        (other("wide", hidden_size=99), "wide: hidden_size is 99, this LlamaForCausalLM has"),
        (other("bare", adapters={}), "bare: adapters is {}"),
        (other("empty", {"a": torch.zeros(1)}), "holds 0 layers of the classifier, xlora_depth is 1"),
        (other("dora", expert={"use_dora": True}), "expert '0' is 'DoRA'; X-LoRA's are plain"),
    ):
        with pytest.raises(ValueError, match=message):
            load_xlora(folder, base)
    assert not hasattr(base, "peft_config")
    assert base.config.use_cache == tiny_text.model("llama").config.use_cache
    load_xlora(made / "dense", base)
    with pytest.raises(ValueError, match="carries adapters already"):
        load_xlora(made / "dense", base)
    assert PeftConfig.from_pretrained(made / "dense").adapters.keys() == {"0", "1", "2"}
