"""Measures every model of a workdir and its controls, makes the paper's figures and tables, and writes a report.

    python launch/evaluate.py --workdir=runs/tiny --out=runs/tiny/report
    python launch/evaluate.py --workdir=runs/tiny --out=/tmp/report --config.evaluation.samples=2048
    python launch/evaluate.py --workdir=W --config.evaluation.scorer=gpt2-large      # a folder or hub name of a GPT-2
    python launch/evaluate.py --workdir=W --analyses=False                           # the sweep alone, minutes sooner
    python launch/evaluate.py --workdir=W --compare=W2,W3                            # and compression over several workdirs

Written are results.json, table.txt and picture.png; run.json with every figure and table as numbers, the
figures as PNG and SVG under figures/; and report.html, one file to open or to send, with a viewer of the decoding.

Measured are: on samples, the oracle's validity and exact likelihood (stories), generative perplexity under the
trained scorer or a published GPT-2, entropy and repetition, against decoding steps and seconds; on held-out text, the bound on the
perplexity and the recovery of masked tokens; and by the analyses what the paper's figures show of the decoder, the latent and the prior.
"""

import pathlib

import cli
from absl import flags

_CONFIG = cli.experiment_flags()
_OUT = flags.DEFINE_string("out", None, "Folder for the results. Default: WORKDIR/report.")
_ANALYSES = flags.DEFINE_bool(
    "analyses",
    True,
    "Whether to run the analyses that need the models themselves, some minutes on two cores. Without, the report has the sweep, the samples and the viewer.",
)
_ANALYSIS_SAMPLES = flags.DEFINE_integer(
    "analysis_samples",
    128,
    "Held-out rows, latents and drawn texts of each analysis.",
    lower_bound=8,
)
_COMPARE = flags.DEFINE_list(
    "compare",
    [],
    "Other workdirs, evaluated before into their own report/, for the figures of compression (the paper's 5 and 9).",
)


def main(argv: list[str]) -> None:
    import diladiff_jax as dl
    from diladiff_jax import config as config_lib
    from diladiff_jax.data import DataOptions, load_prepared
    from diladiff_jax import evaluation
    from diladiff_jax.evaluation import analyses, report
    from diladiff_jax.storage import bundles

    workdir = flags.FLAGS.workdir
    if bundles.is_bundle(workdir):
        raise cli.UsageError(
            f"--workdir={workdir} is a bundle, which holds no text to measure with; give the workdir that it was made from"
        )
    out = _OUT.value or f"{workdir}/report"
    model = dl.load(workdir, config=cli.experiment(_CONFIG))
    prepared = load_prepared(DataOptions.of(model.config.data), workdir)
    try:
        others = [analyses.evaluated(other) for other in _COMPARE.value]
    except ValueError as error:
        raise cli.UsageError(f"--compare: {error}") from None
    if bundles.is_bundle(out):
        raise cli.UsageError(f"--out={out} is a bundle, which stays as it is; give another folder")
    folder = pathlib.Path(out)
    cli.replaceable("out", folder / "results.json", {"setting", "rows"}, "results of evaluate.py")
    stray = next(
        (
            name
            for name in ("table.txt", "report.html", "analyses.json", "picture.png", "figures")
            if (folder / name).exists()
        ),
        None,
    )
    if stray is not None and not (folder / "results.json").exists():
        raise cli.UsageError(
            f"--out={out} has a {stray} and no results.json: it is not an earlier report; give another folder"
        )
    for stage in config_lib.stages_of(model.config):
        if 0 < model.trained_steps(stage) < model.config[stage].steps:
            print(
                f"note: {stage} stands at step {model.trained_steps(stage)} of {model.config[stage].steps}, and is measured as it is",
                flush=True,
            )

    results = evaluation.evaluate(model, prepared)
    try:
        picture = report.write(results, out)  # at once: the sweep is not lost if an analysis fails
    except evaluation.NotFiniteError as error:
        raise cli.UsageError(
            f"a measure is no finite number ({error}), and nothing was written; what was measured has diverged: train it anew, or leave it out"
        ) from None
    if _ANALYSES.value:
        found = analyses.analyse(model, prepared, results, samples=_ANALYSIS_SAMPLES.value)
    else:
        found = analyses.analyse_rows(model, results)
    if others:
        found.figures += analyses.compression_tradeoff([(model.config.to_dict(), results), *others])
    page = report.write_page(
        results, found, report.sample_models(model, seed=model.config.evaluation.seed), out
    )
    print("\n" + report.table(results) + "\n")
    for line in report.summary(results):
        print(line)
    print(
        f"\npicture: {picture.absolute()}\nresults: {picture.absolute().with_name('results.json')}\nreport: {page.absolute()}"
    )


if __name__ == "__main__":
    cli.run(main, __doc__)
