"""The noise schedules: figure 6 of the paper."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from diladiff_jax.diffusion import gaussian
from diladiff_jax.evaluation.figures import Figure, figure, linear, series


def schedule_curves(
    own: gaussian.Schedule | None = None, ds: Sequence[float] = (2.0, 5.0, 10.0, 15.0)
) -> list[Figure]:
    """Figure 6: alpha and log-SNR of the tangent schedule.

    Args:
      own: the experiment's schedule, shown beside the others.
      ds: values of the tangent schedule's d.
    """
    named: dict[str, gaussian.Schedule] = {f"d = {d:g}": gaussian.TangentSchedule(d) for d in ds}
    if own is not None:
        named["this experiment"] = own
    times = np.linspace(0, 1, 101)
    t, inner = jnp.asarray(times, jnp.float32), jnp.asarray(times[1:-1], jnp.float32)
    return [
        figure(
            "schedule_alpha",
            "figure 6",
            "alpha of the schedule",
            linear("time t"),
            linear("alpha(t)"),
            [series(name, times, np.asarray(s.alpha(t)).tolist()) for name, s in named.items()],
        ),
        figure(
            "schedule_log_snr",
            "figure 6",
            "Signal-to-noise ratio of the schedule",
            linear("time t"),
            linear("log(alpha^2 / sigma^2)"),
            [
                series(name, times[1:-1], np.asarray(gaussian.log_snr(s, inner)).tolist())
                for name, s in named.items()
            ],
            "infinite at both ends, which are left out",
        ),
    ]
