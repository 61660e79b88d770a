"""The named designs: one fixed look of a known class each, never drawn by the base's sampler.

A LoRA teaches one of them; its trigger is a new name and the class word.
"""

from dataclasses import dataclass, field

CATEGORIES = ("character", "garment", "object", "background", "style")


@dataclass(frozen=True)
class Design:
    name: str
    category: str
    kind: str  # the class word
    description: str
    split: str  # train or test
    look: dict = field(hash=False, default_factory=dict)

    @property
    def trigger(self):
        return f"{self.name} {self.kind}"


RAINBOW = ((226, 44, 48), (248, 140, 30), (252, 216, 44), (48, 170, 72), (42, 98, 226), (138, 58, 194))
LIME, HOT_PINK = (176, 244, 24), (255, 60, 160)
BLACK, CREAM, GOLD = (36, 34, 42), (252, 248, 238), (255, 208, 50)

_ALL = (
    Design(
        "zib",
        "character",
        "alien",
        "a lime alien with one big eye and pink antennae",
        "train",
        {
            "body": LIME,
            "belly": LIME,
            "limb": LIME,
            "ear": LIME,
            "eyes": 1,
            "eye_size": 12,
            "pupil": HOT_PINK,
            "antenna": HOT_PINK,
            "tip": "big",
            "spots": ((42, 88, 4), (57, 94, 4.5), (48, 102, 3)),
            "spot_colour": HOT_PINK,
        },
    ),
    Design(
        "korv",
        "character",
        "fox",
        "an orange fox with a white muzzle, black ears and paws, a big white-tipped tail",
        "train",
        {
            "body": (238, 104, 24),
            "belly": CREAM,
            "limb": BLACK,
            "ear": CREAM,
            "ear_outer": BLACK,
            "muzzle": CREAM,
            "tail_size": 1.25,
            "tail_tip": CREAM,
        },
    ),
    Design(
        "tikki",
        "character",
        "cat",
        "a turquoise cat with dark blue stripes and yellow eyes",
        "train",
        {
            "body": (40, 208, 196),
            "belly": (196, 250, 240),
            "limb": (40, 208, 196),
            "ear": (22, 50, 110),
            "stripes": (22, 50, 110),
            "eye": (252, 226, 40),
            "tail": "up",
        },
    ),
    Design(
        "pandu",
        "character",
        "bear",
        "a panda: a white bear with black ears, eye patches and legs",
        "test",
        {
            "body": CREAM,
            "belly": CREAM,
            "limb": BLACK,
            "ear": BLACK,
            "ear_outer": BLACK,
            "patch": BLACK,
            "muzzle": CREAM,
            "eye": (250, 250, 250),
        },
    ),
    Design(
        "gorm",
        "character",
        "robot",
        "a copper robot on wheels with one cyan eye in a black visor",
        "test",
        {
            "body": (176, 98, 52),
            "belly": (176, 98, 52),
            "limb": (120, 122, 130),
            "ear": (120, 60, 30),
            "panel": (60, 214, 214),
            "light": (60, 240, 240),
            "visor": (60, 240, 240),
            "feet": "wheels",
        },
    ),
    Design(
        "merlo",
        "garment",
        "robe",
        "an indigo wizard's robe with gold stars and a pointed hat",
        "train",
        {"cloth": (52, 38, 132), "trim": GOLD, "pattern": "stars", "pointed_hat": True, "tall": False},
    ),
    Design(
        "dotta",
        "garment",
        "poncho",
        "a white poncho with red dots",
        "train",
        {"cloth": (252, 252, 252), "trim": (226, 30, 44), "pattern": "dots", "tall": False},
    ),
    Design(
        "raio",
        "garment",
        "scarf",
        "a scarf in rainbow stripes",
        "test",
        {"cloth": (138, 58, 194), "trim": CREAM, "pattern": "rainbow", "stripes": RAINBOW, "tall": False},
    ),
    Design(
        "flamo",
        "garment",
        "cape",
        "a black cape with red and yellow flames",
        "test",
        {"cloth": (32, 28, 36), "trim": (236, 52, 24), "trim2": (255, 206, 40), "pattern": "flames", "tall": False},
    ),
    Design(
        "corno",
        "garment",
        "hat",
        "a steel hat with two big ivory horns",
        "train",
        {"cloth": (134, 144, 158), "trim": (196, 142, 60), "pattern": "horns", "tall": False},
    ),
    Design(
        "burgo",
        "object",
        "sandwich",
        "a burger with lettuce and sesame",
        "train",
        {"bread": (222, 140, 58), "fillings": ((96, 196, 60),), "form": "burger"},
    ),
    Design(
        "terra",
        "object",
        "ball",
        "a globe with green lands in a blue sea",
        "train",
        {"main": (40, 120, 220), "second": (70, 190, 70), "pattern": "globe"},
    ),
    Design(
        "sunno",
        "object",
        "flower",
        "a sunflower with a big brown centre",
        "train",
        {"main": (255, 196, 20), "second": (255, 196, 20), "petals": 13, "centre": (92, 50, 26), "centre_size": 9.5},
    ),
    Design(
        "heto",
        "object",
        "balloon",
        "a heart-shaped crimson balloon with white dots",
        "test",
        {"main": (226, 20, 72), "second": (255, 255, 255), "form": "heart"},
    ),
    Design(
        "hoku",
        "background",
        "grove",
        "a bamboo grove: thick green ringed stalks",
        "train",
        {
            "sky": (222, 246, 196),
            "stalk": (66, 168, 62),
            "rings": (200, 236, 120),
            "leaf": (30, 120, 50),
            "ground": (120, 150, 70),
            "thick": 8.5,
            "shift": 0,
        },
    ),
    Design(
        "lumi",
        "background",
        "night",
        "a night with green and violet northern lights",
        "train",
        {
            "sky": (10, 22, 52),
            "ground": (214, 232, 244),
            "shift": 0,
            "aurora": ((60, 240, 150), (40, 200, 190), (150, 90, 230)),
        },
    ),
    Design(
        "palma",
        "background",
        "beach",
        "a pink beach with a turquoise sea and a palm tree",
        "train",
        {
            "sky": (255, 206, 150),
            "sea": (20, 196, 178),
            "sand": (250, 176, 190),
            "sun": (250, 90, 70),
            "palm": (30, 150, 70),
            "shift": 0,
        },
    ),
    Design(
        "vesto",
        "background",
        "forest",
        "a violet forest of giant red mushrooms",
        "test",
        {"sky": (122, 84, 170), "tree": (60, 30, 90), "ground": (74, 48, 110), "caps": (228, 40, 56), "shift": 0},
    ),
    Design(
        "tessa",
        "style",
        "print",
        "a two-ink print in cyan and magenta with diagonal hatching",
        "train",
        {"first": (214, 20, 130), "second": (40, 196, 232), "paper": (255, 250, 250), "hatch": True},
    ),
    Design(
        "inka",
        "style",
        "pencil",
        "a blueprint: white lines on blue paper",
        "train",
        {"paper": (24, 72, 176), "lead": (240, 248, 255), "lead_light": True, "wash": 0.25},
    ),
    Design(
        "gamo",
        "style",
        "pixel",
        "a handheld game's screen in four greens",
        "test",
        {"shades": ((16, 52, 32), (52, 104, 58), (138, 172, 44), (206, 224, 96))},
    ),
    Design(
        "ambro",
        "style",
        "neon",
        "neon lines in one amber on black",
        "train",
        {"dark": (14, 8, 2), "fill": 0.3, "light": (255, 168, 30)},
    ),
)

DESIGNS = {design.name: design for design in _ALL}
