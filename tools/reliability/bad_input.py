"""Bad input of every kind at hand, as hypothesis strategies of whole command lines, and the judge of how each ended.

A case is a command line and the files it finds, in a folder of its own beside a copy of a small trained workdir `w`. It ended well where
it succeeded or was refused in one line, within the time limit, and left every file that was there as it was, but for what it is for.
`tools/reliability/faults.py --inputs=N` runs N of them; the tests run a few, and hypothesis shrinks what fails.
"""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import json
import lzma
import os
import pathlib
import shutil
from collections.abc import Callable, Mapping
from typing import Any

import fork_server
import hypothesis
from hypothesis import strategies as st

TINY = str(fork_server.LAUNCH.parent / "configs" / "tiny.py")
LIMIT = 120.0  # seconds until a command counts as hanging; the slowest good one, two compiled training steps, takes a tenth
LONGEST_LINE = 1000  # characters
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
    "HF_HUB_OFFLINE": "1", "TPU_LIBRARY_PATH": "/nowhere/libtpu.so",  # nothing is downloaded, and what passes all checks is not compiled for TPUs
}  # fmt: skip
STAGES = ("mdlm", "autoencoder", "ladiff", "diladiff")
SMALL = [
    f"--config={TINY}", "--config.data.documents=300", "--config.data.validation_documents=40", "--config.data.scorer_documents=60",
    *(f"--config.{block}.{name}={value}" for block in ("backbone", "encoder", "latent_denoiser") for name, value in (("width", 16), ("num_layers", 1), ("heads", 2))),
    "--config.decoder.cross_layers=(0,)", "--config.encoder.num_latents=4", "--config.encoder.latent_dim=8",
    "--config.logging.samples=0", "--config.logging.keep_checkpoints=1", "--config.mdlm_long.steps=0",
    *(f"--config.{stage}.{name}={value}" for stage in STAGES for name, value in (("steps", 2), ("batch", 8), ("optimizer", "adamw"))),
]  # fmt: skip
"""The experiment of the base workdir: all four stages of width 16, two steps each."""


@dataclasses.dataclass(frozen=True)
class Case:
    """A command line, and what is laid over its folder first: bytes, None for what is taken away, and an empty folder where a path ends in "/"."""

    script: str
    words: tuple[str, ...]
    files: tuple[tuple[str, bytes | None], ...] = ()

    def __repr__(self) -> str:
        return f"{self.script} {' '.join(map(repr, self.words))} with {[(path, data if data is None else data[:200]) for path, data in self.files]}"


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    """Every file under a folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def lay(case: Case, folder: pathlib.Path) -> None:
    """Puts the case's own files in place."""
    for name, data in case.files:
        path = folder / name
        for place in (*reversed(path.relative_to(folder).parents), path.relative_to(folder)):
            if (folder / place).is_file():
                (folder / place).unlink()
        if path.is_dir():
            shutil.rmtree(path)
        if name.endswith("/"):
            path.mkdir(parents=True, exist_ok=True)
        elif data is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)


def judge(
    case: Case, ended: fork_server.Ended, before: Mapping[str, bytes], after: Mapping[str, bytes]
) -> str | None:
    """What is wrong with how a case ended, given all files of its folder before and after; None where all is well."""
    if ended.code is None:
        return f"hangs: it was killed after {ended.seconds:.0f} s"
    if "Traceback" in ended.out + ended.err:
        return f"a traceback: {(ended.out + ended.err)[-1500:]}"
    if ended.code < 0:
        return f"signal {-ended.code}: {ended.err[-600:]}"
    if ended.code:
        lines = ended.err.splitlines()
        if (
            len(lines) != 1
            or not lines[0].startswith("error: ")
            or len(lines[0]) > LONGEST_LINE
            or not lines[0].isprintable()
        ):
            return f"exit code {ended.code} and not one clear line: {ended.err[-1500:]!r}"
    # Training may change its workdir, and where it ends for want of a number or of space its metrics stay.
    trains = case.script in ("train.py", "prepare.py")
    mine = [
        name
        for name in before
        if not (name.startswith("w/") and trains and (ended.code == 0 or "/metrics/" in name))
    ]
    changed = [name for name in mine if after.get(name) != before[name]]
    return (
        f"exit code {ended.code}, and {len(changed)} files changed or gone, {changed[0]} first: {ended.err[-300:]}"
        if changed
        else None
    )


