"""Prepared data: rows, reuse, settings that differ, and files that change or break."""

import dataclasses
import json
import os
import subprocess
import sys
import time

import numpy as np
import pytest

from diladiff_jax.data import (
    Batches,
    DataError,
    DataOptions,
    TokenizerOptions,
    corpora,
    file_selection,
    load_prepared,
    packing,
    pipeline,
    prepare,
)

TOKENIZER = TokenizerOptions(kind="bpe", vocab_size=320)


@pytest.fixture
def data(tmp_path):
    (tmp_path / "in").mkdir()
    lines = [
        json.dumps({"text": f"The {a} fox met the {b} dog.\nThen {i} cats ran"})
        for i, (a, b) in enumerate(
            (a, b)
            for a in ("red", "shy", "old", "odd", "big")
            for b in ("wet", "sly", "kind", "new", "é") * 8
        )
    ]
    (tmp_path / "in" / "a.jsonl").write_text("\n".join(lines))
    return DataOptions(
        corpus="text_files",
        files=str(tmp_path / "in"),
        validation_fraction=0.2,
        scorer_fraction=0.1,
        length=16,
    )


def everything_under(folder):
    return {p: (p.stat().st_mtime_ns, p.stat().st_ino) for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("mode", packing.MODES)
def test_rows_are_the_packed_documents(data, tmp_path, mode):
    prepared = prepare(dataclasses.replace(data, packing=mode), TOKENIZER, tmp_path / "w")
    t = prepared.tokenizer
    assert prepared.splits == corpora.SPLITS and prepared.length == 16
    for split in prepared.splits:
        documents, rows = prepared.documents(split), prepared.rows(split)
        expected = list(packing.pack(map(t.encode, documents), 16, t.eot_id, mode))
        assert len(rows) == len(expected) == prepared.counts[split]["rows"]
        np.testing.assert_array_equal(np.stack(rows.__getitems__(range(len(rows)))), expected)
        assert rows[0].dtype == np.int32 and (rows[-1] == expected[-1]).all()
        assert t.sampleable[np.stack(expected)].all(), "a row holds an id that is never sampled"
        assert prepared.counts[split]["bytes"] == sum(len(d.encode()) for d in documents)
        assert prepared.counts[split]["tokens"] == sum(len(t.encode(d)) + 1 for d in documents)
    if mode == "packed":
        text = t.documents(np.concatenate(rows.__getitems__(range(len(rows)))))
        assert text[:-1] == list(documents)[: len(text) - 1]
    with Batches(prepared.rows("train"), 4, 0) as batches:
        assert next(batches).shape == (4, 16)


@pytest.mark.parametrize("how", ["touched", "changed", "stale", "moved"])
def test_prepared_text_is_used_whatever_happens_to_its_source(
    data, tmp_path, caplog, monkeypatch, how
):
    """The workdir keeps its text and logs that the files changed; a new workdir reads the files."""
    first = prepare(data, TOKENIZER, tmp_path / "w")
    path = tmp_path / "in" / "a.jsonl"
    if how == "touched":
        os.utime(path, (1, 1))
    elif how == "changed":
        path.write_text(path.read_text() + '\n{"text": "more"}')
    elif how == "stale":  # as of a network mount whose server is gone
        monkeypatch.setattr(file_selection, "matching", lambda files: os.stat("/nowhere/at/all"))
    else:
        path.rename(tmp_path / "b.jsonl")
    before = everything_under(tmp_path / "w" / "data")
    with caplog.at_level("INFO", logger="diladiff_jax"):
        second = prepare(data, TOKENIZER, tmp_path / "w")
    assert second.counts == first.counts and everything_under(tmp_path / "w" / "data") == before
    assert sum("have changed since" in record.message for record in caplog.records) == 1
    with pytest.raises(DataError, match="tokenizer.vocab_size: got 400"):
        prepare(data, dataclasses.replace(TOKENIZER, vocab_size=400), tmp_path / "w")
    if how == "stale":
        return
    if how == "moved":
        with pytest.raises(DataError, match="matches no file"):
            prepare(data, TOKENIZER, tmp_path / "v")
    else:
        third = prepare(data, TOKENIZER, tmp_path / "v")
        counts = [sum(c["documents"] for c in p.counts.values()) for p in (first, third)]
        assert counts[1] - counts[0] == (how == "changed")


def temporaries(folder):
    return [p for p in folder.rglob("*") if "incomplete" in p.name or ".tmp" in p.name]


def test_what_killed_processes_left_is_removed_from_a_locked_workdir(data, tmp_path):
    """But not from a folder that other workdirs share: their processes may be writing there."""
    for folder in ("w/data", "shared"):
        for left in ("text-0/text_corpus/incomplete.A_1.0.0", ".rows-0.tmp-1"):
            (tmp_path / folder / left).mkdir(parents=True)
            (tmp_path / folder / left / "part").write_text("x")
    (tmp_path / "w" / ".tokenizer.tmp-1").mkdir()
    (tmp_path / "w" / ".prepared.json.tmp-1").write_text("{")
    prepare(data, TOKENIZER, tmp_path / "w")
    assert len(temporaries(tmp_path / "w")) == 4
    prepare(data, TOKENIZER, tmp_path / "w", locked=True)
    assert not temporaries(tmp_path / "w")
    elsewhere = dataclasses.replace(data, directory=str(tmp_path / "shared"))
    prepare(elsewhere, TOKENIZER, tmp_path / "v", locked=True)
    assert len(temporaries(tmp_path / "shared")) == 2


@pytest.mark.parametrize("where", ["dangling", "dangling/x", "file/x"])
def test_a_data_directory_that_cannot_be_made_is_named(data, tmp_path, where):
    (tmp_path / "dangling").symlink_to(tmp_path / "absent" / "disk")
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="data.directory=.* cannot be made") as error:
        prepare(
            dataclasses.replace(data, directory=str(tmp_path / where)), TOKENIZER, tmp_path / "w"
        )
    assert "\n" not in str(error.value)


