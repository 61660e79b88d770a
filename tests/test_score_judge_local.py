"""A local model as the judge: it answers as its own forward pass does, and models that cannot judge are refused."""

import pytest
import torch
from PIL import Image

from multilora.lab.score.record import resolve
from tests.judge_server import GREY


def vlm(folder, seed, template=True):
    """A LLaVA of random weights whose whole vocabulary is verdicts: whatever it writes can be read."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        PreTrainedTokenizerFast,
    )

    words = ["<pad>", "<s>", "</s>", "<image>", "<unk>", "VERDICT:", "A", "B", "TIE"]
    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        additional_special_tokens=["<image>"],
    )  # fmt: skip
    images = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    talk = (
        "{% for m in messages %}{% for part in m['content'] %}{% if part['type'] == 'image' %}<image> {% else %}"
        "{{ part['text'] }} {% endif %}{% endfor %}{% endfor %}VERDICT:"
    )
    processor = LlavaProcessor(images, tokenizer, 8, "default", chat_template=talk if template else None,
                               num_additional_image_tokens=1)  # fmt: skip
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**shape, image_size=16, patch_size=8),
        text_config=LlamaConfig(**shape, vocab_size=len(words), num_key_value_heads=2, pad_token_id=0, bos_token_id=1,
                                eos_token_id=2),
        image_token_index=3, vision_feature_layer=-1,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(4.0)  # answers that depend on the pictures
        model.lm_head.weight[:6] = 0.0
        model.lm_head.weight[8] = -model.lm_head.weight[6] - model.lm_head.weight[7]  # one of the three is above 0
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


def by_hand(folder, question, pictures):
    """The first word of the greedy answer, from one forward pass over inputs put together here."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model, processor = AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    pixels = processor.image_processor(list(pictures), return_tensors="pt")["pixel_values"]
    words = ("<image> " * 8 + question + " VERDICT:").split()  # 4 patches a picture
    vocabulary = processor.tokenizer.get_vocab()
    ids = torch.tensor([[vocabulary.get(word, vocabulary["<unk>"]) for word in words]])
    with torch.no_grad():
        logits = model(input_ids=ids, pixel_values=pixels).logits[0, -1]
    return processor.tokenizer.convert_ids_to_tokens([int(logits.argmax())])[0], ids.shape[1]


def test_a_local_model_answers_as_its_own_forward_pass_does(tmp_path):
    folder = vlm(tmp_path, seed=1)
    judge = resolve("judge", model=folder).source
    judge.answerer.output_tokens = 1
    pictures = [Image.effect_noise((20, 24), 90).convert("RGB"), GREY[3], GREY[11], Image.new("RGB", (16, 16), "red")]
    pairs = [(a, b, f"prompt {i}") for i, a in enumerate(pictures) for b in pictures[:i]]
    verdicts = list(judge.compare(pairs))
    names = {"A": ("first", "second"), "B": ("second", "first"), "TIE": ("tie", "tie")}
    for (a, b, prompt), verdict in zip(pairs, verdicts, strict=True):
        straight, length = by_hand(folder, judge.question(prompt), (a, b))
        turned, _ = by_hand(folder, judge.question(prompt), (b, a))
        assert verdict.answers == (names[straight][0], names[turned][1])
    assert len({answer for v in verdicts for answer in v.answers}) == 3  # it does look
    assert judge.tally.calls == 12
    assert judge.tally.unreadable == 0
    told = judge.estimate([prompt for *_, prompt in pairs], size=(20, 24))
    assert told.input_tokens == judge.tally.input_tokens  # exact, not about
    assert judge.answerer.input_tokens(judge.question("prompt 1"), [(20, 24)] * 2) == length
    assert "LlavaForConditionalGeneration" in judge.model


def test_local_models_that_cannot_judge_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"has no config\.json.*give its url too"):
        resolve("judge", model=str(tmp_path)).load()
    with pytest.raises(ValueError, match="no chat template"):
        resolve("judge", model=vlm(tmp_path / "mute", seed=0, template=False)).load()