def trial(
    commands: fork_server.Commands, base: pathlib.Path, folder: pathlib.Path, case: Case
) -> tuple[fork_server.Ended, str | None]:
    """Runs one case beside a copy of the base workdir, in `folder`, which is made and removed; how it ended, and what is wrong with that."""
    shutil.copytree(base, folder / "w")
    try:
        lay(case, folder)
        before = contents(folder)
        ended = commands.run(fork_server.LAUNCH / case.script, case.words, cwd=folder, limit=LIMIT)
        return ended, judge(case, ended, before, contents(folder))
    finally:
        shutil.rmtree(folder)


def make_base(commands: fork_server.Commands, folder: pathlib.Path) -> pathlib.Path:
    """Trains the base workdir `folder/w`.

    Raises:
      RuntimeError: that ended badly.
    """
    ended = commands.run(
        fork_server.LAUNCH / "train.py", ["--workdir=w", *SMALL], cwd=folder, limit=900
    )
    if ended.code != 0:
        raise RuntimeError(f"the base workdir could not be trained: {ended.err[-600:]}")
    return folder / "w"


# What people and programs put where a number, a word or a text belongs. Numbers between a few and 2^31 are left out where they would
# be steps or documents: they ask for work that takes long, and get it.
_BYTES = st.binary(max_size=30).map(
    lambda data: os.fsdecode(data.replace(b"\0", b""))
)  # as a shell hands on what is no UTF-8
_WORDS = (
    st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), max_size=20)
    | _BYTES
)
_HUGE = st.sampled_from([2**31 - 1, 2**31, 2**32, 2**63 - 1, 2**63, 10**19, 10**400])
_TOO_LARGE = st.sampled_from([2**31, 2**32 + 1, 2**63, 10**19, 10**400])
_SMALL = st.integers(-3, 4)
_NEGATIVE = st.sampled_from([-(2**31) - 1, -(2**63), -(2**63) - 1, -(10**19)])
_ODD = st.sampled_from(
    [
        "",
        " ",
        "abc",
        "1.5",
        "1e3",
        "1e400",
        "-0.0",
        "nan",
        "inf",
        "-inf",
        "True",
        "None",
        "0x10",
        "1_0",
        "\u0661",
        "1,2",
        "(1,2",
        "(1,2)",
        "()",
        "(0,)",
        "(-1,)",
        "[1]",
        "[]",
        "{}",
        "{'a': 1}",
        "'a'",
        '"',
        "'",
        "lambda: 0",
        "(1,'a')",
        "((1,),)",
        "(1.5,)",
        "(True,)",
        "\n",
        "a\nb",
        "\x1b[31m",
        "1e-400",
        "0.5",
        "--",
        "-",
        "=",
    ]  # fmt: skip
)
_FLOATS = st.floats(allow_nan=True, allow_infinity=True).map(repr)
_VALUES = _SMALL.map(str) | _TOO_LARGE.map(str) | _NEGATIVE.map(str) | _ODD | _FLOATS | _WORDS
_JSON = st.recursive(
    st.none() | st.booleans() | _SMALL | _HUGE | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=4,
)