def test_a_second_call_changes_nothing_and_is_fast(data, tmp_path):
    first = prepare(data, TOKENIZER, tmp_path / "w")
    before = everything_under(tmp_path / "w")
    started = time.monotonic()
    second = prepare(data, TOKENIZER, tmp_path / "w")
    assert time.monotonic() - started < 1
    after = everything_under(tmp_path / "w")
    changed = {p.name for p in before.keys() | after.keys() if before.get(p) != after.get(p)}
    assert changed <= {"prepared.json"} and second.counts == first.counts
    assert not temporaries(tmp_path / "w")


def test_two_workdirs_share_a_directory(data, tmp_path):
    shared = dataclasses.replace(data, directory=str(tmp_path / "shared"))
    prepare(shared, TOKENIZER, tmp_path / "a")
    before = everything_under(tmp_path / "shared")
    prepare(shared, TOKENIZER, tmp_path / "b")
    assert everything_under(tmp_path / "shared") == before, "the same rows were written twice"
    other = prepare(dataclasses.replace(shared, length=8), TOKENIZER, tmp_path / "b")
    assert len(other.rows("train")[0]) == 8
    assert len(load_prepared(shared, tmp_path / "a").rows("train")[0]) == 16


def test_prepared_data_outlives_its_source(data, tmp_path):
    prepare(data, TOKENIZER, tmp_path / "w")
    (tmp_path / "in" / "a.jsonl").unlink()
    assert len(load_prepared(data, tmp_path / "w").rows("validation")) > 0


def test_data_prepared_before_a_setting_existed_has_its_default(data, tmp_path):
    prepare(data, TOKENIZER, tmp_path / "w")
    path = tmp_path / "w" / "prepared.json"
    record = json.loads(path.read_text())
    del record["data"]["validation_last"]
    path.write_text(json.dumps(record))
    assert len(load_prepared(data, tmp_path / "w").rows("train")) > 0
    with pytest.raises(DataError, match="data.validation_last: got 3, but .* was prepared with 0"):
        load_prepared(dataclasses.replace(data, validation_last=3), tmp_path / "w")


