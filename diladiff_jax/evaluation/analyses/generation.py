"""What a trained model generates and what that costs: figures 3, 4 and 6, table 2, MAUVE and the prior's likelihood.

All estimates have intervals over samples; `analyses.analyse` runs them on one workdir.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from diladiff_jax.diffusion import gaussian
from diladiff_jax.evaluation.analyses import published
from diladiff_jax.evaluation.analyses.sweep_curves import QUALITY
from diladiff_jax.evaluation.figures import NAMES, Figure, Table, cells, figure, series, table
from diladiff_jax.evaluation.measures import intervals, likelihood, mauve, ode_likelihood
from diladiff_jax.evaluation.measures.intervals import Estimate
from diladiff_jax.evaluation.measures.likelihood import content_mask
from diladiff_jax.evaluation.sweep import Draw, Trained, measures_of


class Analysed(Trained, Protocol):
    """What is needed of a `diladiff_jax.Model`, past the sweep's."""

    sampler: Any

    def sample(
        self, key: Any, num: int = ..., *, model: str | None = ..., **settings: Any
    ) -> Any: ...
    def decode(self, key: Any, latents: Any, **settings: Any) -> Any: ...


# One latent, many texts: figures 3, 4


def equal_positions(a: np.ndarray, b: np.ndarray, eot_id: int) -> np.ndarray:
    """Share of positions with the same id in rows `[n, L]` and `[n, L]`, of those where either holds text: `[n]`."""
    either = np.asarray(content_mask(a, eot_id)) | np.asarray(content_mask(b, eot_id))
    return ((a == b) & either).sum(axis=1) / np.maximum(either.sum(axis=1), 1)


def jaccard(a: np.ndarray, b: np.ndarray, n: int, eot_id: int) -> np.ndarray:
    """Jaccard overlap |A & B| / |A | B| of the sets of n-grams of text in rows `[m, L]` and `[m, L]`: `[m]`; 1 where both are empty."""

    def grams(row: np.ndarray) -> set[tuple[int, ...]]:
        row = row[row != eot_id]
        return {tuple(row[i : i + n].tolist()) for i in range(len(row) - n + 1)}

    pairs = [(grams(x), grams(y)) for x, y in zip(a, b, strict=True)]
    return np.array([len(x & y) / len(x | y) if x | y else 1.0 for x, y in pairs])


def latent_similarity(
    model: Analysed, latents: np.ndarray, decode_steps: Sequence[int], *, seed: int = 0
) -> list[Figure]:
    """Figures 3 and 4: how alike are texts decoded from one latent, and from two.

    Each latent `[n, N, D]` is decoded twice with different keys (within), and pairs (2 i, 2 i + 1) are compared (between).
    """
    eot = model.tokenizer.eot_id
    even = len(latents) // 2 * 2
    alike: dict[str, list[Estimate]] = {"one latent": [], "two latents": []}
    first = second = np.empty(0)
    for steps in decode_steps:
        first, second = (
            model.decode(seed + i, latents[:even], decode_steps=steps).tokens for i in (0, 1)
        )
        alike["one latent"].append(intervals.mean(equal_positions(first, second, eot)))
        alike["two latents"].append(intervals.mean(equal_positions(first[0::2], first[1::2], eot)))
    overlap = {
        "one latent": [intervals.mean(jaccard(first, second, n, eot)) for n in range(1, 5)],
        "two latents": [
            intervals.mean(jaccard(first[0::2], first[1::2], n, eot)) for n in range(1, 5)
        ],
    }
    note = f"{even} latents of held-out text, each decoded twice; {even // 2} pairs of two"
    return [
        figure(
            "equal_positions",
            "figure 3",
            "Texts decoded from one latent and from two",
            "decoding steps",
            "share of equal positions",
            [series(k, decode_steps, v) for k, v in alike.items()],
            note,
            x_scale="log",
        ),
        figure(
            "ngram_overlap",
            "figure 4",
            "n-grams shared by texts decoded from one latent and from two",
            "n",
            "Jaccard overlap of n-grams",
            [series(k, range(1, 5), v) for k, v in overlap.items()],
            note + f"; {decode_steps[-1]} decoding steps",
        ),
    ]


