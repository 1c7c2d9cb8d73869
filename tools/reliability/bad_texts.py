"""Corpora and prompts that are wrong, as hypothesis strategies of cases."""

from __future__ import annotations

import gzip
import json
import lzma
from collections.abc import Callable, Mapping

from hypothesis import strategies as st
from input_case import SMALL_NETWORKS, TINY, Case
from odd_values import JSON, WORDS, damaged

_SENTENCE = "A cat sat on a mat and was glad of it."
_TEXT = "".join(
    f"The cat number {i} sat on mat {i * 7 % 31} and was glad of it.\n<|endoftext|>\n"
    for i in range(400)
).encode()
_RECORDS = "".join(
    json.dumps({"text": text}) + "\n" for text in _TEXT.decode().split("<|endoftext|>\n")
)
_ODD_LINES = [
    *["", "{", "[" * 20_000, "9" * 5000, "null", '{"text": "a"', '{"text":"a"}{"text":"b"}'],
    *['{"text": "\\ud800"}', '{"text": "\\u0000"}', '{"text": NaN}', '{"text": ""}'],
    '{"text": "a", "text": 1}',
]
_PLACES = [
    *["texts"] * 20,
    *["texts/*", "texts/*.txt", "texts/a.txt", "texts/a.jsonl", "texts/**/*.jsonl", "nowhere"],
    *["texts/[", "texts/é.txt", "texts/a.pdf"],
]
_SETTINGS = [
    *["data.validation_fraction=0.5", "data.validation_fraction=0.2", "logging.samples=1"],
    *["mdlm.batch=1000", "mdlm.batch=16", "data.validation_fraction=1e-9"],
    *["data.validation_last=1", "data.validation_last=100000", "data.validation_files=texts"],
    *["data.validation_files=nowhere", "data.scorer_fraction=0.0", "data.field=id", "data.field="],
    *["data.max_documents=1", "data.max_documents=2", "data.length=2", "data.length=4096"],
    *["data.length=0", "data.length=1048577", "data.packing=document", "data.directory=d"],
    *["data.directory=texts/a.txt", "data.directory=/dev/null", "tokenizer.vocab_size=1"],
    *["tokenizer.vocab_size=270", "tokenizer.vocab_size=300", "tokenizer.vocab_size=100000000"],
    *["tokenizer.kind=bpe", "tokenizer.whole_words=5", "tokenizer.whole_words=100000"],
    *["tokenizer.lowercase=True", "data.corpus=nowhere", "data.corpus=no/where", "data.corpus=w"],
    *["data.corpus=", "data.corpus=a:b", "data.corpus=..", "data.corpus=text_files "],
    "encoder.num_latents=2",
]


def corpora(base: Mapping[str, bytes]) -> st.SearchStrategy[Case]:
    """Files of text that cannot be used.

    Texts that are empty, of one line, no text at all, or too few for a batch or a vocabulary;
    records without fields; archives that are none.
    """
    setting = st.sampled_from(_SETTINGS).map(lambda word: (f"--config.{word}",))
    good = ("texts/good.txt", _TEXT)
    files = st.lists(_files(), max_size=3) | st.lists(_files(), max_size=1).map(
        lambda others: [good, *others]
    )
    small = [*SMALL_NETWORKS, "--config.data.validation_fraction=0.2"]
    stages = {"train.py": ["--stage=mdlm", "--config.mdlm.steps=1"], "prepare.py": []}

    def case(
        script: str,
        place: str,
        files: list[tuple[str, bytes]],
        changes: list[tuple[str, ...]],
    ) -> Case:
        flags = [f"--config={TINY}:{place}", "--workdir=new", *small, *stages[script]]
        words = [word for change in changes for word in change]
        return Case(script, (*flags, *words), tuple(dict(files).items()))

    return st.builds(
        case,
        st.sampled_from(["prepare.py"] * 19 + ["train.py"]),
        st.sampled_from(_PLACES),
        files,
        st.lists(setting | setting | _vocabularies(), max_size=2),
    )


def _vocabularies() -> st.SearchStrategy[tuple[str, ...]]:
    """A tokenizer of some kind from a file that may be none."""
    kinds = ["wordpiece", "byte_bpe", "sentencepiece", "unigram"]
    places = ["texts/a.txt", "texts", "nowhere"]
    places += ["w/tokenizer/sentencepiece.model", "w/tokenizer/tokenizer.json"]
    return st.tuples(
        st.sampled_from(kinds).map("--config.tokenizer.kind={}".format),
        st.sampled_from(places).map("--config.tokenizer.file={}".format),
    )


