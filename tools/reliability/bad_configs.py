"""Settings and experiment files that are wrong, as hypothesis strategies of cases."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from hypothesis import strategies as st
from input_case import SMALL, TINY, Case, quick_flags
from odd_values import (
    FLOATS,
    HUGE,
    NEGATIVE,
    ODD,
    TOO_LARGE,
    VALUES,
    WORDS,
    misspelled,
    settings_by_name,
    split_words,
)
from odd_values import SMALL as SMALL_NUMBERS

_COMPILE_FLAGS = ("--stage=mdlm", "--topology=v5e:2x2")
# Any value of these settings is accepted, and the work that it asks for is done.
_LONG_WORK = ("steps", "documents", "bound_draws", "samples")
_CHOICES = split_words(
    "one bound adamw muon constant linear cosine learned rotary rmsnorm layernorm packed"
    " document unigram bpe wordpiece tangent linear_variance empirical euler ddim heun"
    " dpmpp_2m previous current none literal noise_level rotation velocity drawn implied"
    " matmuls full bfloat16 float32 random count confidence threshold denoiser bert stories"
    " text_files"
)
_LIKELY_VALUES = {
    bool: ["True", "False"],
    int: ["1", "2", "4", "8"],
    float: ["0.0", "0.5", "1.0", "1e-6", "-0.1", "2.0", "1e30"],
    list: ["(0,)", "(1,)", "(0,1)", "(1,2,4)"],
    str: _CHOICES,
}


def configs(base: Mapping[str, bytes]) -> st.SearchStrategy[Case]:
    """Wrong values of settings, settings that do not exist, and files that are no experiment."""
    known = settings_by_name(json.loads(base["config.json"]))
    override = _overrides(known)
    names = st.sampled_from(sorted(known))
    unknown = (names.flatmap(misspelled) | st.text("abc._1", max_size=8)).flatmap(
        lambda key: VALUES.map(lambda value: f"--config.{key}={value}")
    )
    likely = names.flatmap(
        lambda key: st.sampled_from(_LIKELY_VALUES[type(known[key])]).map(
            lambda value: f"--config.{key}={value}"
        )
    )
    changes = (
        st.lists(likely, min_size=1, max_size=2)
        | st.tuples(override)
        | st.lists(override | unknown, min_size=1, max_size=2)
    )
    on_trained = st.builds(
        lambda script, words: Case(script, ("--workdir=w", *quick_flags(script), *words)),
        st.sampled_from(["sample.py", "sample.py", "train.py"]),
        changes,
    )
    compiled = changes.map(
        lambda words: Case("compile.py", (f"--config={TINY}", *_COMPILE_FLAGS, *words))
    )
    stages = {"train.py": ["--stage=mdlm"], "prepare.py": []}
    fresh = st.builds(
        lambda script, words: Case(script, ("--workdir=new", *SMALL, *stages[script], *words)),
        st.sampled_from(["prepare.py", "train.py"]),
        changes,
    )
    return st.one_of(on_trained, on_trained, fresh, compiled, _experiment_files(override))


def _overrides(known: Mapping[str, Any]) -> st.SearchStrategy[str]:
    """Overrides of existing settings, by values that are right, odd or out of range."""

    def values(key: str) -> st.SearchStrategy[str]:
        likely = st.sampled_from(_LIKELY_VALUES[type(known[key])])
        if not isinstance(known[key], int | float):
            return likely | VALUES
        large = TOO_LARGE if key.endswith(_LONG_WORK) else HUGE
        return likely | (SMALL_NUMBERS | large | NEGATIVE).map(str) | ODD | FLOATS | WORDS

    return st.sampled_from(sorted(known)).flatmap(
        lambda key: values(key).map(lambda value: f"--config.{key}={value}")
    )


_IMPORT = b"def get_config():\n from ml_collections import ConfigDict\n return ConfigDict"
_SOURCES = [
    *[b"", b"\0", b"\xff", b"def", b"x = 1", b"get_config = 1", b"import nowhere"],
    *[b"raise KeyError(1)", b"raise SystemExit"],
    b"def get_config(): return 1",
    b"def get_config(): return None",
    b"def get_config(): return {}",
    b"def get_config(): return {'data': 1}",
    b"def get_config(): raise ValueError('a\\nb')",
    b"def get_config(): return 1 / 0",
    b"def get_config(): import nowhere",
    b"def get_config(a, b): return {}",
    b"def get_config(): return get_config()",
    b"def get_config(): raise SystemExit(0)",
    _IMPORT + b"({'sed': 1})",
    _IMPORT + b"({1: 1})",
    _IMPORT + b"({'seed': 'a'})",
]


def _experiment_files(override: st.SearchStrategy[str]) -> st.SearchStrategy[Case]:
    """Files given as --config that define no valid experiment."""

    def case(script: str, source: bytes, name: str, argument: str, words: list[str]) -> Case:
        flags = ("--workdir=new", *quick_flags(script), *words)
        if script == "compile.py":
            flags = _COMPILE_FLAGS
        return Case(script, (f"--config={name}{argument}", *flags), ((name, source),))

    return st.builds(
        case,
        st.sampled_from(["sample.py", "train.py", "prepare.py", "compile.py"]),
        st.sampled_from(_SOURCES) | st.binary(max_size=40),
        st.sampled_from(["c.py", "c.json", "c", "é.py", "a b.py"]),
        st.sampled_from(["", ":", ":stories", ":a:b"]),
        st.lists(override, max_size=1),
    )
