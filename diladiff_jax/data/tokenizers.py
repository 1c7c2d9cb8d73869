"""Tokenizers: SentencePiece trained here, or the vocabularies of BERT, GPT-2 and others, behind one interface.

Ids are laid out as the vocabulary's own, then those of pad, mask and eot that it lacks, then unused ids up to a
multiple of 128, so that embedding tables divide evenly over devices.
"""

from __future__ import annotations

import abc
import collections
import hashlib
import io
import itertools
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from diladiff_jax.data.errors import DataError
from diladiff_jax.files import expand

TRAINED = ("unigram", "bpe")
FROM_FILE = ("wordpiece", "byte_bpe", "sentencepiece")
MASK_TEXT = "[MASK]"
_NAMES = {
    "pad": "[PAD]",
    "mask": MASK_TEXT,
    "eot": "<|endoftext|>",
}  # of the specials a vocabulary lacks
_MULTIPLE = 128
_TRAINING_THREADS = (
    4  # a constant: unigram training sums per thread, so another count is another vocabulary
)
_BLOCK = "\N{LOWER ONE EIGHTH BLOCK}"  # U+2581, which SentencePiece takes for a space
_STEERING = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)


def printable(text: str) -> str:
    """Text for a terminal or a log: what would steer it (controls but tabs and newlines, reversals, surrogates) is escaped, as in "\\x1b"."""
    return _STEERING.sub(
        lambda found: found[0].encode("unicode_escape", "surrogatepass").decode(), text
    )


