"""A few samples of every model, with what a page needs to show them side by side and to step through their decoding."""

from __future__ import annotations

import os.path
from typing import Any

import numpy as np

from diladiff_jax.data import stories
from diladiff_jax.data.tokenizers import Tokenizer
from diladiff_jax.evaluation.analyses.generation import Analysed
from diladiff_jax.evaluation.figures import NAMES
from diladiff_jax.evaluation.measures import text

_CONTEXT = 16  # tokens before one that may change how it is written


def draw(model: Analysed, num: int = 6, *, seed: int = 0) -> list[dict[str, Any]]:
    """The first `num` samples of every model of a workdir, from the same seeds and at the config's settings.

    Returns:
      One object a model:
      `{"model", "title", "latent_steps", "decode_steps", "temperature", "top_p", "samples": [sample]}`, and
      `sample = {"index", "seed", "text", "entropy", "valid", "fault", "tokens", "unmasked_at"}`: `tokens` are the L tokens as
      written (None for end-of-text), `unmasked_at` the decoding step that unmasked each (-1: given), `valid` the
      oracle's verdict (None where the corpus has none), `fault` what it found.
    """
    drawn = []
    for name in model.models:
        # A whole batch, of which few are shown: it runs the program that the sweep has compiled.
        found = model.sample(seed, max(num, model.config.sampling.batch), model=name)
        controls = model.controls(name)
        rows = found.tokens[:num]
        verdicts = [
            _verdict(t) if model.config.data.corpus == "stories" else (None, "")
            for t in text.first_documents(rows, model.tokenizer)
        ]
        drawn.append(
            {
                "model": name,
                "title": NAMES[name],
                "latent_steps": int(controls.latent_steps) if found.latents is not None else None,
                "decode_steps": int(controls.decode_steps),
                "temperature": float(controls.temperature),
                "top_p": float(controls.top_p),
                "samples": [
                    {
                        "index": i,
                        "seed": seed,
                        "text": found.texts[i],
                        "entropy": text.unigram_entropy(row),
                        "valid": verdicts[i][0],
                        "fault": verdicts[i][1],
                        "tokens": surfaces(model.tokenizer, row),
                        "unmasked_at": found.unmasked_at[i].tolist(),
                    }
                    for i, row in enumerate(rows)
                ],
            }
        )
    return drawn


def surfaces(tokenizer: Tokenizer, row: np.ndarray) -> list[str | None]:
    """How each token of a row `[L]` is written where it stands: with the space before it, if any; None for end-of-text.

    What a token adds to the text decoded before it, so that it holds for any tokenizer. Of a character whose bytes are
    several tokens, the last one writes it and the others U+FFFD; a space that decoding drops is written as nothing.
    """
    written: list[str | None] = []
    run: list[int] = []
    for token in row.tolist():
        if token == tokenizer.eot_id:
            written.append(None)
            run = []
            continue
        run = [*run[-_CONTEXT:], token]
        before, after = tokenizer.decode(run[:-1]), tokenizer.decode(run)
        written.append(after[len(os.path.commonprefix([before, after])) :])
    return written


def _verdict(document: str) -> tuple[bool, str]:
    report = stories.check(document)
    if not report.parses:
        return False, "is no story"
    broken = [name for name, kept in report.agreements.items() if not kept]
    return report.valid, "breaks " + ", ".join(broken) if broken else ""
