"""Every model and control of a workdir over decoding steps: one table of measures and seconds."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from diladiff_jax.data import Prepared
from diladiff_jax.data.tokenizers import Tokenizer
from diladiff_jax.evaluation.measures import likelihood, text
from diladiff_jax.evaluation.measures.intervals import Estimate
from diladiff_jax.evaluation.measures.scorer import Scorer

Row = dict[str, Any]

PRIORS = ("prior_ddim", "prior_dpmpp_2m")
"""The undistilled prior at the student's number of network calls, under DDIM and under DPM-Solver++(2M)."""

CONTROLS = (*PRIORS, "true_latent", "null_latent")
"""Beside the priors: the decoder given the latents of real text, and given noise."""


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
    @property
    def published_scorer(self) -> Scorer | None: ...
    def compiled(self, model: str) -> Any: ...
    def parameters(self, model: str) -> dict[str, Any]: ...
    def trained(self, stage: str) -> Any: ...
    def controls(self, model: str = ..., **settings: Any) -> Any: ...
    def encode(self, texts: Any) -> Any: ...
    def has(self, stage: str) -> bool: ...
    def trained_steps(self, stage: str) -> int: ...


def evaluate(
    model: Trained, prepared: Prepared, say: Callable[[str], None] = print
) -> dict[str, Any]:
    """The content of `results.json`: `{"setting", "rows"}`; see `report.SCHEMA`."""
    config, settings = model.config, model.config.evaluation
    measure = measures_of(model, config.data.corpus)
    rows: list[Row] = []

    def add(row: Row) -> None:
        rows.append({"corpus": config.data.corpus} | row)
        say(_line(rows[-1]))

    held_out = validation_rows(prepared, settings.samples)
    add(_row("data", len(held_out), measures=measure(held_out)))
    for name, measures in _bounds(model, held_out):
        add(_row(name, len(held_out), measures=measures))
    plan = [(name, settings.decode_steps) for name in model.models]
    if "diladiff" in model.models:
        plan += [(name, settings.control_steps) for name in CONTROLS]
    # Batch by batch through all rows, so that whatever else the machine does falls on all of them alike.
    draws = [Draw(model, name, held_out, settings.seed, n) for name, steps in plan for n in steps]
    rounds = -(-settings.samples // Draw.batch_of(model))
    for i in range(rounds):
        for draw in draws:
            draw()
        say(
            f"drawn: {min((i + 1) * Draw.batch_of(model), settings.samples)} of {settings.samples} samples a row"
        )
    s = config.sampling
    for draw in draws:
        tokens, seconds = draw.result(settings.samples)
        add(
            _row(
                draw.name,
                len(tokens),
                draw.latent_steps,
                draw.decode_steps,
                s.temperature,
                s.top_p,
                seconds,
                tokens.size / seconds,
                measure(tokens),
            )
        )
    setting = {
        "seed": settings.seed,
        "length": config.data.length,
        "batch": config.sampling.batch,
        "prior_method": config.sampling.prior_method,
        "prior_steps": config.sampling.prior_steps,
        "student_steps": config.sampling.student_steps,
        "gamma": config.sampling.gamma,
        "order": config.sampling.order,
        "refresh_every": config.sampling.refresh_every,
        "skip_layers": list(config.sampling.skip_layers),
        "skip_from": config.sampling.skip_from,
        "trained_steps": {
            stage: model.trained_steps(stage)
            for stage in ("mdlm", "mdlm_long", "autoencoder", "ladiff", "diladiff", "scorer")
        },
        "device": jax.devices()[0].device_kind,
        "devices": model.devices,
        "compute_dtype": config.compute_dtype,
        "scorer": _scorer(model),
        "scored_on": "text tokenized anew, at most the scorer's `length` tokens a row",
    }
    return {"setting": setting, "rows": rows}


class Draw:
    """One row of the sweep: samples of one model or control at one number of decoding steps, a batch a call."""

    def __init__(
        self, model: Trained, name: str, held_out: np.ndarray, seed: int, decode_steps: int
    ) -> None:
        self.name, self.decode_steps = name, decode_steps
        self._model, self._held_out = model, held_out
        self._key = jax.random.key(seed)
        self._batch = self.batch_of(model)
        program = {"true_latent": "given", "null_latent": "noise"}.get(name, name)
        self._program = model.compiled(program)
        self._params = (
            {"decoder": model.trained("autoencoder")["decoder"]}
            if program in ("given", "noise")
            else model.parameters("ladiff" if program in PRIORS else program)
        )
        few = name in PRIORS
        # The student calls its network twice a step, these with the previous step's self-conditioning once.
        latent_steps = 2 * model.config.sampling.student_steps if few else None
        sampled_like = "ladiff" if few else name if name in model.models else "diladiff"
        self._controls = model.controls(
            sampled_like, decode_steps=decode_steps, latent_steps=latent_steps
        )
        self.latent_steps = (
            int(self._controls.latent_steps) if name in ("ladiff", "diladiff", *PRIORS) else None
        )
        self._parts: list[np.ndarray] = []
        self._seconds: list[float] = []

    @staticmethod
    def batch_of(model: Trained) -> int:
        """The sampling batch, rounded up to what the devices divide."""
        return -(-model.config.sampling.batch // model.devices) * model.devices

    def __call__(self) -> None:
        """Draws the next batch and times it; the first one compiles before it is timed."""
        model, first = self._model, len(self._parts) * self._batch
        indices = np.arange(first, first + self._batch)
        extra = (
            (np.asarray(model.encode(self._held_out[indices % len(self._held_out)])),)
            if self.name == "true_latent"
            else ()
        )
        prompt = np.full(
            (self._batch, model.length), model.tokenizer.mask_id, np.int32
        )  # on the host: a device's array is given up with the call
        arguments = (self._params, self._key, jnp.asarray(indices), prompt, *extra, self._controls)
        if not self._parts:  # with one step of each kind: the numbers of steps are not compiled in
            quick = self._controls._replace(decode_steps=jnp.int32(1), latent_steps=jnp.int32(1))
            jax.block_until_ready(self._program(*arguments[:-1], quick))
        began = time.perf_counter()
        self._parts.append(np.asarray(self._program(*arguments).tokens))
        self._seconds.append(time.perf_counter() - began)

    def result(self, samples: int) -> tuple[np.ndarray, float]:
        """Tokens `[samples, L]`, and the seconds they took without compilation: the median batch's, scaled."""
        return np.concatenate(self._parts)[:samples], float(
            np.median(self._seconds)
        ) * samples / self._batch


def measures_of(model: Trained, corpus: str) -> Callable[[np.ndarray], dict[str, Estimate]]:
    """What is measured of samples `[n, L]`: the oracle on its own corpus, the scorer where one is trained, and the tokens alone."""
    tokenizer = model.tokenizer

    def measure(tokens: np.ndarray) -> dict[str, Estimate]:
        found: dict[str, Estimate] = {}
        if corpus == "stories":
            found |= text.oracle_measures(text.first_documents(tokens, tokenizer))
        if model.published_scorer is not None:
            found |= model.published_scorer.measures([tokenizer.decode(row) for row in tokens])
        elif model.has("scorer"):
            scorer = model.networks.scorer
            found["gen_ppl"] = likelihood.generative_perplexity(
                scorer,
                model.trained("scorer"),
                likelihood.retokenize(tokens, tokenizer),
                tokenizer.eot_id,
                tokenizer.sampleable,
                batch=model.config.sampling.batch,
            )
        return found | text.token_measures(tokens, tokenizer.eot_id)

    return measure


def _scorer(model: Trained) -> dict[str, Any] | None:
    """Who judged `gen_ppl`, and the most tokens of a row that it read."""
    if model.published_scorer is not None:
        return {"name": model.config.evaluation.scorer, "length": model.published_scorer.length}
    return (
        {"name": "stage scorer", "length": model.config.data.length}
        if model.has("scorer")
        else None
    )


def _bounds(model: Trained, held_out: np.ndarray) -> list[tuple[str, dict[str, Estimate]]]:
    """Bound and recovery on held-out rows: of the plain denoisers, and of the decoder given the rows' own latents."""
    settings, tokenizer = model.config.evaluation, model.tokenizer
    found = []

    def measure(
        logits_of: Any, params: Any, condition: np.ndarray | None = None
    ) -> dict[str, Estimate]:
        return likelihood.bound_and_recovery(
            logits_of,
            params,
            held_out,
            jax.random.key(settings.seed),
            tokenizer.mask_id,
            tokenizer.eot_id,
            tokenizer.sampleable,
            condition=condition,
            draws=settings.bound_draws,
            batch=model.config.sampling.batch,
        )

    denoiser, decoder = model.networks.denoiser, model.networks.decoder
    for stage in ("mdlm", "mdlm_long"):
        if model.has(stage):
            found.append(
                (
                    f"{stage} bound",
                    measure(
                        lambda params, x_t, _: denoiser.apply({"params": params}, x_t),
                        model.trained(stage),
                    ),
                )
            )
    if model.has("autoencoder"):
        decode = lambda params, x_t, z: decoder.apply({"params": params}, x_t, z)
        found.append(
            (
                "autoencoder bound",
                measure(decode, model.trained("autoencoder")["decoder"], encoded(model, held_out)),
            )
        )
    return found


def encoded(model: Trained, rows: np.ndarray) -> np.ndarray:
    """Latents of rows `[n, L]`, a sampling batch at a time."""
    size = model.config.sampling.batch
    return np.concatenate(
        [np.asarray(model.encode(rows[i : i + size])) for i in range(0, len(rows), size)]
    )


def validation_rows(prepared: Prepared, samples: int) -> np.ndarray:
    """The first held-out rows, `[at most samples, L]`."""
    rows = prepared.rows("validation")
    return np.stack(rows.__getitems__(range(min(samples, len(rows)))))


def _row(
    model: str,
    samples: int,
    latent_steps: int | None = None,
    decode_steps: int | None = None,
    temperature: float | None = None,
    top_p: float | None = None,
    seconds: float | None = None,
    rate: float | None = None,
    measures: dict[str, Estimate] | None = None,
) -> Row:
    return {
        "model": model,
        "latent_steps": latent_steps,
        "decode_steps": decode_steps,
        "temperature": temperature,
        "top_p": top_p,
        "samples": samples,
        "seconds": seconds,
        "tokens_per_second": rate,
        "metrics": measures or {},
    }


def _line(row: Row) -> str:
    steps = "" if row["decode_steps"] is None else f" {row['decode_steps']} steps"
    shown: Sequence[str] = [
        f"{name} {value['value']:.3f}" for name, value in row["metrics"].items()
    ]
    return (
        f"{row['model']}{steps}: "
        + ", ".join(shown)
        + ("" if row["seconds"] is None else f", {row['seconds']:.2f} s")
    )
