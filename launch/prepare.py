"""Prepares an experiment's text: corpus to ArrayRecord shards, tokenizer, packed rows, and the published
encoder if features are its. Training does the same when needed.

    python launch/prepare.py --config=configs/tiny.py:pydocs --workdir=runs/pydocs
    python launch/prepare.py --config=configs/lm1b.py --workdir=W --config.data.directory=/shared/lm1b

What is there already is left as it is.
"""

import pathlib

import cli
from absl import flags

_CONFIG = cli.experiment_flags()


def main(argv: list[str]) -> None:
    from diladiff_jax.data import DataOptions, TokenizerOptions, prepare
    from diladiff_jax.storage import config_file, pretrained
    from diladiff_jax.storage.workdir import workdir_lock

    config, workdir = cli.experiment(_CONFIG), pathlib.Path(flags.FLAGS.workdir)
    config_file.require_own(config, workdir)
    cli.writable_folder("workdir", str(workdir))
    with workdir_lock(workdir) as locked:
        config_file.save(config, workdir, first=True)
        data, tokenizer = DataOptions.of(config.data), TokenizerOptions.of(config.tokenizer)
        prepared = prepare(data, tokenizer, workdir, locked=locked)
        if config.features.source == "bert":
            pretrained.adopt(config.features.path, workdir / "features")
        config_file.save(config, workdir)
    for split, counts in prepared.counts.items():
        print(f"{split}: " + ", ".join(f"{value:,} {name}" for name, value in counts.items()))
    print(
        f"vocabulary: {prepared.tokenizer.vocab_size} ids, {int(prepared.tokenizer.sampleable.sum())} of them text"
    )


if __name__ == "__main__":
    cli.run(main, __doc__)
