"""The paper's analyses (METHOD sections 6 and 8) as figures and tables of one form (`forms`), each with intervals over samples.

Those that read a trained model take `dl.load(WORKDIR)`; those that read measurements take rows of `results.json`. `analyse` runs
all that apply to one workdir.
"""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize

from diladiff_jax.data.prepare import Prepared
from diladiff_jax.diffusion import gaussian, masking
from diladiff_jax.evaluation import intervals, likelihood, mauve, ode, published
from diladiff_jax.evaluation.forms import Figure, Table, cells, figure, series, table
from diladiff_jax.evaluation.intervals import Estimate
from diladiff_jax.evaluation.likelihood import LogitsOf, is_text
from diladiff_jax.evaluation.sweep import Trained, encoded, measures_of, validation_rows

Array = jax.Array
Say = Callable[[str], None]

QUALITY = {"valid": "share of fully valid documents", "gen_ppl": "generative perplexity", "mauve": "MAUVE", "entropy": "entropy (nats, within a sample)"}
NAMES = {
    "mdlm": "MDLM", "mdlm_long": "MDLM, whole decoder budget", "ladiff": "LaDiff", "diladiff": "DiLaDiff",
    "prior_few_steps": "prior, undistilled, same calls", "true_latent": "decoder, true latents", "null_latent": "decoder, null latent",
}


class Analysed(Trained, Protocol):
    """What is needed of a `diladiff_jax.Model`, past the sweep's."""

    sampler: Any

    def sample(self, key: Any, num: int = ..., *, model: str | None = ..., **settings: Any) -> Any: ...
    def decode(self, key: Any, latents: Any, **settings: Any) -> Any: ...


# Masked counts: figures 7, 8, 10


@dataclasses.dataclass(frozen=True)
class ByCount:
    """Sums over the masked positions of text, per masked count and row, `[C, n]`: -log p in nats, recovered tokens, and how many."""

    nll: np.ndarray
    right: np.ndarray
    masked: np.ndarray

    def loss(self, i: int) -> Estimate:
        """-log p per masked token at count i, in nats."""
        return intervals.ratio(self.nll[i], self.masked[i])

    def recovery(self, i: int) -> Estimate:
        """Share of the masked tokens recovered at count i."""
        return intervals.ratio(self.right[i], self.masked[i])


def by_masked_count(
    logits_of: LogitsOf, params: Any, tokens: np.ndarray, key: Array, mask_id: int, eot_id: int, sampleable: np.ndarray, counts: Sequence[int],
    *, condition: np.ndarray | None = None, draws: int = 1, batch: int,
) -> ByCount:
    """Loss and recovery on rows `[n, L]` with exactly `counts` of their L positions masked, over `draws` random subsets of each.

    Arguments as in `likelihood.bound_and_recovery`. Masks fall on fill too, which is not counted.
    """
    allowed, grid = jnp.asarray(sampleable), jnp.repeat(jnp.asarray(counts, jnp.int32), draws)

    @jax.jit
    def measure(params: Any, rows: Array, given: Array | None, key: Array) -> tuple[Array, Array, Array]:
        text = is_text(rows, eot_id)

        def draw(task: tuple[Array, Array]) -> tuple[Array, Array, Array]:
            key, count = task
            x_t = masking.mask_exactly(key, rows, jnp.full(rows.shape[:1], count), mask_id)
            nll, right = masking.token_nll(logits_of(params, x_t, given), rows, allowed)
            masked = (x_t == mask_id) & text
            return (jnp.where(masked, nll, 0.0)).sum(axis=-1), (right * masked).sum(axis=-1), masked.sum(axis=-1)

        return jax.lax.map(draw, (jax.random.split(key, len(grid)), grid))

    n, parts = len(tokens), []
    batch = min(batch, n)
    for first in range(0, n, batch):
        rows = np.arange(first, first + batch) % n
        given = None if condition is None else jnp.asarray(condition[rows])
        found = jax.device_get(measure(params, jnp.asarray(tokens[rows]), given, jax.random.fold_in(key, first)))
        parts.append([part[:, : min(batch, n - first)] for part in found])
    sums = (np.concatenate(part, axis=1).astype(np.float64).reshape(len(counts), draws, n).sum(axis=1) for part in zip(*parts, strict=True))
    return ByCount(*sums)


def count_bins(length: int, bins: int = 8) -> list[int]:
    """Masked counts that spread over 1 to L, both among them."""
    return sorted({max(1, round(length * i / bins)) for i in range(1, bins + 1)} | {1})


