"""Characters: six species, each with random looks; a look is a dict that a design can fix."""

from multilora.lab.world.pen import INK, darker, lighter

CHARACTERS = ("cat", "rabbit", "bear", "robot", "alien", "fox")
WHITE = (250, 250, 252)


def sample_look(character, colour, rng):
    """A random look of a species in one main colour (RGB)."""
    belly = rng.choice((colour, lighter(colour, 0.5), lighter(colour, 0.5)))
    look = {"body": colour, "belly": belly, "ear": rng.choice((darker(colour), lighter(colour))), "limb": colour}
    if character == "alien":
        look["eyes"] = rng.choice((1, 2, 2, 3))
        look["antenna"] = rng.choice(((250, 214, 46), (60, 190, 230), (240, 240, 240), colour))
        look["tip"] = rng.choice(("ball", "none"))
    elif character == "robot":
        look["light"] = rng.choice(((250, 214, 46), (230, 60, 60), (70, 220, 240)))
        look["panel"] = rng.choice((lighter(colour), darker(colour), (190, 196, 206)))
    elif character == "cat":
        look["tail"] = rng.choice(("up", "down"))
    elif character == "fox":
        look["muzzle"] = lighter(colour, 0.45)
        look["tail_tip"] = colour
    elif character == "bear":
        look["muzzle"] = lighter(colour, 0.6)
    elif character == "rabbit":
        look["ear"] = rng.choice(((250, 190, 205), lighter(colour), darker(colour)))
    return look


def draw_back(pen, character, look):
    """What is behind the body: the tail."""
    if character == "cat":
        end = (18, 74) if look.get("tail") == "up" else (16, 106)
        pen.limb([(38, 102), (24, 100), end], look["body"], 5)
        if look.get("stripes"):
            pen.line([(24, 97), (24, 103)], look["stripes"], 3)
    elif character == "fox":
        reach = look.get("tail_size", 1.0)
        x, y = 40 - 20 * reach, 96 - 12 * reach
        pen.oval(x, y, 11 * reach, 16 * reach, look["body"])
        pen.slice(x, y, 11 * reach, 16 * reach, 200, 340, look["tail_tip"])
        pen.limb([(40, 104), (x + 3, y + 11 * reach)], look["body"], 6)
    elif character == "rabbit":
        pen.oval(33, 103, 7, 7, lighter(look["body"], 0.6))


def draw_body(pen, character, look):
    limb = look["limb"]
    if character == "robot":
        if look.get("feet") == "wheels":
            for x in (38, 50, 62):
                pen.oval(x, 110, 7, 7, (60, 62, 70))
                pen.oval(x, 110, 2.5, 2.5, (200, 204, 210), None)
        else:
            pen.box(36, 104, 47, 115, darker(look["body"], 0.25), radius=2)
            pen.box(53, 104, 64, 115, darker(look["body"], 0.25), radius=2)
        pen.box(33, 66, 67, 106, look["body"], radius=4)
        pen.box(40, 76, 60, 92, look["panel"], radius=2)
        return
    for x in (41, 59):
        pen.oval(x, 111, 9, 5, limb)
    pen.oval(50, 88, 18, 23, look["body"])
    pen.oval(50, 92, 11, 15, look["belly"], None)
    for x, y, radius in look.get("spots", ()):
        pen.oval(x, y, radius, radius, look["spot_colour"], None)
    if look.get("stripes"):
        for y in (80, 90, 100):
            pen.line([(34, y), (42, y + 2)], look["stripes"], 4)
            pen.line([(66, y), (58, y + 2)], look["stripes"], 4)


def draw_arms(pen, look, sleeve=None):
    """The left arm hangs, the right one reaches for the object."""
    for shoulder, elbow, hand in (((36, 74), (29, 84), (26, 92)), ((64, 74), (74, 82), (85, 82))):
        if sleeve:
            pen.limb([shoulder, elbow], sleeve, 9)
            pen.limb([elbow, hand], look["limb"], 5)
        else:
            pen.limb([shoulder, elbow, hand], look["limb"], 6)


def _eyes(pen, y, gap=9.0, radius=3.4, colour=INK):
    for x in (50 - gap, 50 + gap):
        pen.oval(x, y, radius, radius * 1.2, colour, None)
        pen.oval(x + 1, y - 1.4, radius * 0.35, radius * 0.35, WHITE, None)


def _cat(pen, look):
    for side in (-1, 1):
        pen.shape([(50 + side * 21, 42), (50 + side * 19, 14), (50 + side * 5, 28)], look["body"])
        pen.shape([(50 + side * 17, 34), (50 + side * 16.5, 21), (50 + side * 9, 29)], look["ear"], None)
    pen.oval(50, 46, 23, 20, look["body"])
    if look.get("stripes"):
        for x in (42, 50, 58):
            pen.line([(x, 28), (x, 36)], look["stripes"], 4)
        for side in (-1, 1):
            pen.line([(50 + side * 22, 46), (50 + side * 15, 48)], look["stripes"], 4)
    _eyes(pen, 44, colour=look.get("eye", INK))
    pen.shape([(47, 51), (53, 51), (50, 54.5)], (240, 110, 130), None)
    for side in (-1, 1):
        pen.line([(50, 54), (50 + side * 5, 58)], INK, 1.3)
        pen.line([(50 + side * 10, 53), (50 + side * 27, 50)], INK, 1.1)
        pen.line([(50 + side * 10, 56), (50 + side * 27, 58)], INK, 1.1)


