"""Backgrounds over the whole picture; looks as in draw_character."""

from multilora.lab.world.pen import darker, lighter, mix

BACKGROUNDS = ("plain", "beach", "forest", "snow", "city", "grove", "night")
PASTELS = ((250, 236, 210), (214, 236, 250), (222, 246, 218), (250, 222, 232), (232, 224, 250), (236, 236, 236))


def sample_look(background, rng):
    """A random look of a background."""
    shift = rng.choice((-4, 0, 4))
    if background == "plain":
        return {"wall": rng.choice(PASTELS)}
    if background == "beach":
        return {
            "sky": rng.choice(((150, 214, 250), (186, 230, 250))),
            "sea": rng.choice(((40, 140, 210), (60, 170, 220))),
            "sand": rng.choice(((246, 220, 150), (238, 206, 140))),
            "sun": (255, 224, 70),
            "shift": shift,
        }
    if background == "forest":
        return {
            "sky": rng.choice(((206, 236, 226), (190, 226, 246))),
            "tree": rng.choice(((30, 110, 60), (44, 130, 70), (24, 96, 76))),
            "ground": (104, 174, 84),
            "shift": shift,
        }
    if background == "snow":
        return {
            "sky": rng.choice(((176, 204, 236), (196, 214, 230))),
            "rock": rng.choice(((120, 140, 176), (134, 146, 166))),
            "shift": shift,
        }
    if background == "city":
        return {
            "sky": rng.choice(((240, 190, 160), (180, 196, 220), (214, 200, 230))),
            "wall": rng.choice(((94, 100, 122), (112, 100, 116), (84, 104, 124))),
            "window": (255, 232, 130),
            "shift": shift,
        }
    if background == "grove":
        return {
            "sky": rng.choice(((240, 240, 214), (226, 236, 240), (246, 230, 220))),
            "stalk": rng.choice(((196, 164, 90), (150, 120, 84), (176, 140, 150))),
            "leaf": rng.choice(((150, 160, 70), (170, 120, 70))),
            "ground": (188, 170, 120),
            "shift": shift,
        }
    return {"sky": rng.choice(((22, 26, 70), (34, 24, 74), (16, 34, 72))), "ground": (34, 52, 58), "shift": shift}


def _plain(pen, look):
    pen.box(-9, -9, 137, 104, look["wall"], None)
    pen.box(-9, 104, 137, 137, mix(look["wall"], (120, 110, 120), 0.22), None)


def _beach(pen, look):
    shift = look["shift"]
    pen.box(-9, -9, 137, 66, look["sky"], None)
    pen.oval(17, 19 + shift / 2, 11, 11, look["sun"], None)
    pen.box(-9, 64, 137, 94, look["sea"], None)
    for y in (71, 80):
        for x in range(-4 + shift, 140, 24):
            pen.line([(x, y), (x + 11, y)], lighter(look["sea"], 0.5), 2)
    pen.box(-9, 92, 137, 137, look["sand"], None)
    if look.get("palm"):
        pen.line([(14, 98), (11, 70), (17, 44)], (140, 90, 50), 6)
        for end in ((0, 34), (6, 26), (27, 26), (36, 36), (34, 50), (-2, 50)):
            pen.line([(17, 43), end], look["palm"], 6)


def _forest(pen, look):
    shift = look["shift"]
    pen.box(-9, -9, 137, 96, look["sky"], None)
    pen.box(-9, 92, 137, 137, look["ground"], None)
    for x, size in ((8, 34), (38, 26), (66, 24), (92, 28), (120, 34)):
        x, top = x + shift, 90 - size * 2.2
        if look.get("caps"):
            pen.box(x - 5, 60, x + 5, 96, (250, 240, 224), None)
            pen.slice(x, 62, size * 0.55, size * 0.9, 180, 360, look["caps"], None)
            for dx, dy in ((-0.25, 12), (0.2, 16), (0.0, 24)):
                pen.oval(x + dx * size, 62 - dy * size / 34, 2.6, 2.6, (255, 250, 240), None)
            continue
        pen.box(x - 2.5, 86, x + 2.5, 97, (110, 74, 46), None)
        for level in range(3):
            half = size * (0.26 + 0.09 * level)
            y = top + size * 0.6 * level
            pen.shape([(x - half, y + size * 0.9), (x, y), (x + half, y + size * 0.9)], look["tree"], None)