def recovery_by_ratio(model: Analysed, rows: np.ndarray, latents: np.ndarray, *, draws: int = 4, seed: int = 0) -> list[Figure]:
    """Figure 7: loss and recovery against the masking ratio, without a latent, with the row's own, and with noise for one."""
    counts = count_bins(model.length)
    x = [c / model.length for c in counts]
    noise = np.asarray(jax.random.normal(jax.random.fold_in(jax.random.key(seed), 1), latents.shape))
    found = {"decoder, own latent": _decoder_by_count(model, rows, latents, counts, draws, seed), "decoder, noise for a latent": _decoder_by_count(model, rows, noise, counts, draws, seed)}
    if model.has("mdlm"):
        denoiser = model.networks.denoiser
        logits_of: LogitsOf = lambda params, x_t, _: denoiser.apply({"params": params}, x_t)  # noqa: E731
        found["MDLM"] = _by_count(model, logits_of, model.trained("mdlm"), rows, None, counts, draws, seed)
    loss = [series(name, x, [f.loss(i) for i in range(len(counts))]) for name, f in found.items()]
    recovery = [series(name, x, [f.recovery(i) for i in range(len(counts))]) for name, f in found.items()]
    note = f"{len(rows)} held-out rows, {draws} masks of each exact count"
    return [
        figure("loss_by_ratio", "figure 7", "Loss against masking ratio", "masking ratio", "-log p per masked token (nats)", loss, note),
        figure("recovery_by_ratio", "figure 7", "Recovery against masking ratio", "masking ratio", "share of masked tokens recovered", recovery, note),
    ]


def _by_count(model: Analysed, logits_of: LogitsOf, params: Any, rows: np.ndarray, latents: np.ndarray | None, counts: Sequence[int], draws: int, seed: int) -> ByCount:
    t = model.tokenizer
    return by_masked_count(
        logits_of, params, rows, jax.random.key(seed), t.mask_id, t.eot_id, t.sampleable, counts, condition=latents, draws=draws, batch=model.config.sampling.batch
    )


def _decoder_by_count(model: Analysed, rows: np.ndarray, latents: np.ndarray, counts: Sequence[int], draws: int, seed: int) -> ByCount:
    decoder = model.networks.decoder
    logits_of: LogitsOf = lambda params, x_t, z: decoder.apply({"params": params}, x_t, z)  # noqa: E731
    return _by_count(model, logits_of, model.trained("autoencoder")["decoder"], rows, latents, counts, draws, seed)


def attention_share(decoder: Any, params: Any, rows: np.ndarray, latents: np.ndarray, mask_id: int, eot_id: int, counts: Sequence[int], *, seed: int = 0) -> Figure:
    """Figure 8: the norm of the cross-attention's update over that of the self-attention after it, per layer and masking ratio.

    Norms are over the positions of text and the width of one row `[L, D]`; the updates are read from the decoder's "intermediates".
    """
    text = jnp.asarray(is_text(rows, eot_id))
    layers = sorted(set(decoder.cross_layers))

    @jax.jit
    def ratios(params: Any, key: Array, count: Array) -> dict[int, Array]:
        x_t = masking.mask_exactly(key, jnp.asarray(rows), jnp.full(len(rows), count), mask_id)
        kept = decoder.apply({"params": params}, x_t, jnp.asarray(latents), mutable=["intermediates"])[1]["intermediates"]

        def norm(update: Array) -> Array:
            return jnp.sqrt(jnp.sum(jnp.square(update.astype(jnp.float32)) * text[..., None], axis=(1, 2)))

        return {i: norm(kept[f"cross_{i}"]["update"][0]) / jnp.maximum(norm(kept["backbone"][f"block_{i}"]["attention_update"][0]), 1e-12) for i in layers}

    found = [jax.device_get(ratios(params, jax.random.fold_in(jax.random.key(seed), c), c)) for c in counts]
    x = [c / rows.shape[1] for c in counts]
    lines = [series(f"layer {i}", x, [intervals.mean(at[i].astype(np.float64)) for at in found]) for i in layers]
    return figure(
        "attention_share", "figure 8", "Cross-attention beside self-attention", "masking ratio", "norm of the cross-attention's update / the self-attention's", lines,
        f"{len(rows)} held-out rows; above 1 the latent says more than the text around",
    )


# The decoder under latent noise: figures 10, 11, 12


