"""The command `score.py`: its table and its file, and one line of error for bad input."""

import json

import pytest
from tiny_llama import write_gguf

from diladiff_jax.evaluation import judging


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


def test_it_prints_a_table_and_writes_the_documented_file(files, run_command):
    """`raw_text` is read where a file has it, and blank texts count."""
    out = files / "scores.json"
    flags = [f"--scorer={files / 'tiny.gguf'}", f"--out={out}", f"--texts={files / 'raw.jsonl'}"]
    flags += [f"--reference={files / 'plain.jsonl'}", f"--training_text={files / 'train.txt'}"]
    done = run_command("score.py", *flags)
    assert done.code == 0, done.err
    scores = json.loads(out.read_text())
    judging.check_scores(scores)
    texts, reference = scores["rows"]
    ids = len("the cat") - 1 + len("a hat") + 1  # bytes, the merge "he", and end-of-text
    assert (texts["texts"], texts["counted"]) == (2, 2 * ids)
    assert reference["texts"] == 3 and reference["metrics"]["empty"]["value"] == 1 / 3
    assert "gen_ppl" in done.out and "note: no MAUVE" in done.out
    assert str(out) in done.out and "sha256" in done.out


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
def test_bad_input_is_one_line_of_error(run_command, tmp_path, content, flags, words):
    texts = tmp_path / "texts.jsonl"
    if content is not None:
        texts.write_text(content)
    done = run_command(
        "score.py", f"--texts={texts}", *(flag.format(texts=texts) for flag in flags)
    )
    assert done.code == 1 and words.format(texts=texts) in done.err, done.err
    assert len(done.err.strip().splitlines()) == 1
