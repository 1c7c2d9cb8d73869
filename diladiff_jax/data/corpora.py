"""Corpora as TFDS datasets of text: written once to ArrayRecord shards, then read at random.

A corpus has up to three splits that share no document: 'train', 'validation', and 'scorer', which is held out to
train an autoregressive scorer on text that the model has not seen and is not evaluated on.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import hashlib
import io
import itertools
import json
import logging
import math
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from diladiff_jax.data import packing, text_files
from diladiff_jax.data.errors import DataError

SPLITS = ("train", "validation", "scorer")
_READ = 1024  # documents a batched read
_FEATURES = "tensorflow_datasets.core.features."
_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Settings:
    """The `data` block of a config."""

    corpus: str  # 'text_files', 'pydocs', 'stories', the name of a public TFDS dataset, or the folder of a prepared one
    files: str = ""  # text_files: a folder, a glob or one file
    validation_files: str = (
        ""  # text_files: validation documents of their own; '': a fraction of `files`
    )
    field: str = "text"  # the field that holds the text (.jsonl, .parquet, TFDS)
    documents: int = 0  # stories: training documents
    validation_documents: int = 0  # stories
    scorer_documents: int = 0  # stories; 0: no scorer split
    validation_fraction: float = 0.01  # the others: of all documents
    validation_last: int = (
        0  # the others: so many documents at the end, in place of a fraction; 0: the fraction
    )
    scorer_fraction: float = 0.0  # the others; 0: no scorer split
    max_documents: int = 0  # the others: read only the first so many; 0: all
    seed: int = 0  # stories: of the generator
    length: int = 1024  # L, tokens a row
    packing: str = "packed"  # or 'document'
    directory: str = ""  # where shards go; '': WORKDIR/data

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> Settings:
        """Settings from a plain mapping or a ConfigDict. Raises DataError for keys or values out of place."""
        if isinstance(data, cls):
            return data
        fields = {f.name: f for f in dataclasses.fields(cls)}
        for name, value in data.items():
            if name not in fields:
                raise DataError(
                    f"data.{name}: no such setting; expected one of {', '.join(fields)}"
                )
            wanted = {"str": str, "int": int, "float": (float, int)}[fields[name].type]
            if not isinstance(value, wanted) or isinstance(value, bool):
                raise DataError(
                    f"data.{name}={value!r}: expected a value of type {fields[name].type}"
                )
        if not data.get("corpus"):
            raise DataError(
                "data.corpus is missing: expected text_files, pydocs, stories or the name of a TFDS dataset"
            )
        self = cls(**dict(data.items()))
        self._check()
        return self

    def _check(self) -> None:
        if self.packing not in packing.MODES:
            raise DataError(
                f"data.packing={self.packing!r}: expected one of {', '.join(packing.MODES)}"
            )
        for name, least in (
            ("length", 2),
            ("documents", 0),
            ("validation_documents", 0),
            ("scorer_documents", 0),
            ("max_documents", 0),
            ("validation_last", 0),
        ):
            if getattr(self, name) < least:
                raise DataError(f"data.{name}={getattr(self, name)}: expected at least {least}")
        if self.corpus == "stories":
            if self.documents < 1 or self.validation_documents < 1:
                raise DataError(
                    f"data.documents={self.documents}, data.validation_documents="
                    f"{self.validation_documents}: stories needs at least 1 of each"
                )
            return
        low, high = self.validation_fraction, self.scorer_fraction
        if not (0 <= low < 1 and 0 <= high < 1 and low + high < 1):
            raise DataError(
                f"data.validation_fraction={low}, data.scorer_fraction={high}: expected fractions from 0 "
                "whose sum is below 1"
            )
        if self.validation_last and self.validation_files:
            raise DataError(
                f"data.validation_last={self.validation_last}: expected 0 beside data.validation_files"
            )
        if low == 0 and not self.validation_files and not self.validation_last:
            raise DataError(
                "data.validation_fraction=0: expected more than 0, or data.validation_files"
            )

    def corpus_key(self) -> str:
        """A short hash of what determines the text of the corpus."""
        about = {
            n: v
            for n, v in dataclasses.asdict(self).items()
            if n not in ("length", "packing", "directory")
        }
        if not self.validation_last:
            del about[
                "validation_last"
            ]  # corpora written before there was such a setting keep their name
        if self.corpus == "text_files":
            paths = text_files.matching(self.files)
            paths += text_files.matching(self.validation_files) if self.validation_files else []
            about["stamps"] = [(str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in paths]
        return short_hash(about)


def short_hash(value: Any) -> str:
    """16 hexadecimal digits of a JSON value."""
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=8).hexdigest()


def splits(data: Mapping[str, Any]) -> dict[str, Callable[[], Iterator[str]]]:
    """For each split of the corpus, a function that begins a pass over its documents.

    Stories are drawn with a seed of their own for each split. Elsewhere the hash of a document's content decides
    its split, so that duplicates stay together and the split of a document never depends on the rest of the corpus.
    With `validation_files`, documents that are in them word for word are left out of the other splits. With
    `validation_last`, the documents at the end are held out as they are, and the hash parts the rest.

    Raises:
      DataError: an unknown corpus; while iterating, documents that cannot be read.
    """
    settings = Settings.of(data)
    if settings.corpus == "stories":
        from diladiff_jax.data import stories

        counts = dict(
            zip(
                SPLITS,
                (settings.documents, settings.validation_documents, settings.scorer_documents),
            )
        )
        return {
            split: functools.partial(stories.documents, count, _split_seed(settings.seed, split))
            for split, count in counts.items()
            if count
        }

    everything = _reader(settings)
    held_out: Callable[[], set[bytes]] = set
    limits = {
        "validation": settings.validation_fraction,
        "scorer": settings.scorer_fraction,
        "train": 1.0,
    }
    result = {}
    if settings.validation_files:
        limits["validation"] = 0.0
        own = functools.partial(text_files.documents, settings.validation_files, settings.field)
        held_out = functools.cache(lambda: {_digest(text) for text in own()})
        result["validation"] = own

    rest = everything
    if settings.validation_last:
        limits["validation"] = 0.0
        result["validation"] = lambda: iter(
            collections.deque(everything(), settings.validation_last)
        )
        rest = lambda: _but_the_last(everything(), settings.validation_last)

    def assigned(split: str) -> Iterator[str]:
        for text in rest():
            digest = _digest(text)
            if _split_of(digest, limits) == split and digest not in held_out():
                yield text

    return result | {
        split: functools.partial(assigned, split) for split, limit in limits.items() if limit > 0
    }


def _but_the_last(documents: Iterator[str], count: int) -> Iterator[str]:
    """All documents but the last `count`, which wait in memory until it is known that they are the last."""
    waiting: collections.deque[str] = collections.deque()
    for document in documents:
        waiting.append(document)
        if len(waiting) > count:
            yield waiting.popleft()


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()


def _split_of(digest: bytes, limits: Mapping[str, float]) -> str:
    place = int.from_bytes(digest, "big") / 2**64
    for split, bound in zip(limits, itertools.accumulate(limits.values())):
        if place < bound:
            return split
    raise AssertionError(f"the limits {limits} leave no split for the rest")


def _split_seed(seed: int, split: str) -> int:
    return (
        int.from_bytes(hashlib.blake2b(f"{seed}/{split}".encode(), digest_size=4).digest(), "big")
        >> 1
    )


def _reader(settings: Settings) -> Callable[[], Iterator[str]]:
    """A function that begins a pass over the first `max_documents` documents of a corpus without own splits."""
    if settings.corpus == "text_files":
        text_files.matching(settings.files)  # complains now, not in the middle of TFDS
        begin = functools.partial(text_files.documents, settings.files, settings.field)
    elif settings.corpus == "pydocs":
        from diladiff_jax.data import pydocs

        begin = pydocs.documents
    else:
        begin = functools.partial(_tfds_documents, _prepared_tfds(settings.corpus), settings.field)
    where = (
        f"data.files={settings.files!r}"
        if settings.corpus == "text_files"
        else f"data.corpus={settings.corpus!r}"
    )
    return lambda: _some(itertools.islice(begin(), settings.max_documents or None), where)


def _some(documents: Iterator[str], where: str) -> Iterator[str]:
    """The documents, of which there must be one at least."""
    for first in documents:
        return itertools.chain([first], documents)
    raise DataError(f"{where} holds no text but blanks; expected some documents")


def _prepared_tfds(name: str) -> Any:
    """The builder of a public TFDS dataset, downloaded and prepared if it is not yet, or of a prepared folder."""
    import tensorflow_datasets as tfds

    if (Path(name) / "dataset_info.json").is_file():
        return prepared_folder(Path(name))
    if not re.fullmatch(r"\w[\w/.+-]*(:\d[\d.*]*)?", name):
        # TFDS would take it for a bucket, or for code of a community's to be fetched and run.
        raise _unknown(name)
    try:
        builder = tfds.builder(name, file_format="array_record")
    except (tfds.core.registered.DatasetNotFoundError, ValueError) as error:
        raise _unknown(name) from error
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            builder.download_and_prepare()
    except Exception as error:  # whatever the dataset's own code and the network raise
        raise DataError(
            f"data.corpus={name!r}: TFDS cannot prepare it ({type(error).__name__}: "
            f"{str(error)[:200]})"
        ) from error
    return builder


def _unknown(name: str) -> DataError:
    return DataError(
        f"data.corpus={name!r}: expected text_files, pydocs, stories, the name of a TFDS dataset or the "
        "folder of a prepared one"
    )


def prepared_folder(folder: Path) -> Any:
    """The builder of a dataset that TFDS has prepared in `folder`, without executing anything that its files name.

    Raises:
      DataError: no such dataset, or one with features of classes that are not TFDS's own, which it would import.
    """
    import tensorflow_datasets as tfds

    path = folder / "features.json"
    try:
        foreign = _foreign_classes(json.loads(path.read_text()))
        if not foreign:
            return tfds.builder_from_directory(str(folder))
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{folder}: no dataset that TFDS has prepared ({type(error).__name__}: {str(error)[:200]}); prepare it again"
        ) from error
    raise DataError(
        f"{path} names the class {foreign[0][:100]!r}, which would be imported; expected classes of {_FEATURES}* alone"
    )


def _foreign_classes(description: Any) -> list[str]:
    """The classes that a features.json (its present form and its old one) names and that are not TFDS's own."""
    if isinstance(description, str) and description.lstrip().startswith(
        "{"
    ):  # the old form may have JSON in a text
        return _foreign_classes(json.loads(description))
    if isinstance(description, list):
        return [name for part in description for name in _foreign_classes(part)]
    if not isinstance(description, dict):
        return []
    named = [
        description[key]
        for key in ("pythonClassName", "python_class_name", "type")
        if isinstance(description.get(key), str)
    ]
    inner = [name for part in description.values() for name in _foreign_classes(part)]
    return [name for name in named if not name.startswith(_FEATURES)] + inner


