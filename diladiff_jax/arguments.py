"""Checks of what callers pass to a `Model`: an invalid argument raises a one-line `ValueError`."""

from __future__ import annotations

import dataclasses
import math
import numbers
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diladiff_jax.data import tokenizers
from diladiff_jax.data.tokenizers import Tokenizer
from diladiff_jax.diffusion.masking import DiscreteProcess
from diladiff_jax.jax_settings import as_random_key, random_key
from diladiff_jax.sampling.controls import Controls
from diladiff_jax.sampling.options import SamplingOptions
from diladiff_jax.stages import SampledModel

MAX_INDEX = 2**31
"""Samples are numbered in 32 bits."""


def whole_number(name: str, value: Any, least: int = 1, most: int | None = None) -> int:
    """`value` as an int from `least` to `most`.

    Raises:
      ValueError: it is something else.
    """
    number = int(value) if isinstance(value, numbers.Integral) else None
    if number is None or number < least or (most is not None and number > most):
        limit = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise ValueError(f"{name}: got {_in_one_line(value)}, expected a whole number {limit}")
    return number


def first_index(start: Any, num: int) -> int:
    """`start` as the index of the first of `num` samples.

    Raises:
      ValueError: an index would be negative or exceed 31 bits.
    """
    return whole_number("start", start, 0, MAX_INDEX - num)


def sampling_key(key: Any) -> jax.Array:
    """One key of `jax_settings.PRNG` from a seed or a key, new-style or old-style.

    Raises:
      ValueError: it is neither.
    """
    if isinstance(key, numbers.Integral):
        seed = int(key)
        if not -(2**63) <= seed < 2**63:
            raise ValueError(f"key: got seed {seed}, expected a whole number of 64 bits")
        return random_key(seed)
    if isinstance(key, jax.Array):
        is_typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
        if key.shape == () if is_typed else _is_old_style(key):
            return as_random_key(key)
    raise ValueError(
        f"key: got {_in_one_line(key)}, expected a whole number or one key of jax.random.key"
    )


def _is_old_style(key: jax.Array) -> bool:
    """Whether an array is what `jax.random.PRNGKey` returns, for any of JAX's generators."""
    return key.dtype == jnp.uint32 and key.shape in ((2,), (4,))


def _in_one_line(value: Any) -> str:
    """`repr` in one line: an array is described by its type and shape."""
    if isinstance(value, jax.Array | np.ndarray) and value.ndim:
        return f"array of shape {value.shape} and type {value.dtype}"
    return " ".join(repr(value).split())[:80]


def controls(
    options: SamplingOptions, model: SampledModel, length: int, given: dict[str, Any]
) -> Controls:
    """The settings of a sampling call: those given, and the config's for the rest.

    Args:
      options: the config's.
      model: what is sampled; it decides the default of `latent_steps`.
      length: tokens per text, which limits the number of steps.
      given: by the caller; None counts as not given.

    Raises:
      ValueError: a number out of range, or a name that is not a setting of a call.
    """
    defaults = Controls.of(options, model.latent_steps)._asdict()
    for name in given:
        if name not in defaults:
            known = hasattr(options, name)
            hint = (
                f"sampling.{name} is a setting of the config (dl.load(workdir, config=...))"
                if known
                else f"expected one of {', '.join(Controls._fields)}"
            )
            raise ValueError(f"{name}: not an argument of a sampling call; {hint}")
    if model.decode is not None:
        defaults["decode_steps"] = length
    values = defaults | {name: value for name, value in given.items() if value is not None}
    most = MAX_INDEX // length - 1  # positions times steps are counted in 32 bits
    steps = [whole_number(name, values[name], 1, most) for name in ("decode_steps", "latent_steps")]
    if model.decode is not None and steps[0] != length:
        raise ValueError(
            f"decode_steps: got {steps[0]}, expected {length}: {model.name} takes a step per token"
        )
    others = {name: values[name] for name in Controls._fields if not name.endswith("_steps")}
    for name, value in others.items():
        if not isinstance(value, numbers.Real):
            raise ValueError(f"{name}: got {_in_one_line(value)}, expected a number")
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        dataclasses.replace(options, **{name: number})  # raises if its rule excludes it
    return Controls(*map(jnp.int32, steps), *map(jnp.float32, others.values()))


def prompt_tokens(
    prompt: str | Sequence[str] | np.ndarray | jax.Array,
    tokenizer: Tokenizer,
    process: DiscreteProcess,
    length: int,
) -> np.ndarray:
    """Prompts as int32 `[B, L]`, open wherever the model is free.

    Args:
      prompt: text or texts, in which `[MASK]` is one token to fill in and everything after the
        text is free; or tokens `[B, L]`.

    Raises:
      ValueError: a prompt is empty, too long, leaves nothing to fill in, or misspells the mask; or
        tokens of another shape or vocabulary.
    """
    if isinstance(prompt, np.ndarray | jax.Array):
        return token_rows(prompt, tokenizer, length)
    texts = [prompt] if isinstance(prompt, str) else list(prompt)
    rows = np.array(process.initial((len(texts), length)))
    for row, text in zip(rows, texts, strict=True):
        ids = tokenizer.encode_masked(text)
        rest = text.replace(tokenizers.MASK_TEXT, " ")
        if near := re.search(r"[\[<]\s*mask\s*[\]>]", rest, re.IGNORECASE):
            raise ValueError(
                f"prompt {text[:40]!r}: got {near[0]!r}, expected {tokenizers.MASK_TEXT} for a "
                "token to fill in"
            )
        if not len(ids):
            raise ValueError("prompt: got no text. Omit the prompt to sample freely.")
        if len(ids) > length:
            raise ValueError(
                f"prompt {text[:40]!r}: got {len(ids)} tokens, expected at most {length}"
            )
        if len(ids) == length and tokenizer.mask_id not in ids:
            raise ValueError(
                f"prompt {text[:40]!r}: fills all {length} tokens of the model. Shorten it, or put "
                f"{tokenizers.MASK_TEXT} where the model should write."
            )
        row[: len(ids)] = ids
    return rows


def text_tokens(texts: Sequence[str], tokenizer: Tokenizer, length: int) -> np.ndarray:
    """Texts as int32 `[B, L]`, padded with end-of-text.

    Raises:
      ValueError: a text is too long.
    """
    rows = np.full((len(texts), length), tokenizer.eot_id, np.int32)
    for row, text in zip(rows, texts, strict=True):
        ids = tokenizer.encode(text)
        if len(ids) > length:
            raise ValueError(
                f"text {text[:40]!r}: got {len(ids)} tokens, expected at most {length}"
            )
        row[: len(ids)] = ids
    return rows


def token_rows(tokens: np.ndarray | jax.Array, tokenizer: Tokenizer, length: int) -> np.ndarray:
    """Tokens as int32 `[B, L]`.

    Raises:
      ValueError: another shape or type, or ids that are not the tokenizer's.
    """
    rows = np.asarray(tokens)
    if rows.ndim != 2 or rows.shape[1] != length or not np.issubdtype(rows.dtype, np.integer):
        raise ValueError(
            f"tokens: got {rows.dtype} of shape {rows.shape}, expected integers [B, {length}]"
        )
    if rows.size and not (rows.min() >= 0 and rows.max() < tokenizer.vocab_size):
        raise ValueError(
            f"tokens: got ids from {rows.min()} to {rows.max()}, "
            f"expected 0 to {tokenizer.vocab_size - 1}"
        )
    return rows.astype(np.int32)
