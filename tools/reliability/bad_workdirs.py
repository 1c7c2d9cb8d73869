"""Workdirs that are damaged, as hypothesis strategies of cases."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from hypothesis import strategies as st
from input_case import SMALL, Case, quick_flags
from odd_values import JSON, damaged, settings_by_name

Change = tuple[str, bytes | None]

_NEAR_VALUES = [
    *[0, 1, 2, 8, 16, 24, 33, 64, -1, True, 0.5, [0], [1, 0]],
    *["rotary", "threshold", "bert", "text_files"],
]
_INIT_FROM_SOURCES = [
    *[b"", b"{}", b"[]", b"null", b"{", b"\xff", b'{"workdir": 1}', b'{"workdir": "nowhere"}'],
    *[b'{"workdir": "w"}', b'{"workdir": "a\\u0000b"}'],
]
_STRANGE_CHECKPOINTS = [
    *[("99/", None), ("99/params/x", b""), ("99", b""), ("x/", None), ("\u0663/x", b"")],
    ("99999999999999999999999/x", b""),
]
_FOLDERS = ["tokenizer", "data", "mdlm", "mdlm/checkpoints", "autoencoder/checkpoints", "diladiff"]
_EVALUATE = ("--workdir=w", "--out=/dev/null/x")
_COMMANDS = [
    ("sample.py", ("--workdir=w", *quick_flags("sample.py"))),
    ("sample.py", ("--workdir=w", "--num=1", "--decode_steps=1", "--latent_steps=1")),
    ("train.py", ("--workdir=w", "--stage=all")),
    ("train.py", ("--workdir=w", *SMALL)),
    ("train.py", ("--workdir=w", "--stage=diladiff", "--config.diladiff.steps=3")),
    (
        "train.py",
        ("--workdir=new", *SMALL, "--init_from=w", "--stage=autoencoder", "--stop_at=1"),
    ),
    ("prepare.py", ("--workdir=w",)),
    ("evaluate.py", (*_EVALUATE, "--analyses=False")),
    ("evaluate.py", (*_EVALUATE, "--compare=w")),
]


def workdirs(base: Mapping[str, bytes]) -> st.SearchStrategy[Case]:
    """Workdirs whose files are missing, cut short, changed, or from another experiment."""
    plain = sorted(name for name in base if "/metrics/" not in name)
    notes = [name for name in plain if name.endswith(".json") and "/checksums/" not in name]
    one = st.sampled_from(notes).flatmap(
        lambda name: _mutated(base, name) | _mutated(base, name) | _spoiled(base, name)
    ) | st.sampled_from(plain).flatmap(lambda name: _spoiled(base, name))
    checkpoint = st.sampled_from([name for name in plain if "/checkpoints/" in name]).flatmap(
        lambda name: _spoiled(base, name)
    )
    # Without its checksums, only Orbax itself can notice that a checkpoint is damaged.
    without_checksums = checkpoint.map(
        lambda change: (change, (f"w/{change[0].split('/')[1]}/checksums/", None))
    )
    note = st.sampled_from(_INIT_FROM_SOURCES).map(lambda data: ("w/init_from.json", data))
    folder = st.sampled_from(_FOLDERS).flatmap(
        lambda name: st.sampled_from(
            [(f"w/{name}/", None), (f"w/{name}", b"text"), (f"w/{name}", None)]
        )
    )
    strange = st.sampled_from(_STRANGE_CHECKPOINTS).map(
        lambda change: (f"w/mdlm/checkpoints/{change[0]}", change[1])
    )
    tokenizer = st.sampled_from([1, 100, 300, 500, 2000]).map(_other_tokenizer)
    changes = (
        st.lists(one, min_size=1, max_size=2).map(tuple)
        | tokenizer
        | without_checksums
        | st.tuples(one)
        | st.tuples(note | folder | strange)
        | st.tuples(note, one)
    )
    return st.builds(
        lambda command, changes: Case(*command, tuple(changes)),
        st.sampled_from(_COMMANDS),
        changes,
    )


def _other_tokenizer(pieces: int) -> tuple[Change, ...]:
    """Replaces the tokenizer by a complete one of another kind and vocabulary."""
    words = "\n".join(["[UNK]", *(f"w{i}" for i in range(pieces))]).encode()
    specials = {
        f"{name}_id": pieces + 1 + place for place, name in enumerate(("pad", "mask", "eot"))
    }
    record = {
        "format": 1,
        "kind": "wordpiece",
        "lowercase": False,
        "vocab_size": -(-(pieces + 4) // 128) * 128,
        **specials,
        "sha256": {"vocab.txt": hashlib.sha256(words).hexdigest()},
        "source": {},
    }
    return (
        ("w/tokenizer/", None),
        ("w/tokenizer/vocab.txt", words),
        ("w/tokenizer/tokenizer.json", json.dumps(record).encode()),
    )


def _spoiled(base: Mapping[str, bytes], name: str) -> st.SearchStrategy[Change]:
    """A file that is damaged, removed, or of other content."""
    others = [b"", b"[" * 20_000, b"9" * 5000, b"null", b"{}"]
    return damaged(base[name]).map(lambda data: (f"w/{name}", data)) | st.sampled_from(
        [(f"w/{name}", None), (f"w/{name}/", None), *((f"w/{name}", data) for data in others)]
    )


def _mutated(base: Mapping[str, bytes], name: str) -> st.SearchStrategy[Change]:
    """A JSON file in which one value is changed, added or removed."""
    tree = json.loads(base[name])

    def change(path: str, value: Any, *, remove: bool) -> Change:
        changed = json.loads(base[name])
        *parents, last = path.split("/")
        node = changed
        for parent in parents:
            node = node[parent]
        if remove:
            del node[last]
        else:
            node[last] = value
        return f"w/{name}", json.dumps(changed).encode()

    paths = list(tree)
    if name == "config.json":
        paths = sorted(path.replace(".", "/") for path in settings_by_name(tree))
    blocks = [key for key in tree if isinstance(tree[key], dict)]
    return st.builds(
        change,
        st.sampled_from([*paths, *blocks, "new"]),
        st.sampled_from(_NEAR_VALUES) | JSON,
        remove=st.just(False),
    ) | st.builds(change, st.sampled_from(paths), st.none(), remove=st.just(True))
