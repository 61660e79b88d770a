"""CLIP scores, text-image and image-image: OpenAI's names and files through clip-anytorch, HF folders through
transformers (clip_hf.py), and the embedded scorer.

The embedded scorer is a small CLIP in OpenAI's layout, built by clip-anytorch's own `build_model` and fed by its own
`clip.tokenize`. Its file keeps the token embedding's used rows only: every other token shares one row.
"""

from __future__ import annotations

import functools
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import PIL
import torch
from PIL import Image

from multilora.lab.score.embed import Cached, Convention, Embedder, Similarity
from multilora.lab.score.record import score
from multilora.method import Opt

VOCABULARY = 49408  # clip.tokenize's BPE
SUFFIXES = (".pt", ".safetensors")


def _clip() -> Any:
    with warnings.catch_warnings():  # clip-anytorch imports pkg_resources, which warns of its own end
        warnings.simplefilter("ignore")
        try:
            import clip
        except ImportError as error:
            raise ValueError("CLIP scores need clip-anytorch: pip install clip-anytorch") from error
    return clip


def expand(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A stored state dict in OpenAI's layout: "token_embedding.rows" and ".ids" become the full ".weight".

    rows: [m + 1, width], row 0 for every token not in ids; ids: [m] ascending token numbers.
    """
    state = dict(state)
    if "token_embedding.rows" in state:
        rows, ids = state.pop("token_embedding.rows"), state.pop("token_embedding.ids").long()
        weight = rows[:1].expand(VOCABULARY, -1).clone()
        weight[ids] = rows[1:]
        state["token_embedding.weight"] = weight
    return state


@dataclass(frozen=True)
class Clip(Embedder):
    """A CLIP model of clip-anytorch with its preprocessing."""

    model: torch.nn.Module
    preprocess: Any
    name: str
    library = "clip-anytorch"

    @property
    def device(self) -> torch.device:
        return self.model.logit_scale.device

    @property
    def preprocessing(self) -> str:
        import torchvision

        size = self.model.visual.input_resolution
        return f"clip._transform({size}), torchvision {torchvision.__version__}, pillow {PIL.__version__}"

    def _texts(self, texts: list[str]) -> torch.Tensor:
        """Raw text features [n, d]; texts beyond the window (77 tokens) are cut."""
        window = self.model.context_length
        clip = _clip()
        warn_cut(sum(len(clip.clip._tokenizer.encode(text)) + 2 > window for text in texts), len(texts), window)
        return self.model.encode_text(clip.tokenize(texts, context_length=window, truncate=True).to(self.device))

    def _pictures(self, images: list[Image.Image]) -> torch.Tensor:
        return self.model.encode_image(torch.stack([self.preprocess(image) for image in images]).to(self.device))


def warn_cut(cut: int, count: int, window: int) -> None:
    """Say that texts were longer than a CLIP reads: their scores are those of their beginnings."""
    if cut:
        warnings.warn(
            f"{cut} of {count} texts are longer than this CLIP's {window} tokens: their ends do not count",
            UserWarning,
            stacklevel=2,
        )


@functools.cache
def load_clip(name: str = "embedded", device: str = "cpu") -> Embedder:
    """A scorer: "embedded", an OpenAI name ("ViT-B/32"), the path of a .pt or .safetensors file in OpenAI's layout, or
    a folder of transformers' CLIPModel.

    Weights are float32. Raises ValueError for an unknown name (with the known ones) or a missing file.
    """
    clip = _clip()
    path = Path(name).expanduser()
    if name == "embedded":
        from multilora.pipelines.load import assets

        path = assets() / "clip" / "model.safetensors"
    if path.is_dir():
        from multilora.lab.score.clip_hf import load_clip_hf

        return load_clip_hf(path, device)
    if path.suffix == ".safetensors":
        if not path.is_file():
            raise ValueError(f"CLIP scorer {name!r}: {path} is missing; the embedded one: multilora world train")
        model = built(path)
    elif name in clip.available_models() or (path.suffix == ".pt" and path.is_file()):
        try:
            model = clip.load(name if name in clip.available_models() else str(path), device="cpu", jit=False)[
                0
            ].float()
        except (OSError, RuntimeError) as error:
            raise ValueError(f"CLIP scorer {name!r} could not be loaded: {error}") from error
    else:
        raise ValueError(
            f"CLIP scorer {name!r}: wanted 'embedded', one of {', '.join(clip.available_models())}, the path of an "
            f"existing {' or '.join(SUFFIXES)} file, or a folder of transformers' CLIPModel"
        )
    size = model.visual.input_resolution
    preprocess = clip.clip._transform(size)
    label = f"clip-anytorch {name}, float32, bicubic {size} px centre crop"
    return Clip(model.to(device).eval(), preprocess, label)


def built(path: Path) -> torch.nn.Module:
    """clip-anytorch's `build_model` on a safetensors file. build_model converts weights to half: back to float32."""
    from safetensors.torch import load_file

    try:
        return _clip().model.build_model(expand(load_file(path))).float()
    except (KeyError, RuntimeError) as error:
        raise ValueError(f"CLIP scorer {path}: not a CLIP in OpenAI's layout ({error})") from error


@functools.cache
def shared(name: str, device: str, cache: str) -> Embedder:
    """load_clip with its vectors kept, one per process: the scores of one model embed a picture once."""
    return Cached(load_clip(name, device), cache)


MODEL = Opt("'embedded', an OpenAI name such as ViT-B/32, a .pt or .safetensors file, or a folder of transformers")
CONVENTION = Opt("torchmetrics: 100 max(cos, 0); cosine: 100 cos, which may be negative")
DEVICE = Opt("where the model runs: cpu, cuda, mps")
CACHE = Opt("a file that keeps what was computed, by picture hash; several runs may share it")


@score(
    title="CLIP score, picture and prompt", needs=("prompt",), unit="100 cos", paper="https://arxiv.org/abs/2104.08718"
)
def clip_text(
    *,
    model: Annotated[str, MODEL] = "embedded",
    convention: Annotated[Convention, CONVENTION] = "torchmetrics",
    device: Annotated[str, DEVICE] = "cpu",
    cache: Annotated[str, CACHE] = "",
) -> Similarity:
    """How near each picture is to its prompt. It hardly follows what people prefer: show presence beside it."""
    return Similarity(shared(model, device, cache), convention)


@score(title="CLIP score, picture and reference", needs=("references",), unit="100 cos")
def clip_image(
    *,
    model: Annotated[str, MODEL] = "embedded",
    convention: Annotated[Convention, CONVENTION] = "torchmetrics",
    device: Annotated[str, DEVICE] = "cpu",
    cache: Annotated[str, CACHE] = "",
) -> Similarity:
    """How near each picture is to its reference pictures; of several the mean counts."""
    return Similarity(shared(model, device, cache), convention)