def _snow(pen, look):
    shift = look["shift"]
    pen.box(-9, -9, 137, 100, look["sky"], None)
    for x, top, half in ((22, 38, 38), (104, 30, 44), (64, 54, 30)):
        x += shift
        pen.shape([(x - half, 96), (x, top), (x + half, 96)], look["rock"], None)
        pen.shape([(x - half * 0.36, top + 21), (x, top), (x + half * 0.36, top + 21)], (252, 252, 255), None)
    pen.box(-9, 92, 137, 137, (246, 249, 254), None)
    for x, y in ((8, 12), (30, 24), (60, 8), (84, 18), (118, 12), (12, 52), (86, 60), (118, 66), (72, 30)):
        pen.oval(x + shift, y, 1.9, 1.9, (255, 255, 255), None)


def _city(pen, look):
    shift = look["shift"]
    pen.box(-9, -9, 137, 100, look["sky"], None)
    for i, (x, top, width) in enumerate(
        ((-8, 30, 26), (20, 52, 20), (42, 20, 22), (66, 42, 20), (88, 14, 22), (112, 36, 26))
    ):
        wall = look["wall"] if i % 2 else darker(look["wall"], 0.2)
        pen.box(x + shift, top, x + shift + width, 100, wall, None)
        for y in range(top + 6, 94, 12):
            for column in range(2):
                left = x + shift + 4 + column * (width - 8) / 2
                pen.box(left, y, left + 4.5, y + 5.5, look["window"], None)
    pen.box(-9, 98, 137, 137, (128, 130, 140), None)


def _grove(pen, look):
    shift = look["shift"]
    pen.box(-9, -9, 137, 100, look["sky"], None)
    pen.box(-9, 96, 137, 137, look["ground"], None)
    thick = look.get("thick", 4.5)
    for i, x in enumerate((4, 19, 34, 50, 66, 81, 96, 111, 126)):
        x += shift
        pen.line([(x, -8), (x, 98)], look["stalk"], thick)
        if look.get("rings"):
            for y in range(6 + 7 * (i % 2), 96, 17):
                pen.line([(x - thick / 2 - 1, y), (x + thick / 2 + 1, y)], look["rings"], 2.4)
        for y in range(8 + 11 * (i % 3), 90, 33):
            side = 1 if i % 2 else -1
            pen.shape([(x, y), (x + side * 7, y - 6), (x + side * 11, y - 1)], look["leaf"], None)


def _night(pen, look):
    shift = look["shift"]
    pen.box(-9, -9, 137, 137, look["sky"], None)
    for i, colour in enumerate(look.get("aurora", ())):
        y = 20 + 15 * i
        wave = [(-9, y + 6), (24, y - 7), (58, y + 4), (92, y - 8), (137, y + 3)]
        pen.shape(wave + [(x, z + 15) for x, z in reversed(wave)], colour, None)
    for x, y in ((32, 10), (60, 6), (84, 24), (122, 10), (10, 52), (118, 62), (90, 52), (28, 66), (76, 12), (6, 84)):
        pen.oval(x + shift, y, 1.7, 1.7, (255, 250, 210), None)
    if not look.get("aurora"):
        pen.oval(15, 20, 11, 11, (250, 240, 190), None)
        pen.oval(20, 17, 9.5, 9.5, look["sky"], None)
    pen.oval(64, 142, 110, 46, look["ground"], None)


DRAW = {
    "plain": _plain,
    "beach": _beach,
    "forest": _forest,
    "snow": _snow,
    "city": _city,
    "grove": _grove,
    "night": _night,
}


def draw_background(pen, background, look):
    DRAW[background](pen, look)