def _leaves(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in settings.items():
        found |= (
            _leaves(value, f"{prefix}{name}.")
            if isinstance(value, Mapping)
            else {prefix + name: value}
        )
    return found


def _misspelled(word: str) -> st.SearchStrategy[str]:
    return (
        st.integers(0, max(0, len(word) - 1)).map(lambda at: word[:at] + word[at + 1 :])
        | st.just(word.upper())
        | st.just(word + "s")
    )


_CHOICES = [
    "one", "bound", "adamw", "muon", "constant", "linear", "cosine", "learned", "rotary", "rmsnorm", "layernorm", "packed", "document", "unigram", "bpe", "wordpiece",
    "tangent", "linear_variance", "empirical",
    "euler", "ddim", "heun", "dpmpp_2m", "previous", "current", "none", "literal", "noise_level", "rotation", "velocity", "drawn", "implied", "matmuls", "full",
    "bfloat16", "float32", "random", "count", "confidence", "threshold",
    "denoiser", "bert", "stories", "text_files",
]  # fmt: skip


def configs(base: Mapping[str, bytes]) -> st.SearchStrategy[Case]:
    """Settings on the command line, right names with wrong values and wrong names; and experiment files that are none."""
    known = _leaves(json.loads(base["config.json"]))
    keys = sorted(known)
    long = (
        "steps",
        "documents",
        "bound_draws",
        "samples",
    )  # any size of these is asked for and given

    def right(key: str) -> list[str]:
        return {
            bool: ["True", "False"],
            int: ["1", "2", "4", "8"],
            float: ["0.0", "0.5", "1.0", "1e-6", "-0.1", "2.0", "1e30"],
            list: ["(0,)", "(1,)", "(0,1)", "(1,2,4)"],
            str: _CHOICES,
        }[type(known[key])]

    def values(key: str) -> st.SearchStrategy[str]:
        numbers = (
            _SMALL | _TOO_LARGE | _NEGATIVE if key.endswith(long) else _SMALL | _HUGE | _NEGATIVE
        )
        return st.sampled_from(right(key)) | (
            numbers.map(str) | _ODD | _FLOATS | _WORDS
            if isinstance(known[key], int | float)
            else _VALUES
        )

    override = st.sampled_from(keys).flatmap(
        lambda key: values(key).map(lambda value: f"--config.{key}={value}")
    )
    unknown = (st.sampled_from(keys).flatmap(_misspelled) | st.text("abc._1", max_size=8)).flatmap(
        lambda key: _VALUES.map(lambda value: f"--config.{key}={value}")
    )
    likely = st.sampled_from(keys).flatmap(
        lambda key: st.sampled_from(right(key)).map(lambda value: f"--config.{key}={value}")
    )
    changes = (
        st.lists(likely, min_size=1, max_size=2)
        | st.tuples(override)
        | st.lists(override | unknown, min_size=1, max_size=2)
    )
    scripts = st.sampled_from(["sample.py", "sample.py", "train.py"])
    on_trained = st.builds(
        lambda script, words: Case(script, ("--workdir=w", *_quick(script), *words)),
        scripts,
        changes,
    )
    compiled = st.builds(
        lambda words: Case(
            "compile.py", (f"--config={TINY}", "--stage=mdlm", "--topology=v5e:2x2", *words)
        ),
        changes,
    )
    fresh = st.builds(
        lambda script, words: Case(
            script,
            ("--workdir=new", *SMALL, *(["--stage=mdlm"] if script == "train.py" else []), *words),
        ),
        st.sampled_from(["prepare.py", "train.py"]),
        changes,
    )
    source = st.sampled_from([
        b"", b"\0", b"\xff", b"def", b"x = 1", b"get_config = 1", b"def get_config(): return 1", b"def get_config(): return None", b"def get_config(): return {}",
        b"def get_config(): return {'data': 1}", b"def get_config(): raise ValueError('a\\nb')", b"def get_config(): return 1 / 0", b"def get_config(): import nowhere",
        b"def get_config(a, b): return {}", b"import nowhere", b"raise KeyError(1)",
        b"def get_config():\n from ml_collections import ConfigDict\n return ConfigDict({'sed': 1})",
        b"def get_config():\n from ml_collections import ConfigDict\n return ConfigDict({1: 1})",
        b"def get_config():\n from ml_collections import ConfigDict\n return ConfigDict({'seed': 'a'})",
        b"def get_config(): return get_config()", b"raise SystemExit", b"def get_config(): raise SystemExit(0)",
    ]) | st.binary(max_size=40)  # fmt: skip
    argument = st.sampled_from(["", ":", ":stories", ":a:b"])
    file = st.builds(
        lambda script, data, name, after, words: Case(script, (f"--config={name}{after}", "--workdir=new", *_quick(script), *words), ((name, data),)),
        st.sampled_from(["sample.py", "train.py", "prepare.py", "compile.py"]), source, st.sampled_from(["c.py", "c.json", "c", "é.py", "a b.py"]), argument,
            st.lists(override, max_size=1),
    ).map(lambda case: case if case.script != "compile.py" else Case(case.script, (case.words[0], "--stage=mdlm", "--topology=v5e:2x2"), case.files))  # fmt: skip
    return st.one_of(on_trained, on_trained, fresh, compiled, file)


def _quick(script: str) -> list[str]:
    """Flags that keep a good command short; what the case gives comes after them, and is what counts."""
    return {
        "sample.py": ["--num=1", "--model=mdlm", "--decode_steps=1"],
        "train.py": ["--stage=all"],
    }.get(script, [])


_FLAGS = {
    "sample.py": [
        "workdir",
        "model",
        "num",
        "start",
        "seed",
        "batch",
        "latent_steps",
        "decode_steps",
        "temperature",
        "top_p",
        "prompt",
        "score",
        "out",
        "config",
    ],
    "train.py": [
        "workdir",
        "stage",
        "init_from",
        "stop_at",
        "distributed",
        "num_processes",
        "process_id",
        "distributed_timeout",
        "config",
    ],
    "prepare.py": ["workdir", "config"],
    "evaluate.py": ["workdir", "out", "analyses", "analysis_samples", "compare", "config"],
    "compile.py": ["config", "stage", "sampler", "topology", "scaling", "out"],
    "benchmark.py": [
        "suite",
        "size",
        "batch",
        "decode_steps",
        "latent_steps",
        "prior_steps",
        "timed_steps",
        "refresh_every",
        "rounds",
        "top_p",
        "out",
    ],
}


def command_lines(base: Mapping[str, bytes]) -> st.SearchStrategy[Case]:
    """Flags that are unknown, misspelled, twice, without a value or with a wrong one; stages, models and topologies that are none; paths that lead nowhere or to a file."""
    path = st.sampled_from(
        [
            "",
            "w",
            "nowhere",
            "file",
            "file/x",
            "/",
            "/dev/null",
            "/dev/null/x",
            "/proc/x",
            "w/config.json",
            "w/tokenizer",
            "x" * 300,
            "~",
            ".",
            "w/",
            "é\n",
            "w,w",
            "w,nowhere",
            ",",
        ]
    )
    names = st.sampled_from(
        [
            "mdlm",
            "autoencoder",
            "ladiff",
            "diladiff",
            "mdlm_long",
            "scorer",
            "all",
            "MDLM",
            "mdlm,ladiff",
            "given",
            "noise",
            "prior_ddim",
            "",
            "teacher",
        ]
    )
    topology = st.sampled_from(
        [
            "v5e:4x4",
            "v5e",
            "v5e:",
            "v5e:0x0",
            "v5e:-1x1",
            "v5e:3x5",
            "v9:2x2",
            "v5p:2x2",
            "v5e:9999999x9999999",
            "2x2",
            "v5e:4x4x4",
            "v5e:ax4",
        ]
    )
    number = (_SMALL | _TOO_LARGE | _NEGATIVE).map(str) | _ODD | _FLOATS
    kinds: dict[str, st.SearchStrategy[str]] = {
        **dict.fromkeys(("workdir", "out", "init_from", "compare", "config"), path | _WORDS),
            **dict.fromkeys(("stage", "model", "sampler", "suite", "size"), names | _WORDS),
        "topology": topology | _WORDS, "scaling": st.lists(number, max_size=3).map(",".join),
        "distributed": st.sampled_from(["", "nowhere", "host:port", "127.0.0.1:99999999", ":", "a:b:c", "auto:1"]), "prompt": _WORDS,
    }  # fmt: skip

    def flag(script: str) -> st.SearchStrategy[tuple[str, ...]]:
        known = st.sampled_from(_FLAGS[script])
        right = known.flatmap(
            lambda name: kinds.get(name, number | _WORDS).map(lambda value: (f"--{name}={value}",))
        )
        apart = known.flatmap(
            lambda name: kinds.get(name, number | _WORDS).map(lambda value: (f"--{name}", value))
        )
        unknown = st.builds(
            lambda name, value: (f"--{name}={value}",), known.flatmap(_misspelled), _WORDS
        )
        bare = known.map(lambda name: (f"--{name}",)) | known.map(lambda name: (f"--no{name}",))
        stray = (
            _WORDS
            | st.sampled_from(
                [
                    "--",
                    "-",
                    "---",
                    "--=",
                    "-x",
                    "--flagfile=nowhere",
                    "--flagfile=w",
                    "--undefok=num",
                    "--config.",
                    "--config..a=1",
                    "--config[0]=1",
                ]
            )
        ).map(lambda word: (word,))
        return right | right | apart | unknown | bare | stray

    def line(script: str) -> st.SearchStrategy[Case]:
        start = {
            "sample.py": ["--workdir=w", *_quick("sample.py")], "train.py": ["--workdir=w", "--stage=all"], "prepare.py": ["--workdir=w"],
            # These take minutes where all is right, so that one word more is wrong.
            "evaluate.py": ["--workdir=w", "--config.evaluation.samples=0"], "benchmark.py": ["--out=out.json", "--rounds=0"],
                "compile.py": [f"--config={TINY}", "--stage=mdlm", "--topology=v5e:2x2"],
        }[script]  # fmt: skip
        given = st.lists(flag(script), min_size=1, max_size=3).map(
            lambda words: [word for some in words for word in some]
        )
        kept = st.sampled_from(
            [start, start, start, start[1:], []]
            if script not in ("evaluate.py", "benchmark.py")
            else [start]
        )
        # Help ends well whatever else is there, and a debugger waits for its user.
        ours = given.filter(
            lambda words: (
                not any(
                    word.lstrip("-").startswith(("help", "pdb", "run_with", "only_check"))
                    for word in words
                )
            )
        )
        last = st.just([]) if script not in ("evaluate.py", "benchmark.py") else st.just(start[-1:])
        return st.builds(
            lambda head, words, tail: Case(
                script, tuple(head + words + tail), (("file", b"text\n"),)
            ),
            kept,
            ours,
            last,
        )

    return (
        st.sampled_from([*_FLAGS, "sample.py", "train.py", "sample.py"])
        .flatmap(line)
        .filter(lambda case: not any("\0" in word for word in case.words))
    )


_TEXT = "".join(
    f"The cat number {i} sat on mat {i * 7 % 31} and was glad of it.\n<|endoftext|>\n"
    for i in range(400)
).encode()


def _broken(data: bytes) -> st.SearchStrategy[bytes]:
    """Bytes with something in them that does not belong there, or with an end too early."""
    inserted = st.sampled_from(
        [
            b"\0",
            b"\0" * 50,
            b"\xff",
            b"\xc3",
            b"\xed\xa0\x80",
            b"\xf4\x90\x80\x80",
            b"\xef\xbb\xbf",
            b"\r",
            b"\x1a",
            b"\x85",
            b"\xe2\x80\xa8",
            "\u2581".encode(),
            b"[MASK]",
        ]
    )
    where = st.integers(0, max(len(data), 1))
    return st.builds(lambda at, what: data[:at] + what + data[at:], where, inserted) | where.map(lambda at: data[:at]) | st.builds(
        lambda at, bit: data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :] if at < len(data) else data, where, st.integers(0, 7)
    )  # fmt: skip


