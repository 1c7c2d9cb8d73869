"""Every analysis of the paper that one workdir allows, as figures and tables."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence

import numpy as np

from diladiff_jax.data import Prepared
from diladiff_jax.evaluation.analyses import published, sweep_curves
from diladiff_jax.evaluation.analyses.attention import attention_share
from diladiff_jax.evaluation.analyses.latent_cost import latent_overhead
from diladiff_jax.evaluation.analyses.latent_noise import robustness
from diladiff_jax.evaluation.analyses.likelihood import prior_likelihood
from diladiff_jax.evaluation.analyses.masked_counts import count_grid, recovery_by_ratio
from diladiff_jax.evaluation.analyses.mauve import mauve_table
from diladiff_jax.evaluation.analyses.sampling_settings import latent_samplers, sampled_rows
from diladiff_jax.evaluation.analyses.schedules import schedule_curves
from diladiff_jax.evaluation.analyses.similarity import latent_similarity
from diladiff_jax.evaluation.figures import Findings, table
from diladiff_jax.evaluation.held_out import validation_rows
from diladiff_jax.evaluation.measures.mauve import MissingPackage
from diladiff_jax.evaluation.results import Results
from diladiff_jax.model import Model
from diladiff_jax.stages import MODELS, TRUE_LATENT

_SWEEP_FIGURES = "figures 13 to 15"
_ATTENTION_ROWS = 64


class Context:
    """What an analysis of a trained model reads.

    Attributes:
      model: the workdir's models.
      samples: number of texts and latents per analysis.
      seed: of everything random.
      rows: held-out rows, int32 `[n, L]` with n at most `samples`.
    """

    def __init__(self, model: Model, prepared: Prepared, samples: int) -> None:
        self.model, self.samples = model, samples
        self.seed: int = model.config.evaluation.seed
        self.rows = validation_rows(prepared, samples)

    @functools.cached_property
    def latents(self) -> np.ndarray:
        """The latents of the rows, `[n, N, D_lat]`."""
        return np.asarray(self.model.encode(self.rows))

    @property
    def decode_steps(self) -> list[int]:
        """The sweep's numbers of decoding steps, up to one per token, in ascending order."""
        settings = self.model.config.evaluation
        return sorted({min(steps, self.model.length) for steps in settings.decode_steps})


@dataclasses.dataclass(frozen=True)
class Analysis:
    """One analysis of a trained model.

    Attributes:
      name: what progress lines call it.
      stages: the stages that must be trained.
      run: makes its figures and tables.
    """

    name: str
    stages: tuple[str, ...]
    run: Callable[[Context], Findings]


def _recovery(c: Context) -> Findings:
    return Findings(recovery_by_ratio(c.model, c.rows, c.latents, seed=c.seed))


def _attention(c: Context) -> Findings:
    found = attention_share(
        c.model.networks.decoder,
        c.model.parameters(TRUE_LATENT.name)["decoder"],
        c.rows[:_ATTENTION_ROWS],
        c.latents[:_ATTENTION_ROWS],
        c.model.tokenizer,
        count_grid(c.model.length),
        seed=c.seed,
    )
    return Findings([found])


