import json
import os
import subprocess
import sys
import time

import ml_collections
import numpy as np
import pytest

from diladiff_jax.data import corpora, packing, pipeline
from diladiff_jax.data.errors import DataError
from diladiff_jax.data.pipeline import Batches
from diladiff_jax.data.prepare import load_prepared, prepare

TOKENIZER = {"kind": "bpe", "vocab_size": 320, "file": "", "lowercase": False}


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
    return {
        "corpus": "text_files",
        "files": str(tmp_path / "in"),
        "validation_fraction": 0.2,
        "scorer_fraction": 0.1,
        "length": 16,
        "packing": "packed",
    }


def everything_under(folder):
    return {p: (p.stat().st_mtime_ns, p.stat().st_ino) for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("mode", packing.MODES)
def test_rows_are_the_packed_documents(data, tmp_path, mode):
    prepared = prepare(data | {"packing": mode}, TOKENIZER, tmp_path / "w")
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
def test_text_that_is_prepared_is_needed_no_more(data, tmp_path, caplog, monkeypatch, how):
    """Files of another date, with more in them, or gone: the workdir goes on with what it has, and says so; a fresh one sees them as they are."""
    first = prepare(data, TOKENIZER, tmp_path / "w")
    path = tmp_path / "in" / "a.jsonl"
    if how == "touched":
        os.utime(path, (1, 1))
    elif how == "changed":
        path.write_text(path.read_text() + '\n{"text": "more"}')
    elif how == "stale":  # a mount that has died
        monkeypatch.setattr(
            corpora.text_files, "matching", lambda files: os.stat("/nowhere/at/all")
        )
    else:
        path.rename(tmp_path / "b.jsonl")
    before = everything_under(tmp_path / "w" / "data")
    with caplog.at_level("INFO", logger="diladiff_jax"):
        second = prepare(data, TOKENIZER, tmp_path / "w")
    assert second.counts == first.counts and everything_under(tmp_path / "w" / "data") == before
    assert sum("are not as they were when" in record.message for record in caplog.records) == 1
    with pytest.raises(
        DataError, match="tokenizer"
    ):  # what the tokenizer was made with is held to as ever
        prepare(data, TOKENIZER | {"vocab_size": 400}, tmp_path / "w")
    if how == "stale":
        return
    if how == "moved":
        with pytest.raises(DataError, match="matches no file"):
            prepare(data, TOKENIZER, tmp_path / "v")
    else:
        assert sum(
            c["documents"] for c in prepare(data, TOKENIZER, tmp_path / "v").counts.values()
        ) == sum(c["documents"] for c in first.counts.values()) + (how == "changed")


def test_what_killed_calls_left_is_removed(data, tmp_path):
    """From the workdir alone: a folder that other workdirs share may have another call at work in it."""
    for folder in ("w/data", "shared"):
        for left in ("text-0/text_corpus/incomplete.A_1.0.0", "rows-0.tmp-1"):
            (tmp_path / folder / left).mkdir(parents=True)
            (tmp_path / folder / left / "part").write_text("x")
    (tmp_path / "w" / "tokenizer.tmp-1").mkdir()
    prepare(data, TOKENIZER, tmp_path / "w")
    assert (tmp_path / "w" / "data" / "rows-0.tmp-1").exists()
    prepare(data, TOKENIZER, tmp_path / "w", alone=True)
    prepare(data | {"directory": str(tmp_path / "shared")}, TOKENIZER, tmp_path / "v", alone=True)
    assert not [
        p for p in (tmp_path / "w").rglob("*") if "incomplete" in p.name or ".tmp" in p.name
    ]
    assert (
        len(
            [
                p
                for p in (tmp_path / "shared").rglob("*")
                if "incomplete" in p.name or ".tmp" in p.name
            ]
        )
        == 2
    )


@pytest.mark.parametrize("where", ["dangling", "dangling/x", "file/x"])
def test_a_folder_for_data_that_cannot_be_is_named(data, tmp_path, where):
    (tmp_path / "dangling").symlink_to(tmp_path / "absent" / "disk")
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="data.directory=.* cannot be made") as refused:
        prepare(data | {"directory": str(tmp_path / where)}, TOKENIZER, tmp_path / "w")
    assert "\n" not in str(refused.value)


def test_a_second_call_does_nothing_and_does_it_fast(data, tmp_path):
    first = prepare(data, TOKENIZER, tmp_path / "w")
    (tmp_path / "w" / "prepared.json").stat()
    before = everything_under(tmp_path / "w")
    started = time.monotonic()
    second = prepare(
        ml_collections.ConfigDict(data), ml_collections.ConfigDict(TOKENIZER), tmp_path / "w"
    )
    assert time.monotonic() - started < 1
    after = everything_under(tmp_path / "w")
    changed = {p.name for p in before.keys() | after.keys() if before.get(p) != after.get(p)}
    assert changed <= {"prepared.json"} and second.counts == first.counts
    assert not [p for p in after if "tmp-" in str(p)]


def test_two_workdirs_share_a_directory(data, tmp_path):
    shared = data | {"directory": str(tmp_path / "shared")}
    prepare(shared, TOKENIZER, tmp_path / "a")
    before = everything_under(tmp_path / "shared")
    prepare(shared, TOKENIZER, tmp_path / "b")
    assert everything_under(tmp_path / "shared") == before, "the same rows were written twice"
    other = prepare(shared | {"length": 8}, TOKENIZER, tmp_path / "b")
    assert len(other.rows("train")[0]) == 8
    assert len(load_prepared(shared, tmp_path / "a").rows("train")[0]) == 16