@dataclasses.dataclass(frozen=True)
class Omega:
    """omega(u) = w0 + (w1 - w0)(1 + tanh(k (u - t0))) / 2: the decoding error rate at the noise angle pi u / 2."""

    w0: float
    w1: float
    k: float
    t0: float

    def __call__(self, u: Any) -> np.ndarray:
        return self.w0 + (self.w1 - self.w0) * 0.5 * (1 + np.tanh(self.k * (np.asarray(u, np.float64) - self.t0)))

    def schedule(self) -> gaussian.EmpiricalSchedule:
        """Its inverse as a schedule; a k too steep for float32 is lowered to the steepest that is not."""
        return gaussian.EmpiricalSchedule(min(self.k, gaussian.MAX_STEEPNESS / max(self.t0, 1 - self.t0)), self.t0)


def fit_omega(u: np.ndarray, error: np.ndarray) -> Omega:
    """Least squares of omega to error rates at u in [0, 1], `[m]` each; k in (0, 50], t0 in [0.02, 0.98].

    Raises:
      ValueError: fewer than five points, for four numbers.
    """
    u, error = np.asarray(u, np.float64), np.asarray(error, np.float64)
    if len(u) < 5:
        raise ValueError(f"omega has four numbers and {len(u)} points to fit; it needs at least 5")
    middle = u[np.argmin(np.abs(error - 0.5 * (error.min() + error.max())))]

    def residual(p: np.ndarray) -> np.ndarray:
        return Omega(*p)(u) - error

    bounds = ([-1.0, -1.0, 1e-2, 0.02], [2.0, 2.0, 50.0, 0.98])
    starts = [[error[0], error[-1], k, np.clip(middle, 0.05, 0.95)] for k in (3.0, 10.0)]
    return Omega(*min((scipy.optimize.least_squares(residual, s, bounds=bounds) for s in starts), key=lambda r: r.cost).x.tolist())


def noisy_latents(latents: np.ndarray, u: float, seed: int = 0) -> np.ndarray:
    """cos(pi u / 2) z + sin(pi u / 2) eps: the latent at a noise angle, whatever the schedule."""
    eps = np.random.default_rng([seed, round(1e6 * u)]).normal(size=latents.shape)
    return (math.cos(0.5 * math.pi * u) * latents + math.sin(0.5 * math.pi * u) * eps).astype(np.float32)


def decoding_error(model: Analysed, rows: np.ndarray, latents: np.ndarray, levels: Sequence[float], shares: Sequence[float] = (1.0,), *, seed: int = 0) -> list[ByCount]:
    """Loss and recovery given each row's latent at each noise angle pi u / 2, `[levels, n]`: one for each share of masked positions."""
    counts = [max(1, round(share * model.length)) for share in shares]
    noisy = np.concatenate([noisy_latents(latents, u, seed) for u in levels])
    found = _decoder_by_count(model, np.tile(rows, (len(levels), 1)), noisy, counts, 1, seed)
    sums = (getattr(found, name).reshape(len(counts), len(levels), len(rows)) for name in ("nll", "right", "masked"))
    return [ByCount(*parts) for parts in zip(*sums, strict=True)]


