import collections
import json
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds

from diladiff_jax.data import corpora
from diladiff_jax.data.errors import DataError

DOCS = [f"document {i % 900} says é" for i in range(1000)]  # the last hundred are duplicates


class LittlePublicCorpus(tfds.core.GeneratorBasedBuilder):
    """Stands for a dataset of the TFDS catalogue."""

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


def read(data):
    return {split: list(begin()) for split, begin in corpora.splits(data).items()}


def text_files(folder, **more):
    return {
        "corpus": "text_files",
        "files": str(folder / "in"),
        "validation_fraction": 0.2,
        "scorer_fraction": 0.1,
    } | more


def test_hashed_splits_are_disjoint_complete_and_of_the_asked_size(folder):
    got = read(text_files(folder))
    assert collections.Counter(sum(got.values(), [])) == collections.Counter(DOCS)
    sets = {split: set(docs) for split, docs in got.items()}
    assert sets.keys() == set(corpora.SPLITS)
    assert sum(map(len, sets.values())) == len(set(DOCS)), "duplicates fell into two splits"
    for split, share in (("validation", 0.2), ("scorer", 0.1), ("train", 0.7)):
        deviation = (900 * share * (1 - share)) ** 0.5
        assert abs(len(sets[split]) - 900 * share) < 4 * deviation
    assert read(text_files(folder)) == got


def test_a_documents_split_does_not_depend_on_the_others(folder):
    everything = read(text_files(folder))
    some = read(text_files(folder, max_documents=100))
    assert sum(map(len, some.values())) == 100
    assert all(set(some[split]) <= set(everything[split]) for split in some)


def test_validation_files_are_validation_and_kept_out_of_training(folder):
    (folder / "held.txt").write_text(
        "\n<|endoftext|>\n".join([DOCS[3], "something else"]), encoding="utf-8"
    )
    got = read(text_files(folder, validation_files=str(folder / "held.txt")))
    assert got["validation"] == [DOCS[3], "something else"]
    assert set(got["train"]) | set(got["scorer"]) == set(DOCS) - {DOCS[3]}
    assert not set(got["train"]) & set(got["scorer"])


def test_the_last_documents_are_held_out_as_they_are(folder):
    """The end of the corpus in its order, and nothing of it elsewhere but what stands there twice; the rest is parted as ever."""
    got = read(text_files(folder, validation_last=150))
    assert got["validation"] == DOCS[-150:]
    assert (
        collections.Counter(got["train"] + got["scorer"]) == collections.Counter(DOCS[:-150])
        and got["scorer"]
    )
    plain, last = (corpora.Settings.of(text_files(folder, validation_last=n)) for n in (0, 150))
    assert plain.corpus_key() != last.corpus_key()
    assert not list(corpora.splits(text_files(folder, validation_last=1000))["train"]())


def test_no_scorer_split_unless_asked_for(folder):
    assert read(text_files(folder, scorer_fraction=0.0)).keys() == {"train", "validation"}


def test_stories_have_a_seed_a_split(monkeypatch):
    from diladiff_jax.data import stories

    monkeypatch.setattr(stories, "documents", lambda count, seed: iter([f"{seed}"] * count))
    data = {"corpus": "stories", "documents": 3, "validation_documents": 2, "scorer_documents": 1}
    got = read(data)
    assert {split: len(docs) for split, docs in got.items()} == {
        "train": 3,
        "validation": 2,
        "scorer": 1,
    }
    seeds = {docs[0] for docs in got.values()} | {
        docs[0] for docs in read(data | {"seed": 1}).values()
    }
    assert len(seeds) == 6


def test_pydocs_are_hashed_into_splits(monkeypatch):
    from diladiff_jax.data import pydocs

    monkeypatch.setattr(pydocs, "documents", lambda: iter(DOCS))
    got = read({"corpus": "pydocs", "validation_fraction": 0.5})
    assert sorted(got["train"] + got["validation"]) == sorted(DOCS)


