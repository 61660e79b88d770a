"""Garments: what is behind the body, on it, and over the head; looks as in draw_character."""

import math

from multilora.lab.world.pen import INK, darker, lighter

GARMENTS = ("none", "scarf", "cape", "robe", "poncho", "hat")


def sample_look(garment, colour, rng):
    """A random look of a garment in one main colour (RGB)."""
    return {
        "cloth": colour,
        "trim": rng.choice((lighter(colour, 0.6), darker(colour, 0.45), (245, 240, 225))),
        "pattern": rng.choice(("plain", "plain", "trim", "buttons")),
        "tall": rng.choice((False, True)),
    }


def star(pen, x, y, radius, colour, line=None):
    points = []
    for i in range(10):
        angle = math.pi * (i / 5 - 0.5)
        reach = radius if i % 2 == 0 else radius * 0.45
        points.append((x + reach * math.cos(angle), y + reach * math.sin(angle)))
    pen.shape(points, colour, line, 1.0)


def draw_back(pen, garment, look):
    if garment != "cape":
        return
    pen.shape(
        [(37, 63), (63, 63), (76, 86), (83, 113), (70, 109), (58, 114), (42, 114), (30, 109), (17, 113), (24, 86)],
        look["cloth"],
    )
    if look["pattern"] == "trim":
        pen.line([(19, 110), (30, 106), (42, 111), (58, 111), (70, 106), (81, 110)], look["trim"], 4)
    elif look["pattern"] == "flames":
        for x, top in ((22, 92), (31, 84), (69, 84), (78, 92)):
            pen.shape([(x - 5.5, 111), (x, top), (x + 5.5, 111)], look["trim"], None)
            pen.shape([(x - 3, 111), (x, top + 11), (x + 3, 111)], look["trim2"], None)


def sleeve(garment, look):
    """The sleeves' colour, or None for a garment without any."""
    return look["cloth"] if garment == "robe" else None


def draw_body(pen, garment, look):
    """What lies on the body, under the arms and the head."""
    if garment != "robe":
        return
    pen.shape([(40, 64), (60, 64), (67, 84), (74, 113), (26, 113), (33, 84)], look["cloth"])
    if look["pattern"] == "stars":
        for x, y, radius in ((42, 76, 4.5), (57, 80, 4), (40, 96, 5), (54, 101, 5.5), (65, 106, 3.5)):
            star(pen, x, y, radius, look["trim"])
        return
    if look["pattern"] == "trim":
        pen.line([(27, 110), (73, 110)], look["trim"], 4.5)
    if look["pattern"] == "buttons":
        for y in (76, 96, 106):
            pen.oval(50, y, 2, 2, look["trim"], None)
    pen.line([(34, 88), (66, 88)], look["trim"], 4)


def draw_front(pen, garment, look):
    """What lies over the arms and the head."""
    if garment == "scarf":
        _scarf(pen, look)
    elif garment == "cape":
        pen.shape([(36, 64), (64, 64), (58, 71), (42, 71)], look["cloth"])
        pen.oval(50, 69, 3, 3, (250, 214, 46))
    elif garment == "poncho":
        _poncho(pen, look)
    elif garment == "hat":
        _hat(pen, look)
    elif garment == "robe" and look.get("pointed_hat"):
        pen.shape([(30, 31), (51, 2), (70, 31)], look["cloth"])
        pen.oval(50, 30, 25, 4.5, look["cloth"])
        star(pen, 50, 20, 5.5, look["trim"])


def _scarf(pen, look):
    pen.box(56, 68, 65, 94, look["cloth"], radius=1)
    pen.box(33, 62, 67, 73, look["cloth"], radius=5)
    if look["pattern"] == "rainbow":
        colours = look["stripes"]
        for i, colour in enumerate(colours):
            x = 36 + 28 * i / len(colours)
            pen.box(x, 63.5, x + 28 / len(colours), 71.5, colour, None)
            y = 74 + 18 * i / len(colours)
            pen.box(57.3, y, 63.8, y + 18 / len(colours), colour, None)
    elif look["pattern"] == "trim":
        pen.line([(57, 86), (64, 86)], look["trim"], 3)
        pen.line([(44, 63), (44, 72)], look["trim"], 3)
        pen.line([(56, 63), (56, 72)], look["trim"], 3)
    for x in (57.5, 60.5, 63.5):
        pen.line([(x, 94), (x, 97)], INK, 1)


def _poncho(pen, look):
    pen.shape([(42, 64), (58, 64), (79, 91), (50, 105), (21, 91)], look["cloth"])
    if look["pattern"] == "dots":
        for x, y in ((50, 72), (40, 79), (60, 79), (31, 88), (50, 87), (69, 88), (41, 95), (59, 95)):
            pen.oval(x, y, 3.6, 3.6, look["trim"], None)
    elif look["pattern"] in ("trim", "buttons"):
        pen.line([(27, 87), (50, 97), (73, 87)], look["trim"], 4)
    for x, y in ((26, 93), (34, 97), (42, 101), (58, 101), (66, 97), (74, 93)):
        pen.line([(x, y), (x, y + 5)], look["cloth"], 2)


def _hat(pen, look):
    top = 6 if look["tall"] else 12
    pen.box(35, top, 65, 30, look["cloth"], radius=4)
    pen.box(35.8, 21, 64.2, 26.5, look["trim"], None)
    pen.oval(50, 29, 25, 4.5, look["cloth"])
    if look["pattern"] == "horns":
        for side in (-1, 1):
            x = 50 + side * 15
            pen.shape([(x, 26), (x + side * 14, 22), (x + side * 17, 3), (x + side * 9, 13), (x, 16)], (250, 242, 214))
