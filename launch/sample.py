"""Draws texts from a trained workdir, as JSON Lines or on the terminal.

    python launch/sample.py --workdir=runs/tiny --model=diladiff --num=64 --decode_steps=8 --out=samples.jsonl
    python launch/sample.py --workdir=runs/tiny --num=4 --prompt="Mia found a [MASK] kite"

Sample i of a seed is the same whatever --num, --batch or the number of devices. With --prompt the given tokens
are held fixed, each [MASK] stands for one token, and what follows the prompt is free.

Each batch is written to FILE.partial as soon as it is drawn, and FILE is there when all are. A stopped command goes on
with the same command, after the last sample that was written.
"""

import json
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import common
from absl import flags

_CONFIG = common.experiment_flags()
_MODEL = flags.DEFINE_string("model", None, "diladiff, ladiff, mdlm or mdlm_long; default the best one trained.")
_NUM = flags.DEFINE_integer("num", 8, "How many.", lower_bound=1)
_START = flags.DEFINE_integer("start", 0, "Index of the first one.", lower_bound=0)
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the draw.", lower_bound=0, upper_bound=2**63 - 1)
_BATCH = flags.DEFINE_integer("batch", None, "How many at a time; default the config's.", lower_bound=1)
_LATENT_STEPS = flags.DEFINE_integer("latent_steps", None, "Steps of the latent sampler; default the config's.", lower_bound=1)
_DECODE_STEPS = flags.DEFINE_integer("decode_steps", None, "Decoding steps; default the config's.", lower_bound=1)
_TEMPERATURE = flags.DEFINE_float("temperature", None, "Default the config's.", lower_bound=0)
_TOP_P = flags.DEFINE_float("top_p", None, "Nucleus; default the config's.", lower_bound=0, upper_bound=1)
_PROMPT = flags.DEFINE_string("prompt", None, "Text to hold fixed and fill in.")
_OUT = flags.DEFINE_string("out", None, "File for JSON Lines; default the terminal, as text.")


def main(argv: list[str]) -> None:
    import diladiff_jax as dl

    model = dl.load(flags.FLAGS.workdir, config=common.experiment(_CONFIG))
    name = _MODEL.value or (model.models[-1] if model.models else None)
    given = dict(latent_steps=_LATENT_STEPS.value, decode_steps=_DECODE_STEPS.value, temperature=_TEMPERATURE.value, top_p=_TOP_P.value)

    def batches(done: int) -> Iterator[Any]:
        return model.stream(_SEED.value, _NUM.value - done, model=name, batch=_BATCH.value, start=_START.value + done, prompt=_PROMPT.value, **given)

    try:
        if _OUT.value is None:
            for drawn in batches(0):
                print(*drawn.texts, sep="\n", flush=True)
            return
        common.writable_folder("out", str(pathlib.Path(_OUT.value).absolute().parent))
        used = {"seed": _SEED.value, "model": name, "prompt": _PROMPT.value, **_used(model, name, given)}
        _write(pathlib.Path(_OUT.value), batches, used)
    except ValueError as error:
        raise common.UsageError(str(error)) from None
    print(f"{_NUM.value} samples of {name}: {_OUT.value}")


def _used(model: Any, name: str | None, given: dict[str, Any]) -> dict[str, Any]:
    """The settings of the draw as they end up; steps of a latent only where there is one."""
    controls = model.controls(name, **given)._asdict()
    names = ("decode_steps", "temperature", "top_p", *(("latent_steps", "gamma") if name in ("ladiff", "diladiff") else ()))
    return {key: controls[key].item() for key in names}


def _write(path: pathlib.Path, batches: Callable[[int], Iterator[Any]], used: dict[str, Any]) -> None:
    """Writes the samples to `path`, going on after those that an earlier run with the same settings has left in `path.partial`.

    Raises:
      UsageError: the file cannot be written.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        done = min(_left(partial, used), _NUM.value)
        with partial.open("r+" if done else "w", encoding="utf-8") as out:
            for _ in range(done):
                out.readline()
            out.seek(out.tell())
            out.truncate()
            if done:
                print(f"{done} samples are there already: {partial}", flush=True)
            for drawn in batches(done) if done < _NUM.value else ():
                for text, tokens in zip(drawn.texts, drawn.tokens, strict=True):
                    record = {"index": _START.value + done, "text": text, "tokens": tokens.tolist(), **used}
                    out.write(json.dumps(record, ensure_ascii=False) + "\n")
                    done += 1
                out.flush()
            os.fsync(out.fileno())
        partial.replace(path)
    except OSError as error:
        raise common.UsageError(f"--out={path} cannot be written ({error.strerror}); give a file in a folder that can be") from None


def _left(partial: pathlib.Path, used: dict[str, Any]) -> int:
    """How many whole records with these settings, from index --start on, an earlier run has left; 0 where they are others'."""
    if not partial.exists():
        return 0
    count = 0
    for line in partial.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
        try:
            record = json.loads(line) if line.endswith("\n") else None
        except json.JSONDecodeError:
            record = None
        if not isinstance(record, dict) or record.get("index") != _START.value + count or any(record.get(key) != value for key, value in used.items()):
            break
        count += 1
    return count


if __name__ == "__main__":
    common.run(main, __doc__)
