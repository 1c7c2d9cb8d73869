"""Samples texts from a trained workdir or bundle, as JSON Lines or to the terminal.

    python launch/sample.py --workdir=runs/tiny --num=64 --decode_steps=8 --out=samples.jsonl
    python launch/sample.py --workdir=runs/tiny --num=4 --prompt="Mia found a [MASK] kite"

Sample i of a seed does not depend on --num, --batch or the number of devices. With --prompt the
given tokens are fixed, each [MASK] is one token to fill in, and the text after the prompt is free.

Each batch is written to FILE.partial as soon as it is sampled; when all samples are there, the file
is renamed to FILE and replaces earlier samples. No other kind of file is overwritten. To
resume a stopped command, run it again: it continues after the last sample that was written.
"""

import json
import pathlib
from collections.abc import Iterator
from typing import Any

import cli
from absl import flags

_CONFIG = cli.experiment_flags()
_COMPUTE_DTYPE = cli.compute_dtype_flag()
_MODEL = flags.DEFINE_string(
    "model",
    None,
    "Model to sample: one of {models}; default: the best one that is trained.",
)
_NUM = flags.DEFINE_integer("num", 8, "Number of samples.", lower_bound=1)
_START = flags.DEFINE_integer("start", 0, "Index of the first sample.", lower_bound=0)
_SEED = flags.DEFINE_integer(
    "seed", 0, "Seed of the random draws.", lower_bound=0, upper_bound=2**63 - 1
)
_BATCH = flags.DEFINE_integer(
    "batch",
    None,
    "Texts to sample at a time; default: sampling.batch of the config.",
    lower_bound=1,
)
_LATENT_STEPS = flags.DEFINE_integer(
    "latent_steps",
    None,
    "Steps of the latent sampler; default: sampling.student_steps or sampling.prior_steps of the"
    " config. Only for models with a latent.",
    lower_bound=1,
)
_DECODE_STEPS = flags.DEFINE_integer(
    "decode_steps",
    None,
    "Decoding steps; default: sampling.decode_steps of the config.",
    lower_bound=1,
)
_TEMPERATURE = flags.DEFINE_float(
    "temperature",
    None,
    "Temperature of the token distributions; default: sampling.temperature of the config.",
    lower_bound=0,
)
_TOP_P = flags.DEFINE_float(
    "top_p",
    None,
    "Probability mass of the nucleus to sample from; default: sampling.top_p of the config.",
    lower_bound=0,
    upper_bound=1,
)
_PROMPT = flags.DEFINE_string(
    "prompt", None, "Text to keep fixed, with [MASK] for each token to fill in."
)
_SCORE = flags.DEFINE_bool(
    "score",
    False,
    "Whether to also compute each text's negative log-likelihood under the trained scorer, in nats"
    " per token, over the tokens as they were sampled (`nll` in the file).",
)
_OUT = flags.DEFINE_string(
    "out",
    None,
    "JSON Lines file to write; default: print the texts; lines after the first of a text "
    "are indented.",
)


def main(argv: list[str]) -> None:
    from diladiff_jax.stages import MODELS, sampled_models

    model = cli.load_model(_CONFIG, _COMPUTE_DTYPE)
    name = _MODEL.value or model.best
    if name is not None:
        cli.require_one_of("model", name, sampled_models())
    if name and MODELS[name].latent_steps is None and _LATENT_STEPS.value is not None:
        raise cli.UsageError(
            f"--latent_steps: got {_LATENT_STEPS.value}, but --model={name} has no latent. Remove"
            " the flag."
        )
    try:
        if _OUT.value is None:
            _print_samples(_batches(model, name))
        else:
            _write_samples(model, name, pathlib.Path(_OUT.value))
    except ValueError as error:
        raise cli.UsageError(str(error)) from None


def _overrides() -> dict[str, Any]:
    """The sampling settings that the command line changes."""
    return dict(
        latent_steps=_LATENT_STEPS.value,
        decode_steps=_DECODE_STEPS.value,
        temperature=_TEMPERATURE.value,
        top_p=_TOP_P.value,
    )


def _batches(model: Any, name: str | None, done: int = 0) -> Iterator[Any]:
    """Samples in batches, after the first `done`."""
    return model.stream(
        _SEED.value,
        _NUM.value - done,
        model=name,
        batch=_BATCH.value,
        start=_START.value + done,
        prompt=_PROMPT.value,
        score=_SCORE.value,
        **_overrides(),
    )


def _print_samples(batches: Iterator[Any]) -> None:
    from diladiff_jax.data import printable

    for batch in batches:
        lines = [printable(text).replace("\n", "\n    ") for text in batch.texts]
        if batch.nll is not None:
            lines = [f"{nll:.3f}  {text}" for nll, text in zip(batch.nll, lines, strict=True)]
        print(*lines, sep="\n", flush=True)


def _write_samples(model: Any, name: str | None, path: pathlib.Path) -> None:
    import resumable_samples

    from diladiff_jax.console import say
    from diladiff_jax.storage import bundles

    fields = {"seed": _SEED.value, "model": name, **model.sampling_settings(name, **_overrides())}
    if _PROMPT.value is not None:
        fields["prompt"] = _PROMPT.value
    if bundles.is_bundle(path.absolute().parent):
        raise cli.UsageError(
            f"--out={path} is in a bundle, which must not change. Give a file in another folder."
        )
    cli.check_replaceable(
        "out", path, {"index", "text", "tokens"}, "a file of samples", json_lines=True
    )
    resumable_samples.write(
        path,
        lambda done: _batches(model, name, done),
        start=_START.value,
        num=_NUM.value,
        fields=fields,
        origin=_origin(model, fields),
        raw_text=model.tokenizer.raw_text,
    )
    say(f"{_NUM.value} samples of {name}: {_OUT.value}")


def _origin(model: Any, fields: dict[str, Any]) -> dict[str, Any]:
    """What determines the samples: only a run with the same origin is continued."""
    from diladiff_jax.stages import STAGES

    origin = fields | {
        "workdir": str(pathlib.Path(flags.FLAGS.workdir).absolute()),
        "prompt": _PROMPT.value,
        "start": _START.value,
        "score": _SCORE.value,
        "compute_dtype": model.experiment.compute_dtype,
        "trained_steps": {stage: model.trained_steps(stage) for stage in STAGES},
    }
    return json.loads(json.dumps(origin))  # as it will be read back: tuples become lists


if __name__ == "__main__":
    cli.run(main, __doc__)
