"""Results, findings and samples as an evaluation makes them, with hostile text among them."""

import numpy as np

from diladiff_jax.evaluation import figures
from diladiff_jax.evaluation.analyses import published, sweep_curves
from diladiff_jax.stages import MODELS

HOSTILE = (
    "</script><script>document.title='owned'</script><!-- \"quoted\" 'single' & <b>bold</b>"
    " \u2028 \u202e 🦊 \x00 ]]> $title ${style} {{ title }} {% raw %} {# note #}"
)
STEPS, LENGTH = 4, 9


def estimate(value, half=0.1):
    return {"value": value, "low": value - half, "high": value + half}


def make_results(models=("mdlm", "diladiff")):
    """Models at three numbers of steps, data and a bound, with an oracle and a scorer."""
    rows = [("data", None, 1.0), ("autoencoder bound", None, None)]
    rows += [
        (model, steps, quality * steps / 8)
        for model, quality in zip(models, np.linspace(0.2, 0.8, len(models)), strict=True)
        for steps in (2, 4, 8)
    ]
    return {
        "setting": {
            "length": LENGTH,
            "seed": 0,
            "trained_steps": {"mdlm": 6, "scorer": 0},
            "scorer": None,
            "device": "cpu <&>",
        },
        "rows": [
            {
                "corpus": "stories",
                "model": model,
                "latent_steps": 5 if model == "diladiff" else None,
                "decode_steps": steps,
                "temperature": steps and 1.0,
                "top_p": steps and 0.9,
                "samples": 64,
                "seconds": steps and 0.1 * steps,
                "tokens_per_second": steps and 100.0,
                "metrics": {"bound_ppl": estimate(3.0), "recovery": estimate(0.6)}
                if valid is None
                else {
                    "valid": estimate(valid),
                    "entropy": estimate(2.5),
                    "gen_ppl": estimate(30.0, 4.0),
                },
            }
            for model, steps, valid in rows
        ],
    }


def make_found(results):
    """Figures with and without intervals, on both scales, of few and many points; odd tables."""
    rows, curve = results["rows"], np.linspace(0, 1, 101)
    drawn = [
        *sweep_curves.speed_quality(rows),
        *sweep_curves.quality_by_setting(rows, "decode_steps", "figures 13 to 15"),
        figures.figure(
            "curve",
            "figure 6",
            'A curve of "many" points <&>',
            figures.linear("time t"),
            figures.linear("alpha(t)"),
            [figures.series("d = 2", curve, (1 - curve).tolist())],
            "a note <i>",
        ),
        figures.figure(
            "steep",
            "",
            "Log on both",
            figures.log("u"),
            figures.log("v"),
            [
                figures.series(
                    "measured", [0.01, 0.5, 30], [estimate(2.0), estimate(20.0), estimate(300.0)]
                )
            ],
        ),
    ]
    tables = [
        sweep_curves.main_table(rows),
        sweep_curves.autoencoder_table(rows),
        published.main_comparison(results),
        published.autoencoder_comparison(results, 2.0),
        figures.table(
            "odd",
            "",
            "Odd cells",
            ("name", "value", "low", "high", "count", "words"),
            [
                ["a", 0.123456, 0.1, 0.2, 7, HOSTILE],
                ["b", None, None, None, None, ""],
                ["c", 1234.5678, None, None, -3, "x" * 40],
            ],
            "note",
        ),
    ]
    return figures.Findings(drawn, tables)


def make_samples():
    """Two models with two samples each, with an end of text, a line break and hostile text."""
    tokens = [
        [" Mia", " won", " a", " red", " kite", ".", "\n", HOSTILE, None],
        ["na", "ïve", " 🦊", " fox", ".", None, None, None, None],
    ]
    orders = [[0, 2, 1, 3, 1, 0, 2, 1, 3], [-1, 0, 1, 2, 3, 3, 3, 3, 0]]
    return [
        {
            "model": model,
            "title": MODELS[model].title,
            "latent_steps": latent,
            "decode_steps": STEPS,
            "temperature": 1.0,
            "top_p": 0.9,
            "samples": [
                {
                    "index": i,
                    "seed": 3,
                    "text": "".join(t or "" for t in tokens[i]),
                    "entropy": 2.125,
                    "valid": valid,
                    "fault": "" if valid else "breaks name",
                    "tokens": tokens[i],
                    "unmasked_at": orders[i],
                }
                for i, valid in enumerate((True, False))
            ],
        }
        for model, latent in (("mdlm", None), ("diladiff", 5))
    ]
