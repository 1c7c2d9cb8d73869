"""Measures every model of a workdir and its controls; writes results.json, table.txt and picture.png.

    python launch/evaluate.py --workdir=runs/tiny --out=runs/tiny/report
    python launch/evaluate.py --workdir=runs/tiny --out=/tmp/report --config.evaluation.samples=2048
    python launch/evaluate.py --workdir=W --config.evaluation.scorer=gpt2-large      # a folder or hub name of a GPT-2

Measured are: on samples, the oracle's validity and exact likelihood (stories), generative perplexity under the
trained scorer or a published GPT-2, entropy and repetition, against decoding steps and seconds; on held-out text, the bound on the
perplexity and the recovery of masked tokens.
"""

import common
from absl import flags

_CONFIG = common.experiment_flags()
_OUT = flags.DEFINE_string("out", None, "Folder for the results. Default: WORKDIR/report.")


def main(argv: list[str]) -> None:
    import diladiff_jax as dl
    from diladiff_jax.data.prepare import load_prepared
    from diladiff_jax.evaluation import report, sweep

    workdir = flags.FLAGS.workdir
    model = dl.load(workdir, config=common.experiment(_CONFIG))
    results = sweep.evaluate(model, load_prepared(model.config.data, workdir))
    picture = report.write(results, _OUT.value or f"{workdir}/report")
    print("\n" + report.table(results) + "\n")
    for line in report.summary(results):
        print(line)
    print(f"\npicture: {picture.absolute()}\nresults: {picture.absolute().with_name('results.json')}")


if __name__ == "__main__":
    common.run(main, __doc__)
