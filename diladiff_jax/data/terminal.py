"""Makes text safe to print."""

import re

# Control characters but tab and newline, separators of lines, reversals of the writing direction,
# and surrogates.
_UNSAFE = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)


def printable(text: str) -> str:
    """Text for a terminal or a log: characters that would control it are escaped, as in "\\x1b"."""
    return _UNSAFE.sub(
        lambda found: found[0].encode("unicode_escape", "surrogatepass").decode(), text
    )