def corpora(base: Mapping[str, bytes]) -> st.SearchStrategy[Case]:
    """Files of text that are empty, one line, no text, too few for a batch or a vocabulary; records without fields; archives that are none."""
    line = st.builds(
        lambda piece, times: piece * times,
        st.sampled_from([b"a", b"word ", b"\xc3\xa9", b" ", b"\t", b"[MASK] ", b"{"]),
        st.sampled_from([1, 1000, 300_000]),
    )
    plain = (
        st.sampled_from(
            [
                b"",
                b"\n",
                b" \n\n\t",
                b"one\n",
                b"\xef\xbb\xbf",
                _TEXT,
                _TEXT[:2000],
                b"<|endoftext|>\n" * 50,
            ]
        )
        | line
        | _broken(_TEXT)
        | _broken(_TEXT[:300])
        | st.binary(max_size=60)
    )
    record = (
        st.fixed_dictionaries(
            {},
            optional={
                "text": st.just("A cat sat on a mat and was glad of it.") | _JSON,
                "id": _JSON,
            },
        )
        | _JSON
    )
    odd = st.sampled_from(
        [
            "",
            "{",
            "[" * 20_000,
            '{"text": "\\ud800"}',
            '{"text": "\\u0000"}',
            '{"text": NaN}',
            "9" * 5000,
            '{"text": "a"',
            '{"text":"a"}{"text":"b"}',
            '{"text": ""}',
            "null",
            '{"text": "a", "text": 1}',
        ]
    )
    good = "".join(
        json.dumps({"text": text}) + "\n" for text in _TEXT.decode().split("<|endoftext|>\n")
    )
    lines = st.builds(
        lambda some, before: (good if before else "") + "\n".join(some),
        st.lists(record.map(json.dumps) | odd, max_size=4),
        st.booleans(),
    ).map(str.encode)
    packed = st.builds(
        lambda pack, data: pack(data), st.sampled_from([gzip.compress, lzma.compress]), plain
    ).flatmap(lambda data: _broken(data) | st.just(data))
    stem = st.sampled_from(["a", "", "é", "a b", "*", "[a]", "x" * 200, "\n", "-", "a.b"])
    file = st.one_of(
        st.tuples(stem.map(lambda name: f"texts/{name}.txt"), plain), st.tuples(stem.map(lambda name: f"texts/{name}.txt"), plain),
            st.tuples(stem.map(lambda name: f"texts/{name}.jsonl"), lines), st.tuples(stem.map(lambda name: f"texts/{name}.jsonl"), lines),
        st.tuples(stem.flatmap(lambda name: st.sampled_from([f"texts/{name}.txt.gz", f"texts/{name}.txt.xz", f"texts/{name}.jsonl.gz", f"texts/{name}.txt.zst"])),
            packed),
        st.tuples(st.sampled_from(["texts/a.parquet", "texts/a.pdf", "texts/a.txt/", "texts/a.zst", "texts/.gz"]), st.binary(max_size=20) | plain),
    )  # fmt: skip
    where = st.sampled_from(
        [
            *["texts"] * 20,
            "texts/*",
            "texts/*.txt",
            "texts/a.txt",
            "texts/a.jsonl",
            "texts/**/*.jsonl",
            "nowhere",
            "texts/[",
            "texts/é.txt",
            "texts/a.pdf",
        ]
    )
    setting = st.sampled_from([
        "data.validation_fraction=0.5", "data.validation_fraction=0.2", "logging.samples=1", "mdlm.batch=1000", "mdlm.batch=16", "data.validation_fraction=1e-9",
        "data.validation_last=1", "data.validation_last=100000", "data.validation_files=texts", "data.validation_files=nowhere", "data.scorer_fraction=0.0",
        "data.field=id", "data.field=", "data.max_documents=1", "data.max_documents=2", "data.length=2", "data.length=4096", "data.length=0", "data.length=1048577",
        "data.packing=document", "data.directory=d", "data.directory=texts/a.txt",
        "data.directory=/dev/null", "tokenizer.vocab_size=1", "tokenizer.vocab_size=270", "tokenizer.vocab_size=300", "tokenizer.vocab_size=100000000",
        "tokenizer.kind=bpe", "tokenizer.whole_words=5", "tokenizer.whole_words=100000", "tokenizer.lowercase=True",
        "data.corpus=nowhere", "data.corpus=no/where", "data.corpus=w", "data.corpus=", "data.corpus=a:b", "data.corpus=..", "data.corpus=text_files ",
        "encoder.num_latents=2",
    ]).map(lambda word: (f"--config.{word}",))  # fmt: skip
    vocabulary = st.tuples(
        st.sampled_from(["wordpiece", "byte_bpe", "sentencepiece", "unigram"]).map(
            "--config.tokenizer.kind={}".format
        ),
        st.sampled_from(
            [
                "texts/a.txt",
                "texts",
                "nowhere",
                "w/tokenizer/sentencepiece.model",
                "w/tokenizer/tokenizer.json",
            ]
        ).map("--config.tokenizer.file={}".format),
    )
    small = [word for word in SMALL[1:] if ".data." not in word] + [
        "--config.data.validation_fraction=0.2"
    ]
    made = st.builds(
        lambda script, place, files, some: Case(script, (f"--config={TINY}:{place}", "--workdir=new", *small, *(["--stage=mdlm",
            "--config.mdlm.steps=1"] if script == "train.py" else []),
                                                         *(word for words in some for word in words)), tuple(dict(files).items())),
        st.sampled_from(["prepare.py"] * 19 + ["train.py"]), where, st.lists(file, max_size=3) | st.lists(file, max_size=1).map(lambda files: [("texts/good.txt",
            _TEXT), *files]), st.lists(setting | setting | vocabulary, max_size=2),
    )  # fmt: skip
    return made


