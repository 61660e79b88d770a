"""Colours, and a pen that draws in a 128 x 128 space on a supersampled picture."""

from PIL import Image, ImageDraw

SPACE = 128
INK = (34, 30, 46)

COLOURS = {
    "red": (222, 42, 46),
    "orange": (248, 138, 28),
    "yellow": (252, 216, 44),
    "green": (48, 170, 72),
    "blue": (42, 98, 226),
    "purple": (138, 58, 194),
    "pink": (248, 138, 190),
    "white": (246, 246, 248),
}


def mix(first, second, share):
    """`first` with `share` (0 to 1) of `second` in it."""
    return tuple(round(a + (b - a) * share) for a, b in zip(first, second, strict=True))


def lighter(colour, share=0.55):
    return mix(colour, (255, 255, 255), share)


def darker(colour, share=0.35):
    return mix(colour, (20, 16, 36), share)


class Pen:
    """Shapes in the 128 x 128 space, moved by (`dx`, `dy`), on a picture `scale` times larger."""

    def __init__(self, scale):
        self.scale = scale
        side = round(SPACE * scale)
        self.image = Image.new("RGB", (side, side), (255, 255, 255))
        self.draw = ImageDraw.Draw(self.image)
        self.dx = self.dy = 0.0

    def _points(self, points):
        return [((x + self.dx) * self.scale, (y + self.dy) * self.scale) for x, y in points]

    def _width(self, width):
        return max(1, round(width * self.scale))

    def oval(self, x, y, rx, ry, fill, line=INK, width=1.5):
        box = self._points([(x - rx, y - ry), (x + rx, y + ry)])
        self.draw.ellipse(box, fill=fill, outline=line, width=self._width(width) if line else 0)

    def box(self, x0, y0, x1, y1, fill, line=INK, width=1.5, radius=0.0):
        box = self._points([(x0, y0), (x1, y1)])
        self.draw.rounded_rectangle(
            box, radius * self.scale, fill=fill, outline=line, width=self._width(width) if line else 0
        )

    def shape(self, points, fill, line=INK, width=1.5):
        points = self._points(points)
        self.draw.polygon(points, fill=fill)
        if line:
            self.draw.line(points + points[:2], fill=line, width=self._width(width), joint="curve")

    def line(self, points, colour=INK, width=1.5):
        self.draw.line(self._points(points), fill=colour, width=self._width(width), joint="curve")

    def limb(self, points, colour, width):
        """A thick line with round ends and an outline."""
        for fill, extra in ((INK, 3.0), (colour, 0.0)):
            self.line(points, fill, width + extra)
            for x, y in (points[0], points[-1]):
                radius = (width + extra) / 2
                self.oval(x, y, radius, radius, fill, None)

    def slice(self, x, y, rx, ry, start, end, fill, line=INK, width=1.5):
        """A part of an ellipse between two angles in degrees, closed by its chord."""
        box = self._points([(x - rx, y - ry), (x + rx, y + ry)])
        self.draw.chord(box, start, end, fill=fill, outline=line, width=self._width(width) if line else 0)