def robustness(model: Analysed, rows: np.ndarray, latents: np.ndarray, *, bins: int = 10, refits: int = 40, seed: int = 0) -> tuple[list[Figure], list[Table]]:
    """Figures 10, 11 and 12: recovery against latent noise; the fit of omega to the error; its inverse as a schedule."""
    levels = np.linspace(0, 1, bins + 1)
    sigma = np.sin(0.5 * np.pi * levels)
    note = f"{len(rows)} held-out rows; the noise is variance preserving, sigma = 1 is no latent at all"
    shares = (1.0, 0.5)
    found = decoding_error(model, rows, latents, levels.tolist(), shares, seed=seed)
    whole = found[0]
    lines = [series(f"{share:.0%} masked", sigma, [f.recovery(i) for i in range(len(levels))]) for share, f in zip(shares, found, strict=True)]
    figures = [figure("robustness", "figure 10", "Decoder under latent noise", "noise level sigma of the latent", "share of masked tokens recovered", lines, note)]

    error = [_complement(whole.recovery(i)) for i in range(len(levels))]
    fitted = fit_omega(levels, np.array([e["value"] for e in error]))
    fine = np.linspace(0, 1, 101)
    figures.append(figure(
        "decoding_error", "figure 11", "Decoding error against noise, and the fit of omega", "u = angle of the noise / (pi / 2)", "share of tokens decoded wrongly in one step",
        [series("measured", levels, error), series("omega(u)", fine, fitted(fine).tolist())], note,
    ))
    schedule = fitted.schedule()
    u = np.asarray(schedule.angle(jnp.asarray(fine, jnp.float32)), np.float64) * 2 / np.pi
    figures.append(figure(
        "reparameterization", "figure 12", "Time in which the decoding error grows linearly", "time t", "u(t), and the error there",
        [series("u(t)", fine, u.tolist()), series("omega(u(t))", fine, fitted(u).tolist())],
        f"diffusion.schedule = empirical, diffusion.k = {schedule.k:.3g}, diffusion.t0 = {schedule.t0:.3g}",
    ))
    draws = np.random.default_rng(seed).integers(0, len(rows), (refits, len(rows)))
    refitted = np.array([dataclasses.astuple(fit_omega(levels, 1 - whole.right[:, i].sum(axis=1) / whole.masked[:, i].sum(axis=1))) for i in draws])
    low, high = np.quantile(refitted, [0.025, 0.975], axis=0)
    values = [[name, float(getattr(fitted, name)), float(low[i]), float(high[i])] for i, name in enumerate(("w0", "w1", "k", "t0"))]
    return figures, [table("omega", "figure 11", "omega(u) = w0 + (w1 - w0)(1 + tanh(k (u - t0))) / 2", ("number", "value", "low", "high"), values, f"bootstrap of {refits} refits over rows")]


def _complement(e: Estimate) -> Estimate:
    return Estimate(value=1 - e["value"], low=1 - e["high"], high=1 - e["low"])


# One latent, many texts: figures 3, 4


def equal_positions(a: np.ndarray, b: np.ndarray, eot_id: int) -> np.ndarray:
    """Share of positions with the same id in rows `[n, L]` and `[n, L]`, of those where either holds text: `[n]`."""
    either = np.asarray(is_text(a, eot_id)) | np.asarray(is_text(b, eot_id))
    return ((a == b) & either).sum(axis=1) / np.maximum(either.sum(axis=1), 1)


def jaccard(a: np.ndarray, b: np.ndarray, n: int, eot_id: int) -> np.ndarray:
    """Jaccard overlap |A & B| / |A | B| of the sets of n-grams of text in rows `[m, L]` and `[m, L]`: `[m]`; 1 where both are empty."""

    def grams(row: np.ndarray) -> set[tuple[int, ...]]:
        row = row[row != eot_id]
        return {tuple(row[i : i + n].tolist()) for i in range(len(row) - n + 1)}

    pairs = [(grams(x), grams(y)) for x, y in zip(a, b, strict=True)]
    return np.array([len(x & y) / len(x | y) if x | y else 1.0 for x, y in pairs])


def latent_similarity(model: Analysed, latents: np.ndarray, decode_steps: Sequence[int], *, seed: int = 0) -> list[Figure]:
    """Figures 3 and 4: how alike are texts decoded from one latent, and from two.

    Each latent `[n, N, D]` is decoded twice with different keys (within), and pairs (2 i, 2 i + 1) are compared (between).
    """
    eot = model.tokenizer.eot_id
    even = len(latents) // 2 * 2
    alike: dict[str, list[Estimate]] = {"one latent": [], "two latents": []}
    first = second = np.empty(0)
    for steps in decode_steps:
        first, second = (model.decode(seed + i, latents[:even], decode_steps=steps).tokens for i in (0, 1))
        alike["one latent"].append(intervals.mean(equal_positions(first, second, eot)))
        alike["two latents"].append(intervals.mean(equal_positions(first[0::2], first[1::2], eot)))
    overlap = {
        "one latent": [intervals.mean(jaccard(first, second, n, eot)) for n in range(1, 5)],
        "two latents": [intervals.mean(jaccard(first[0::2], first[1::2], n, eot)) for n in range(1, 5)],
    }
    note = f"{even} latents of held-out text, each decoded twice; {even // 2} pairs of two"
    return [
        figure("equal_positions", "figure 3", "Texts decoded from one latent and from two", "decoding steps", "share of equal positions", [series(k, decode_steps, v) for k, v in alike.items()], note, x_scale="log"),
        figure("ngram_overlap", "figure 4", "n-grams shared by texts decoded from one latent and from two", "n", "Jaccard overlap of n-grams", [series(k, range(1, 5), v) for k, v in overlap.items()], note + f"; {decode_steps[-1]} decoding steps"),
    ]


