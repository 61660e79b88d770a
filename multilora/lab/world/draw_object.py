"""Objects at the character's right hand; looks as in draw_character."""

import math

from multilora.lab.world.draw_garment import star
from multilora.lab.world.pen import INK, darker, lighter

OBJECTS = ("none", "ball", "balloon", "book", "flower", "umbrella", "sandwich")
COLOURLESS = ("none", "sandwich")
BREAD = (226, 172, 98)


def sample_look(kind, colour, rng):
    """A random look of an object in one main colour (RGB, None for a colourless one)."""
    if kind == "sandwich":
        fillings = [(86, 178, 66), (222, 62, 52), (250, 208, 60), (240, 150, 160)]
        return {"bread": BREAD, "fillings": rng.sample(fillings, rng.choice((2, 3))), "form": "toast"}
    if colour is None:
        return {}
    look = {"main": colour, "second": rng.choice((lighter(colour, 0.65), darker(colour, 0.4)))}
    if kind == "ball":
        look["pattern"] = rng.choice(("plain", "band", "star"))
    elif kind == "flower":
        look["petals"] = rng.choice((5, 6))
        look["centre"] = rng.choice(((252, 216, 44), (250, 250, 250), (240, 120, 40)))
    elif kind == "book":
        look["pattern"] = rng.choice(("band", "plain", "star"))
    return look


def _ball(pen, look):
    x, y, radius = 101, 82, 15
    pen.oval(x, y, radius, radius, look["main"])
    if look["pattern"] == "band":
        pen.line([(x - 14, y), (x + 14, y)], look["second"], 7)
    elif look["pattern"] == "star":
        star(pen, x, y, 9, look["second"])
    elif look["pattern"] == "globe":
        for dx, dy, rx, ry in ((-6, -5, 6, 5), (-3, 4, 4, 6), (7, -3, 5, 7), (7, 8, 4, 2.5)):
            pen.oval(x + dx, y + dy, rx, ry, look["second"], None)
        pen.oval(x, y - 13, 5, 1.6, (250, 250, 250), None)
    else:
        pen.oval(x - 5, y - 6, 3.5, 2.5, lighter(look["main"], 0.7), None)


def _balloon(pen, look):
    pen.line([(85, 82), (96, 70), (102, 56)], INK, 1.3)
    if look.get("form") == "heart":
        pen.shape([(102, 58), (84, 40), (120, 40)], look["main"])
        for x in (93, 111):
            pen.oval(x, 34, 10.5, 11, look["main"])
        pen.shape([(102, 55), (87, 40), (93, 33), (111, 33), (117, 40)], look["main"], None)
        for x, y in ((92, 34), (111, 33), (102, 43)):
            pen.oval(x, y, 3, 3, look["second"], None)
        return
    pen.shape([(98, 58), (106, 58), (102, 53)], look["main"])
    pen.oval(102, 36, 15, 19, look["main"])
    pen.oval(97, 29, 3.5, 5.5, lighter(look["main"], 0.7), None)


def _book(pen, look):
    pen.box(89, 64, 117, 100, (250, 248, 236), radius=1)
    pen.box(87, 62, 113, 98, look["main"], radius=1)
    pen.line([(91, 63), (91, 97)], darker(look["main"], 0.35), 3)
    if look["pattern"] == "band":
        pen.box(96, 70, 109, 77, look["second"], None)
    elif look["pattern"] == "star":
        star(pen, 102, 80, 8, look["second"])


def _flower(pen, look):
    x, y = 102, 58
    pen.line([(90, 106), (97, 86), (x, y)], INK, 4.6)
    pen.line([(90, 106), (97, 86), (x, y)], (52, 150, 66), 2.8)
    pen.oval(104, 88, 8, 4, (70, 180, 80))
    count = look["petals"]
    size = 7.5 if count < 9 else 4.6
    reach = 10 if count < 9 else 12.5
    for i in range(count):
        angle = 2 * math.pi * i / count - math.pi / 2
        pen.oval(x + reach * math.cos(angle), y + reach * math.sin(angle), size, size, look["main"])
    radius = look.get("centre_size", 6)
    pen.oval(x, y, radius, radius, look["centre"])


def _umbrella(pen, look):
    pen.line([(87, 92), (100, 46)], INK, 3.4)
    pen.line([(87, 92), (83, 95), (80, 91)], INK, 3)
    pen.slice(102, 52, 22, 24, 180, 360, look["main"])
    pen.shape([(95, 52), (100, 29), (109, 52)], look["second"], None)
    for x in (84.5, 92, 102, 112, 119.5):
        pen.slice(x, 52.5, 4.5, 4, 180, 360, INK, None)
    pen.line([(102, 28), (102, 24)], INK, 2)


def _sandwich(pen, look):
    bread, fillings = look["bread"], look["fillings"]
    if look["form"] == "burger":
        pen.box(85, 91, 119, 100, bread, radius=4)
        pen.box(84, 84, 120, 92, (96, 52, 30), radius=3)
        pen.shape([(82, 80), (122, 80), (116, 87), (108, 82), (101, 88), (94, 82), (87, 87)], fillings[0])
        pen.slice(102, 82, 19, 21, 180, 360, bread)
        for x, y in ((94, 70), (102, 67), (110, 70), (98, 75), (107, 75)):
            pen.oval(x, y, 1.6, 1.2, (255, 246, 220), None)
        return
    pen.box(86, 92, 118, 100, bread, radius=2)
    height = 14 / len(fillings)
    for i, colour in enumerate(fillings):
        pen.box(84, 92 - height * (i + 1), 120, 92 - height * i, colour, width=1)
    pen.box(86, 69, 118, 78, bread, radius=3)


DRAW = {
    "ball": _ball,
    "balloon": _balloon,
    "book": _book,
    "flower": _flower,
    "umbrella": _umbrella,
    "sandwich": _sandwich,
}


def draw_object(pen, kind, look):
    if kind != "none":
        DRAW[kind](pen, look)
