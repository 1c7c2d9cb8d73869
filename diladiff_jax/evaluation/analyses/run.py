"""Every analysis of the paper (METHOD sections 6 and 8) that one workdir allows, as figures and tables of one form (`forms`).

The analyses themselves stand in `row_analyses` (of rows of `results.json`), `decoder_analyses` and `generation_analyses` (of a
trained model); this decides which apply.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from diladiff_jax.data import Prepared
from diladiff_jax.evaluation.analyses import decoder as decoder
from diladiff_jax.evaluation.analyses import generation as generation
from diladiff_jax.evaluation.analyses import published, sweep_curves
from diladiff_jax.evaluation.analyses.generation import Analysed
from diladiff_jax.evaluation.figures import Figure, Table, table
from diladiff_jax.evaluation.measures import mauve
from diladiff_jax.evaluation.sweep import encoded, validation_rows

Say = Callable[[str], None]
Found = dict[str, list[Any]]
"""`{"figures": [figure], "tables": [table]}`, the content of `analyses.json`; see `forms.SCHEMA`."""


def of_rows(model: Analysed, results: Mapping[str, Any]) -> Found:
    """What the rows of `results.json` show by themselves, in seconds: the sweep's curves, the main tables, and the published figures beside."""
    rows, config = results["rows"], model.config
    compression = config.data.length / config.encoder.num_latents
    return {
        "figures": [
            *sweep_curves.speed_quality(rows),
            *sweep_curves.against(rows, "decode_steps", "figures 13 to 15"),
            *generation.schedule_curves(model.sampler.schedule),
        ],
        "tables": [
            sweep_curves.main_table(rows),
            sweep_curves.autoencoder_table(rows),
            published.main_comparison(results),
            published.autoencoder_comparison(results, compression),
            published.schedule_comparison(results, config.diffusion.schedule, config.diffusion.d),
            published.speed_comparison(results),
        ],
    }


def analyse(
    model: Analysed,
    prepared: Prepared,
    results: Mapping[str, Any],
    say: Say = print,
    *,
    samples: int = 128,
) -> Found:
    """`of_rows`, and every analysis that needs the model itself; what a missing stage or package forbids is said and left out.

    Args:
      results: the content of `results.json`.
      samples: held-out rows, latents and drawn texts of each analysis (the likelihood takes a quarter).
    """
    found, config = of_rows(model, results), model.config
    held_out = validation_rows(prepared, samples)
    seed = config.evaluation.seed
    left_out: list[list[str]] = []

    def leave_out(name: str, why: str) -> None:
        left_out.append([name, why])
        say(f"{name}: left out, {why}")

    def step(
        name: str, needs: Sequence[str], run: Callable[[], tuple[list[Figure], list[Table]]]
    ) -> None:
        missing = [stage for stage in needs if not model.has(stage)]
        if missing:
            leave_out(name, f"{' and '.join(missing)} not trained here")
            return
        began = time.perf_counter()
        try:
            figures, tables = run()
        except mauve.MissingPackage as error:
            leave_out(name, str(error))
            return
        found["figures"].extend(figures)
        found["tables"].extend(tables)
        say(f"{name}: {time.perf_counter() - began:.1f} s")

    def varied(setting: str, values: Sequence[float]) -> tuple[list[Figure], list[Table]]:
        drawn = generation.sampled_rows(
            model, "diladiff", [{setting: value} for value in values], samples, seed=seed
        )
        return sweep_curves.against(drawn, setting, "figures 13 to 15"), []

    def attention() -> tuple[list[Figure], list[Table]]:
        params, tokenizer = model.trained("autoencoder")["decoder"], model.tokenizer
        counts = decoder.count_bins(model.length)
        shares = decoder.attention_share(
            model.networks.decoder,
            params,
            held_out[:64],
            latents[:64],
            tokenizer.mask_id,
            tokenizer.eot_id,
            counts,
            seed=seed,
        )
        return [shares], []

    latents = encoded(model, held_out) if model.has("autoencoder") else np.empty(0)
    steps = sorted({min(s, model.length) for s in config.evaluation.decode_steps})
    few, quarter = config.sampling.student_steps, max(2, samples // 4)
    step(
        "recovery by masking ratio",
        ("autoencoder",),
        lambda: (decoder.recovery_by_ratio(model, held_out, latents, seed=seed), []),
    )
    step("attention share", ("autoencoder",), attention)
    step(
        "robustness to latent noise",
        ("autoencoder",),
        lambda: decoder.robustness(model, held_out, latents, seed=seed),
    )
    step(
        "texts of one latent",
        ("autoencoder",),
        lambda: (
            generation.latent_similarity(
                model, latents, sorted({steps[0], steps[len(steps) // 2], steps[-1]}), seed=seed
            ),
            [],
        ),
    )
    step(
        "latent steps",
        ("autoencoder", "diladiff"),
        lambda: varied("latent_steps", sorted({1, 2, few, 2 * few})),
    )
    step("temperature", ("autoencoder", "diladiff"), lambda: varied("temperature", (0.5, 0.7, 1.0)))
    step("nucleus", ("autoencoder", "diladiff"), lambda: varied("top_p", (0.8, 0.9, 1.0)))
    step(
        "latent samplers",
        ("autoencoder", "ladiff", "diladiff"),
        lambda: ([], [generation.latent_samplers(model, samples, seed=seed)]),
    )
    step(
        "latent overhead",
        ("autoencoder",),
        lambda: (
            [],
            [
                generation.latent_overhead(
                    model, sorted({steps[len(steps) // 2], steps[-1]}), seed=seed
                )
            ],
        ),
    )
    step(
        "likelihood of the prior",
        ("autoencoder", "ladiff"),
        lambda: (
            [],
            [generation.prior_likelihood(model, held_out[:quarter], latents[:quarter], seed=seed)],
        ),
    )
    step("MAUVE", ("scorer",), lambda: ([], [generation.mauve_table(model, held_out, seed=seed)]))
    if left_out:
        found["tables"].append(table("left_out", "", "Left out", ("analysis", "why"), left_out))
    return found
