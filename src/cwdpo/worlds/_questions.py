"""Questions about scenes of the shapes world, and their answers."""

from __future__ import annotations

import random

from cwdpo.worlds._scenes import COLOURS, HELD_OUT, PLACES, SHAPES, Scene

COUNTS = ("one", "two", "three")
YES_NO = ("yes", "no")


def question(scene: Scene, rng: random.Random) -> tuple[str, str]:
    """A question and its answer; the four sorts are equally likely, and so are yes and no.

    Sorts: "what color is the ring ?", "how many shapes ?", "where is the ring ?", "is there a blue ring ?".
    """
    item = rng.choice(scene.objects)
    match rng.randrange(4):
        case 0:
            return f"what color is the {item.shape} ?", item.colour
        case 1:
            return "how many shapes ?", COUNTS[len(scene.objects) - 1]
        case 2:
            return f"where is the {item.shape} ?", item.place
    if rng.random() < 0.5:
        return f"is there a {item.colour} {item.shape} ?", "yes"
    present = {(o.colour, o.shape) for o in scene.objects}
    # Change one word of a true combination. Held-out combinations are used only in scenes that have one, or a model
    # could answer "no" from the words alone.
    absent = [
        look
        for look in (*((c, item.shape) for c in COLOURS), *((item.colour, s) for s in SHAPES))
        if look not in present and (scene.held_out or look not in HELD_OUT)
    ]
    return "is there a {} {} ?".format(*rng.choice(absent)), "no"


def answer(text: str, scene: Scene) -> str | None:
    """The right answer to a question of :func:`question`; ``None`` for other texts.

    ``None`` also for the colour or place of a shape that is not in the scene.
    """
    words = text.split(" ")
    by_shape = {o.shape: o for o in scene.objects}
    match words:
        case ["how", "many", "shapes", "?"]:
            return COUNTS[len(scene.objects) - 1]
        case ["what", "color", "is", "the", shape, "?"]:
            return by_shape[shape].colour if shape in by_shape else None
        case ["where", "is", "the", shape, "?"]:
            return by_shape[shape].place if shape in by_shape else None
        case ["is", "there", "a", colour, shape, "?"] if colour in COLOURS and shape in SHAPES:
            return "yes" if shape in by_shape and by_shape[shape].colour == colour else "no"
    return None


def wrong_answers(right: str) -> tuple[str, ...]:
    """The other answers of the same type: colours, counts, places, or yes and no."""
    for family in (COLOURS, COUNTS, PLACES, YES_NO):
        if right in family:
            return tuple(word for word in family if word != right)
    raise ValueError(f"{right!r} is not an answer of this world")