# The schedule: figure 6


def schedule_curves(own: gaussian.Schedule | None = None, ds: Sequence[float] = (2.0, 5.0, 10.0, 15.0)) -> list[Figure]:
    """Figure 6: alpha and logSNR of the tangent schedule for several d, and of the experiment's own."""
    named: dict[str, gaussian.Schedule] = {f"d = {d:g}": gaussian.TangentSchedule(d) for d in ds}
    if own is not None:
        named["this experiment"] = own
    t = np.linspace(0, 1, 101)
    inner = t[1:-1]
    alpha = [series(name, t, np.asarray(s.alpha(jnp.asarray(t, jnp.float32))).tolist()) for name, s in named.items()]
    snr = [series(name, inner, np.asarray(gaussian.log_snr(s, jnp.asarray(inner, jnp.float32))).tolist()) for name, s in named.items()]
    return [
        figure("schedule_alpha", "figure 6", "alpha of the schedule", "time t", "alpha(t)", alpha),
        figure("schedule_log_snr", "figure 6", "Signal to noise of the schedule", "time t", "log(alpha^2 / sigma^2)", snr, "infinite at both ends, which are left out"),
    ]


# Sweeps from rows of results.json: figures 2, 13 to 16; tables 1, 3


def measured(rows: Sequence[Mapping[str, Any]], metric: str, x: Callable[[Mapping[str, Any]], float | None]) -> list[dict[str, Any]]:
    """One series a model of `metric` against `x(row)`, in the order of x; rows without either are left out."""
    lines = []
    for name in dict.fromkeys(r["model"] for r in rows):
        points = sorted(((x(r), r["metrics"][metric]) for r in rows if r["model"] == name and metric in r["metrics"] and x(r) is not None), key=lambda p: p[0])
        if points:
            lines.append(series(NAMES.get(name, name), [p[0] for p in points], [p[1] for p in points]))
    return lines


def speed_quality(rows: Sequence[Mapping[str, Any]]) -> list[Figure]:
    """Figures 2 and 16: quality against seconds, one figure a measure of quality."""
    figures = []
    for metric, label in QUALITY.items():
        lines = measured(rows, metric, lambda r: None if r["seconds"] is None else 1e3 * r["seconds"] / r["samples"])
        if lines:
            paper = "figures 2 and 16" if metric != "entropy" else "figure 16"
            scale = "log" if metric == "gen_ppl" else "linear"
            figures.append(figure(f"speed_{metric}", paper, f"Speed against {label}", "milliseconds a document", label, lines, "latent and decoding, without compilation", x_scale="log", y_scale=scale))
    return figures


def against(rows: Sequence[Mapping[str, Any]], setting: str, paper: str = "") -> list[Figure]:
    """Figures 13 to 15: every measure of quality against one setting of the draw.

    Args:
      setting: a column of `results.json`: "latent_steps", "decode_steps", "temperature" or "top_p".
    """
    scale = "log" if setting.endswith("steps") else "linear"
    word = setting.replace("_", " ")
    figures = []
    for metric, label in QUALITY.items():
        lines = [line for line in measured(rows, metric, lambda r: r[setting]) if len(set(line["x"])) > 1]
        if lines:
            figures.append(figure(f"{metric}_by_{setting}", paper, f"{label} against {word}", word, label, lines, x_scale=scale, y_scale="log" if metric == "gen_ppl" else "linear"))
    return figures


def sampled_rows(model: Analysed, name: str, settings: Sequence[Mapping[str, Any]], samples: int, *, seed: int = 0) -> list[dict[str, Any]]:
    """Rows in the form of `results.json`, one for each mapping of controls (latent_steps, decode_steps, temperature, top_p).

    Untimed (`seconds` is None): each is drawn once, its compilation included.
    """
    measure, corpus = measures_of(model, model.config.data.corpus), model.config.data.corpus
    rows = []
    for given in settings:
        used = model.controls(name, **given)
        tokens = model.sample(seed, samples, model=name, **given).tokens
        latent = int(used.latent_steps) if name in ("ladiff", "diladiff") else None
        rows.append({
            "corpus": corpus, "model": name, "latent_steps": latent, "decode_steps": int(used.decode_steps), "temperature": float(used.temperature), "top_p": float(used.top_p),
            "samples": samples, "seconds": None, "tokens_per_second": None, "metrics": measure(tokens),
        })
    return rows


