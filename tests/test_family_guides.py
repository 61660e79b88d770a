"""The Python of docs/ runs as it stands there, block after block, with small models of random weights for the hub ids.

Put in place of the guides' names: pipelines by tests/tiny.py and tests/tiny_more.py, ControlNets by
tests/tiny_tasks.py, LoRA files that fit, three pictures. Nothing in a block is changed.
"""

import re
from pathlib import Path

import diffusers
import huggingface_hub
import pytest
import torch
from PIL import Image

import multilora as ml
from multilora.pipelines import load
from multilora.pipelines.image import Composed
from tests import tiny, tiny_more, tiny_tasks

DOCS = Path(__file__).parents[1] / "docs"
FAMILIES = sorted(p.stem for p in (DOCS / "families").glob("*.md") if p.stem != "table")
ELSEWHERE = {"merging": "tests/test_guide.py", "guider": "tests/test_guider_guide.py"}
OTHERS = sorted(
    p.stem for p in DOCS.glob("*.md") if p.stem not in ELSEWHERE and re.search(r"^```python$", p.read_text(), re.M)
)
OTHERS.append("guides/real_models")  # the other guides run on the embedded models: tests/test_docs.py
# Hub id -> (small pipeline, its name in tests/tiny_tasks.py)
BASES = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": (tiny.sd15, "sd15"),
    "stabilityai/stable-diffusion-xl-base-1.0": (tiny.sdxl, "sdxl"),
    "stabilityai/stable-diffusion-3.5-medium": (tiny_tasks.sd3, "sd3"),
    "stabilityai/stable-diffusion-3-medium-diffusers": (tiny_tasks.sd3, "sd3"),
    "black-forest-labs/FLUX.1-dev": (lambda: tiny.flux(guidance_embeds=True), "flux"),
    "black-forest-labs/FLUX.1-schnell": (tiny.flux, "flux"),
    "Qwen/Qwen-Image": (tiny_more.qwen_pipe, "qwen"),
    "Tongyi-MAI/Z-Image-Turbo": (tiny_more.z_pipe, "z"),
    "Tongyi-MAI/Z-Image": (tiny_more.z_pipe, "z"),
}
LORAS = ("fox", "robe", "lightning")


def blocks(path: Path) -> list[tuple[int, str]]:
    """(line, code) of every Python block."""
    text = path.read_text()
    return [
        (text[: found.start()].count("\n") + 2, found[1])
        for found in re.finditer(r"^```python\n(.*?)^```$", text, re.M | re.S)
    ]


@pytest.fixture
def small(tmp_path, monkeypatch):
    """Hub ids give small models; the working folder has their files. Returns what was loaded."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(load, "default_device", lambda: "cpu")
    loaded = []

    def from_pretrained(cls, name, **options):
        make, family = BASES[name]
        pipe = make()
        if family == "z":
            pipe.default_sample_size = 8
        absent = {key: options.pop(key) for key in list(options) if options[key] is None}
        pipe.register_modules(**absent)
        assert set(options) <= {"dtype", "torch_dtype"}, options
        assert options.get("dtype", torch.float32) == torch.float32
        if not loaded or loaded[-1][1] != family:
            for seed, name in enumerate(LORAS):
                lora = tiny.lora_for(pipe, seed=seed, name=name, text_encoder=family in ("sd15", "sdxl"))
                Path(f"{name}.safetensors").unlink(missing_ok=True)
                ml.save(lora, f"{name}.safetensors")
        loaded.append((pipe, family))
        return pipe

    def snapshot_download(name):
        pipe, family = loaded[-1]
        folder = tmp_path / name.replace("/", "--")
        tiny_tasks.controlnet(family, pipe).save_pretrained(folder)
        return str(folder)

    def from_single_file(cls, file, torch_dtype):
        assert torch_dtype == torch.float32
        pipe, family = loaded[-1]
        return tiny_tasks.controlnet(family, pipe)

    monkeypatch.setattr(diffusers.ZImageControlNetModel, "from_single_file", classmethod(from_single_file))
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda name, filename: filename)
    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", classmethod(from_pretrained))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    tiny_tasks.picture().save("photo.png")
    tiny_tasks.picture(5).save("edges.png")
    tiny_tasks.mask().save("mask.png")
    return loaded


def run(path: Path) -> dict:
    names: dict = {}
    for line, code in blocks(path):
        exec(compile("\n" * (line - 1) + code, str(path), "exec"), names)
    return names


@pytest.mark.parametrize("family", FAMILIES)
def test_a_familys_guide_runs(family, small):
    path = DOCS / "families" / f"{family}.md"
    names = run(path)
    pictures = {n: v for n, v in names.items() if isinstance(v, Composed)}
    assert {"merged", "switched", "averaged", "redrawn", "inpainted"} <= set(pictures)
    assert all(len(v.images) >= 1 and isinstance(v.images[0], Image.Image) for v in pictures.values())
    methods = {n: pictures[n].images[0].tobytes() for n in ("merged", "switched", "averaged")}
    assert len(set(methods.values())) == 3
    assert max(pictures["averaged"].passes) == 2
    assert pictures["redrawn"].recipe.task == "image-to-image"
    assert pictures["inpainted"].recipe.task == "inpainting"
    text = path.read_text()
    assert "small model of the same" in text
    assert "in place of the hub id" in text
    assert re.search(r"^## Memory and speed$", text, re.M)
    assert re.search(r"^## Traps$", text, re.M)


@pytest.mark.parametrize("name", OTHERS)
def test_other_guides_run(name, small):
    run(DOCS / f"{name}.md")


def test_every_family_has_a_guide():
    assert FAMILIES == ["flux", "qwen-image", "sd15", "sd3", "sdxl", "z-image"]
    for name, where in ELSEWHERE.items():
        assert f"{name}.md" in (DOCS.parent / where).read_text()


def test_links_between_guides_lead_somewhere():
    for path in [*DOCS.glob("*.md"), *(DOCS / "families").glob("*.md")]:
        for target, _, anchor in (m.partition("#") for m in re.findall(r"\]\(([^)\s]+)\)", path.read_text())):
            if target.startswith("http"):
                continue
            goal = (path.parent / target).resolve()
            assert goal.exists(), (path, target)
            if anchor:
                titles = re.findall(r"^#+ (.*)$", goal.read_text(), re.M)
                assert anchor in {re.sub(r"[^\w -]", "", t.lower()).replace(" ", "-") for t in titles}