def _tfds_documents(builder: Any, field: str) -> Iterator[str]:
    """The documents of the builder's 'train' split."""
    if field not in builder.info.features:
        raise DataError(
            f"{builder.name}: no feature {field!r} (found {', '.join(builder.info.features)}); set data.field"
        )
    if "train" not in builder.info.splits:
        raise DataError(
            f"{builder.name}: no split 'train' (found {', '.join(builder.info.splits)})"
        )
    source = builder.as_data_source(split="train")
    for start in range(0, len(source), _READ):
        indices = range(start, min(start + _READ, len(source)))
        for index, example in zip(indices, source.__getitems__(indices)):
            try:
                text = example[field].decode()
            except (UnicodeDecodeError, AttributeError) as error:
                raise DataError(
                    f"{builder.name}, example {index}: field {field!r} is not UTF-8 text"
                ) from error
            if text.strip():
                yield text


@functools.cache
def _builder_class() -> type:
    """The TFDS builder, made on first use so that importing this module stays light."""
    import tensorflow_datasets as tfds

    with tfds.core.registered.skip_registration():

        class TextCorpus(tfds.core.GeneratorBasedBuilder):
            """Documents of text, from any function that yields them."""

            VERSION = tfds.core.Version("1.0.0")

            def __init__(self, splits: Mapping[str, Callable[[], Iterator[str]]], **kwargs: Any):
                self._splits = splits
                super().__init__(**kwargs)

            def _info(self) -> tfds.core.DatasetInfo:
                # In the corpus' own order: the training pipeline shuffles, and TFDS would on disk.
                return tfds.core.DatasetInfo(
                    builder=self,
                    disable_shuffling=True,
                    features=tfds.features.FeaturesDict({"text": tfds.features.Text()}),
                )

            def _split_generators(
                self, dl_manager: Any
            ) -> dict[str, Iterator[tuple[int, dict[str, str]]]]:
                return {split: self._generate_examples(split) for split in self._splits}

            def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, str]]]:
                number = -1
                for number, text in enumerate(self._splits[split]()):
                    try:
                        yield number, {"text": text.encode()}
                    except UnicodeEncodeError as error:
                        raise DataError(
                            f"document {number} of split {split}: a lone surrogate at character "
                            f"{error.start}; expected valid Unicode"
                        ) from error
                if number < 0:
                    raise DataError(
                        f"split {split!r} of the corpus got no document: use more of them (in a .txt file, lines "
                        f"of {text_files.SEPARATOR} part them), or a larger fraction or count for it"
                    )
                _log.info("corpus: %d documents in split %s", number + 1, split)

    return TextCorpus