def main_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Table 1: every sampled row with its measures of quality, intervals beside them."""
    names = [m for m in ("valid", "gen_ppl", "entropy", "mauve", "repetition") if any(m in r["metrics"] for r in rows)]
    columns = ["model", "latent steps", "decoding steps", "temperature", "ms a document"] + [f"{m}{end}" for m in names for end in ("", " low", " high")]
    body = []
    for r in rows:
        if r["decode_steps"] is not None or r["model"] == "data":
            per = None if r["seconds"] is None else 1e3 * r["seconds"] / r["samples"]
            body.append([NAMES.get(r["model"], r["model"]), r["latent_steps"], r["decode_steps"], r["temperature"], per] + [c for m in names for c in cells(r["metrics"].get(m))])
    return table("main", "table 1", "Main comparison", columns, body)


def autoencoder_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Table 3: bound on the perplexity and recovery, of the denoisers and of the decoder given each row's own latent."""
    columns = ("network", "bound ppl", "low", "high", "recovery", "low", "high")
    body = [[r["model"].removesuffix(" bound"), *cells(r["metrics"].get("bound_ppl")), *cells(r["metrics"].get("recovery"))] for r in rows if "recovery" in r["metrics"]]
    return table("autoencoder", "table 3", "Bound and recovery on held-out text", columns, body, "the autoencoder's bound is given its latent, whose own cost is not in it")


def compression_tradeoff(workdirs: Sequence[str | pathlib.Path]) -> list[Figure]:
    """Figures 5 and 9: compression and augmentation over several workdirs, each with its report/results.json.

    Figure 5: recovery, bound and what is then generated against compression L / N, a series for each augmentation.
    Figure 9: what is generated against recovery, a point a workdir.

    Raises:
      ValueError: a workdir without config.json or report/results.json.
    """
    runs = []
    for workdir in map(pathlib.Path, workdirs):
        found = {}
        for name in ("config.json", "report/results.json"):
            if not (workdir / name).is_file():
                raise ValueError(f"{workdir / name} does not exist; run launch/train.py and launch/evaluate.py on {workdir} first")
            found[name] = json.loads((workdir / name).read_text())
        config, rows = found["config.json"], found["report/results.json"]["rows"]
        a = config["autoencoder"]
        augmentation = ", ".join(f"{key} {a[key]:g}" for key in ("noise", "p_feat", "p_lat", "p_drop"))
        held_out = next((r["metrics"] for r in rows if r["model"] == "autoencoder bound"), {})
        best: dict[str, Estimate] = {}
        for metric in QUALITY:
            sampled = [r["metrics"][metric] for r in rows if r["model"] in ("ladiff", "diladiff") and metric in r["metrics"]]
            if sampled and metric != "entropy":
                best[metric] = (min if metric == "gen_ppl" else max)(sampled, key=lambda e: e["value"])
        runs.append((config["data"]["length"] / config["encoder"]["num_latents"], augmentation, held_out | best))

    def lines(of_x: Callable[[tuple[float, str, dict[str, Estimate]]], float], y: str, needed: str) -> list[dict[str, Any]]:
        groups: dict[str, list[tuple[float, Estimate]]] = {}
        for run in sorted((r for r in runs if y in r[2] and needed in r[2]), key=of_x):
            groups.setdefault(run[1], []).append((of_x(run), run[2][y]))
        return [series(name, [p[0] for p in points], [p[1] for p in points]) for name, points in groups.items()]

    figures = []
    for y, label in {"recovery": "share of masked tokens recovered", "bound_ppl": "bound on the perplexity"}.items():
        figures.append(figure(f"compression_{y}", "figure 5", f"{label} against compression", "compression L / N", label, lines(lambda r: r[0], y, y), x_scale="log"))
    for metric in QUALITY:
        if any(metric in r[2] for r in runs) and metric != "entropy":
            label, note = QUALITY[metric], "the best row of LaDiff and DiLaDiff in each workdir"
            figures.append(figure(f"compression_{metric}", "figure 5", f"{label} against compression", "compression L / N", label, lines(lambda r: r[0], metric, metric), note, x_scale="log"))
            figures.append(figure(f"tradeoff_{metric}", "figure 9", f"{label} against what the autoencoder recovers", "share of masked tokens recovered", label, lines(lambda r: r[2]["recovery"]["value"], metric, "recovery"), note))
    return figures


# What the latent costs, and what LaDiff's likelihood is: table 2; METHOD section 6


