"""Every model and control of a workdir over decoding steps: one table of measures and seconds."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from diladiff_jax.data.prepare import Prepared
from diladiff_jax.data.tokenizers import Tokenizer
from diladiff_jax.evaluation import likelihood, text
from diladiff_jax.evaluation.intervals import Estimate

Row = dict[str, Any]

CONTROLS = ("prior_few_steps", "true_latent", "null_latent")
"""The undistilled prior under DDIM at the student's number of network calls; the decoder given the latents of real text, and given noise."""


class Trained(Protocol):
    """What is needed of a `diladiff_jax.Model`."""

    config: Any
    tokenizer: Tokenizer
    networks: Any
    length: int

    @property
    def models(self) -> tuple[str, ...]: ...
    @property
    def devices(self) -> int: ...
    def compiled(self, model: str) -> Any: ...
    def parameters(self, model: str) -> dict[str, Any]: ...
    def trained(self, stage: str) -> Any: ...
    def controls(self, model: str = ..., **settings: Any) -> Any: ...
    def encode(self, texts: Any) -> Any: ...
    def has(self, stage: str) -> bool: ...
    def trained_steps(self, stage: str) -> int: ...


def evaluate(model: Trained, prepared: Prepared, say: Callable[[str], None] = print) -> dict[str, Any]:
    """The content of `results.json`: `{"setting", "rows"}`; see `report.SCHEMA`."""
    config, settings = model.config, model.config.evaluation
    measure = _measures(model, config.data.corpus)
    rows: list[Row] = []

    def add(row: Row) -> None:
        rows.append({"corpus": config.data.corpus} | row)
        say(_line(rows[-1]))

    held_out = _validation(prepared, settings.samples)
    add(_row("data", len(held_out), measures=measure(held_out)))
    for name, measures in _bounds(model, held_out):
        add(_row(name, len(held_out), measures=measures))
    plan = [(name, settings.decode_steps) for name in model.models]
    if "diladiff" in model.models:
        plan += [(name, settings.control_steps) for name in CONTROLS]
    for name, steps in plan:
        draw = Draw(model, name, held_out, settings.seed)
        for decode_steps in steps:
            tokens, seconds, latent_steps = draw(settings.samples, decode_steps)
            s = config.sampling
            add(_row(name, len(tokens), latent_steps, decode_steps, s.temperature, s.top_p, seconds, tokens.size / seconds, measure(tokens)))
    setting = {
        "seed": settings.seed,
        "length": config.data.length,
        "batch": config.sampling.batch,
        "prior_method": config.sampling.prior_method,
        "prior_steps": config.sampling.prior_steps,
        "student_steps": config.sampling.student_steps,
        "gamma": config.sampling.gamma,
        "trained_steps": {stage: model.trained_steps(stage) for stage in ("mdlm", "mdlm_long", "autoencoder", "ladiff", "diladiff", "scorer")},
        "device": jax.devices()[0].device_kind,
        "devices": model.devices,
        "compute_dtype": config.compute_dtype,
        "scored_on": "the model's own tokens, not re-tokenized",
    }
    return {"setting": setting, "rows": rows}


