"""CHAIR: objects that a caption names but the image does not show."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cwdpo.errors import DataError
from cwdpo.metrics._coco import simple_tokens
from cwdpo.metrics.base import Answer, Measured, Metric, by_prompt, ratio

COCO = (
    "person bicycle car motorcycle airplane bus train truck boat 'traffic light' 'fire hydrant' 'stop sign' "
    "'parking meter' bench bird cat dog horse sheep cow elephant bear zebra giraffe backpack umbrella handbag "
    "tie suitcase frisbee skis snowboard 'sports ball' kite 'baseball bat' 'baseball glove' skateboard surfboard "
    "'tennis racket' bottle 'wine glass' cup fork knife spoon bowl banana apple sandwich orange broccoli carrot "
    "'hot dog' pizza donut cake chair couch 'potted plant' bed 'dining table' toilet tv laptop mouse remote "
    "keyboard 'cell phone' microwave oven toaster sink refrigerator book clock vase scissors 'teddy bear' "
    "'hair drier' toothbrush"
)
_OTHER_WORDS = {
    "person": ("people", "man", "woman", "boy", "girl", "child", "men", "women", "children"),
    "mouse": ("mice",),
    "knife": ("knives",),
    "couch": ("couches", "sofa", "sofas"),
    "tv": ("television", "tvs"),
}


class Chair(Metric):
    """CHAIR (Rohrbach et al., arXiv 1809.02156). The row's ``objects`` lists the objects in the image.

    Args:
        synonyms: a text file with one object per line: its name and other words for it, separated by commas. Default:
            the 80 COCO categories with their plurals and a few words for people.
    """

    synonyms: str | None = None

    def __call__(self, answers: Sequence[Answer]) -> list[Measured]:
        """``chair_i`` (share of named objects not in the image), ``chair_s`` (captions with one), ``chair_recall``."""
        words = self.words()
        per_object, per_caption, found = [], [], []
        for a in answers:
            there = self._there(a, words)
            named = mentioned(a.text, words)
            wrong = named - there
            per_object.append((len(wrong), len(named)))
            per_caption.append((float(bool(wrong)), 1.0))
            found.append((len(named & there), len(there)))

        def measured(name: str, rows: Sequence[tuple[float, float]], better: str, text: str) -> Measured:
            parts, prompts = by_prompt(answers, rows)
            n = int(sum(r[1] for r in rows))
            return Measured(name, parts, prompts, n, ratio, unit="share", better=better, help=text)  # type: ignore[arg-type]

        return [
            measured("chair_i", per_object, "lower", "named objects that the image does not show"),
            measured("chair_s", per_caption, "lower", "captions that name such an object"),
            measured("chair_recall", found, "higher", "objects of the image that are named"),
        ]

    def words(self) -> dict[str, str]:
        """Maps each word (or two words) for an object to the object's name."""
        if self.synonyms is None:
            return _default()
        try:
            lines = Path(self.synonyms).read_text(encoding="utf-8").splitlines()
        except OSError as error:
            raise DataError(
                f"metric chair: synonyms: {self.synonyms}: cannot be read ({error.strerror})"
            ) from None
        rows = [[w.strip().lower() for w in line.split(",") if w.strip()] for line in lines]
        return {word: row[0] for row in rows if row for word in row}

    def _there(self, answer: Answer, words: dict[str, str]) -> set[str]:
        where = answer.example.where or answer.example.id
        value = answer.example.extra.get("objects")
        if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
            raise DataError(
                f"{where}: objects: CHAIR needs a list of the names of the objects in the image, got {value!r}"
            )
        return {words.get(v.lower(), v.lower()) for v in value}


def mentioned(text: str, words: dict[str, str]) -> set[str]:
    """The objects that a text names; two words that name an object count together ("hot dog" is not a dog)."""
    tokens = simple_tokens(text).split()
    found: set[str] = set()
    i = 0
    while i < len(tokens):
        pair = " ".join(tokens[i : i + 2])
        if i + 1 < len(tokens) and pair in words:
            found.add(words[pair])
            i += 2
            continue
        if tokens[i] in words:
            found.add(words[tokens[i]])
        i += 1
    return found


def _default() -> dict[str, str]:
    import shlex

    table: dict[str, str] = {}
    for name in shlex.split(COCO):
        plural = f"{name}es" if name.endswith(("s", "x", "ch", "sh")) else f"{name}s"
        for word in (name, *_OTHER_WORDS.get(name, ()), plural):
            table[word] = name
    return table
