"""An endless language of very short stories, with exact oracles.

    Mia found two red kites at the harbour. She sold them to Tom. Tom keeps the red kites from
    the harbour.

Every detail of a story is chosen once, uniformly from many values, and must recur: single words
are close to unpredictable, so nearly all that there is to learn is in the correlations between
them. A sampler that draws words independently of each other is caught at once, and by an exact
measure: `check` says which agreements a text keeps, `log_likelihood` how probable it is.

The language is declared as data, the tables below, and read by one interpreter. Each word of a
slot asserts *features*, such as ``number=many`` for "kites". A story is written from left to
right: first the variant of a sentence, then its words, each drawn uniformly from those whose
features agree with all that the story has asserted so far. A detail's first mention is thus a
free choice, and its later ones are forced. Sampler, parser, likelihood and entropy all follow
from this one rule, and so cannot disagree with each other.

A *unit* is a word or a full stop. A story has 24 to 30 units, so that with a tokenizer of one
piece per unit it fits 32 tokens, the end of the text included.
"""

from __future__ import annotations

import itertools
import math
import random
import re
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

Features = Mapping[str, str]


@dataclass(frozen=True)
class Slot:
    """A place for one word.

    Attributes:
      words: the words that fit, with the features each asserts. All words of a slot assert the
        same features, with values of their own.
      unlike: a feature whose value the word must not be, where the story has asserted it.
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


@dataclass(frozen=True)
class Report:
    """Which of the language's rules a text keeps.

    Attributes:
      parses: the text has the surface of a story: every slot holds some word of its kind.
      agreements: for each agreement, whether it is kept. All False if the text does not parse.
    """

    parses: bool
    agreements: Mapping[str, bool]

    @property
    def valid(self) -> bool:
        """Whether the text keeps every rule, that is, has a positive probability."""
        return self.parses and all(self.agreements.values())

    @property
    def agreement(self) -> float:
        """The share of agreements kept, in [0, 1]; 0 if the text does not parse."""
        return sum(self.agreements.values()) / len(self.agreements)


# --- The language -------------------------------------------------------------------------------

# Which agreement breaks when two mentions of a feature differ. "Keeper" says which of the two
# people has the things in the end: the other one if they were given away, else their finder.
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
_COLOURS = "black blue broken dusty golden green grey heavy painted plain purple red rusty striped white yellow"
_OBJECTS = "bell blanket book bottle button candle chair coat drum flute hat key kite lamp map mirror pillow ring rope wheel"
_PLACES = (
    "airport bakery barn bridge castle cinema circus farm garden harbour library lighthouse market mill museum "
    "orchard pond station tower zoo"
)


def _slot(feature: str, words_of: Mapping[str, str]) -> Slot:
    """A slot whose words, given as one string per value, assert one feature."""
    return Slot({w: {feature: value} for value, words in words_of.items() for w in words.split()})


def _detail(feature: str, words: str) -> Slot:
    """A slot for a detail: each word asserts itself."""
    return _slot(feature, {word: word for word in words.split()})


SLOTS: Mapping[str, Slot] = {
    "finder": Slot({name: {"finder": name, "gender": g} for name, g in _GENDER_OF.items()}),
    "finder again": _detail("finder", " ".join(_GENDER_OF)),
    "other": Slot({name: {"other": name} for name in _GENDER_OF}, unlike="finder"),
    "other again": _detail("other", " ".join(_GENDER_OF)),
    "she": _slot("gender", {"she": "She", "he": "He"}),
    "found": Slot(dict.fromkeys(
        ["borrowed", "bought", "chose", "collected", "found", "made", "received", "won"], {})),
    "two": _slot("number", {"one": "a one", "many": "two three"}),
    "colour": _detail("colour", _COLOURS),
    "kites": Slot({
        noun + ending: {"object": noun, "number": number}
        for noun in _OBJECTS.split() for number, ending in (("one", ""), ("many", "s"))}),
    "harbour": _detail("place", _PLACES),
    "gave": _slot("keeper", {
        "other": "gave handed passed sold", "finder": "described mentioned revealed showed"}),
    "them": _slot("number", {"one": "it", "many": "them"}),
    "are": _slot("number", {"one": "is", "many": "are"}),
    "keeps": Slot(dict.fromkeys(["guards", "keeps", "owns", "treasures"], {})),
}  # fmt: skip

# The wordings differ in length and order, so that no detail has a position of its own, and no
# word is used both with and without a capital, which would cost the tokenizer a piece.
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


# --- Its interpreter ----------------------------------------------------------------------------


class _Choice:
    """A choice among options that each assert features: a word of a slot, or a whole wording.

    Args:
      options: the features of each option; every option has the same ones.
      unlike: a feature whose value the option must not be.
    """

    def __init__(self, options: Mapping[Hashable, Features], unlike: str | None = None):
        self.options = options
        self.unlike = unlike
        self.features = tuple(next(iter(options.values())))
        self._relevant = self.features + ((unlike,) if unlike else ())
        self._fitting: dict[tuple, list] = {}

    def clashes(self, option: Hashable, known: Features) -> set[str]:
        """The features in which an option disagrees with those known already."""
        asserted = self.options[option]
        found = {name for name, value in asserted.items() if known.get(name, value) != value}
        if self.unlike and known.get(self.unlike) == option:
            found.add(self.unlike)
        return found

    def fitting(self, known: Features) -> list:
        """The options without clashes, in the order declared."""
        key = tuple(known.get(name) for name in self._relevant)
        if key not in self._fitting:
            self._fitting[key] = [o for o in self.options if not self.clashes(o, known)]
        return self._fitting[key]

    def groups(self, bound: frozenset[str]) -> list[list]:
        """The options that remain under each value of the features that are bound."""
        names = [name for name in self.features if name in bound]
        groups: dict[tuple, list] = {}
        for option, asserted in self.options.items():
            groups.setdefault(tuple(asserted[name] for name in names), []).append(option)
        return list(groups.values())


class Grammar:
    """A language declared as slots and sentences; see the module's docstring for its rule.

    Args:
      slots: the slots, by the names that templates use.
      sentences: the variants of each sentence, in order. Each template ends in the only "."
        that it has.
      agreements: the name of the agreement that each feature belongs to.
    """

    def __init__(
        self,
        slots: Mapping[str, Slot] = SLOTS,
        sentences: Sequence[Sequence[Variant]] = SENTENCES,
        agreements: Features = AGREEMENTS,
    ):
        # A literal word is a slot with one option that asserts nothing.
        choices = {"{" + name + "}": _Choice(s.words, s.unlike) for name, s in slots.items()}
        literals = {}

        def compiled(template: str) -> tuple[_Choice, ...]:
            parts = re.findall(r"\{.*?\}|\S+", template)
            return tuple(
                choices.get(part) or literals.setdefault(part, _Choice({part: {}}))
                for part in parts
            )

        self._sentences = [_Choice({compiled(v.template): v.features for v in variants})
                           for variants in sentences]  # fmt: skip
        self._agreements = agreements

    def vocabulary(self) -> frozenset[str]:
        """All units that stories are made of."""
        wordings = itertools.chain.from_iterable(s.options for s in self._sentences)
        return frozenset(word for slots in wordings for slot in slots for word in slot.options)

    def sample(self, rng: random.Random) -> str:
        """Draws one story."""
        known: dict[str, str] = {}

        def draw(choice: _Choice) -> Hashable:
            fitting = choice.fitting(known)
            # `random()` alone has a stream that Python promises not to change.
            option = fitting[int(rng.random() * len(fitting))]
            known.update(choice.options[option])
            return option

        words = [draw(slot) for sentence in self._sentences for slot in draw(sentence)]
        return " ".join(words).replace(" .", ".")

    def check(self, text: str) -> Report:
        """Says which rules a text keeps. Spacing does not matter; any text is allowed.

        Where the surface allows several readings (the last sentence, which may be about either
        person), the most favourable one counts: fewest agreements broken, and among those
        preferably not "name".
        """
        broken = [
            {self._agreements[feature] for feature in self._broken(reading)}
            for reading in self._readings(text)
        ]
        names = dict.fromkeys(self._agreements.values())
        if not broken:
            return Report(False, dict.fromkeys(names, False))
        best = min(broken, key=lambda b: (len(b), "name" in b))
        return Report(True, {name: name not in best for name in names})

    def log_likelihood(self, text: str) -> float:
        """The exact log-probability of a text's units, in nats; -inf if they are no story.

        Where several derivations give the text (there are none such in this module's language),
        their probabilities are added.
        """
        return _log_sum_exp(
            -sum(math.log(len(choice.fitting(known))) for choice, _, known in reading)
            for reading in self._readings(text)
            if not self._broken(reading)
        )

    def entropy(self) -> float:
        """The exact entropy of a story, in nats: the mean of minus `log_likelihood`.

        A choice's number of options must not depend on the values chosen before, only on which
        features have one; then the entropy is an average over wordings alone.

        Raises:
          ValueError: if the grammar is not balanced in that sense.
        """

        def of_slots(slots: tuple[_Choice, ...], bound: frozenset[str], rest: list) -> float:
            total = 0.0
            for slot in slots:
                # The option excluded by `unlike` is in whichever group remains.
                excluded = slot.unlike in bound
                total += _only(math.log(len(g) - excluded) for g in slot.groups(bound))
                bound |= set(slot.features)
            return total + of_sentences(rest, bound)

        def of_sentences(sentences: list[_Choice], bound: frozenset[str]) -> float:
            if not sentences:
                return 0.0
            sentence, *rest = sentences
            after = bound | set(sentence.features)
            return _only(
                math.log(len(g)) + math.fsum(of_slots(s, after, rest) for s in g) / len(g)
                for g in sentence.groups(bound)
            )

        return of_sentences(self._sentences, frozenset())

    def _readings(self, text: str) -> Iterator[list[tuple[_Choice, Hashable, Features]]]:
        """The ways to read a text as the surface of a story.

        Yields:
          The choices in the order made, each with the option taken and the features known
          before it, where a feature's first mention counts.
        """
        words = units(text)
        ends = [i + 1 for i, word in enumerate(words) if word == "."]
        if len(ends) != len(self._sentences) or ends[-1] != len(words):
            return
        per_sentence = []
        for sentence, start, end in zip(self._sentences, [0, *ends], ends):
            said = words[start:end]
            per_sentence.append([
                [(sentence, slots), *zip(slots, said)]
                for slots in sentence.options
                if len(slots) == len(said) and all(w in s.options for s, w in zip(slots, said))
            ])  # fmt: skip
        for parts in itertools.product(*per_sentence):
            known: Features = {}
            reading = []
            for choice, option in itertools.chain.from_iterable(parts):
                reading.append((choice, option, known))
                known = {**choice.options[option], **known}
            yield reading

    @staticmethod
    def _broken(reading: list[tuple[_Choice, Hashable, Features]]) -> set[str]:
        """The features in which a reading contradicts itself."""
        return set().union(*(choice.clashes(option, known) for choice, option, known in reading))


def _only(values: Iterator[float]) -> float:
    """The one value that all values have."""
    first, *others = values
    if not all(math.isclose(first, other) for other in others):
        raise ValueError("the grammar is not balanced: earlier values change the later options")
    return first


def _log_sum_exp(values: Iterator[float]) -> float:
    values = list(values)
    top = max(values, default=-math.inf)
    return top if len(values) < 2 else top + math.log(math.fsum(math.exp(v - top) for v in values))


# --- The corpus ---------------------------------------------------------------------------------

_GRAMMAR = Grammar()


def units(text: str) -> list[str]:
    """Splits a text into words and full stops."""
    return re.findall(r"\.|[^\s.]+", text)


def documents(count: int, seed: int) -> Iterator[str]:
    """Yields `count` stories; the one at an index depends on the seed and that index alone.

    Raises:
      ValueError: if `count` is negative.
    """
    if count < 0:
        raise ValueError(f"count must not be negative: {count}")
    return (_GRAMMAR.sample(random.Random(f"{seed}/{index}")) for index in range(count))


def check(text: str) -> Report:
    """Says which rules of the language a text keeps; see `Grammar.check`."""
    return _GRAMMAR.check(text)


def log_likelihood(text: str) -> float:
    """The exact log-probability of a text, in nats; -inf if it is no story."""
    return _GRAMMAR.log_likelihood(text)


def entropy() -> float:
    """The exact entropy of a story, in nats."""
    return _GRAMMAR.entropy()


def vocabulary() -> frozenset[str]:
    """All units that stories are made of."""
    return _GRAMMAR.vocabulary()
