"""A few samples of every model, to show side by side and to step through their decoding."""

from __future__ import annotations

from typing import Any

import numpy as np

from diladiff_jax.data import stories
from diladiff_jax.data.tokenizers import Tokenizer
from diladiff_jax.evaluation.measures import text
from diladiff_jax.model import Model
from diladiff_jax.stages import MODELS

_CONTEXT = 16  # preceding tokens that may affect how a token is written


def sample_models(model: Model, num: int = 6, *, seed: int = 0) -> list[dict[str, Any]]:
    """Samples every model of a workdir from the same seed, at the config's settings.

    Args:
      model: the workdir's models.
      num: samples of each.
      seed: of the samples.

    Returns:
      For each model `{"model", "title", "latent_steps", "decode_steps", "temperature", "top_p",
      "samples": [sample]}` with `sample = {"index", "seed", "text", "entropy", "valid", "fault",
      "tokens", "unmasked_at"}`. `tokens` are the L tokens as written (None for end-of-text),
      `unmasked_at` the decoding step that unmasked each (-1 if it was given), `valid` the oracle's
      verdict (None if the corpus has no oracle) and `fault` the reason for it.
    """
    found = []
    for name in model.models:
        # A whole batch, although few are shown: it runs the program that the sweep has compiled.
        sampled = model.sample(seed, max(num, model.config.sampling.batch), model=name)
        controls = model.controls(name)
        rows = sampled.tokens[:num]
        has_oracle = model.config.data.corpus == "stories"
        verdicts = [
            _verdict(document) if has_oracle else (None, "")
            for document in text.first_documents(rows, model.tokenizer)
        ]
        found.append(
            {
                "model": name,
                "title": MODELS[name].title,
                "latent_steps": int(controls.latent_steps) if MODELS[name].latent_steps else None,
                "decode_steps": int(controls.decode_steps),
                "temperature": float(controls.temperature),
                "top_p": float(controls.top_p),
                "samples": [
                    {
                        "index": i,
                        "seed": seed,
                        "text": sampled.texts[i],
                        "entropy": text.unigram_entropy(row),
                        "valid": verdicts[i][0],
                        "fault": verdicts[i][1],
                        "tokens": written_tokens(model.tokenizer, row),
                        "unmasked_at": sampled.unmasked_at[i].tolist(),
                    }
                    for i, row in enumerate(rows)
                ],
            }
        )
    return found


def written_tokens(tokenizer: Tokenizer, row: np.ndarray) -> list[str | None]:
    """How each token of a row `[L]` is written in its text; None for end-of-text.

    A token's part is what it adds to the text decoded before it, spaces included, so this works
    for any tokenizer. If a character's bytes are several tokens, the last one writes the character
    and the others U+FFFD. A space that decoding drops is written as nothing.
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
        written.append(after[_common_prefix(before, after) :])
    return written


def _common_prefix(a: str, b: str) -> int:
    """The number of characters with which both texts begin."""
    differences = (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
    return next(differences, min(len(a), len(b)))


def _verdict(document: str) -> tuple[bool, str]:
    report = stories.check(document)
    if not report.parses:
        return False, "is no story"
    broken = [name for name, kept in report.agreements.items() if not kept]
    return report.valid, "breaks " + ", ".join(broken) if broken else ""
