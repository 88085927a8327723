"""As much English as the prompt sets need: a or an, and plurals."""

from __future__ import annotations

from typing import Final

NUMBERS: Final = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")

_SAME: Final = ("sheep", "deer", "fish", "moose", "bison", "squid")
_IRREGULAR: Final = dict(
    pair.split("=")
    for pair in """mouse=mice wolf=wolves calf=calves goose=geese ox=oxen person=people child=children man=men
    woman=women foot=feet tooth=teeth knife=knives leaf=leaves""".split()
)


def article(phrase: str) -> str:
    """`a` or `an`, whichever goes before `phrase`, by its first letter: right for the words of the sets here."""
    return "an" if phrase.startswith(tuple("aeiou")) else "a"


def plural(noun: str) -> str:
    """The plural of a singular noun; of several words, that of the last: `polar bear`, `polar bears`."""
    last = noun.replace("-", " ").rpartition(" ")[2]
    if last in _IRREGULAR:
        return noun.removesuffix(last) + _IRREGULAR[last]
    if last.endswith(_SAME):
        return noun
    if last.endswith("y") and last[-2:-1] not in tuple("aeiou"):
        return noun[:-1] + "ies"
    return noun + ("es" if last.endswith(("s", "x", "z", "ch", "sh")) else "s")
