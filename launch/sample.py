"""Draws texts from a trained workdir, as JSON Lines or on the terminal.

    python launch/sample.py --workdir=runs/tiny --model=diladiff --num=64 --decode_steps=8 --out=samples.jsonl
    python launch/sample.py --workdir=runs/tiny --num=4 --prompt="Mia found a [MASK] kite"

Sample i of a seed is the same whatever --num, --batch or the number of devices. With --prompt the given tokens
are held fixed, each [MASK] stands for one token, and what follows the prompt is free.

Each batch is written to FILE.partial as soon as it is drawn, and FILE is there when all are, in place of samples that were
there before; a file of anything else is not overwritten. A stopped command goes on with the same command, after the last
sample that was written.
"""

import contextlib
import fcntl
import json
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

import cli
from absl import flags

_CONFIG = cli.experiment_flags()
_MODEL = flags.DEFINE_string(
    "model", None, "diladiff, ladiff, mdlm or mdlm_long; default the best one trained."
)
_NUM = flags.DEFINE_integer("num", 8, "How many.", lower_bound=1)
_START = flags.DEFINE_integer("start", 0, "Index of the first one.", lower_bound=0)
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the draw.", lower_bound=0, upper_bound=2**63 - 1)
_BATCH = flags.DEFINE_integer(
    "batch", None, "How many at a time; default the config's.", lower_bound=1
)
_LATENT_STEPS = flags.DEFINE_integer(
    "latent_steps", None, "Steps of the latent sampler; default the config's.", lower_bound=1
)
_DECODE_STEPS = flags.DEFINE_integer(
    "decode_steps", None, "Decoding steps; default the config's.", lower_bound=1
)
_TEMPERATURE = flags.DEFINE_float("temperature", None, "Default the config's.", lower_bound=0)
_TOP_P = flags.DEFINE_float(
    "top_p", None, "Nucleus; default the config's.", lower_bound=0, upper_bound=1
)
_PROMPT = flags.DEFINE_string("prompt", None, "Text to hold fixed and fill in.")
_SCORE = flags.DEFINE_bool(
    "score",
    False,
    "Whether the trained scorer judges each text too: `nll`, nats a token, of the tokens as they were drawn.",
)
_OUT = flags.DEFINE_string(
    "out",
    None,
    "File for JSON Lines; default the terminal, as text, whose further lines are indented.",
)


def main(argv: list[str]) -> None:
    import diladiff_jax as dl
    from diladiff_jax import config as config_lib
    from diladiff_jax.data import printable
    from diladiff_jax.sampling.pipeline import MODELS
    from diladiff_jax.storage import bundles

    model = dl.load(flags.FLAGS.workdir, config=cli.experiment(_CONFIG))
    name = _MODEL.value or (model.models[-1] if model.models else None)
    if name is not None and name not in MODELS:
        raise cli.UsageError(f"--model is {name!r}; it must be one of {', '.join(MODELS)}")
    if name in ("mdlm", "mdlm_long") and _LATENT_STEPS.value is not None:
        raise cli.UsageError(
            f"--latent_steps is {_LATENT_STEPS.value}, and --model={name} has no latent; leave it away"
        )
    given = dict(
        latent_steps=_LATENT_STEPS.value,
        decode_steps=_DECODE_STEPS.value,
        temperature=_TEMPERATURE.value,
        top_p=_TOP_P.value,
    )

    def batches(done: int) -> Iterator[Any]:
        return model.stream(
            _SEED.value,
            _NUM.value - done,
            model=name,
            batch=_BATCH.value,
            start=_START.value + done,
            prompt=_PROMPT.value,
            score=_SCORE.value,
            **given,
        )

    try:
        if _OUT.value is None:
            for drawn in batches(0):
                texts = [printable(text).replace("\n", "\n    ") for text in drawn.texts]
                print(
                    *(
                        texts
                        if drawn.nll is None
                        else (
                            f"{nll:.3f}  {text}" for nll, text in zip(drawn.nll, texts, strict=True)
                        )
                    ),
                    sep="\n",
                    flush=True,
                )
            return
        path = pathlib.Path(_OUT.value)
        used = {"seed": _SEED.value, "model": name, **_used(model, name, given)}
        if bundles.is_bundle(path.absolute().parent):
            raise cli.UsageError(
                f"--out={path} is in a bundle, which stays as it is; give a file in another folder"
            )
        cli.replaceable("out", path, {"index", "text", "tokens"}, "samples", lines=True)
        # What else decides the samples: records of anything else are not gone on from.
        origin = {
            "workdir": str(pathlib.Path(flags.FLAGS.workdir).absolute()),
            "start": _START.value,
            "prompt": _PROMPT.value,
            "score": _SCORE.value,
        }
        origin |= {
            "trained_steps": {
                stage: model.trained_steps(stage)
                for stage in config_lib.STAGES + config_lib.BASELINES
            },
            "sampling": model.config.sampling.to_dict() | {"batch": None},
        }
        origin = json.loads(json.dumps(origin))  # as it will be read back: a sequence as a list
        _write(path, batches, used, used | origin)
    except ValueError as error:
        raise cli.UsageError(str(error)) from None
    print(f"{_NUM.value} samples of {name}: {_OUT.value}")


