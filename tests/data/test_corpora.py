"""Corpora: their splits, and what may be read from where."""

import collections
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import requests
import tensorflow_datasets as tfds

from diladiff_jax.data import (
    DataError,
    DataOptions,
    StreamCorpus,
    TokenizerOptions,
    corpora,
    prepare,
)
from diladiff_jax.data.corpora import pydocs, stories, tfds_datasets

DOCS = [f"document {i % 900} says é" for i in range(1000)]  # the last hundred are duplicates


class LittlePublicCorpus(tfds.core.GeneratorBasedBuilder):
    """In place of a dataset of the TFDS catalogue."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(
                {"content": tfds.features.Text(), "n": tfds.features.Scalar(np.int64)}
            ),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager):
        return {"train": ((i, {"content": d, "n": i}) for i, d in enumerate(DOCS))}

    def _generate_examples(self):
        raise NotImplementedError


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text("\n<|endoftext|>\n".join(DOCS), encoding="utf-8")
    return tmp_path


def read(options):
    return {split: list(begin()) for split, begin in corpora.splits(options).items()}


def text_files(folder, **more):
    settings = {"validation_fraction": 0.2, "scorer_fraction": 0.1} | more
    return DataOptions(corpus="text_files", files=str(folder / "in"), **settings)


def test_hashed_splits_are_disjoint_complete_and_of_the_requested_size(folder):
    got = read(text_files(folder))
    assert collections.Counter(itertools.chain.from_iterable(got.values())) == collections.Counter(
        DOCS
    )
    sets = {split: set(docs) for split, docs in got.items()}
    assert sets.keys() == set(corpora.SPLITS)
    assert sum(map(len, sets.values())) == len(set(DOCS)), "duplicates are in two splits"
    for split, fraction in (("validation", 0.2), ("scorer", 0.1), ("train", 0.7)):
        deviation = (900 * fraction * (1 - fraction)) ** 0.5
        assert abs(len(sets[split]) - 900 * fraction) < 4 * deviation
    assert read(text_files(folder)) == got


def test_the_split_of_a_document_does_not_depend_on_the_others(folder):
    everything = read(text_files(folder))
    some = read(text_files(folder, max_documents=100))
    assert sum(map(len, some.values())) == 100
    assert all(set(some[split]) <= set(everything[split]) for split in some)


def test_validation_files_are_validation_and_kept_out_of_training(folder):
    (folder / "held.txt").write_text(
        "\n<|endoftext|>\n".join([DOCS[3], "something else"]), encoding="utf-8"
    )
    for fraction in (0.2, 0.0):
        settings = dict(validation_files=str(folder / "held.txt"), validation_fraction=fraction)
        got = read(text_files(folder, **settings))
        assert got["validation"] == [DOCS[3], "something else"]
        assert set(got["train"]) | set(got["scorer"]) == set(DOCS) - {DOCS[3]}
        assert not set(got["train"]) & set(got["scorer"])


@pytest.mark.parametrize("fraction", [0.2, 0.0])
def test_the_last_documents_are_held_out_as_they_are(folder, fraction):
    """In their order; earlier duplicates of them stay in the other splits."""
    plain = text_files(folder)
    last = text_files(folder, validation_last=150, validation_fraction=fraction)
    got = read(last)
    assert got["validation"] == DOCS[-150:]
    rest = collections.Counter(got["train"] + got["scorer"])
    assert rest == collections.Counter(DOCS[:-150]) and got["scorer"]
    assert corpora.corpus_key(plain) != corpora.corpus_key(last)
    assert not read(text_files(folder, validation_last=1000))["train"]


def test_there_is_no_scorer_split_by_default(folder):
    assert read(text_files(folder, scorer_fraction=0.0)).keys() == {"train", "validation"}


def test_every_split_of_the_stories_has_a_seed_of_its_own(monkeypatch):
    monkeypatch.setattr(stories, "documents", lambda count, seed: iter([f"{seed}"] * count))
    counts = dict(documents=3, validation_documents=2, scorer_documents=1)
    both = [read(DataOptions(corpus="stories", seed=seed, **counts)) for seed in (0, 1)]
    sizes = {split: len(docs) for split, docs in both[0].items()}
    assert sizes == {"train": 3, "validation": 2, "scorer": 1}
    assert len({docs[0] for got in both for docs in got.values()}) == 6


def test_pydocs_are_divided_by_hashes(monkeypatch):
    monkeypatch.setattr(pydocs, "documents", lambda: iter(DOCS))
    got = read(DataOptions(corpus="pydocs", validation_fraction=0.5))
    assert sorted(got["train"] + got["validation"]) == sorted(DOCS)


def test_a_corpus_registered_from_outside_is_prepared(tmp_path, monkeypatch):
    class Poems(StreamCorpus):
        def open(self, options):
            return lambda: (f"a poem about the {options.field} {i}" for i in range(60))

    monkeypatch.setattr(corpora.registry, "CORPORA", dict(corpora.CORPORA))
    corpora.register_corpus("poems", Poems())
    data = DataOptions(corpus="poems", field="sea", validation_fraction=0.3, length=8)
    prepared = prepare(data, TokenizerOptions(kind="bpe", vocab_size=300), tmp_path)
    documents = [text for split in prepared.splits for text in prepared.documents(split)]
    assert sorted(documents) == sorted(f"a poem about the sea {i}" for i in range(60))
    with pytest.raises(ValueError, match="'poems'.*not taken"):
        corpora.register_corpus("poems", Poems())


def test_a_public_dataset_is_read_by_folder_and_by_name(tmp_path):
    builder = LittlePublicCorpus(data_dir=str(tmp_path), file_format="array_record")
    builder.download_and_prepare()
    by_folder = read(DataOptions(corpus=str(builder.data_path), field="content"))
    assert sorted(itertools.chain.from_iterable(by_folder.values())) == sorted(DOCS)
    tfds.core.add_data_dir(str(tmp_path))
    assert read(DataOptions(corpus="little_public_corpus", field="content")) == by_folder
    with pytest.raises(DataError, match="no feature 'text' .*content"):
        read(DataOptions(corpus="little_public_corpus"))


_FEATURES_DICT = "tensorflow_datasets.core.features.features_dict.FeaturesDict"
_OLD_FORMAT = {"features": {"content": {"pythonClassName": "evil.Text", "text": {}}}}


@pytest.mark.parametrize(
    "features",
    [
        {"pythonClassName": "evil.Text", "text": {}},
        {"python_class_name": "evil.Text", "text": {}},
        {"type": "evil.Text", "content": {}},
        {"type": _FEATURES_DICT, "content": {"content": {"type": "evil.Text", "content": {}}}},
        {
            "type": _FEATURES_DICT,
            "proto_cls": "tensorflow_datasets.FeaturesDict",
            "content": json.dumps(_OLD_FORMAT),
        },
    ],
)
def test_a_prepared_folder_imports_nothing(tmp_path, monkeypatch, features):
    """TFDS imports the module of every class that features.json names, so foreign ones fail."""
    builder = LittlePublicCorpus(data_dir=str(tmp_path / "tfds"), file_format="array_record")
    builder.download_and_prepare()
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'owned')!r}, 'w')")
    monkeypatch.syspath_prepend(str(tmp_path))
    (Path(builder.data_path) / "features.json").write_text(json.dumps(features))
    with pytest.raises(DataError, match="'evil.Text', which would be imported"):
        read(DataOptions(corpus=str(builder.data_path), field="content"))
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    "name",
    ["no_such_corpus", "huggingface:squad", "community:x/y", "gs://bucket/x", "~nobody/x", "../x"],
)
def test_names_outside_the_catalogue_are_rejected_and_nothing_is_downloaded(name):
    with pytest.raises(DataError, match="data.corpus: got .* the name of a TFDS dataset") as error:
        read(DataOptions(corpus=name))
    assert name in str(error.value) and "\n" not in str(error.value)


def test_files_that_do_not_exist_are_rejected_before_anything_is_read(folder):
    with pytest.raises(DataError, match="data.files='/nowhere/at/all' matches no file"):
        corpora.splits(DataOptions(corpus="text_files", files="/nowhere/at/all"))


def test_a_download_without_a_network_ends_soon_with_one_line(monkeypatch, caplog):
    """Its tries are bounded and reported; the message says what works without a network."""
    from tensorflow_datasets.core.download import downloader

    before = downloader.MAX_RETRIES
    monkeypatch.setattr(tfds_datasets, "_RETRIES", 2)
    with (
        caplog.at_level("INFO"),
        pytest.raises(requests.exceptions.ConnectionError),
        tfds_datasets._bounded_retries(),
        downloader._open_with_requests("http://127.0.0.1:9/corpus"),
    ):
        pass
    messages = [record.getMessage() for record in caplog.records]
    assert messages == [f"no connection for the download; {n} more tries" for n in (1, 0)]
    assert before == downloader.MAX_RETRIES
