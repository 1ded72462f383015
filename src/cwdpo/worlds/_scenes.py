"""Scenes of the shapes world: the objects of an image, and how they are drawn. Does not import torch or Pillow."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cwdpo.errors import DataError

SIDE = 48
SIZES = ("small", "large")
COLOURS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink")
SHAPES = ("circle", "square", "triangle", "diamond", "cross", "ring")
PLACES = ("top left", "top right", "bottom left", "bottom right")
RELATIONS = ("left of", "right of", "above", "below")
SPLITS = ("train", "validation", "test")

HELD_OUT = frozenset(
    {("red", "ring"), ("yellow", "cross"), ("green", "diamond"), ("blue", "triangle"), ("purple", "square")}
)
"""(colour, shape) combinations that no training scene contains: 5 of 48."""

HELD_OUT_SHARE = 0.25
"""Share of validation and test scenes that contain a held-out combination."""

_RGB = {
    "red": (215, 45, 45),
    "orange": (240, 135, 25),
    "yellow": (235, 225, 60),
    "green": (50, 170, 65),
    "cyan": (70, 215, 220),
    "blue": (50, 85, 220),
    "purple": (145, 55, 190),
    "pink": (245, 150, 190),
}
# With a radius below 4.8, a circle has nearly the same pixels as a square or diamond.
RADIUS = {"small": (4.8, 6.0), "large": (8.0, 10.0)}
_CENTRE = {"top": 12, "bottom": 36, "left": 12, "right": 36}
_JITTER = 2


@dataclass(frozen=True)
class SceneObject:
    """One drawn object; ``x``, ``y`` (centre) and ``radius`` are in pixels, ``place`` is its quadrant."""

    size: str
    colour: str
    shape: str
    place: str
    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class Scene:
    """One to three objects of different shapes, at most one per quadrant.

    ``noise_seed`` decides colour and pixel noise, so that a scene always gives the same image. ``held_out``: whether
    the scene has a combination of :data:`HELD_OUT`.
    """

    objects: tuple[SceneObject, ...]
    noise_seed: int
    held_out: bool

    def to_json(self) -> dict[str, Any]:
        """The scene as plain lists, strings and numbers."""
        data = asdict(self)
        return {**data, "objects": list(data["objects"])}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Scene:
        """The scene that ``to_json`` wrote.

        Raises:
            DataError: a key is missing or unknown, or a word is not of this world.
        """
        try:
            objects = tuple(SceneObject(**o) for o in data["objects"])
            scene = cls(objects, int(data["noise_seed"]), bool(data["held_out"]))
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"scene: {error!r}; a scene has 'objects', 'noise_seed' and 'held_out', and an object has "
                f"{', '.join(SceneObject.__dataclass_fields__)}; write it with Scene.to_json"
            ) from None
        allowed = {"size": SIZES, "colour": COLOURS, "shape": SHAPES, "place": PLACES}
        for i, item in enumerate(objects):
            for key, words in allowed.items():
                if getattr(item, key) not in words:
                    raise DataError(
                        f"scene: object {i}: {key} is {getattr(item, key)!r}; allowed: {', '.join(words)}"
                    )
        return scene


def relation_holds(first: str, relation: str, second: str) -> bool:
    """Whether an object at place ``first`` is in ``relation`` to an object at place ``second``.

    Rows and columns of quadrants decide: objects in the same column are neither left nor right of each other.
    """
    (row_a, column_a), (row_b, column_b) = first.split(), second.split()
    return {
        "left of": (column_a, column_b) == ("left", "right"),
        "right of": (column_a, column_b) == ("right", "left"),
        "above": (row_a, row_b) == ("top", "bottom"),
        "below": (row_a, row_b) == ("bottom", "top"),
    }[relation]


def stream(seed: int, split: str, index: int, purpose: str = "scene") -> random.Random:
    """The random generator of one item; it does not depend on other items or on their number."""
    return random.Random(f"{seed}:{split}:{index}:{purpose}")


def make_scene(seed: int, split: str, index: int) -> Scene:
    """Scene ``index`` of a split.

    Training scenes have no combination of :data:`HELD_OUT`; a quarter of the other scenes have at least one.

    Raises:
        DataError: ``split`` is not train, validation or test.
    """
    if split not in SPLITS:
        raise DataError(f"shapes world: unknown split {split!r}; allowed: {', '.join(SPLITS)}")
    rng = stream(seed, split, index)
    n = rng.choices((1, 2, 3), (0.2, 0.4, 0.4))[0]
    held_out = split != "train" and rng.random() < HELD_OUT_SHARE
    looks = [(rng.choice([c for c in COLOURS if (c, s) not in HELD_OUT]), s) for s in rng.sample(SHAPES, n)]
    if held_out:
        novel = rng.choice(sorted(HELD_OUT))
        same_shape = [i for i, look in enumerate(looks) if look[1] == novel[1]]
        looks[same_shape[0] if same_shape else rng.randrange(n)] = novel
    objects = [
        _place(rng, colour, shape, place)
        for (colour, shape), place in zip(looks, rng.sample(PLACES, n), strict=True)
    ]
    return Scene(tuple(objects), rng.randrange(2**32), held_out)


def _place(rng: random.Random, colour: str, shape: str, place: str) -> SceneObject:
    size = rng.choice(SIZES)
    row, column = place.split()
    return SceneObject(
        size=size,
        colour=colour,
        shape=shape,
        place=place,
        x=_CENTRE[column] - 0.5 + rng.randint(-_JITTER, _JITTER),
        y=_CENTRE[row] - 0.5 + rng.randint(-_JITTER, _JITTER),
        radius=round(rng.uniform(*RADIUS[size]), 2),
    )


def render(scene: Scene) -> NDArray[np.uint8]:
    """The image of a scene, uint8 [48, 48, 3]; equal scenes give equal images."""
    noise = np.random.default_rng(scene.noise_seed)
    picture = np.full((SIDE, SIDE, 3), noise.uniform(30, 50), dtype=np.float64)
    for item in scene.objects:
        colour = np.asarray(_RGB[item.colour], dtype=np.float64) + noise.uniform(-12, 12, 3)
        picture[_mask(item)] = colour
    picture += noise.normal(0, 5, picture.shape)
    return np.clip(np.rint(picture), 0, 255).astype(np.uint8)


def _mask(item: SceneObject) -> NDArray[np.bool_]:
    rows, columns = np.mgrid[0:SIDE, 0:SIDE]
    dx, dy, r = columns - item.x, rows - item.y, item.radius
    ax, ay = np.abs(dx), np.abs(dy)
    match item.shape:
        case "circle":
            mask = dx**2 + dy**2 <= r**2
        case "ring":
            distance = dx**2 + dy**2
            mask = (distance <= r**2) & (distance >= (0.55 * r) ** 2)
        case "square":
            mask = np.maximum(ax, ay) <= 0.85 * r
        case "diamond":
            mask = ax + ay <= 1.1 * r
        case "cross":
            mask = (np.minimum(ax, ay) <= 0.27 * r) & (np.maximum(ax, ay) <= r)
        case _:
            mask = (np.abs(dy) <= 0.85 * r) & (ax <= 0.55 * (dy + 0.85 * r))
    return np.asarray(mask, dtype=np.bool_)