class Draw:
    """Draws samples of one model or control, a batch at a time, by one compiled program."""

    def __init__(self, model: Trained, name: str, held_out: np.ndarray, seed: int) -> None:
        self._model, self._name, self._held_out = model, name, held_out
        self._key = jax.random.key(seed)
        self._batch = -(-model.config.sampling.batch // model.devices) * model.devices
        program = {"prior_few_steps": "prior_ddim", "true_latent": "given", "null_latent": "noise"}.get(name, name)
        self._program = model.compiled(program)
        self._params = {"decoder": model.trained("autoencoder")["decoder"]} if program in ("given", "noise") else model.parameters("ladiff" if program == "prior_ddim" else program)
        self._warm = False

    def __call__(self, samples: int, decode_steps: int) -> tuple[np.ndarray, float, int | None]:
        """Tokens `[samples, L]`, the seconds they took without compilation, and the latent steps.

        Seconds are the median batch's, scaled to all samples; with two batches that is their mean.
        """
        model, batch = self._model, self._batch
        few = self._name == "prior_few_steps"
        # The student calls its network twice a step, DDIM with the previous step's self-conditioning once.
        latent_steps = 2 * model.config.sampling.student_steps if few else None
        controls = model.controls("ladiff" if few else self._name if self._name in model.models else "diladiff", decode_steps=decode_steps, latent_steps=latent_steps)
        prompt = jnp.full((batch, model.length), model.tokenizer.mask_id, jnp.int32)
        parts, seconds = [], []
        for first in range(0, samples, batch):
            indices = np.arange(first, first + batch)
            extra = (np.asarray(model.encode(self._held_out[indices % len(self._held_out)])),) if self._name == "true_latent" else ()
            arguments = (self._params, self._key, jnp.asarray(indices), prompt, *extra, controls)
            if not self._warm:
                jax.block_until_ready(self._program(*arguments))
                self._warm = True
            began = time.perf_counter()
            parts.append(np.asarray(self._program(*arguments).tokens))
            seconds.append(time.perf_counter() - began)
        used = int(controls.latent_steps) if self._name in ("ladiff", "diladiff", "prior_few_steps") else None
        return np.concatenate(parts)[:samples], float(np.median(seconds)) * samples / batch, used


def _measures(model: Trained, corpus: str) -> Callable[[np.ndarray], dict[str, Estimate]]:
    tokenizer = model.tokenizer

    def measure(tokens: np.ndarray) -> dict[str, Estimate]:
        found: dict[str, Estimate] = {}
        if corpus == "stories":
            found |= text.oracle_measures(text.first_documents(tokens, tokenizer))
        if model.has("scorer"):
            scorer = model.networks.scorer
            found["gen_ppl"] = likelihood.generative_perplexity(
                scorer, model.trained("scorer"), tokens, tokenizer.eot_id, tokenizer.sampleable, batch=model.config.sampling.batch
            )
        return found | text.token_measures(tokens, tokenizer.eot_id)

    return measure


def _bounds(model: Trained, held_out: np.ndarray) -> list[tuple[str, dict[str, Estimate]]]:
    """Bound and recovery on held-out rows: of the plain denoisers, and of the decoder given the rows' own latents."""
    settings, tokenizer = model.config.evaluation, model.tokenizer
    found = []

    def measure(logits_of: Any, condition: np.ndarray | None = None) -> dict[str, Estimate]:
        return likelihood.bound_and_recovery(
            logits_of, held_out, jax.random.key(settings.seed), tokenizer.mask_id, tokenizer.sampleable,
            condition=condition, draws=settings.bound_draws, batch=model.config.sampling.batch,
        )

    for stage in ("mdlm", "mdlm_long"):
        if model.has(stage):
            params = model.trained(stage)
            found.append((f"{stage} bound", measure(lambda x_t, _, params=params: model.networks.denoiser.apply({"params": params}, x_t))))
    if model.has("autoencoder"):
        decoder = model.trained("autoencoder")["decoder"]
        found.append(
            ("autoencoder bound", measure(lambda x_t, z: model.networks.decoder.apply({"params": decoder}, x_t, z), _encoded(model, held_out)))
        )
    return found


def _encoded(model: Trained, rows: np.ndarray) -> np.ndarray:
    """Latents of rows `[n, L]`, a sampling batch at a time."""
    size = model.config.sampling.batch
    return np.concatenate([np.asarray(model.encode(rows[i : i + size])) for i in range(0, len(rows), size)])


def _validation(prepared: Prepared, samples: int) -> np.ndarray:
    rows = prepared.rows("validation")
    return np.stack(rows.__getitems__(range(min(samples, len(rows)))))


def _row(
    model: str, samples: int, latent_steps: int | None = None, decode_steps: int | None = None, temperature: float | None = None,
    top_p: float | None = None, seconds: float | None = None, rate: float | None = None, measures: dict[str, Estimate] | None = None,
) -> Row:
    return {
        "model": model, "latent_steps": latent_steps, "decode_steps": decode_steps, "temperature": temperature, "top_p": top_p,
        "samples": samples, "seconds": seconds, "tokens_per_second": rate, "metrics": measures or {},
    }


def _line(row: Row) -> str:
    steps = "" if row["decode_steps"] is None else f" {row['decode_steps']} steps"
    shown: Sequence[str] = [f"{name} {value['value']:.3f}" for name, value in row["metrics"].items()]
    return f"{row['model']}{steps}: " + ", ".join(shown) + ("" if row["seconds"] is None else f", {row['seconds']:.2f} s")
