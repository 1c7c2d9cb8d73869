"""What people and programs put where a number, a word, a text or JSON belongs.

Numbers between a few and 2^31 are left out where they would be steps or documents: they ask for
work that takes long, and get it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from hypothesis import strategies as st


def split_words(text: str) -> list[str]:
    """The words of a text; shorter than a list of many literals."""
    return text.split()


# Not UTF-8, as a shell passes it on.
_BYTES = st.binary(max_size=30).map(lambda data: os.fsdecode(data.replace(b"\0", b"")))
WORDS = (
    st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), max_size=20)
    | _BYTES
)
HUGE = st.sampled_from([2**31 - 1, 2**31, 2**32, 2**63 - 1, 2**63, 10**19, 10**400])
TOO_LARGE = st.sampled_from([2**31, 2**32 + 1, 2**63, 10**19, 10**400])
SMALL = st.integers(-3, 4)
NEGATIVE = st.sampled_from([-(2**31) - 1, -(2**63), -(2**63) - 1, -(10**19)])
ODD = st.sampled_from(
    [
        *["", " ", "\n", "a\nb", "\x1b[31m", "{'a': 1}", "lambda: 0", "\u0661"],
        *split_words("abc 1.5 1e3 1e400 1e-400 0.5 -0.0 nan inf -inf True None 0x10 1_0 1,2"),
        *split_words("(1,2 (1,2) () (0,) (-1,) [1] [] {} 'a' (1,'a') ((1,),) (1.5,) (True,)"),
        *['"', "'", "--", "-", "="],
    ]
)
FLOATS = st.floats(allow_nan=True, allow_infinity=True).map(repr)
VALUES = SMALL.map(str) | TOO_LARGE.map(str) | NEGATIVE.map(str) | ODD | FLOATS | WORDS
JSON = st.recursive(
    st.none() | st.booleans() | SMALL | HUGE | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=4,
)


def misspelled(word: str) -> st.SearchStrategy[str]:
    """A word without one of its letters, in capitals, or with an s."""
    without_a_letter = st.integers(0, max(0, len(word) - 1)).map(
        lambda at: word[:at] + word[at + 1 :]
    )
    return without_a_letter | st.just(word.upper()) | st.just(word + "s")


_INSERTED = [
    *[b"\0", b"\0" * 50, b"\xff", b"\xc3", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xef\xbb\xbf"],
    *[b"\r", b"\x1a", b"\x85", b"\xe2\x80\xa8", "\u2581".encode(), b"[MASK]"],
]


def damaged(data: bytes) -> st.SearchStrategy[bytes]:
    """The data with something inserted, with a bit flipped, or cut short."""
    place = st.integers(0, max(len(data), 1))

    def insert(at: int, what: bytes) -> bytes:
        return data[:at] + what + data[at:]

    def flip(at: int, bit: int) -> bytes:
        if at >= len(data):
            return data
        return data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :]

    return (
        st.builds(insert, place, st.sampled_from(_INSERTED))
        | place.map(lambda at: data[:at])
        | st.builds(flip, place, st.integers(0, 7))
    )


def settings_by_name(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The settings of nested blocks by their dotted names."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            found |= settings_by_name(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = value
    return found