def test_written_and_read_back_through_tfds(folder):
    data = text_files(folder)
    corpora.build(data, folder / "text")
    assert list((folder / "text").rglob("*.array_record*"))
    for split, docs in read(data).items():
        stored = corpora.Documents(folder / "text", split)
        assert len(stored) == len(docs) and list(stored) == docs
        assert (
            stored[5] == docs[5]
            and stored[-1] == docs[-1]
            and stored.__getitems__([2, 0]) == [docs[2], docs[0]]
        )
        with pytest.raises(IndexError):
            stored[len(docs)]


def test_a_public_dataset_is_read_by_folder_and_by_name(tmp_path):
    builder = LittlePublicCorpus(data_dir=str(tmp_path), file_format="array_record")
    builder.download_and_prepare()
    by_folder = read({"corpus": str(builder.data_path), "field": "content"})
    assert sorted(sum(by_folder.values(), [])) == sorted(DOCS)
    tfds.core.add_data_dir(str(tmp_path))
    assert read({"corpus": "little_public_corpus", "field": "content"}) == by_folder
    with pytest.raises(DataError, match="no feature 'text' .*content"):
        read({"corpus": "little_public_corpus"})


@pytest.mark.parametrize("features", [
    {"pythonClassName": "evil.Text", "text": {}},
    {"python_class_name": "evil.Text", "text": {}},
    {"type": "evil.Text", "content": {}},
    {"type": "tensorflow_datasets.core.features.features_dict.FeaturesDict", "content": {"content": {"type": "evil.Text", "content": {}}}},
    {"type": "tensorflow_datasets.core.features.features_dict.FeaturesDict", "proto_cls": "tensorflow_datasets.FeaturesDict",
     "content": json.dumps({"features": {"content": {"pythonClassName": "evil.Text", "text": {}}}})},
])  # fmt: skip
def test_a_prepared_folder_has_nothing_imported(tmp_path, monkeypatch, features):
    """TFDS imports the module of every class that features.json names: where one is not its own, it is not asked."""
    builder = LittlePublicCorpus(data_dir=str(tmp_path / "tfds"), file_format="array_record")
    builder.download_and_prepare()
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'owned')!r}, 'w')")
    monkeypatch.syspath_prepend(str(tmp_path))
    (Path(builder.data_path) / "features.json").write_text(json.dumps(features))
    with pytest.raises(DataError, match="'evil.Text', which would be imported"):
        read({"corpus": str(builder.data_path), "field": "content"})
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    "name", ["huggingface:squad", "community:x/y", "gs://bucket/x", "~nobody/x", "../x"]
)
def test_nothing_is_fetched_from_communities(name):
    with pytest.raises(DataError, match="the name of a TFDS dataset"):
        read({"corpus": name})


@pytest.mark.parametrize(
    "change, where",
    [
        ({"corpus": ""}, "data.corpus"),
        ({"corpus": "no_such_corpus"}, "no_such_corpus"),
        ({"coprus": "x"}, "data.coprus"),
        ({"files": ""}, "data.files"),
        ({"files": "/nowhere/at/all"}, "data.files"),
        ({"length": 1}, "data.length"),
        ({"length": "8"}, "data.length"),
        ({"packing": "loose"}, "data.packing"),
        ({"max_documents": -1}, "data.max_documents"),
        ({"validation_fraction": 0.6, "scorer_fraction": 0.4}, "data.validation_fraction"),
        ({"validation_fraction": 0.0}, "data.validation_fraction"),
        ({"corpus": "stories"}, "data.documents"),
    ],
)
def test_bad_settings_are_refused_in_one_line(folder, change, where):
    with pytest.raises(DataError) as error:
        read(text_files(folder) | change)
    assert where in str(error.value) and "\n" not in str(error.value)


def test_empty_splits_and_lone_surrogates_are_refused(folder):
    (folder / "bad").mkdir()
    (folder / "bad" / "a.jsonl").write_text('{"text": "a\\ud800"}\n')
    (folder / "blank").mkdir()
    (folder / "blank" / "a.txt").write_text("\n \n\n")
    for data, where in (
        (text_files(folder, max_documents=1), "got no document"),
        (text_files(folder, files=str(folder / "blank")), "blank' holds no text"),
        (text_files(folder, files=str(folder / "bad")), "lone surrogate"),
    ):
        with pytest.raises(DataError, match=where) as error:
            corpora.build(data, folder / "text")
        assert "\n" not in str(error.value) and not corpora.is_built(folder / "text")