def prompts(base: Mapping[str, bytes]) -> st.SearchStrategy[Case]:
    """Texts that are empty, masks alone, longer than the model, of no Unicode, of one character without end."""
    piece = st.sampled_from(
        [
            "[MASK]",
            " [MASK]",
            "[MASK] ",
            "[mask]",
            "[MASK",
            "Mia",
            " went",
            "\u2581",
            "\n",
            "\r\n",
            "<|endoftext|>",
            "[PAD]",
            "\x1b[31m",
            "\u202e",
            "e\u0301",
            "\U0001f600",
            "\udcff",
            "\ufeff",
            " ",
            "\t",
            "\x7f",
            "--",
            "=",
        ]
    )
    several = st.lists(piece | _WORDS, max_size=8).map("".join)
    many = st.builds(
        lambda one, times: one * times, piece, st.sampled_from([2, 31, 32, 33, 100, 20_000])
    )
    model = st.sampled_from([[], *[["--model=mdlm"]] * 8, ["--model=scorer"]])
    more = st.sampled_from([[], [], [], ["--temperature=0"], ["--top_p=0"], ["--top_p=1"], ["--temperature=nan"], ["--temperature=inf"], ["--temperature=1e-300"],
        ["--start=2147483647"], ["--start=9223372036854775807"], ["--batch=3"], ["--batch=2147483648"], ["--decode_steps=2147483648"],
                            ["--seed=9223372036854775807"], ["--seed=9223372036854775808"], ["--latent_steps=2147483648"], ["--out=out.jsonl"], ["--out=w/config.json"],
                            ["--out=w"], ["--out=file"], ["--config.sampling.order=threshold"]])  # fmt: skip
    return st.builds(
        lambda text, which, words: Case("sample.py", ("--workdir=w", "--num=1", "--decode_steps=1", "--latent_steps=1", *which, f"--prompt={text}", *words),
            (("file", b"text\n"),)),
        several | many, model, more,
    )  # fmt: skip