def test_prepared_data_outlives_its_source(data, tmp_path):
    prepare(data, TOKENIZER, tmp_path / "w")
    (tmp_path / "in" / "a.jsonl").unlink()
    assert len(load_prepared(data, tmp_path / "w").rows("validation")) > 0


def test_data_prepared_before_a_setting_existed_is_data_at_its_default(data, tmp_path):
    prepare(data, TOKENIZER, tmp_path / "w")
    path = tmp_path / "w" / "prepared.json"
    record = json.loads(path.read_text())
    del record["data"]["validation_last"]
    path.write_text(json.dumps(record))
    assert len(load_prepared(data, tmp_path / "w").rows("train")) > 0
    with pytest.raises(DataError, match="data.validation_last=3, but .* was prepared with 0"):
        load_prepared(data | {"validation_last": 3}, tmp_path / "w")


def test_interrupted_work_is_not_taken_for_finished(data, tmp_path, monkeypatch):
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


def test_a_vocabulary_file_serves_too(data, tmp_path):
    (tmp_path / "vocab.txt").write_text(
        "\n".join(["[PAD]", "[UNK]", "[SEP]", "[MASK]", "the", "fox", "dog", "ran"])
    )
    config = {"kind": "wordpiece", "file": str(tmp_path / "vocab.txt"), "lowercase": True}
    prepared = prepare(data, config, tmp_path / "w")
    assert "the" in prepared.tokenizer.decode(prepared.rows("train")[0])


def test_other_settings_are_refused_in_one_line(data, tmp_path):
    workdir = tmp_path / "w"
    attempts = [lambda: load_prepared(data, workdir)]
    prepare(data, TOKENIZER, workdir)
    attempts = [
        lambda: load_prepared(data, tmp_path / "elsewhere"),
        lambda: load_prepared(data | {"length": 32}, workdir),
        lambda: load_prepared(data | {"directory": str(tmp_path / "elsewhere")}, workdir),
        lambda: prepare(data, TOKENIZER | {"vocab_size": 330}, workdir),
        lambda: prepare(data, TOKENIZER | {"kind": "unigram"}, workdir),
        lambda: prepare(data | {"max_documents": 150}, TOKENIZER, workdir),
        lambda: prepare(data, TOKENIZER | {"kind": "words"}, workdir),
        lambda: prepare(data | {"length": 100_000}, TOKENIZER, workdir),
        lambda: load_prepared(data, workdir).rows("test"),
        lambda: load_prepared(data, workdir).documents("test"),
    ]
    for number, attempt in enumerate(attempts):
        with pytest.raises(DataError) as error:
            attempt()
            pytest.fail(f"attempt {number} was accepted")
        assert "\n" not in str(error.value)
    assert len(load_prepared(data, workdir).rows("train")) > 1, (
        "a refused attempt damaged the workdir"
    )


def test_no_tensorflow_and_no_device(data, tmp_path):
    program = f"""
import sys
from diladiff_jax.data import corpora, packing, pipeline, prepare, text_files, tokenizers
heavy = {{'tensorflow', 'grain', 'tensorflow_datasets', 'sentencepiece', 'tokenizers', 'pyarrow'}} & set(sys.modules)
assert not heavy, heavy
made = prepare.prepare({data!r}, {TOKENIZER!r}, {str(tmp_path / "w")!r})
with pipeline.Batches(made.rows('train'), 4, 0) as batches:
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


@pytest.mark.parametrize("threads", [0, 2])
def test_a_file_cut_short_under_a_running_reader(data, tmp_path, threads, monkeypatch):
    """For a moment, and put back in place or as a new file: the batches are the same. For good, or with another file in its place: one line with
    the file and rows. Gone before it is opened: one line."""
    prepared = prepare(data, TOKENIZER, tmp_path / "w")
    with Batches(prepared.rows("train"), 4, seed=0) as batches:
        expected = [next(batches) for _ in range(30)]
    (path,), (other,) = (
        prepared._rows.glob(f"{split}-*.array_record") for split in ("train", "validation")
    )
    whole = path.read_bytes()

    def put_back_anew():
        path.unlink()
        path.write_bytes(whole)

    mends = {
        "in place": lambda: path.write_bytes(whole),
        "anew": put_back_anew,
        "another": lambda: path.write_bytes(other.read_bytes()),
        "not": lambda: None,
    }
    how = None
    monkeypatch.setattr(pipeline.time, "sleep", lambda seconds: mends[how]())
    with Batches(prepared.rows("train"), 4, seed=0, threads=threads) as batches:
        found = [next(batches) for _ in range(3)]
        for how in ("in place", "anew", "in place"):
            os.truncate(path, 1000)
            found += [next(batches) for _ in range(9)]
        np.testing.assert_array_equal(found, expected)
        assert path.read_bytes() == whole and batches.get_state()["position"] == 30
        for how, words in (("another", r"\d+ rows where \d+ were"), ("not", "")):
            path.write_bytes(whole)
            os.truncate(path, 1000)
            with pytest.raises(
                DataError, match=rf"rows \d+, .*train-00000.array_record cannot be read \({words}"
            ) as error:
                for _ in range(9):
                    next(batches)
            assert "\n" not in str(error.value) and str(path.parent) in str(error.value)
    with pytest.raises(DataError, match="rows cannot be opened"):
        prepared.rows("train")
    path.unlink()
    with pytest.raises(
        DataError,
        match=f"0 rows of split 'train' are there, {prepared.counts['train']['rows']} were written",
    ):
        prepared.rows("train")