# The schedule: figure 6


def schedule_curves(
    own: gaussian.Schedule | None = None, ds: Sequence[float] = (2.0, 5.0, 10.0, 15.0)
) -> list[Figure]:
    """Figure 6: alpha and logSNR of the tangent schedule for several d, and of the experiment's own."""
    named: dict[str, gaussian.Schedule] = {f"d = {d:g}": gaussian.TangentSchedule(d) for d in ds}
    if own is not None:
        named["this experiment"] = own
    t = np.linspace(0, 1, 101)
    inner = t[1:-1]
    alpha = [
        series(name, t, np.asarray(s.alpha(jnp.asarray(t, jnp.float32))).tolist())
        for name, s in named.items()
    ]
    snr = [
        series(
            name, inner, np.asarray(gaussian.log_snr(s, jnp.asarray(inner, jnp.float32))).tolist()
        )
        for name, s in named.items()
    ]
    return [
        figure("schedule_alpha", "figure 6", "alpha of the schedule", "time t", "alpha(t)", alpha),
        figure(
            "schedule_log_snr",
            "figure 6",
            "Signal to noise of the schedule",
            "time t",
            "log(alpha^2 / sigma^2)",
            snr,
            "infinite at both ends, which are left out",
        ),
    ]


# Draws in other settings: figures 13 to 15