def _used(model: Any, name: str | None, given: dict[str, Any]) -> dict[str, Any]:
    """The settings of the draw as they end up; steps of a latent only where there is one."""
    controls = model.controls(name, **given)._asdict()
    names = (
        "decode_steps",
        "temperature",
        "top_p",
        *(("latent_steps", "gamma") if name in ("ladiff", "diladiff") else ()),
    )
    how = model.config.sampling
    words = {"order": how.order, "refresh_every": how.refresh_every} | (
        {"threshold": how.threshold} if how.order == "threshold" else {}
    )
    words |= (
        {"skip_layers": list(how.skip_layers), "skip_from": how.skip_from}
        if how.skip_layers
        else {}
    )
    return (
        {key: controls[key].item() for key in names}
        | words
        | ({"prompt": _PROMPT.value} if _PROMPT.value is not None else {})
    )


def _write(
    path: pathlib.Path,
    batches: Callable[[int], Iterator[Any]],
    used: dict[str, Any],
    origin: dict[str, Any],
) -> None:
    """Writes the samples to `path`, going on after those that an earlier run of the same `origin` has left in `path.partial`.

    Raises:
      UsageError: the file cannot be written.
    """
    from diladiff_jax import files

    partial, about = (
        path.with_name(path.name + ending) for ending in (".partial", ".partial.json")
    )
    try:
        with partial.open("a+b") as out:
            _lock(out, partial)
            done, size = _left(partial, about, origin)
            out.truncate(size)
            if not done:
                files.atomic_write_text(
                    about, json.dumps(origin)
                )  # only now: what another run had left must not be taken for this one's
            else:
                print(f"{done} samples are there already: {partial}", flush=True)
            for drawn in batches(done) if done < _NUM.value else ():
                for i, (text, tokens) in enumerate(zip(drawn.texts, drawn.tokens, strict=True)):
                    record = {
                        "index": _START.value + done,
                        "text": text,
                        "tokens": tokens.tolist(),
                        **({} if drawn.nll is None else {"nll": float(drawn.nll[i])}),
                        **used,
                    }
                    out.write((json.dumps(record, ensure_ascii=False) + "\n").encode())
                    done += 1
                out.flush()
            os.fsync(out.fileno())
            partial.replace(path)  # while it is held
            about.unlink(missing_ok=True)
    except OSError as error:
        raise cli.UsageError(
            f"--out={path} cannot be written ({error.strerror}); give a file in a folder that can be"
        ) from None


def _lock(out: BinaryIO, partial: pathlib.Path) -> None:
    """Holds the file until it is closed; file systems without locks go without.

    Raises:
      UsageError: another process has it.
    """
    with contextlib.suppress(OSError):
        try:
            fcntl.flock(out, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise cli.UsageError(
                f"another sample.py writes to {partial}; wait for it or end it, or give another --out"
            ) from None
    if not partial.exists() or os.fstat(out.fileno()).st_ino != partial.stat().st_ino:
        raise cli.UsageError(
            f"another sample.py has just finished {partial.with_suffix('')}; give another --out, or the same command again"
        )


def _left(partial: pathlib.Path, about: pathlib.Path, origin: dict[str, Any]) -> tuple[int, int]:
    """How many whole records an earlier run of the same origin has left, at most --num, and the bytes they take.

    Raises:
      UsageError: the file is another's.
    """
    if not partial.stat().st_size:
        return 0, 0
    try:
        others = json.loads(about.read_text())
        if others != origin:
            key = next((key for key in origin if others.get(key) != origin[key]), "settings")
            raise cli.UsageError(
                f"{partial} has samples of another command (its {key} is {str(others.get(key))[:100]}); let that one go on, or remove the file"
            )
    except (OSError, ValueError, RecursionError, AttributeError) as error:
        if isinstance(error, cli.UsageError):
            raise
        raise cli.UsageError(
            f"{partial} is there, and {about.name} beside it does not say what it is; remove it, or give another --out"
        ) from None
    count = size = 0
    with partial.open("rb") as lines:
        for line in lines:  # in bytes, a line ends at a newline and nowhere else
            try:
                whole = line.endswith(b"\n") and json.loads(line)["index"] == _START.value + count
            except (ValueError, KeyError, TypeError):
                whole = False
            if not whole or count == _NUM.value:
                break
            count, size = count + 1, size + len(line)
    return count, size


if __name__ == "__main__":
    cli.run(main, __doc__)
