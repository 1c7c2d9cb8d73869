"""Draws texts from a trained workdir, as JSON Lines or on the terminal.

    python launch/sample.py --workdir=runs/tiny --model=diladiff --num=64 --decode_steps=8 --out=samples.jsonl
    python launch/sample.py --workdir=runs/tiny --num=4 --prompt="Mia found a [MASK] kite"

Sample i of a seed is the same whatever --num, --batch or the number of devices. With --prompt the given tokens
are held fixed, each [MASK] stands for one token, and what follows the prompt is free.
"""

import json
import pathlib

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
    settings = dict(
        model=name, batch=_BATCH.value, start=_START.value, latent_steps=_LATENT_STEPS.value, decode_steps=_DECODE_STEPS.value,
        temperature=_TEMPERATURE.value, top_p=_TOP_P.value,
    )
    if _OUT.value is not None:
        common.writable_folder("out", str(pathlib.Path(_OUT.value).absolute().parent))
    try:
        if _PROMPT.value is None:
            drawn = model.sample(_SEED.value, _NUM.value, **settings)
        else:
            drawn = model.infill(_SEED.value, [_PROMPT.value] * _NUM.value, **settings)
    except ValueError as error:
        raise common.UsageError(str(error)) from None
    controls = model.controls(name, **{k: settings[k] for k in ("latent_steps", "decode_steps", "temperature", "top_p")})
    used = {"decode_steps": int(controls.decode_steps), "temperature": float(controls.temperature), "top_p": float(controls.top_p)}
    if drawn.latents is not None:
        used["latent_steps"] = int(controls.latent_steps)
    if _OUT.value is None:
        for text in drawn.texts:
            print(text)
        return
    path = pathlib.Path(_OUT.value)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(path.name + ".tmp")
        with aside.open("w") as out:
            for i, (text, tokens) in enumerate(zip(drawn.texts, drawn.tokens, strict=True)):
                record = {"index": _START.value + i, "seed": _SEED.value, "model": name, "text": text, "tokens": tokens.tolist(), **used}
                out.write(json.dumps(record, ensure_ascii=False) + "\n")
        aside.replace(path)
    except OSError as error:
        raise common.UsageError(f"--out={path} cannot be written ({error.strerror}); give a file in a folder that can be") from None
    print(f"{len(drawn.texts)} samples of {name}: {path}")


if __name__ == "__main__":
    common.run(main, __doc__)