class Tokenizer(abc.ABC):
    """Text to token ids and back.

    Attributes:
      kind: 'unigram', 'bpe', 'wordpiece', 'byte_bpe' or 'sentencepiece'.
      lowercase: whether text is lower-cased before it is encoded.
      vocab_size: ids, padded up to a multiple of 128.
      pad_id, mask_id, eot_id: the special ids.
      sampleable: bool [vocab_size], the ids that a sampler may emit: text pieces and eot.
    """

    def __init__(
        self,
        kind: str,
        lowercase: bool,
        files: Mapping[str, bytes],
        size: int,
        specials: Mapping[str, int | None],
        unsampleable: Iterable[int],
    ):
        """`size` ids of the vocabulary's own, `specials` its pad, mask and eot (None: lacks it)."""
        self.kind = kind
        self.lowercase = lowercase
        self._files = dict(files)
        ids, end = {}, size
        for name in _NAMES:
            if specials[name] is None:
                ids[name], end = end, end + 1
            else:
                ids[name] = specials[name]
        self._size = size
        self.pad_id, self.mask_id, self.eot_id = ids["pad"], ids["mask"], ids["eot"]
        self.vocab_size = -(-end // _MULTIPLE) * _MULTIPLE
        self.sampleable = np.arange(self.vocab_size) < size
        self.sampleable[[*unsampleable, self.pad_id, self.mask_id]] = False
        self.sampleable[self.eot_id] = True
        self.sampleable.flags.writeable = False

    def encode(self, text: str) -> np.ndarray:
        """int32 [n], without eot. Raises DataError for text with lone surrogates."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode` of each text, in parallel where the tokenizer can."""
        return [
            np.asarray(ids, np.int32)
            for ids in self._encode([self._checked(t) for t in texts], initial=True)
        ]

    def encode_masked(self, text: str) -> np.ndarray:
        """int32 [n] of text in which each '[MASK]' stands for one masked token, with the space before it."""
        first, *rest = map(self._checked, re.split(r" ?\[MASK\]", text))
        ids = list(self._encode([first], initial=True)[0])
        for part in self._encode(rest, initial=False):
            ids += [self.mask_id, *part]
        return np.asarray(ids, np.int32)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Text of the ids: masked tokens as '[MASK]', documents (which eot ends) on lines of their own.

        Raises DataError for ids outside the vocabulary.
        """
        return "\n".join(self.documents(ids))

    def documents(self, ids: Sequence[int] | np.ndarray) -> list[str]:
        """The text of each non-empty run of ids between eots; pad and unused ids are dropped."""
        ids = self._known(ids)
        ids = ids[self.sampleable[ids] | (ids == self.mask_id)]
        runs = np.split(ids, np.flatnonzero(ids == self.eot_id))
        return [self._text(run) for run in (r[r != self.eot_id] for r in runs) if len(run)]

    def pieces(self, ids: Sequence[int] | np.ndarray) -> list[str]:
        """The vocabulary's own writing of each id."""
        names = {
            self.pad_id: _NAMES["pad"],
            self.mask_id: _NAMES["mask"],
            self.eot_id: _NAMES["eot"],
        }
        return [
            self._piece(i) if i < self._size else names.get(i, "[UNUSED]")
            for i in self._known(ids).tolist()
        ]

    def save(
        self, directory: str | os.PathLike[str], source: Mapping[str, Any] | None = None
    ) -> None:
        """Writes the vocabulary and `tokenizer.json` aside, then renames. `source` notes where it came from.

        Raises DataError if the directory is there already.
        """
        directory = Path(directory)
        if directory.exists():
            raise DataError(
                f"{directory}: exists already; remove it or save the tokenizer elsewhere"
            )
        record = {
            "format": 1,
            "kind": self.kind,
            "lowercase": self.lowercase,
            "vocab_size": self.vocab_size,
            "pad_id": self.pad_id,
            "mask_id": self.mask_id,
            "eot_id": self.eot_id,
            "sha256": self.file_hashes(),
            "source": dict(source or {}),
        }
        aside = directory.with_name(f"{directory.name}.tmp-{os.getpid()}")
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        for name, data in self._files.items():
            (aside / name).write_bytes(data)
        (aside / "tokenizer.json").write_text(json.dumps(record, indent=2) + "\n")
        aside.rename(directory)

    def file_hashes(self) -> dict[str, str]:
        """SHA-256 of each vocabulary file."""
        return {name: hashlib.sha256(data).hexdigest() for name, data in self._files.items()}

    def _checked(self, text: str) -> str:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"text holds a lone surrogate U+{ord(text[error.start]):04X} at character {error.start}; "
                "expected valid Unicode"
            ) from error
        return text.lower() if self.lowercase else text

    def _known(self, ids: Sequence[int] | np.ndarray) -> np.ndarray:
        ids = np.asarray(ids, np.int64).reshape(-1)
        if len(ids) and not (ids.min() >= 0 and ids.max() < self.vocab_size):
            raise DataError(
                f"token ids {ids.min()} to {ids.max()}: expected 0 to {self.vocab_size - 1}"
            )
        return ids

    def _text(self, ids: np.ndarray) -> str:
        """One document, with masks."""
        first, *rest = np.split(ids, np.flatnonzero(ids == self.mask_id))
        text = self._decode(first.tolist(), initial=True)
        for part in rest:
            text += " " * bool(text and not text[-1].isspace()) + MASK_TEXT
            after = self._decode(part[1:].tolist(), initial=False)
            text += " " * bool(not self._writes_spaces and after[:1].isalnum()) + after
        return text

    _writes_spaces: bool  # whether decoded text keeps the space before its first word

    @abc.abstractmethod
    def _encode(self, texts: list[str], initial: bool) -> list[list[int]]:
        """Ids of each text, which starts a document (`initial`) or goes on after a mask."""

    @abc.abstractmethod
    def _decode(self, ids: list[int], initial: bool) -> str: ...

    @abc.abstractmethod
    def _piece(self, index: int) -> str: ...


