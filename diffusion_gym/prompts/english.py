"""As much English as prompts need: a or an, and plurals."""

from __future__ import annotations

import re
from typing import Final

NUMBERS: Final = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")

# By sound, not by letter: "a unicorn", "a European", "a ewe", "a one-eyed cat"; "an hour", "an heir".
_VOWEL: Final = re.compile(r"[aeiou]|hour|heir|hono[u]?r|honest", re.IGNORECASE)
_CONSONANT: Final = re.compile(r"eu|ew|on(?:e|ce)\b|u(?:ni(?![dmn])|nanim|s(?:e|u|a)|k|te|to|ro|bi|ga)", re.IGNORECASE)
# Said letter by letter: "an MRI", "an X-ray", "a UFO", "a TV". A number: "an 8", "an 11-year-old", "an 80s car".
_SPELT: Final = re.compile(r"(?:[A-Z]{2,3}|[A-Z](?=-))(?![A-Za-z])")
_SPELT_VOWEL: Final = "AEFHILMNORSX"
_NUMBER_VOWEL: Final = re.compile(r"8|1[18](?!\d)")

_SAME: Final = ("sheep", "deer", "fish", "moose", "bison", "squid", "offspring", "aircraft", "scissors", "sunglasses")
_IRREGULAR: Final = {
    "goose": "geese",
    "ox": "oxen",
    "child": "children",
    "person": "people",
    "man": "men",
    "foot": "feet",
    "tooth": "teeth",
    "knife": "knives",
    "leaf": "leaves",
    "loaf": "loaves",
    "potato": "potatoes",
    "tomato": "tomatoes",
    "mosquito": "mosquitoes",
    "buffalo": "buffaloes",
    "quiz": "quizzes",
}
# Pattern of a word's end, and what replaces its group.
_ENDINGS: Final = tuple(
    (re.compile(pattern), ending)
    for pattern, ending in (
        (r"(?:wo|snow|fire|police|post|fisher|sports)m(an)$", "en"),
        (r"(?:m|^l)(ouse)$", "ice"),  # mouse, titmouse, louse; not house or blouse
        (r"(?:wol|cal|el|hal)(f)$", "ves"),  # wolf, calf, shelf, half; not reef or giraffe
        (r"[^aeiou](y)$", "ies"),
        (r"(?:s|x|z|ch|sh)()$", "es"),
        (r"()$", "s"),
    )
)


def article(phrase: str) -> str:
    """`a` or `an`, whichever goes before `phrase`."""
    if spelt := _SPELT.match(phrase):
        return "an" if spelt[0][0] in _SPELT_VOWEL else "a"
    if phrase[:1].isdigit():
        return "an" if _NUMBER_VOWEL.match(phrase) else "a"
    return "an" if _VOWEL.match(phrase) and not _CONSONANT.match(phrase) else "a"


def plural(noun: str) -> str:
    """The plural of a singular noun; of several words, that of the last: `polar bear`, `polar bears`."""
    start, last = re.fullmatch(r"(.*?)([^\s-]*)", noun, re.DOTALL).groups()  # type: ignore[union-attr]
    return start + _plural(last)


def _plural(word: str) -> str:
    if word in _IRREGULAR:
        return _IRREGULAR[word]
    if word.endswith(_SAME):
        return word
    found = ((pattern.search(word), ending) for pattern, ending in _ENDINGS)
    return next(word[: match.start(1)] + ending for match, ending in found if match)
