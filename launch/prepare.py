"""Prepares the text of an experiment: ArrayRecord shards, the tokenizer and packed rows.

    python launch/prepare.py --config=configs/tiny.py:pydocs --workdir=runs/pydocs
    python launch/prepare.py --config=configs/lm1b.py --workdir=W \\
        --config.data.directory=/shared/lm1b

If the features come from a published encoder, its files are copied into the workdir too. Training
prepares whatever is missing; run this command to do it beforehand, for example on a machine with
network access. What exists already is left unchanged.
"""

import pathlib

import cli
from absl import flags

_CONFIG = cli.experiment_flags()


def main(argv: list[str]) -> None:
    from diladiff_jax.console import say
    from diladiff_jax.data import DataOptions, TokenizerOptions, prepare
    from diladiff_jax.storage import config_file, pretrained
    from diladiff_jax.storage.workdir import workdir_lock

    config, workdir = cli.load_config(_CONFIG), pathlib.Path(flags.FLAGS.workdir)
    config_file.require_own(config, workdir)
    cli.check_writable_folder("workdir", str(workdir))
    with workdir_lock(workdir) as locked:
        config_file.save(config, workdir, first=True)
        data, tokenizer = DataOptions.of(config.data), TokenizerOptions.of(config.tokenizer)
        prepared = prepare(data, tokenizer, workdir, locked=locked)
        if config.features.source == "bert":
            pretrained.adopt(config.features.path, workdir / "features")
        config_file.save(config, workdir)
    for split, counts in prepared.counts.items():
        say(f"{split}: " + ", ".join(f"{value:,} {name}" for name, value in counts.items()))
    tokenizer = prepared.tokenizer
    text_ids = int(tokenizer.sampleable.sum())
    say(f"vocabulary: {tokenizer.vocab_size} ids, {text_ids} of them text")


if __name__ == "__main__":
    cli.run(main, __doc__)
