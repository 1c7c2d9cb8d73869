"""Measures every model of a workdir and its controls, and writes the report.

    python launch/evaluate.py --workdir=runs/tiny --out=runs/tiny/report
    python launch/evaluate.py --workdir=runs/tiny --out=report --config.evaluation.samples=2048
    python launch/evaluate.py --workdir=W --config.evaluation.scorer=smollm2
    python launch/evaluate.py --workdir=W --analyses=False      # only the sweep: minutes faster
    python launch/evaluate.py --workdir=W --compare=W2,W3       # compression across workdirs

evaluation.scorer is smollm2, a GGUF file, or a folder or hub name of a GPT-2 or Llama; by default
the scorer of the workdir is used. launch/install_smollm2.sh installs smollm2.

On samples it measures validity and exact likelihood (stories only), generative perplexity,
entropy and repetition, against decoding steps and seconds. On held-out text it measures the bound
on the perplexity and the recovery of masked tokens. The analyses make the paper's figures of the
decoder, the latent and the prior.

The folder then has results.json, table.txt and picture.png; analyses.json with every figure and
table as numbers; the figures as PNG and SVG in figures/; and report.html, a single file to open or
to send, in which the decoding can be replayed.
"""

import os
import pathlib
from typing import Any

import cli
from absl import flags

_CONFIG = cli.experiment_flags()
_COMPUTE_DTYPE = cli.compute_dtype_flag()
_OUT = flags.DEFINE_string("out", None, "Folder for the results; default: WORKDIR/report.")
_ANALYSES = flags.DEFINE_bool(
    "analyses",
    True,
    "Whether to run the analyses that need the models, a few minutes on two cores. Without them,"
    " the report has only the sweep, the samples and the replay of the decoding.",
)
_ANALYSIS_SAMPLES = flags.DEFINE_integer(
    "analysis_samples",
    128,
    "Number of held-out rows, of latents and of samples that each analysis uses.",
    lower_bound=8,
)
_COMPARE = flags.DEFINE_string(
    "compare",
    "",
    "Other workdirs, separated by commas, that have been evaluated into their own report/, for the"
    " figures of compression (figures 5 and 9 of arXiv 2605.23605).",
)

_REPORT_FILES = ("table.txt", "report.html", "analyses.json", "picture.png", "figures")


def main(argv: list[str]) -> None:
    from diladiff_jax.console import say
    from diladiff_jax.data import DataOptions, load_prepared
    from diladiff_jax.evaluation import NotFiniteError, analyses, evaluate, report
    from diladiff_jax.storage import bundles

    workdir = flags.FLAGS.workdir
    if bundles.is_bundle(workdir):
        raise cli.UsageError(
            f"--workdir={workdir} is a bundle, which has no text to measure with. Give the workdir"
            " that it was exported from."
        )
    out = _OUT.value or f"{workdir}/report"
    model = cli.load_model(_CONFIG, _COMPUTE_DTYPE)
    prepared = load_prepared(DataOptions.of(model.config.data), workdir)
    try:
        others = [analyses.evaluated(other) for other in _compared(_COMPARE.value)]
    except ValueError as error:
        raise cli.UsageError(f"--compare: {error}") from None
    _check_out(out)
    _note_unfinished_stages(model)

    results = evaluate(model, prepared)
    try:
        page = report.write_report(
            model,
            prepared,
            results,
            out,
            analysis_samples=_ANALYSIS_SAMPLES.value if _ANALYSES.value else None,
            others=others,
        )
    except NotFiniteError as error:
        raise cli.UsageError(
            f"a measure is not finite ({error}), so nothing was written. The model has diverged:"
            " train it again, or leave it out."
        ) from None
    say("\n".join(["", report.table(results), "", *report.summary(results), ""]))
    for name, file in (("picture", "picture.png"), ("results", "results.json")):
        say(f"{name}: {page.absolute().with_name(file)}")
    say(f"report: {page.absolute()}")


def _compared(value: str) -> list[str]:
    """The workdirs that --compare names. An existing path is one, even if it has commas."""
    if os.path.exists(value):
        return [value]
    return [path.strip() for path in value.split(",") if path.strip()]


def _check_out(out: str) -> None:
    """Checks that the folder is new, or has an earlier report."""
    from diladiff_jax.storage import bundles

    if bundles.is_bundle(out):
        raise cli.UsageError(
            f"--out={out} is a bundle, which must not change. Give another folder."
        )
    results = pathlib.Path(out) / "results.json"
    cli.check_replaceable("out", results, {"setting", "rows"}, "a result of evaluate.py")
    stray = next((name for name in _REPORT_FILES if results.with_name(name).exists()), None)
    if stray is not None and not results.exists():
        raise cli.UsageError(
            f"--out={out} has a {stray} but no results.json, so it is not an earlier report. Give"
            " another folder."
        )


def _note_unfinished_stages(model: Any) -> None:
    from diladiff_jax import config as config_lib
    from diladiff_jax.console import say

    for stage in config_lib.stages_of(model.config):
        trained, steps = model.trained_steps(stage), model.config[stage].steps
        if 0 < trained < steps:
            say(f"note: {stage} is trained for {trained} of {steps} steps; it is measured as it is")


if __name__ == "__main__":
    cli.run(main, __doc__)