def _files() -> st.SearchStrategy[tuple[str, bytes]]:
    """Files in the folder texts/."""
    plain, lines = _plain_texts(), _json_lines()

    def pack_text(pack: Callable[[bytes], bytes], data: bytes) -> bytes:
        return pack(data)

    packed = st.builds(pack_text, st.sampled_from([gzip.compress, lzma.compress]), plain).flatmap(
        lambda data: damaged(data) | st.just(data)
    )
    stem = st.sampled_from(["a", "", "é", "a b", "*", "[a]", "x" * 200, "\n", "-", "a.b"])
    archive_ends = st.sampled_from([".txt.gz", ".txt.xz", ".jsonl.gz", ".txt.zst"])
    text_file = st.tuples(stem.map("texts/{}.txt".format), plain)
    json_file = st.tuples(stem.map("texts/{}.jsonl".format), lines)
    archive = st.tuples(st.builds("texts/{}{}".format, stem, archive_ends), packed)
    others = ["texts/a.parquet", "texts/a.pdf", "texts/a.txt/", "texts/a.zst", "texts/.gz"]
    other = st.tuples(st.sampled_from(others), st.binary(max_size=20) | plain)
    return st.one_of(text_file, text_file, json_file, json_file, archive, other)


def _plain_texts() -> st.SearchStrategy[bytes]:
    one_line = st.builds(
        lambda piece, times: piece * times,
        st.sampled_from([b"a", b"word ", b"\xc3\xa9", b" ", b"\t", b"[MASK] ", b"{"]),
        st.sampled_from([1, 1000, 300_000]),
    )
    few = [b"", b"\n", b" \n\n\t", b"one\n", b"\xef\xbb\xbf", b"<|endoftext|>\n" * 50]
    return (
        st.sampled_from([*few, _TEXT, _TEXT[:2000]])
        | one_line
        | damaged(_TEXT)
        | damaged(_TEXT[:300])
        | st.binary(max_size=60)
    )


def _json_lines() -> st.SearchStrategy[bytes]:
    record = (
        st.fixed_dictionaries({}, optional={"text": st.just(_SENTENCE) | JSON, "id": JSON}) | JSON
    )
    return st.builds(
        lambda lines, after_good_ones: (_RECORDS if after_good_ones else "") + "\n".join(lines),
        st.lists(record.map(json.dumps) | st.sampled_from(_ODD_LINES), max_size=4),
        st.booleans(),
    ).map(str.encode)


_PIECES = [
    *["[MASK]", " [MASK]", "[MASK] ", "[mask]", "[MASK", "Mia", " went", "\u2581", "\n", "\r\n"],
    *["<|endoftext|>", "[PAD]", "\x1b[31m", "\u202e", "e\u0301", "\U0001f600", "\udcff", "\ufeff"],
    *[" ", "\t", "\x7f", "--", "="],
]
_PROMPT_FLAGS = [
    *[[], [], []],
    *[["--temperature=0"], ["--temperature=nan"], ["--temperature=inf"], ["--temperature=1e-300"]],
    *[["--top_p=0"], ["--top_p=1"], ["--start=2147483647"], ["--start=9223372036854775807"]],
    *[["--batch=3"], ["--batch=2147483648"], ["--decode_steps=2147483648"]],
    *[["--seed=9223372036854775807"], ["--seed=9223372036854775808"]],
    *[["--latent_steps=2147483648"], ["--out=out.jsonl"], ["--out=w/config.json"]],
    *[["--out=w"], ["--out=file"], ["--config.sampling.order=threshold"]],
]


def prompts(base: Mapping[str, bytes]) -> st.SearchStrategy[Case]:
    """Prompts that are empty, only masks, too long, no Unicode, or one character many times."""
    piece = st.sampled_from(_PIECES)
    several = st.lists(piece | WORDS, max_size=8).map("".join)
    many = st.builds(
        lambda one, times: one * times, piece, st.sampled_from([2, 31, 32, 33, 100, 20_000])
    )
    model = st.sampled_from([[], *[["--model=mdlm"]] * 8, ["--model=scorer"]])
    start = ("--workdir=w", "--num=1", "--decode_steps=1", "--latent_steps=1")
    return st.builds(
        lambda text, model, words: Case(
            "sample.py", (*start, *model, f"--prompt={text}", *words), (("file", b"text\n"),)
        ),
        several | many,
        model,
        st.sampled_from(_PROMPT_FLAGS),
    )
