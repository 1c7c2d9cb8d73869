"""Hashes that name folders and seed generators: the same on every machine and Python version."""

import hashlib
import json
from typing import Any


def short_hash(value: Any) -> str:
    """16 hexadecimal digits that depend on a JSON value only."""
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=8).hexdigest()


def seed_from(name: str) -> int:
    """An unsigned 32-bit seed that depends on `name` only."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=4).digest(), "big")
