"""Styles: filters over the finished picture; looks as in draw_character."""

import numpy as np
from PIL import Image, ImageFilter

STYLES = ("flat", "pencil", "pixel", "neon", "print")
LUMA = np.array([0.299, 0.587, 0.114], np.float32)
INKS = (
    ((30, 60, 140), (236, 110, 70)),
    ((120, 30, 60), (90, 170, 150)),
    ((24, 90, 70), (244, 180, 70)),
    ((70, 40, 120), (240, 150, 160)),
    ((40, 40, 48), (220, 70, 60)),
)


def sample_look(style, rng):
    """A random look of a style."""
    if style == "pencil":
        return {
            "paper": rng.choice(((252, 250, 244), (246, 238, 220), (236, 238, 240))),
            "lead": rng.choice(((50, 50, 58), (70, 60, 50))),
            "wash": rng.choice((0.3, 0.4)),
        }
    if style == "pixel":
        return {"levels": rng.choice((5, 8))}
    if style == "neon":
        return {"dark": rng.choice(((14, 8, 34), (8, 14, 36), (20, 6, 26))), "fill": rng.choice((0.3, 0.4))}
    if style == "print":
        first, second = rng.choice(INKS)
        return {"first": first, "second": second, "paper": rng.choice(((250, 246, 234), (255, 252, 246)))}
    return {}


def _edges(pixels):
    """[h, w, 3] in 0..255 -> [h, w, 1] edge strength in 0..1."""
    edge = np.zeros(pixels.shape[:2], np.float32)
    down = np.abs(pixels[1:] - pixels[:-1]).max(-1)
    right = np.abs(pixels[:, 1:] - pixels[:, :-1]).max(-1)
    edge[1:] = down
    edge[:, 1:] = np.maximum(edge[:, 1:], right)
    return np.clip(edge / 110 - 0.12, 0, 1)[..., None]


def _pencil(image, look):
    pixels = np.asarray(image, np.float32)
    paper, lead = np.float32(look["paper"]), np.float32(look["lead"])
    dark = np.clip(0.45 - (pixels @ LUMA) / 255, 0, 1)[..., None] * 0.9
    wash = look["wash"]
    if look.get("lead_light"):
        out = paper * (1 - wash) + pixels * wash * 0.5
        return out + (lead - out) * np.clip(_edges(pixels) * 1.3, 0, 1)
    out = paper * (1 - wash) + pixels * wash
    return out + (lead - out) * np.clip(_edges(pixels) + dark, 0, 0.92)


def _pixel(image, look):
    side = image.width // 4
    small = np.asarray(image.resize((side, side), Image.BOX), np.float32)
    if look.get("shades"):
        shades = np.float32(look["shades"])
        level = np.clip((small @ LUMA) / 256 * len(shades), 0, len(shades) - 1).astype(int)
        small = shades[level]
    else:
        step = 255 / (look["levels"] - 1)
        small = np.round(small / step) * step
    return small.repeat(4, 0).repeat(4, 1)


def _neon(image, look):
    pixels = np.asarray(image, np.float32)
    glow = np.asarray(image.filter(ImageFilter.MaxFilter(5)), np.float32)
    strength = _edges(pixels)
    blurred = Image.fromarray((strength[..., 0] * 255).astype(np.uint8)).filter(ImageFilter.BoxBlur(2))
    halo = np.asarray(blurred, np.float32)[..., None] / 255
    peak = glow.max(-1, keepdims=True)
    bright = np.clip(glow * 255 / np.maximum(peak, 1) + 12, 0, 255)
    if look.get("light"):
        bright = np.float32(look["light"]) * np.clip(peak / 200, 0.35, 1)
        pixels = np.float32(look["light"]) * (pixels @ LUMA)[..., None] / 255
    base = np.float32(look["dark"]) + look["fill"] * pixels
    return base + bright * np.clip(strength * 0.95 + halo * 0.45, 0, 1)


def _print(image, look):
    tone = (np.asarray(image, np.float32) @ LUMA) / 255
    if look.get("hatch"):
        row, column = np.indices(tone.shape)
        stripe = ((row + column) % 8 < 4).astype(np.float32)
        tone = tone + 0.16 * (stripe - 0.5) * (tone < 0.9)
    tone = tone[..., None]
    first, second, paper = (np.float32(look[name]) for name in ("first", "second", "paper"))
    lower = np.clip((tone - 0.36) * 9 + 0.5, 0, 1)
    upper = np.clip((tone - 0.70) * 9 + 0.5, 0, 1)
    return first + (second - first) * lower + (paper - second) * upper


FILTERS = {"pencil": _pencil, "pixel": _pixel, "neon": _neon, "print": _print}


def apply_style(image, style, look):
    """A PIL picture -> the same picture in a style."""
    if style == "flat":
        return image
    return Image.fromarray(np.clip(FILTERS[style](image, look), 0, 255).astype(np.uint8))