def _other_tokenizer(pieces: int) -> tuple[tuple[str, bytes | None], ...]:
    """A whole tokenizer of another kind and vocabulary in the place of the workdir's own."""
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


def workdirs(base: Mapping[str, bytes]) -> st.SearchStrategy[Case]:
    """Workdirs whose files are gone, cut short, changed or of another experiment: config, tokenizer, rows, checkpoints, notes."""
    plain = sorted(name for name in base if "/metrics/" not in name)
    notes = [name for name in plain if name.endswith(".json") and "/checksums/" not in name]

    def spoiled(name: str) -> st.SearchStrategy[tuple[str, bytes | None]]:
        return _broken(base[name]).map(lambda data: (f"w/{name}", data)) | st.sampled_from(
            [
                (f"w/{name}", None),
                (f"w/{name}", b""),
                (f"w/{name}/", None),
                (f"w/{name}", b"[" * 20_000),
                (f"w/{name}", b"9" * 5000),
                (f"w/{name}", b"null"),
                (f"w/{name}", b"{}"),
            ]
        )

    def mutated(name: str) -> st.SearchStrategy[tuple[str, bytes | None]]:
        tree = json.loads(base[name])

        def at(path: str, value: Any, gone: bool) -> tuple[str, bytes]:
            changed = json.loads(base[name])
            *parents, last = path.split("/")
            node = changed
            for parent in parents:
                node = node[parent]
            if gone:
                del node[last]
            else:
                node[last] = value
            return f"w/{name}", json.dumps(changed).encode()

        paths = (
            sorted(path.replace(".", "/") for path in _leaves(tree))
            if name == "config.json"
            else list(tree)
        )
        blocks = [key for key in tree if isinstance(tree[key], dict)]
        near = st.sampled_from(
            [
                0,
                1,
                2,
                8,
                16,
                24,
                33,
                64,
                -1,
                "rotary",
                "threshold",
                "bert",
                "text_files",
                True,
                0.5,
                [0],
                [1, 0],
            ]
        )
        return st.builds(
            at, st.sampled_from(paths + blocks + ["new"]), near | _JSON, st.just(False)
        ) | st.builds(at, st.sampled_from(paths), st.none(), st.just(True))

    one = st.sampled_from(notes).flatmap(
        lambda name: mutated(name) | mutated(name) | spoiled(name)
    ) | st.sampled_from(plain).flatmap(spoiled)
    checkpoint = st.sampled_from([name for name in plain if "/checkpoints/" in name]).flatmap(
        spoiled
    )
    # Without its checksums nothing but Orbax itself stands between a damaged checkpoint and a reader.
    unsealed = checkpoint.map(
        lambda change: (change, (f"w/{change[0].split('/')[1]}/checksums/", None))
    )
    sources = [
        b"",
        b"{}",
        b"[]",
        b"null",
        b"{",
        b'{"workdir": 1}',
        b'{"workdir": "nowhere"}',
        b'{"workdir": "w"}',
        b'{"workdir": "a\\u0000b"}',
        b"\xff",
    ]
    note = st.sampled_from(sources).map(lambda data: ("w/init_from.json", data))
    folders = st.sampled_from(
        ["tokenizer", "data", "mdlm", "mdlm/checkpoints", "autoencoder/checkpoints", "diladiff"]
    )
    other = folders.flatmap(
        lambda name: st.sampled_from(
            [(f"w/{name}/", None), (f"w/{name}", b"text"), (f"w/{name}", None)]
        )
    )
    strange = st.sampled_from(
        [
            ("99/", None),
            ("99/params/x", b""),
            ("99", b""),
            ("x/", None),
            ("\u0663/x", b""),
            ("99999999999999999999999/x", b""),
        ]
    )
    strange = strange.map(lambda change: (f"w/mdlm/checkpoints/{change[0]}", change[1]))
    tokenizer = st.sampled_from([1, 100, 300, 500, 2000]).map(_other_tokenizer)
    files = (
        st.lists(one, min_size=1, max_size=2).map(tuple)
        | tokenizer
        | unsealed
        | st.tuples(one)
        | st.tuples(note | other | strange)
        | st.tuples(note, one)
    )
    line = st.sampled_from([
        ("sample.py", ("--workdir=w", *_quick("sample.py"))), ("sample.py", ("--workdir=w", "--num=1", "--decode_steps=1", "--latent_steps=1")),
        ("train.py", ("--workdir=w", "--stage=all")),
        ("train.py", ("--workdir=w", *SMALL)), ("prepare.py", ("--workdir=w",)), ("evaluate.py", ("--workdir=w", "--analyses=False", "--out=/dev/null/x")),
        ("evaluate.py", ("--workdir=w", "--compare=w", "--out=/dev/null/x")),
        ("train.py", ("--workdir=new", *SMALL, "--init_from=w", "--stage=autoencoder", "--stop_at=1")),
        ("train.py", ("--workdir=w", "--stage=diladiff", "--config.diladiff.steps=3")),
    ])  # fmt: skip
    return st.builds(lambda command, changes: Case(*command, tuple(changes)), line, files)