def sampled_rows(
    model: Analysed,
    name: str,
    settings: Sequence[Mapping[str, Any]],
    samples: int,
    *,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Rows in the form of `results.json`, one for each mapping of controls (latent_steps, decode_steps, temperature, top_p).

    Untimed (`seconds` is None): each is drawn once, its compilation included.
    """
    measure, corpus = measures_of(model, model.config.data.corpus), model.config.data.corpus
    rows = []
    for given in settings:
        used = model.controls(name, **given)
        tokens = model.sample(seed, samples, model=name, **given).tokens
        latent = int(used.latent_steps) if name in ("ladiff", "diladiff") else None
        rows.append(
            {
                "corpus": corpus,
                "model": name,
                "latent_steps": latent,
                "decode_steps": int(used.decode_steps),
                "temperature": float(used.temperature),
                "top_p": float(used.top_p),
                "samples": samples,
                "seconds": None,
                "tokens_per_second": None,
                "metrics": measure(tokens),
            }
        )
    return rows


# Few calls: the prior's samplers and the student


def latent_samplers(
    model: Analysed,
    samples: int,
    calls: Sequence[int] = (5, 10, 20),
    *,
    many: int = 200,
    student: Sequence[int] = (1, 2, 4, 5, 8),
    seed: int = 0,
) -> Table:
    """What each way of drawing a latent reaches, at numbers of network calls; `many` Euler steps are what they approach.

    A step is one call of the network, Heun's two but for its last, the student's two. Decoding is the config's.
    """
    measure, size = measures_of(model, model.config.data.corpus), Draw.batch_of(model)
    prompt = np.full((size, model.length), model.tokenizer.mask_id, np.int32)

    def row(name: str, program: str, network: str, steps: int, made: int) -> list[Any]:
        controls = model.controls(network, latent_steps=steps)
        draw = lambda first: model.compiled(program)(
            model.parameters(network),
            jax.random.key(seed),
            jnp.arange(first, first + size),
            prompt,
            controls,
        )
        found = measure(
            np.concatenate([np.asarray(draw(first).tokens) for first in range(0, samples, size)])[
                :samples
            ]
        )
        return [name, steps, made, *(c for metric in QUALITY for c in cells(found.get(metric)))]

    rows = [row("Euler", "prior_euler", "ladiff", many, many)]
    for name, method in (
        ("Euler", "euler"),
        ("DDIM", "ddim"),
        ("Heun", "heun"),
        ("DPM-Solver++(2M)", "dpmpp_2m"),
    ):
        for n in calls:
            steps = (n + 1) // 2 if method == "heun" else n
            rows.append(
                row(
                    name,
                    f"prior_{method}",
                    "ladiff",
                    steps,
                    2 * steps - 1 if method == "heun" else steps,
                )
            )
    rows += [row("student", "diladiff", "diladiff", n, 2 * n) for n in student]
    kept = [i for i in range(len(rows[0])) if i < 3 or any(r[i] is not None for r in rows)]
    columns = [
        "latents by",
        "steps",
        "network calls",
        *(c for metric in QUALITY for c in (metric, "low", "high")),
    ]
    note = f"{samples} samples each, {int(model.controls('diladiff').decode_steps)} decoding steps; the same noise for all of the prior's"
    return table(
        "latent_samplers",
        "",
        "Latents in few network calls",
        [columns[i] for i in kept],
        [[r[i] for i in kept] for r in rows],
        note,
    )


# What the latent costs, and what LaDiff's likelihood is: table 2; METHOD section 6


def latent_overhead(
    model: Analysed, decode_steps: Sequence[int], *, rounds: int = 5, seed: int = 0
) -> Table:
    """Table 2: time of the latent over the time of decoding, each timed alone, in turns, at the config's sampling batch."""
    size = -(-model.config.sampling.batch // model.devices) * model.devices
    key, indices = jax.random.key(seed), jnp.arange(size)
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(indices)
    prompt = np.full((size, model.length), model.tokenizer.mask_id, np.int32)
    decode, decoder = model.compiled("given"), {"decoder": model.trained("autoencoder")["decoder"]}
    draws = {
        name: jax.jit(draw)
        for name, draw in (
            ("ladiff", model.sampler.prior_latents),
            ("diladiff", model.sampler.student_latents),
        )
        if name in model.models
    }
    controls = {name: model.controls(name) for name in draws}
    # One step of each kind first, which compiles all there is: the numbers of steps are not compiled in.
    once = {
        name: c._replace(decode_steps=jnp.int32(1), latent_steps=jnp.int32(1))
        for name, c in controls.items()
    }
    latents = {
        name: np.asarray(draw(model.parameters(name), keys, once[name]))
        for name, draw in draws.items()
    }
    for name in draws:
        jax.block_until_ready(decode(decoder, key, indices, prompt, latents[name], once[name]))
    rows = []
    for steps in decode_steps:
        seconds: dict[str, list[float]] = {name: [] for name in (*draws, "decode")}
        for _ in range(rounds):
            for name, draw in draws.items():
                seconds[name].append(
                    _seconds(lambda: draw(model.parameters(name), keys, controls[name]))
                )  # noqa: B023
            # Decoding takes the same time whoever drew the latent.
            seconds["decode"].append(
                _seconds(
                    lambda: decode(
                        decoder,
                        key,
                        indices,
                        prompt,
                        latents[name],
                        controls[name]._replace(decode_steps=jnp.int32(steps)),
                    )
                )
            )  # noqa: B023
        decoding = np.array(seconds["decode"])
        for name in draws:
            latent = np.array(seconds[name])
            rows.append(
                [
                    NAMES[name],
                    int(controls[name].latent_steps),
                    steps,
                    float(latent.mean()),
                    float(decoding.mean()),
                    *cells(intervals.ratio(latent, decoding)),
                ]
            )
    rows.sort(key=lambda row: list(NAMES.values()).index(row[0]))
    columns = (
        "model",
        "latent steps",
        "decoding steps",
        "latent (s a batch)",
        "decoding (s a batch)",
        "latent / decoding",
        "low",
        "high",
    )
    theirs = "; ".join(
        f"{NAMES[r['model']]} {r['latent_steps']} + {r['decode_steps']}: {r['share']:.0%}"
        for r in published.OVERHEAD
    )
    return table(
        "latent_overhead",
        "table 2",
        "What the latent costs",
        columns,
        rows,
        f"batch {size}, intervals over {rounds} timed rounds. The paper, at L = 1024 and batch 32: {theirs}",
    )


def _seconds(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - began


def prior_likelihood(
    model: Analysed,
    rows: np.ndarray,
    latents: np.ndarray,
    sigmas: Sequence[float] = (0.3, 0.6),
    *,
    draws: int = 8,
    seed: int = 0,
) -> Table:
    """LaDiff's bound on the perplexity, at several noise floors: see `ode.likelihood_bound`."""
    # Its divergence is a forward derivative, and divided by sigma: in float32 to the last product, as the student's tangents are.
    teacher, decoder = (
        model.networks.teacher.clone(plain=True, dtype=jnp.float32),
        model.networks.decoder,
    )
    prior, params = model.trained("ladiff"), model.trained("autoencoder")["decoder"]
    how = "none" if model.config.sampling.prior_self_conditioning == "none" else "current"

    def denoise(z_t: jax.Array, t: jax.Array, self_condition: jax.Array) -> jax.Array:
        with jax.default_matmul_precision("float32"):
            return teacher.apply({"params": prior}, z_t, t, self_condition)

    predict = ode_likelihood.clean_prediction(denoise, how)
    schedule, body = model.sampler.schedule, []
    for sigma in sigmas:
        t_min = float(schedule.time_of_angle(jnp.arcsin(jnp.float32(sigma))))
        found = ode_likelihood.likelihood_bound(
            predict,
            lambda x_t, z: decoder.apply({"params": params}, x_t, z),
            schedule,
            latents,
            rows,
            jax.random.key(seed),
            model.tokenizer,
            t_min=t_min,
            draws=draws,
            batch=min(model.config.sampling.batch, 32),
            rtol=1e-2,
            atol=1e-2,
        )
        body.append(
            [
                sigma,
                *cells(found["bound_ppl"]),
                *cells(found["nats"]),
                *(found[name]["value"] for name in ("decoder_nats", "prior_nats", "entropy_nats")),
            ]
        )
    columns = (
        "noise floor sigma",
        "bound ppl",
        "low",
        "high",
        "nats a token",
        "low",
        "high",
        "decoder",
        "prior",
        "entropy of the encoder",
    )
    note = f"{len(rows)} held-out rows; self-conditioning {how}; nats a token = decoder + prior - entropy. Each row bounds a model of its own: the one that stops at that noise."
    return table(
        "ladiff_likelihood",
        "",
        "Bound on LaDiff's perplexity, the prior's cost counted",
        columns,
        body,
        note,
    )


def mauve_table(model: Analysed, held_out: np.ndarray, *, seed: int = 0) -> Table:
    """MAUVE of every model at the config's steps against held-out text, on the trained scorer's mean hidden states."""
    scorer, params, tokenizer = model.networks.scorer, model.trained("scorer"), model.tokenizer

    def features(tokens: np.ndarray) -> np.ndarray:
        rows = likelihood.retokenize(tokens, tokenizer)
        counted = np.asarray(content_mask(rows, tokenizer.eot_id))
        hidden = lambda x: scorer.apply({"params": params}, x, method="hidden")
        return mauve.mean_hidden(hidden, rows, counted, batch=model.config.sampling.batch)

    data, rows, found = features(held_out), [], {}
    for name in model.models:
        found = mauve.mauve(data, features(model.sample(seed, len(held_out), model=name).tokens))
        rows.append([NAMES[name], *cells(found), found["samples"], found["data_samples"]])
    settings = ", ".join(f"{k} {v}" for k, v in found.get("settings", {}).items())
    return table(
        "mauve",
        "table 1",
        "MAUVE on this run's scorer",
        ("model", "MAUVE", "low", "high", "samples", "data samples"),
        rows,
        f"features: mean last hidden state; {settings}",
    )