def build(data: Mapping[str, Any], directory: Path) -> None:
    """Writes the corpus under `directory` as ArrayRecord shards; does nothing if it is there. TFDS does so atomically.

    Raises:
      DataError: documents that cannot be read, or a split without any.
    """
    if is_built(directory):
        return
    import tensorflow_datasets as tfds

    if not sys.stderr.isatty():
        tfds.disable_progress_bar()
    builder = _builder_class()(splits(data), data_dir=str(directory), file_format="array_record")
    with contextlib.redirect_stdout(io.StringIO()):  # TFDS announces itself on standard output
        builder.download_and_prepare()


def built(directory: Path) -> Path:
    """Where TFDS puts the dataset under the folder given to `build`."""
    return directory / "text_corpus" / "1.0.0"


def is_built(directory: Path) -> bool:
    """Whether `build` has finished there."""
    return (built(directory) / "dataset_info.json").is_file()


class Documents(Sequence[str]):
    """The documents of one split, by index. Reads batches at a time with `__getitems__` and when iterated over."""

    def __init__(self, directory: Path, split: str):
        """Raises DataError if the corpus there has no such split."""
        builder = prepared_folder(built(directory))
        if split not in builder.info.splits:
            raise DataError(
                f"{directory}: no split {split!r} (found {', '.join(builder.info.splits)}); set "
                f"data.{split}_fraction or data.{split}_documents and prepare again"
            )
        self._source = builder.as_data_source(split=split)

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> str:
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return self.__getitems__([index % len(self)])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[str]:
        return [example["text"].decode() for example in self._source.__getitems__(indices)]

    def __iter__(self) -> Iterator[str]:
        return itertools.chain.from_iterable(self.batches(_READ))

    def batches(self, size: int) -> Iterator[list[str]]:
        """All documents in order, `size` at a time."""
        for batch in range(math.ceil(len(self) / size)):
            yield self.__getitems__(range(batch * size, min((batch + 1) * size, len(self))))