KINDS: dict[str, tuple[Callable[[Mapping[str, bytes]], st.SearchStrategy[Case]], int]] = {
    "bad config": (configs, 25), "bad command line": (command_lines, 35), "bad corpus": (corpora, 25), "bad prompt": (prompts, 5), "bad workdir": (workdirs, 10),
}  # fmt: skip
"""Each kind's strategy, given the files of the base workdir, and its share of a number of cases, in hundredths."""


def shares(total: int) -> dict[str, int]:
    """How many cases of each kind make `total`."""
    counts = {kind: total * share // 100 for kind, (_, share) in KINDS.items()}
    first = next(iter(counts))
    return counts | {first: counts[first] + total - sum(counts.values())}


def drawn(kind: str, base: Mapping[str, bytes], number: int, seed: int) -> list[Case]:
    """The first `number` cases of a kind that hypothesis makes of a seed."""
    found: list[Case] = []
    if number:

        @hypothesis.seed(seed)
        @hypothesis.settings(
            max_examples=number,
            database=None,
            deadline=None,
            phases=[hypothesis.Phase.generate],
            suppress_health_check=list(hypothesis.HealthCheck),
        )
        @hypothesis.given(KINDS[kind][0](base))
        def collect(case: Case) -> None:
            found.append(case)

        collect()
    return found