class _SentencePiece(Tokenizer):
    """A SentencePiece model: trained by `train` (lossless), or anyone's (as its own normalizer has it)."""

    def __init__(self, kind: str, lowercase: bool, files: Mapping[str, bytes]):
        import sentencepiece

        try:
            model = sentencepiece.SentencePieceProcessor(model_proto=files["sentencepiece.model"])
            size = model.vocab_size()
        except (RuntimeError, TypeError) as error:
            raise DataError(f"not a SentencePiece model ({error})") from error
        super().__init__(
            kind,
            lowercase,
            files,
            size,
            {
                "pad": model.pad_id() if model.pad_id() >= 0 else None,
                "mask": None,
                "eot": model.eos_id() if model.eos_id() >= 0 else None,
            },
            # Trained models spell the unknown in bytes; anyone else's may write <unk>, which then is text like any other.
            [
                i
                for i in range(size)
                if model.is_control(i)
                or model.is_unused(i)
                or (model.is_unknown(i) and kind in TRAINED)
            ],
        )
        self._model = model
        self._writes_spaces = kind in TRAINED
        self._block = [model.piece_to_id(f"<0x{byte:02X}>") for byte in _BLOCK.encode()]
        self._space = model.piece_to_id("<0x20>")
        self._lacks_space = kind in TRAINED and model.piece_to_id(_BLOCK) == model.unk_id()

    def _encode(self, texts: list[str], initial: bool) -> list[list[int]]:
        if self.kind not in TRAINED:
            return self._model.encode(texts)
        # A document's first word is given the space that other words have before them: one piece a word, not two.
        texts = [" " + t if initial and t else t for t in texts]
        # U+2581 would come back as a space; spelled in bytes, it comes back as itself.
        parts = [t.split(_BLOCK) for t in texts]
        encoded = map(self._spaced, self._model.encode(list(itertools.chain.from_iterable(parts))))
        joined = []
        for part in parts:
            ids = list(next(encoded))
            for _ in part[1:]:
                ids += self._block
                ids += next(encoded)
            joined.append(ids)
        return joined

    def _spaced(self, ids: list[int]) -> list[int]:
        """Ids of text without U+2581, in which a vocabulary of whole words alone spells a space as SentencePiece writes it: it would come back as that."""
        if not self._lacks_space:
            return ids
        found: list[int] = []
        for i in ids:
            found.append(i)
            if found[-len(self._block) :] == self._block:
                found[-len(self._block) :] = [self._space]
        return found

    def _decode(self, ids: list[int], initial: bool) -> str:
        text = self._model.decode(ids) if ids else ""
        return text.removeprefix(" ") if initial and self.kind in TRAINED else text

    def _piece(self, index: int) -> str:
        return self._model.id_to_piece(index)


class _WordPiece(Tokenizer):
    """BERT's vocab.txt with BERT's own splitting; `lowercase` also strips accents, as BERT's uncased models do."""

    _writes_spaces = False

    def __init__(self, kind: str, lowercase: bool, files: Mapping[str, bytes]):
        from tokenizers import Tokenizer as Engine
        from tokenizers import decoders, models, normalizers, pre_tokenizers

        words = (
            _utf8(files["vocab.txt"], "vocab.txt")
            .replace("\r\n", "\n")
            .removesuffix("\n")
            .split("\n")
        )
        ids = {word: i for i, word in enumerate(words)}
        if "[UNK]" not in ids or len(ids) != len(words):
            raise DataError("vocab.txt: expected one different token a line, [UNK] among them")
        # Text has [UNK] in it, so the model must be able to write it: else the loss of such text is infinite.
        unsampleable = [
            i for w, i in ids.items() if re.fullmatch(r"\[(unused\d+|CLS|SEP|PAD|MASK)\]", w)
        ]
        super().__init__(
            kind,
            lowercase,
            files,
            len(words),
            {"pad": ids.get("[PAD]"), "mask": ids.get("[MASK]"), "eot": ids.get("[SEP]")},
            unsampleable,
        )
        self._words = words
        self._engine = Engine(models.WordPiece(ids, unk_token="[UNK]"))
        self._engine.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
        self._engine.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        self._engine.decoder = decoders.WordPiece()

    def _encode(self, texts: list[str], initial: bool) -> list[list[int]]:
        return [e.ids for e in self._engine.encode_batch_fast(texts, add_special_tokens=False)]

    def _decode(self, ids: list[int], initial: bool) -> str:
        return self._engine.decode(ids, skip_special_tokens=False)

    def _piece(self, index: int) -> str:
        return self._words[index]