def _rabbit(pen, look):
    for side in (-1, 1):
        pen.oval(50 + side * 10, 20, 6.5, 18, look["body"])
        pen.oval(50 + side * 10, 20, 3, 13, look["ear"], None)
    pen.oval(50, 48, 21, 18, look["body"])
    _eyes(pen, 45, gap=8.5)
    pen.oval(50, 51, 2.4, 1.8, (240, 110, 130), None)
    pen.box(47, 54, 53, 60, WHITE, width=1)
    pen.line([(50, 54), (50, 60)], INK, 0.8)


def _bear(pen, look):
    for side in (-1, 1):
        pen.oval(50 + side * 17, 29, 9, 9, look.get("ear_outer", look["body"]))
        pen.oval(50 + side * 17, 29, 4.5, 4.5, look["ear"], None)
    pen.oval(50, 46, 23, 20, look["body"])
    if look.get("patch"):
        for side in (-1, 1):
            pen.oval(50 + side * 9.5, 43, 6.5, 7.5, look["patch"], None)
    pen.oval(50, 54, 10, 8, look["muzzle"], None)
    _eyes(pen, 42, colour=look.get("eye", INK))
    pen.oval(50, 50.5, 4, 2.8, INK, None)
    pen.line([(50, 52), (50, 58)], INK, 1.3)


def _fox(pen, look):
    for side in (-1, 1):
        pen.shape(
            [(50 + side * 24, 38), (50 + side * 23, 8), (50 + side * 6, 27)], look.get("ear_outer", look["body"])
        )
        pen.shape([(50 + side * 19, 32), (50 + side * 19.5, 17), (50 + side * 11, 27)], look["ear"], None)
    pen.shape([(27, 36), (36, 27), (64, 27), (73, 36), (76, 48), (50, 67), (24, 48)], look["body"])
    pen.shape([(28, 48), (44, 46), (50, 51), (56, 46), (72, 48), (50, 65)], look["muzzle"], None)
    _eyes(pen, 41, gap=9.5, radius=3)
    pen.oval(50, 63, 4, 3.2, INK, None)


def _robot(pen, look):
    pen.line([(50, 26), (50, 14)], INK, 2.4)
    pen.oval(50, 12, 4, 4, look["light"])
    for x in (25, 69):
        pen.box(x, 40, x + 6, 53, darker(look["body"], 0.25))
    pen.box(29, 26, 71, 65, look["body"], radius=5)
    if look.get("visor"):
        pen.box(33, 34, 67, 49, (28, 30, 44), radius=6)
        pen.oval(50, 41.5, 6, 6, look["visor"], None)
    else:
        for x in (41, 59):
            pen.oval(x, 41, 6, 6, WHITE)
            pen.oval(x, 41, 2.6, 2.6, INK, None)
    pen.box(39, 54, 61, 60, look["panel"])
    for x in (44.5, 50, 55.5):
        pen.line([(x, 54), (x, 60)], INK, 1)


def _alien(pen, look):
    for side in (-1, 1):
        pen.line([(50 + side * 9, 30), (50 + side * 17, 12)], INK, 4.2)
        pen.line([(50 + side * 9, 30), (50 + side * 17, 12)], look["antenna"], 2.4)
        if look["tip"] != "none":
            radius = 6.5 if look["tip"] == "big" else 4.5
            pen.oval(50 + side * 17, 11, radius, radius, look["antenna"])
    pen.shape(
        [(50, 67), (38, 62), (27, 48), (26, 37), (34, 27), (50, 23), (66, 27), (74, 37), (73, 48), (62, 62)],
        look["body"],
    )
    if look["eyes"] == 1:
        size = look.get("eye_size", 8.5)
        pen.oval(50, 43, size, size, WHITE)
        pen.oval(50, 43, size * 0.5, size * 0.5, look.get("pupil", INK), None)
    else:
        for x in (40, 60):
            pen.oval(x, 44, 6, 8, INK, None)
            pen.oval(x + 1.5, 41, 1.8, 2.2, WHITE, None)
        if look["eyes"] == 3:
            pen.oval(50, 33, 4.5, 5, INK, None)
            pen.oval(51, 31.5, 1.4, 1.6, WHITE, None)
    pen.line([(44, 57), (50, 59.5), (56, 57)], INK, 1.5)


HEADS = {"cat": _cat, "rabbit": _rabbit, "bear": _bear, "robot": _robot, "alien": _alien, "fox": _fox}


def draw_head(pen, character, look):
    HEADS[character](pen, look)
