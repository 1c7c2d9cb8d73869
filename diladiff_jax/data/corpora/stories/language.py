"""The language of stories, declared as data: its words, its sentences and its agreements."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

Features = Mapping[str, str]


@dataclass(frozen=True)
class Slot:
    """A place for one word.

    Attributes:
      words: the words that fit, with the features that each asserts. All words of a slot assert
        the same features, each with values of its own.
      unlike: a feature that the word must differ from, if the story has asserted it.
    """

    words: Mapping[str, Features]
    unlike: str | None = None


@dataclass(frozen=True)
class Variant:
    """One wording of a sentence: words and ``{slot}`` names, and the features it asserts.

    As with words, all variants of a sentence assert the same features.
    """

    template: str
    features: Features = field(default_factory=dict)


# Which agreement breaks when two mentions of a feature differ. "Keeper" is the person who has the
# things in the end: the other person if the finder gave them away, else the finder.
AGREEMENTS: Features = {
    "finder": "name",
    "other": "name",
    "object": "object",
    "colour": "colour",
    "place": "place",
    "number": "number",
    "gender": "pronoun",
    "keeper": "ending",
}

_GENDERS = {
    "she": "Anna Clara Emma Grace Julia Mia Nora Sarah Vera Wendy",
    "he": "Adam Ben Carl David Frank Hugo Ivan Leo Oscar Tom",
}
_GENDER_OF = {name: gender for gender, names in _GENDERS.items() for name in names.split()}
_COLOURS = (
    "black blue broken dusty golden green grey heavy painted plain purple red rusty striped "
    "white yellow"
)
_OBJECTS = (
    "bell blanket book bottle button candle chair coat drum flute hat key kite lamp map mirror "
    "pillow ring rope wheel"
)
_PLACES = (
    "airport bakery barn bridge castle cinema circus farm garden harbour library lighthouse "
    "market mill museum orchard pond station tower zoo"
)


def _slot(feature: str, words_of: Mapping[str, str]) -> Slot:
    """A slot whose words, given as one string per value, assert one feature."""
    return Slot({w: {feature: value} for value, words in words_of.items() for w in words.split()})


def _detail(feature: str, words: str) -> Slot:
    """A slot for a detail: each word asserts itself."""
    return _slot(feature, {word: word for word in words.split()})


def _free(words: str) -> Slot:
    """A slot whose words assert nothing."""
    return Slot({word: {} for word in words.split()})


SLOTS: Mapping[str, Slot] = {
    "finder": Slot({name: {"finder": name, "gender": g} for name, g in _GENDER_OF.items()}),
    "finder again": _detail("finder", " ".join(_GENDER_OF)),
    "other": Slot({name: {"other": name} for name in _GENDER_OF}, unlike="finder"),
    "other again": _detail("other", " ".join(_GENDER_OF)),
    "she": _slot("gender", {"she": "She", "he": "He"}),
    "found": _free("borrowed bought chose collected found made received won"),
    "two": _slot("number", {"one": "a one", "many": "two three"}),
    "colour": _detail("colour", _COLOURS),
    "kites": Slot(
        {
            noun + ending: {"object": noun, "number": number}
            for noun in _OBJECTS.split()
            for number, ending in (("one", ""), ("many", "s"))
        }
    ),
    "harbour": _detail("place", _PLACES),
    "gave": _slot(
        "keeper",
        {"other": "gave handed passed sold", "finder": "described mentioned revealed showed"},
    ),
    "them": _slot("number", {"one": "it", "many": "them"}),
    "are": _slot("number", {"one": "is", "many": "are"}),
    "keeps": _free("guards keeps owns treasures"),
}

# The wordings differ in length and order, so that no detail has a fixed position. No word appears
# both with and without a capital, which would cost the tokenizer a second piece.
SENTENCES: Sequence[Sequence[Variant]] = (
    (
        Variant("{finder} {found} {two} {colour} {kites} at the {harbour} ."),
        Variant("Yesterday {finder} {found} {two} {colour} {kites} at the {harbour} ."),
        Variant("Over at the {harbour} {finder} {found} {two} {colour} {kites} ."),
        Variant("{finder} went to the {harbour} and {found} {two} {colour} {kites} ."),
    ),
    (
        Variant("{she} {gave} {them} to {other} ."),
        Variant("{she} soon {gave} {them} to {other} ."),
        Variant("{she} {gave} the {kites} to {other} ."),
        Variant("{she} {gave} the {colour} {kites} to {other} ."),
    ),
    tuple(
        Variant(template.replace("{keeper", "{" + keeper), {"keeper": keeper})
        for keeper in ("finder", "other")
        for template in (
            "{keeper again} {keeps} the {colour} {kites} from the {harbour} .",
            "Now {keeper again} {keeps} the {colour} {kites} from the {harbour} .",
            "Now the {colour} {kites} from the {harbour} {are} with {keeper again} .",
            "Back at the {harbour} {keeper again} {keeps} the {colour} {kites} .",
        )
    ),
)
