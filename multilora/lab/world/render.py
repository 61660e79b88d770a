"""Scene -> picture, and a gallery."""

import random

from PIL import Image

from multilora.lab.world import draw_background, draw_character, draw_garment, draw_object, draw_style
from multilora.lab.world.designs import DESIGNS
from multilora.lab.world.pen import COLOURS, Pen
from multilora.lab.world.scene import sample_scene

SUPERSAMPLE = 3
JITTER = 2


def looks(scene):
    """The look of every category: the design's where the scene names one, else random by the seed.

    Each category has its own random stream, so a design changes nothing else.
    """
    found = {}
    for category, module in (
        ("character", draw_character),
        ("garment", draw_garment),
        ("object", draw_object),
        ("background", draw_background),
        ("style", draw_style),
    ):
        rng = random.Random(f"{scene.seed}/{category}")
        kind = getattr(scene, category)
        if category in scene.designs:
            found[category] = DESIGNS[scene.designs[category]].look
        elif kind == "none":
            found[category] = {}
        elif category in ("background", "style"):
            found[category] = module.sample_look(kind, rng)
        else:
            colour = COLOURS.get(getattr(scene, f"{category}_colour"))
            found[category] = module.sample_look(kind, colour, rng)
    return found


def render(scene, size=128):
    """The scene's picture, RGB, `size` x `size`; the same bytes for the same scene."""
    look = looks(scene)
    rng = random.Random(f"{scene.seed}/place")
    pen = Pen(size * SUPERSAMPLE / 128)
    draw_background.draw_background(pen, scene.background, look["background"])
    pen.dx, pen.dy = rng.randint(-JITTER, JITTER), rng.randint(-JITTER, JITTER)
    body, cloth = look["character"], look["garment"]
    draw_character.draw_back(pen, scene.character, body)
    draw_garment.draw_back(pen, scene.garment, cloth)
    draw_character.draw_body(pen, scene.character, body)
    draw_garment.draw_body(pen, scene.garment, cloth)
    draw_character.draw_arms(pen, body, draw_garment.sleeve(scene.garment, cloth))
    draw_character.draw_head(pen, scene.character, body)
    draw_garment.draw_front(pen, scene.garment, cloth)
    pen.dx, pen.dy = pen.dx + rng.randint(-1, 1), pen.dy + rng.randint(-1, 1)
    draw_object.draw_object(pen, scene.object, look["object"])
    image = pen.image.reduce(SUPERSAMPLE)
    return draw_style.apply_style(image, scene.style, look["style"])


def sheet(images, columns, gap=2):
    """Pictures of one size in rows, as one picture."""
    side = images[0].width
    rows = -(-len(images) // columns)
    page = Image.new("RGB", (columns * (side + gap) - gap, rows * (side + gap) - gap), (255, 255, 255))
    for i, image in enumerate(images):
        page.paste(image, (i % columns * (side + gap), i // columns * (side + gap)))
    return page


def gallery(count=32, seed=0, columns=8, size=128, **fixed):
    """One picture of `count` random scenes."""
    return sheet([render(sample_scene(seed * 100_000 + i, **fixed), size) for i in range(count)], columns)


def design_gallery(size=128, columns=6, seed=0):
    """One picture with every design, each in a scene that shows it."""
    calm = {"garment": "none", "object": "none", "background": "plain", "style": "flat"}
    images = []
    for i, design in enumerate(DESIGNS.values()):
        fixed = {key: value for key, value in calm.items() if key != design.category}
        if design.category in ("style", "background"):
            fixed = {"style": "flat"} if design.category == "background" else {}
        scene = sample_scene(seed * 1000 + i, designs={design.category: design.name}, **fixed)
        images.append(render(scene, size))
    return sheet(images, columns)