class _ByteBPE(Tokenizer):
    """GPT-2's vocab.json and merges.txt: lossless for all Unicode."""

    _writes_spaces = True

    def __init__(self, kind: str, lowercase: bool, files: Mapping[str, bytes]):
        from tokenizers import Tokenizer as Engine
        from tokenizers import decoders, models, pre_tokenizers

        try:
            ids = json.loads(_utf8(files["vocab.json"], "vocab.json"))
            if sorted(ids.values()) != list(range(len(ids))):
                raise ValueError("ids are not 0, 1, 2 ...")
            lines = _utf8(files["merges.txt"], "merges.txt").split("\n")
            merges = [
                tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")
            ]
            self._engine = Engine(models.BPE(ids, merges))
        except Exception as error:  # the engine raises bare Exceptions
            raise DataError(
                f"not a byte-level BPE vocabulary ({error}); expected vocab.json with its merges.txt"
            ) from error
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        if not set(alphabet) <= ids.keys():
            raise DataError(
                f"vocab.json lacks {len(set(alphabet) - ids.keys())} of the 256 byte symbols"
            )
        super().__init__(
            kind,
            lowercase,
            files,
            len(ids),
            {"pad": None, "mask": None, "eot": ids.get(_NAMES["eot"])},
            [],
        )
        self._words = sorted(ids, key=ids.__getitem__)
        self._engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        self._engine.decoder = decoders.ByteLevel()

    def _encode(self, texts: list[str], initial: bool) -> list[list[int]]:
        return [e.ids for e in self._engine.encode_batch_fast(texts, add_special_tokens=False)]

    def _decode(self, ids: list[int], initial: bool) -> str:
        return self._engine.decode(ids, skip_special_tokens=False)

    def _piece(self, index: int) -> str:
        return self._words[index]


_KINDS: dict[str, tuple[type[Tokenizer], tuple[str, ...]]] = {
    "unigram": (_SentencePiece, ("sentencepiece.model",)),
    "bpe": (_SentencePiece, ("sentencepiece.model",)),
    "sentencepiece": (_SentencePiece, ("sentencepiece.model",)),
    "wordpiece": (_WordPiece, ("vocab.txt",)),
    "byte_bpe": (_ByteBPE, ("vocab.json", "merges.txt")),
}


