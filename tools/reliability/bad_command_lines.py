"""Command lines that are wrong, as hypothesis strategies of cases."""

from __future__ import annotations

from collections.abc import Mapping

from hypothesis import strategies as st
from input_case import TINY, Case, quick_flags
from odd_values import FLOATS, NEGATIVE, ODD, SMALL, TOO_LARGE, WORDS, misspelled, split_words

_FLAGS = {
    "sample.py": split_words(
        "workdir model num start seed batch latent_steps decode_steps temperature top_p"
        " prompt score out config"
    ),
    "train.py": split_words(
        "workdir stage init_from stop_at distributed num_processes process_id"
        " distributed_timeout config"
    ),
    "prepare.py": ["workdir", "config"],
    "evaluate.py": ["workdir", "out", "analyses", "analysis_samples", "compare", "config"],
    "compile.py": ["config", "stage", "sampler", "topology", "scaling", "out"],
    "benchmark.py": split_words(
        "suite size batch decode_steps latent_steps prior_steps timed_steps refresh_every"
        " rounds top_p out"
    ),
}
# evaluate.py and benchmark.py take minutes if everything is right, so one of their flags is wrong.
_TAKES_MINUTES = ("evaluate.py", "benchmark.py")
_START = {
    "sample.py": ["--workdir=w", *quick_flags("sample.py")],
    "train.py": ["--workdir=w", "--stage=all"],
    "prepare.py": ["--workdir=w"],
    "evaluate.py": ["--workdir=w", "--config.evaluation.samples=0"],
    "benchmark.py": ["--out=out.json", "--rounds=0"],
    "compile.py": [f"--config={TINY}", "--stage=mdlm", "--topology=v5e:2x2"],
}
_PATHS = [
    *["", "w", "w/", "nowhere", "file", "file/x", "/", "/dev/null", "/dev/null/x", "/proc/x"],
    *["w/config.json", "w/tokenizer", "x" * 300, "~", ".", "é\n", "w,w", "w,nowhere", ","],
]
_NAMES = split_words(
    "mdlm autoencoder ladiff diladiff mdlm_long scorer all MDLM mdlm,ladiff given noise"
    " prior_ddim teacher"
)
_TOPOLOGIES = split_words(
    "v5e:4x4 v5e v5e: v5e:0x0 v5e:-1x1 v5e:3x5 v9:2x2 v5p:2x2 v5e:9999999x9999999 2x2"
    " v5e:4x4x4 v5e:ax4"
)
_ADDRESSES = ["", "nowhere", "host:port", "127.0.0.1:99999999", ":", "a:b:c", "auto:1"]
_STRAY_WORDS = split_words(
    "-- - --- --= -x --flagfile=nowhere --flagfile=w --undefok=num --config. --config..a=1"
    " --config[0]=1"
)
# Help ends well whatever else is there, and a debugger waits for its user.
_EXCLUDED = ("help", "pdb", "run_with", "only_check")


def command_lines(base: Mapping[str, bytes]) -> st.SearchStrategy[Case]:
    """Wrong flags, and wrong values of flags.

    Flags that are unknown, misspelled, repeated or without a value; stages, models and topologies
    that do not exist; paths that lead nowhere, or to a file instead of a folder.
    """
    return (
        st.sampled_from([*_FLAGS, "sample.py", "train.py", "sample.py"])
        .flatmap(_command_line)
        .filter(lambda case: not any("\0" in word for word in case.words))
    )


def _command_line(script: str) -> st.SearchStrategy[Case]:
    start = _START[script]
    takes_minutes = script in _TAKES_MINUTES
    heads = [start] if takes_minutes else [start, start, start, start[1:], []]
    tail = start[-1:] if takes_minutes else []
    added = (
        st.lists(_words(script), min_size=1, max_size=3)
        .map(lambda groups: [word for group in groups for word in group])
        .filter(lambda words: not any(word.lstrip("-").startswith(_EXCLUDED) for word in words))
    )
    return st.builds(
        lambda head, words: Case(script, (*head, *words, *tail), (("file", b"text\n"),)),
        st.sampled_from(heads),
        added,
    )


def _words(script: str) -> st.SearchStrategy[tuple[str, ...]]:
    """One flag, right or wrong, as one or two words."""
    values = _flag_values()
    number = _numbers() | WORDS
    known = st.sampled_from(_FLAGS[script])
    right = known.flatmap(
        lambda name: values.get(name, number).map(lambda value: (f"--{name}={value}",))
    )
    apart = known.flatmap(
        lambda name: values.get(name, number).map(lambda value: (f"--{name}", value))
    )
    unknown = st.builds(
        lambda name, value: (f"--{name}={value}",), known.flatmap(misspelled), WORDS
    )
    bare = known.map(lambda name: (f"--{name}",)) | known.map(lambda name: (f"--no{name}",))
    stray = (WORDS | st.sampled_from(_STRAY_WORDS)).map(lambda word: (word,))
    return right | right | apart | unknown | bare | stray


def _numbers() -> st.SearchStrategy[str]:
    return (SMALL | TOO_LARGE | NEGATIVE).map(str) | ODD | FLOATS


def _flag_values() -> dict[str, st.SearchStrategy[str]]:
    """By name, values of the flags that take no number."""
    path, name = st.sampled_from(_PATHS) | WORDS, st.sampled_from([*_NAMES, ""]) | WORDS
    return {
        **dict.fromkeys(("workdir", "out", "init_from", "compare", "config"), path),
        **dict.fromkeys(("stage", "model", "sampler", "suite", "size"), name),
        "topology": st.sampled_from(_TOPOLOGIES) | WORDS,
        "scaling": st.lists(_numbers(), max_size=3).map(",".join),
        "distributed": st.sampled_from(_ADDRESSES),
        "prompt": WORDS,
    }