def latent_overhead(model: Analysed, decode_steps: Sequence[int], *, rounds: int = 5, seed: int = 0) -> Table:
    """Table 2: time of the latent over the time of decoding, each timed alone, in turns, at the config's sampling batch."""
    size = -(-model.config.sampling.batch // model.devices) * model.devices
    key, indices = jax.random.key(seed), jnp.arange(size)
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(indices)
    prompt = jnp.full((size, model.length), model.tokenizer.mask_id, jnp.int32)
    decode, decoder = model.compiled("given"), {"decoder": model.trained("autoencoder")["decoder"]}
    rows = []
    for name, draw in (("ladiff", model.sampler.prior_latents), ("diladiff", model.sampler.student_latents)):
        if name not in model.models:
            continue
        latent, params, controls = jax.jit(draw), model.parameters(name), model.controls(name)
        z = np.asarray(latent(params, keys, controls))
        for steps in decode_steps:
            settings = model.controls(name, decode_steps=steps)
            calls = (lambda: latent(params, keys, settings), lambda: decode(decoder, key, indices, prompt, z, settings))  # noqa: B023
            seconds = np.array([[_seconds(call) for call in calls] for _ in range(rounds + 1)])[1:]  # the first one compiles
            rows.append([NAMES[name], int(settings.latent_steps), steps, float(seconds[:, 0].mean()), float(seconds[:, 1].mean()), *cells(intervals.ratio(seconds[:, 0], seconds[:, 1]))])
    columns = ("model", "latent steps", "decoding steps", "latent (s a batch)", "decoding (s a batch)", "latent / decoding", "low", "high")
    theirs = "; ".join(f"{NAMES[r['model']]} {r['latent_steps']} + {r['decode_steps']}: {r['share']:.0%}" for r in published.OVERHEAD)
    return table("latent_overhead", "table 2", "What the latent costs", columns, rows, f"batch {size}, intervals over {rounds} timed rounds. The paper, at L = 1024 and batch 32: {theirs}")


def _seconds(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - began


def prior_likelihood(model: Analysed, rows: np.ndarray, latents: np.ndarray, sigmas: Sequence[float] = (0.3, 0.6), *, draws: int = 8, seed: int = 0) -> Table:
    """LaDiff's bound on the perplexity, at several noise floors: see `ode.likelihood_bound`."""
    teacher, decoder = model.networks.teacher, model.networks.decoder
    prior, params = model.trained("ladiff"), model.trained("autoencoder")["decoder"]
    how = "none" if model.config.sampling.prior_self_conditioning == "none" else "current"
    predict = ode.clean_prediction(lambda z_t, t, c: teacher.apply({"params": prior}, z_t, t, c), how)
    schedule, body = model.sampler.schedule, []
    for sigma in sigmas:
        t_min = float(schedule.time_of_angle(jnp.arcsin(jnp.float32(sigma))))
        found = ode.likelihood_bound(
            predict, lambda x_t, z: decoder.apply({"params": params}, x_t, z), schedule, latents, rows, jax.random.key(seed), model.tokenizer,
            t_min=t_min, draws=draws, batch=min(model.config.sampling.batch, 32), rtol=1e-2, atol=1e-2,
        )
        body.append([sigma, *cells(found["bound_ppl"]), *cells(found["nats"]), *(found[name]["value"] for name in ("decoder_nats", "prior_nats", "entropy_nats"))])
    columns = ("noise floor sigma", "bound ppl", "low", "high", "nats a token", "low", "high", "decoder", "prior", "entropy of the encoder")
    note = f"{len(rows)} held-out rows; self-conditioning {how}; nats a token = decoder + prior - entropy. Each row bounds a model of its own: the one that stops at that noise."
    return table("ladiff_likelihood", "", "Bound on LaDiff's perplexity, the prior's cost counted", columns, body, note)


def mauve_table(model: Analysed, held_out: np.ndarray, *, seed: int = 0) -> Table:
    """MAUVE of every model at the config's steps against held-out text, on the trained scorer's mean hidden states."""
    scorer, params, tokenizer = model.networks.scorer, model.trained("scorer"), model.tokenizer

    def features(tokens: np.ndarray) -> np.ndarray:
        rows = likelihood.retokenize(tokens, tokenizer)
        counted = np.asarray(is_text(rows, tokenizer.eot_id))
        hidden = lambda x: scorer.apply({"params": params}, x, method="hidden")  # noqa: E731
        return mauve.mean_hidden(hidden, rows, counted, batch=model.config.sampling.batch)

    data, rows, found = features(held_out), [], {}
    for name in model.models:
        found = mauve.mauve(data, features(model.sample(seed, len(held_out), model=name).tokens))
        rows.append([NAMES[name], *cells(found), found["samples"], found["data_samples"]])
    settings = ", ".join(f"{k} {v}" for k, v in found.get("settings", {}).items())
    return table("mauve", "table 1", "MAUVE on this run's scorer", ("model", "MAUVE", "low", "high", "samples", "data samples"), rows, f"features: mean last hidden state; {settings}")


def analyse(model: Analysed, prepared: Prepared, results: Mapping[str, Any], say: Say = print, *, samples: int = 128) -> dict[str, list[Any]]:
    """Every analysis that one workdir allows: `{"figures": [...], "tables": [...]}`; what a missing stage forbids is said and left out.

    Args:
      results: the content of `results.json`.
      samples: held-out rows, latents and drawn texts of each analysis (the likelihood takes a quarter).
    """
    figures: list[Figure] = []
    tables: list[Table] = []
    rows, config = results["rows"], model.config
    held_out = validation_rows(prepared, samples)
    seed = config.evaluation.seed

    def step(name: str, needs: Sequence[str], run: Callable[[], tuple[list[Figure], list[Table]]]) -> None:
        missing = [stage for stage in needs if not model.has(stage)]
        if missing:
            say(f"{name}: left out, {' and '.join(missing)} not trained here")
            return
        began = time.perf_counter()
        try:
            found = run()
        except mauve.MissingPackage as error:
            say(f"{name}: left out, {error}")
            return
        figures.extend(found[0])
        tables.extend(found[1])
        say(f"{name}: {time.perf_counter() - began:.1f} s")

    compression = config.data.length / config.encoder.num_latents
    latents = encoded(model, held_out) if model.has("autoencoder") else np.empty(0)
    steps = sorted({min(s, model.length) for s in config.evaluation.decode_steps})
    step("rows measured", (), lambda: (
        [*speed_quality(rows), *against(rows, "decode_steps", "figures 13 to 15"), *schedule_curves(model.sampler.schedule)],
        [main_table(rows), autoencoder_table(rows), published.main_comparison(results), published.autoencoder_comparison(results, compression), published.schedule_comparison(results, config.diffusion.schedule, config.diffusion.d), published.speed_comparison(results)],
    ))
    step("recovery by masking ratio", ("autoencoder",), lambda: (recovery_by_ratio(model, held_out, latents, seed=seed), []))
    step("attention share", ("autoencoder",), lambda: ([attention_share(
        model.networks.decoder, model.trained("autoencoder")["decoder"], held_out[:64], latents[:64], model.tokenizer.mask_id, model.tokenizer.eot_id, count_bins(model.length), seed=seed
    )], []))
    step("robustness to latent noise", ("autoencoder",), lambda: robustness(model, held_out, latents, seed=seed))
    step("texts of one latent", ("autoencoder",), lambda: (latent_similarity(model, latents, sorted({steps[0], steps[len(steps) // 2], steps[-1]}), seed=seed), []))
    few = config.sampling.student_steps
    step("latent steps", ("autoencoder", "diladiff"), lambda: (
        against(sampled_rows(model, "diladiff", [{"latent_steps": n} for n in sorted({1, 2, few, 2 * few})], samples, seed=seed), "latent_steps", "figures 13 to 15"), []))
    step("temperature", ("autoencoder", "diladiff"), lambda: (
        against(sampled_rows(model, "diladiff", [{"temperature": t} for t in (0.5, 0.7, 1.0)], samples, seed=seed), "temperature", "figures 13 to 15"), []))
    step("nucleus", ("autoencoder", "diladiff"), lambda: (
        against(sampled_rows(model, "diladiff", [{"top_p": p} for p in (0.8, 0.9, 1.0)], samples, seed=seed), "top_p", "figures 13 to 15"), []))
    step("latent overhead", ("autoencoder",), lambda: ([], [latent_overhead(model, [steps[len(steps) // 2], steps[-1]], seed=seed)]))
    quarter = max(2, samples // 4)
    step("likelihood of the prior", ("autoencoder", "ladiff"), lambda: ([], [prior_likelihood(model, held_out[:quarter], latents[:quarter], seed=seed)]))
    step("MAUVE", ("scorer",), lambda: ([], [mauve_table(model, held_out, seed=seed)]))
    return {"figures": figures, "tables": tables}