def load(directory: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer that `Tokenizer.save` wrote.

    Raises:
      DataError: nothing there, or files that are damaged or do not fit together.
    """
    directory = Path(directory)
    try:
        record = json.loads((directory / "tokenizer.json").read_text())
        build, names = _KINDS[record["kind"]]
        files = {name: (directory / name).read_bytes() for name in names}
        damaged = [n for n in names if hashlib.sha256(files[n]).hexdigest() != record["sha256"][n]]
        if damaged:
            raise DataError(
                f"{directory / damaged[0]}: not the file that was saved; restore it or train again"
            )
        tokenizer = build(record["kind"], record["lowercase"], files)
        for name in ("vocab_size", "pad_id", "mask_id", "eot_id"):
            if getattr(tokenizer, name) != record[name]:
                raise DataError(
                    f"{directory}: {name} is {getattr(tokenizer, name)}, saved as {record[name]}"
                )
    except DataError:
        raise
    except OSError as error:
        raise DataError(
            f"{error.filename}: {'missing' if isinstance(error, FileNotFoundError) else error.strerror}; expected a tokenizer saved in {directory}"
        ) from error
    except (ValueError, RecursionError, KeyError, TypeError) as error:
        raise DataError(
            f"{directory / 'tokenizer.json'}: not a tokenizer's record ({type(error).__name__}: {str(error)[:100]})"
        ) from error
    return tokenizer


def vocabulary_files(directory: str | os.PathLike[str]) -> tuple[str, ...]:
    """The files that `load` reads beside the record, by the kind that the record names. Raises DataError where it is none."""
    path = Path(directory) / "tokenizer.json"
    try:
        return _KINDS[json.loads(path.read_text())["kind"]][1]
    except (OSError, ValueError, RecursionError, KeyError, TypeError) as error:
        raise DataError(
            f"{path}: not a tokenizer's record ({type(error).__name__}: {str(error)[:100]})"
        ) from error


def source(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """The note that `Tokenizer.save` was given about where the tokenizer came from; empty where its record has none."""
    found = json.loads((Path(directory) / "tokenizer.json").read_text()).get("source")
    return found if isinstance(found, dict) else {}


def from_vocabulary(path: str | os.PathLike[str], kind: str, lowercase: bool = False) -> Tokenizer:
    """A tokenizer from a published vocabulary.

    Args:
      path: vocab.txt ('wordpiece'); NAMEvocab.json beside NAMEmerges.txt ('byte_bpe'); a .model ('sentencepiece').
      kind: one of these.
      lowercase: lower-case text first ('wordpiece': and strip accents).

    Raises:
      DataError: another kind, or files that are missing or not of that kind.
    """
    if kind not in FROM_FILE:
        raise DataError(
            f"tokenizer.kind={kind!r} takes no file: expected one of {', '.join(FROM_FILE)}"
        )
    build, names = _KINDS[kind]
    path = expand(path)
    paths = [path]
    if kind == "byte_bpe":
        if not path.name.endswith("vocab.json"):
            raise DataError(
                f"tokenizer.file={path}: expected a name that ends in vocab.json, merges.txt beside it"
            )
        paths.append(path.with_name(path.name.removesuffix("vocab.json") + "merges.txt"))
    try:
        return build(kind, lowercase, {name: p.read_bytes() for name, p in zip(names, paths)})
    except OSError as error:
        raise DataError(
            f"tokenizer.file={path}: cannot read {error.filename} ({error.strerror})"
        ) from error
    except DataError as error:
        raise DataError(f"tokenizer.file={path}: {error}") from error


def train(
    documents: Iterable[str],
    kind: str,
    vocab_size: int,
    lowercase: bool = False,
    whole_words: int = 0,
    max_documents: int = 100_000,
    max_characters: int = 20_000_000,
) -> Tokenizer:
    """Trains a SentencePiece tokenizer that any Unicode text survives unchanged (if not lower-cased).

    The same documents give the same vocabulary on any machine. Small corpora may give fewer pieces than asked.

    Args:
      documents: read until a cap is met, so a stream of any length may be given.
      kind: 'unigram' or 'bpe'.
      vocab_size: ids, counting 256 bytes, unknown, pad, mask and eot; before rounding up to a multiple of 128.
      lowercase: lower-case text first.
      whole_words: so many of the most frequent words are made pieces whatever the training would choose; for
        languages of few words, where one piece a word is wanted and the training prefers parts of them.
      max_documents, max_characters: how much of the documents is read.

    Raises:
      DataError: another kind, a vocabulary too small for the bytes and characters, or no text.
    """
    import sentencepiece

    if kind not in TRAINED:
        raise DataError(
            f"tokenizer.kind={kind!r} cannot be trained: expected one of {', '.join(TRAINED)}"
        )
    text = _training_text(itertools.islice(documents, max_documents), lowercase, max_characters)
    words: list[str] = []
    if whole_words:
        parts = list(text)  # of a capped size
        counts = collections.Counter(word for part in parts for word in re.findall(r" \w+", part))
        # By count and then by spelling, so that ties cannot depend on the order of the documents.
        words = [
            w.replace(" ", _BLOCK)
            for w, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:whole_words]
        ]
        text = iter(parts)
    first = next(text, None)
    if first is None:
        raise DataError("no text to train a tokenizer on")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=itertools.chain([first], text),
            model_writer=model,
            model_type=kind,
            vocab_size=vocab_size - len(_NAMES),
            hard_vocab_limit=False,
            byte_fallback=True,
            user_defined_symbols=words,
            character_coverage=0.99995,  # of rarer characters the bytes will do
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            unk_id=0,
            bos_id=-1,
            eos_id=-1,
            pad_id=-1,
            num_threads=_TRAINING_THREADS,
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = re.sub(r"^.*\)\] ", "", str(error))  # without the place in its source
        raise DataError(
            f"tokenizer.vocab_size={vocab_size}: SentencePiece cannot train it ({reason})"
        ) from error
    return _SentencePiece(kind, lowercase, {"sentencepiece.model": model.getvalue()})


def _training_text(documents: Iterable[str], lowercase: bool, max_characters: int) -> Iterator[str]:
    """Documents cut before spaces to the lengths that SentencePiece takes (4192 bytes), as `encode` sees them."""
    left = max_characters
    for document in documents:
        text = " " + (document.lower() if lowercase else document)[:left]
        left -= len(text)
        for part in text.split(_BLOCK):
            yield from re.findall(r"(?s).{1,1000}(?= |\Z)|.{1,1000}", part)
        if left <= 0:
            return


def _utf8(data: bytes, name: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise DataError(f"{name}: not UTF-8 at byte {error.start}") from error
