"""Several LoRAs in one picture: sets of LoRAs, weights over the steps, and the methods that compose them.

    import multilora as ml
    fox = ml.load("fox.safetensors", base=pipe)      # any format -> Lora
    both = 0.8 * fox + 0.6 * ml.load("robe.safetensors", base=pipe)
    ml.save(both, "both.safetensors", format="diffusers")
    ml.methods("route")                              # what there is, as records

Importing this imports nothing heavy: the names below are fetched when they are first used.
"""

from pathlib import Path

_here = Path(__file__).parent
if not (_here / "kernels").is_dir():  # a checkout keeps kernels/ and pipelines/ beside this folder; a wheel nests them
    __path__.append(str(_here.parent))

__version__ = "0.1.0"

# Public name -> module that holds it. `merge` is the package itself, which can be called.
_HOMES = {
    "Card": "lora",
    "Dense": "lora",
    "Lora": "lora",
    "LowRank": "lora",
    "load": "files",
    "save": "files",
    "attached": "attach",
    "methods": "method",
    "Schedule": "schedule",
    "Recipe": "recipe",
}

__all__ = ["__version__", "merge", *_HOMES]


def __getattr__(name: str):
    from importlib import import_module

    if name == "merge":
        return import_module("multilora.merge")
    if name in _HOMES:
        return getattr(import_module(f"multilora.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'multilora' has no attribute {name!r}; public names: {', '.join(__all__)}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