def _similarity(c: Context) -> Findings:
    steps = c.decode_steps
    few = sorted({steps[0], steps[len(steps) // 2], steps[-1]})
    return Findings(latent_similarity(c.model, c.latents, few, seed=c.seed))


def _by_setting(c: Context, setting: str, values: Sequence[float]) -> Findings:
    """DiLaDiff's quality at several values of one setting."""
    settings = [{setting: value} for value in values]
    rows = sampled_rows(c.model, "diladiff", settings, c.samples, seed=c.seed)
    return Findings(sweep_curves.quality_by_setting(rows, setting, _SWEEP_FIGURES))


def _latent_step_values(c: Context) -> list[int]:
    few = c.model.config.sampling.student_steps
    return sorted({1, 2, few, 2 * few})


def _overhead(c: Context) -> Findings:
    steps = c.decode_steps
    few = sorted({steps[len(steps) // 2], steps[-1]})
    return Findings(tables=[latent_overhead(c.model, few, seed=c.seed)])


def _likelihood(c: Context) -> Findings:
    rows = max(2, c.samples // 4)  # the ODE takes far longer than the other analyses
    found = prior_likelihood(c.model, c.rows[:rows], c.latents[:rows], seed=c.seed)
    return Findings(tables=[found])


_DECODER, _PRIOR, _STUDENT = (
    MODELS[name].stages for name in (TRUE_LATENT.name, "ladiff", "diladiff")
)
_BOTH = (*_PRIOR, *_STUDENT)

ANALYSES = (
    Analysis("recovery by masking ratio", _DECODER, _recovery),
    Analysis("attention share", _DECODER, _attention),
    Analysis(
        "robustness to latent noise",
        _DECODER,
        lambda c: robustness(c.model, c.rows, c.latents, seed=c.seed),
    ),
    Analysis("texts of one latent", _DECODER, _similarity),
    Analysis(
        "latent steps", _STUDENT, lambda c: _by_setting(c, "latent_steps", _latent_step_values(c))
    ),
    Analysis("temperature", _STUDENT, lambda c: _by_setting(c, "temperature", (0.5, 0.7, 1.0))),
    Analysis("nucleus", _STUDENT, lambda c: _by_setting(c, "top_p", (0.8, 0.9, 1.0))),
    Analysis(
        "latent samplers",
        _BOTH,
        lambda c: Findings(tables=[latent_samplers(c.model, c.samples, seed=c.seed)]),
    ),
    Analysis("latent overhead", _PRIOR, _overhead),
    Analysis("likelihood of the prior", _PRIOR, _likelihood),
    Analysis(
        "MAUVE",
        ("scorer",),
        lambda c: Findings(tables=[mauve_table(c.model, c.rows, seed=c.seed)]),
    ),
)
"""Every analysis of a trained model, in the order in which figures and tables are shown."""


def analyse_rows(model: Model, results: Results) -> Findings:
    """What a sweep shows without sampling again.

    Args:
      model: the workdir's models; their parameters are not read.
      results: the content of `results.json`.

    Returns:
      The sweep's curves and tables, the schedule, and the comparisons with the paper.
    """
    rows, config = results["rows"], model.config
    compression = config.data.length / config.encoder.num_latents
    return Findings(
        [
            *sweep_curves.speed_quality(rows),
            *sweep_curves.quality_by_setting(rows, "decode_steps", _SWEEP_FIGURES),
            *schedule_curves(model.sampler.schedule),
        ],
        [
            sweep_curves.main_table(rows),
            sweep_curves.autoencoder_table(rows),
            published.main_comparison(results),
            published.autoencoder_comparison(results, compression),
            published.schedule_comparison(results, config.diffusion.schedule, config.diffusion.d),
            published.speed_comparison(results),
        ],
    )


def analyse(
    model: Model,
    prepared: Prepared,
    results: Results,
    say: Callable[[str], None] = print,
    *,
    samples: int = 128,
) -> Findings:
    """`analyse_rows` and every analysis in `ANALYSES` that the workdir allows.

    An analysis is left out if a stage is not trained or a package is not installed; a table lists
    these with the reason.

    Args:
      model: the workdir's models.
      prepared: its data, for held-out rows.
      results: the content of `results.json`.
      say: takes lines that report progress.
      samples: held-out rows, latents and sampled texts of each analysis; the likelihood uses a
        quarter of them.
    """
    found, context = analyse_rows(model, results), Context(model, prepared, samples)
    left_out: list[list[str]] = []
    for analysis in ANALYSES:
        began = time.perf_counter()
        missing = [stage for stage in analysis.stages if not model.has(stage)]
        try:
            if missing:
                raise _LeftOut(f"{' and '.join(missing)} not trained here")
            found.extend(analysis.run(context))
        except (_LeftOut, MissingPackage) as reason:
            left_out.append([analysis.name, str(reason)])
            say(f"{analysis.name}: left out, {reason}")
        else:
            say(f"{analysis.name}: {time.perf_counter() - began:.1f} s")
    if left_out:
        found.tables.append(table("left_out", "", "Left out", ("analysis", "reason"), left_out))
    return found


class _LeftOut(Exception):
    """An analysis does not apply to the workdir."""
