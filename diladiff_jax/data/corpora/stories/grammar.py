"""The interpreter of a language of stories: sampler, parser, likelihood and entropy."""

from __future__ import annotations

import collections
import itertools
import math
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from diladiff_jax.data.corpora.stories.language import (
    AGREEMENTS,
    SENTENCES,
    SLOTS,
    Features,
    Slot,
    Variant,
)


@dataclass(frozen=True)
class Report:
    """Which of the language's rules a text keeps.

    Attributes:
      parses: whether the text has the form of a story: every slot holds some word of its kind.
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
        """The fraction of agreements kept, in [0, 1]; 0 if the text does not parse."""
        return sum(self.agreements.values()) / len(self.agreements)


def units(text: str) -> list[str]:
    """Splits a text into words and full stops."""
    return re.findall(r"\.|[^\s.]+", text)


class _Choice:
    """A choice among options that assert features: the words of a slot, or whole wordings.

    Args:
      options: the features of each option; every option has the same ones.
      unlike: a feature whose value the option must not be.
    """

    def __init__(self, options: Mapping[Any, Features], unlike: str | None = None):
        self.options = options
        self.unlike = unlike
        self.features = tuple(next(iter(options.values())))
        self._relevant = self.features + ((unlike,) if unlike else ())
        self._fitting: dict[tuple, list] = {}

    def clashes(self, option: Any, known: Features) -> set[str]:
        """The features in which an option contradicts those that are known."""
        asserted = self.options[option]
        found = {name for name, value in asserted.items() if known.get(name, value) != value}
        if self.unlike and known.get(self.unlike) == option:
            found.add(self.unlike)
        return found

    def fitting(self, known: Features) -> list:
        """The options without clashes, in the order of their declaration."""
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
    """A language declared as slots and sentences; the docstring of `stories` states its rule.

    Args:
      slots: the slots, by the names that templates use.
      sentences: the variants of each sentence, in order. Each template has one ".", at its end.
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

        self._sentences = [
            _Choice({compiled(v.template): v.features for v in variants}) for variants in sentences
        ]
        self._agreements = agreements

    def vocabulary(self) -> frozenset[str]:
        """All units that stories are made of."""
        wordings = itertools.chain.from_iterable(s.options for s in self._sentences)
        return frozenset(word for slots in wordings for slot in slots for word in slot.options)

    def sample(self, rng: random.Random) -> str:
        """Samples one story."""
        known: dict[str, str] = {}

        def draw(choice: _Choice) -> Any:
            fitting = choice.fitting(known)
            # Python promises not to change the stream of `random()`, unlike that of `choice`.
            option = fitting[int(rng.random() * len(fitting))]
            known.update(choice.options[option])
            return option

        words = [draw(slot) for sentence in self._sentences for slot in draw(sentence)]
        return " ".join(words).replace(" .", ".")

    def check(self, text: str) -> Report:
        """Reports which rules a text keeps. Any text is allowed, and spacing does not matter.

        If the text has several readings (its last sentence may be about either person), the most
        favourable one counts: the one that breaks the fewest agreements, and among equals one
        that keeps "name".
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
        """The exact log-probability of a text's units, in nats; -inf if they are not a story.

        If several derivations give the text, their probabilities are added. In the language of
        `stories`, every text has at most one.
        """
        return _log_sum_exp(
            -sum(math.log(len(choice.fitting(known))) for choice, _, known in reading)
            for reading in self._readings(text)
            if not self._broken(reading)
        )

    def details(self, text: str) -> Features | None:
        """The value of each feature in a story; None if the text is not one."""
        for reading in self._readings(text):
            if not self._broken(reading):
                asserted = [choice.options[option] for choice, option, _ in reading]
                return dict(itertools.chain.from_iterable(a.items() for a in asserted))
        return None

    def detail_entropy(self) -> float:
        """The sum of the entropies of the features' values over all stories, in nats.

        A feature's values have the probabilities that they have in the first choice that asserts
        it, which holds where `unlike` excludes every word equally often.
        """
        total, found = 0.0, set[str]()
        for sentence in self._sentences:
            slots = itertools.chain.from_iterable(sentence.options)
            for choice in (sentence, *slots):
                for feature in set(choice.features) - found:
                    values = [asserted[feature] for asserted in choice.options.values()]
                    shares = [n / len(values) for n in collections.Counter(values).values()]
                    total -= math.fsum(p * math.log(p) for p in shares)
                found.update(choice.features)
        return total

    def entropy(self) -> float:
        """The exact entropy of a story, in nats: the mean of -`log_likelihood`.

        The grammar must be balanced: the number of options of a choice may depend on which
        features are known, but not on their values. The entropy is then an average over wordings.

        Raises:
          ValueError: the grammar is not balanced.
        """

        def of_slots(slots: tuple[_Choice, ...], bound: frozenset[str], rest: list) -> float:
            total = 0.0
            for slot in slots:
                # Whichever group remains, it contains the option that `unlike` excludes.
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

    def _readings(self, text: str) -> Iterator[list[tuple[_Choice, Any, Features]]]:
        """The ways to read a text as the surface of a story.

        Yields:
          The choices in order, each with the option taken and the features known before it. The
          first mention of a feature determines its value.
        """
        words = units(text)
        ends = [i + 1 for i, word in enumerate(words) if word == "."]
        if len(ends) != len(self._sentences) or ends[-1] != len(words):
            return
        per_sentence = []
        for sentence, start, end in zip(self._sentences, [0, *ends[:-1]], ends, strict=True):
            found = words[start:end]
            wordings = [slots for slots in sentence.options if len(slots) == len(found)]
            pairs = [(slots, list(zip(slots, found, strict=True))) for slots in wordings]
            per_sentence.append(
                [
                    [(sentence, slots), *taken]
                    for slots, taken in pairs
                    if all(word in slot.options for slot, word in taken)
                ]
            )
        for parts in itertools.product(*per_sentence):
            known: Features = {}
            reading: list[tuple[_Choice, Any, Features]] = []
            for choice, option in itertools.chain.from_iterable(parts):
                reading.append((choice, option, known))
                known = {**choice.options[option], **known}
            yield reading

    @staticmethod
    def _broken(reading: list[tuple[_Choice, Any, Features]]) -> set[str]:
        """The features that a reading contradicts itself in."""
        return set().union(*(choice.clashes(option, known) for choice, option, known in reading))


def _only(values: Iterator[float]) -> float:
    """The value that all `values` are equal to."""
    first, *others = values
    if not all(math.isclose(first, other) for other in others):
        raise ValueError(
            "the grammar is not balanced: earlier values change the number of later options"
        )
    return first


def _log_sum_exp(values: Iterator[float]) -> float:
    terms = list(values)
    top = max(terms, default=-math.inf)
    return top if len(terms) < 2 else top + math.log(math.fsum(math.exp(v - top) for v in terms))
