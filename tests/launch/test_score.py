"""The command `score.py`: its table and its file, and one line of error for bad input."""

import json
import os
import pathlib
import subprocess
import sys

import pytest
from tiny_llama import write_gguf

from diladiff_jax.evaluation import judging

ROOT = pathlib.Path(__file__).parents[2]


def run(*flags):
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    return subprocess.run(
        [sys.executable, str(ROOT / "launch" / "score.py"), *flags],
        env=environment | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.fixture
def files(tmp_path):
    """A scorer, texts with and without `raw_text`, and a training text."""
    write_gguf(tmp_path / "tiny.gguf")
    lines = [{"text": "the cat\na hat", "raw_text": "the cat<|endoftext|>a hat"}] * 2
    (tmp_path / "raw.jsonl").write_text("\n".join(map(json.dumps, lines)))
    lines = [{"text": "the cat"}, {"text": ""}, {"text": "a hat"}]
    (tmp_path / "plain.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "train.txt").write_text("the cat sat on a hat\n")
    return tmp_path


def test_it_prints_a_table_and_writes_the_documented_file(files):
    """`raw_text` is read where a file has it, and blank texts count."""
    out = files / "scores.json"
    flags = [f"--scorer={files / 'tiny.gguf'}", f"--out={out}", f"--texts={files / 'raw.jsonl'}"]
    flags += [f"--reference={files / 'plain.jsonl'}", f"--training_text={files / 'train.txt'}"]
    done = run(*flags)
    assert done.returncode == 0, done.stderr
    scores = json.loads(out.read_text())
    judging.check_scores(scores)
    texts, reference = scores["rows"]
    ids = len("the cat") - 1 + len("a hat") + 1  # bytes, the merge "he", and end-of-text
    assert (texts["texts"], texts["counted"]) == (2, 2 * ids)
    assert reference["texts"] == 3 and reference["metrics"]["empty"]["value"] == 1 / 3
    assert "gen_ppl" in done.stdout and "note: no MAUVE" in done.stdout
    assert str(out) in done.stdout and "sha256" in done.stdout


@pytest.mark.parametrize(
    ("content", "flags", "words"),
    [
        (None, [], "--texts='{texts}' matches no file"),
        ('{"tokens": [1]}\n', [], "line 1: no field 'text' (found tokens). Set --field"),
        ("", [], "--texts={texts}: got no texts, expected at least one"),
        ("{nonsense\n", [], "{texts}, line 1: not JSON"),
        ('{"text": "a"}\n', ["--scorer=tiny.gguf"], "tiny.gguf cannot be read"),
        ('{"text": "a"}\n', ["--reference=none.jsonl"], "--reference='none.jsonl' matches no file"),
        ('{"text": "a"}\n', ["--training_text=none.txt"], "--training_text='none.txt' matches"),
        ('{"text": "a"}\n', ["--out={texts}"], "exists and is not a result of score.py"),
    ],
)
def test_bad_input_is_one_line_of_error(tmp_path, content, flags, words):
    texts = tmp_path / "texts.jsonl"
    if content is not None:
        texts.write_text(content)
    done = run(f"--texts={texts}", *(flag.format(texts=texts) for flag in flags))
    assert done.returncode == 1 and words.format(texts=texts) in done.stderr, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