def test_interrupted_preparation_is_not_mistaken_for_finished(data, tmp_path, monkeypatch):
    def interrupted(*args):
        yield np.zeros(16, np.int32)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(packing, "pack", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prepare(data, TOKENIZER, tmp_path / "w")
    with pytest.raises(DataError, match="launch/prepare.py"):
        load_prepared(data, tmp_path / "w")
    assert len(prepare(data, TOKENIZER, tmp_path / "w").rows("train")) > 1


def test_a_vocabulary_file_may_replace_training(data, tmp_path):
    (tmp_path / "vocab.txt").write_text(
        "\n".join(["[PAD]", "[UNK]", "[SEP]", "[MASK]", "the", "fox", "dog", "ran"])
    )
    options = TokenizerOptions(kind="wordpiece", file=str(tmp_path / "vocab.txt"), lowercase=True)
    prepared = prepare(data, options, tmp_path / "w")
    assert "the" in prepared.tokenizer.decode(prepared.rows("train")[0])


def test_other_settings_are_rejected_in_one_line(data, tmp_path):
    workdir = tmp_path / "w"
    prepare(data, TOKENIZER, workdir)
    attempts = [
        lambda: load_prepared(data, tmp_path / "elsewhere"),
        lambda: load_prepared(dataclasses.replace(data, length=32), workdir),
        lambda: load_prepared(
            dataclasses.replace(data, directory=str(tmp_path / "elsewhere")), workdir
        ),
        lambda: prepare(data, dataclasses.replace(TOKENIZER, vocab_size=330), workdir),
        lambda: prepare(data, dataclasses.replace(TOKENIZER, kind="unigram"), workdir),
        lambda: prepare(dataclasses.replace(data, max_documents=150), TOKENIZER, workdir),
        lambda: prepare(data, dataclasses.replace(TOKENIZER, lowercase=True), workdir),
        lambda: prepare(dataclasses.replace(data, length=100_000), TOKENIZER, workdir),
        lambda: load_prepared(data, workdir).rows("test"),
        lambda: load_prepared(data, workdir).documents("test"),
    ]
    for number, attempt in enumerate(attempts):
        with pytest.raises(DataError) as error:
            attempt()
            pytest.fail(f"attempt {number} was accepted")
        assert "\n" not in str(error.value)
    assert len(load_prepared(data, workdir).rows("train")) > 1, (
        "a rejected attempt damaged the workdir"
    )


def test_preparing_imports_no_tensorflow_and_starts_no_device(data, tmp_path):
    program = f"""
import sys
from diladiff_jax import data
lazy = ['tensorflow', 'grain', 'tensorflow_datasets', 'sentencepiece', 'tokenizers', 'pyarrow']
assert not set(lazy) & set(sys.modules)
options = data.DataOptions(**{dataclasses.asdict(data)!r})
tokenizer = data.TokenizerOptions(**{dataclasses.asdict(TOKENIZER)!r})
made = data.prepare(options, tokenizer, {str(tmp_path / "w")!r})
with data.Batches(made.rows('train'), 4, 0) as batches:
    next(batches)
assert 'tensorflow' not in sys.modules
if 'jax' in sys.modules:  # the package and Grain import it
    from jax._src import xla_bridge
    assert not xla_bridge.backends_are_initialized()
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout == ""


@pytest.fixture
def shards(data, tmp_path):
    """Prepared data, and the files of its training and validation rows."""
    prepared = prepare(data, TOKENIZER, tmp_path / "w")
    (path,), (other,) = (
        prepared.rows_folder.glob(f"{split}-*.array_record") for split in ("train", "validation")
    )
    return prepared, path, other


@pytest.mark.parametrize("threads", [0, 2])
def test_a_file_that_is_truncated_for_a_moment_changes_no_batch(shards, threads, monkeypatch):
    prepared, path, _ = shards
    complete = path.read_bytes()

    def write_new_file():
        path.unlink()
        path.write_bytes(complete)

    with Batches(prepared.rows("train"), 4, seed=0) as batches:
        expected = [next(batches) for _ in range(30)]
    with Batches(prepared.rows("train"), 4, seed=0, threads=threads) as batches:
        found = [next(batches) for _ in range(3)]
        for repair in (lambda: path.write_bytes(complete), write_new_file) * 2:
            monkeypatch.setattr(pipeline.time, "sleep", lambda seconds, repair=repair: repair())
            os.truncate(path, 1000)
            found += [next(batches) for _ in range(9)]
        np.testing.assert_array_equal(found[:30], expected)
        assert path.read_bytes() == complete and batches.get_state()["position"] == len(found)


@pytest.mark.parametrize("threads", [0, 2])
@pytest.mark.parametrize(
    "replaced, reason", [(True, r"got \d+ rows, expected \d+"), (False, "")], ids=str
)
def test_a_file_that_stays_truncated_or_is_replaced_is_named_in_one_line(
    shards, threads, replaced, reason, monkeypatch
):
    prepared, path, other = shards
    repair = lambda seconds: path.write_bytes(other.read_bytes()) if replaced else None
    monkeypatch.setattr(pipeline.time, "sleep", repair)
    expected = rf"rows \d+, .*train-00000.array_record cannot be read \({reason}"
    with Batches(prepared.rows("train"), 4, seed=0, threads=threads) as batches:
        next(batches)
        os.truncate(path, 1000)
        with pytest.raises(DataError, match=expected) as error:
            for _ in range(20):  # some batches have been read ahead
                next(batches)
    assert "\n" not in str(error.value) and str(path.parent) in str(error.value)


def test_rows_that_are_damaged_or_missing_cannot_be_opened(shards):
    prepared, path, _ = shards
    os.truncate(path, 1000)
    with pytest.raises(DataError, match="rows cannot be opened"):
        prepared.rows("train")
    path.unlink()
    count = prepared.counts["train"]["rows"]
    with pytest.raises(DataError, match=f"got 0 rows of split 'train', expected {count}"):
        prepared.rows("train")
