"""The mathematics of the diffusion processes: pure functions and small frozen dataclasses.

Nothing here knows a network. `masking` is the discrete process over tokens, `gaussian` the
continuous one over latents with the noise schedules of `schedules`, and `meanflow` the average
velocities that the student learns.
"""

from diladiff_jax.diffusion import gaussian, masking, meanflow, schedules
from diladiff_jax.diffusion.gaussian import (
    clean_of_velocity,
    ddim_step,
    diffuse,
    euler_step,
    log_snr,
    noise_of_clean,
    velocity_of_clean,
    velocity_of_noise,
)
from diladiff_jax.diffusion.meanflow import (
    STEP_FORMS,
    adaptive_loss,
    average_velocity_target,
    renoise_time,
    rotation_from_prediction,
    sample_times,
    velocity_from_prediction,
)
from diladiff_jax.diffusion.schedules import (
    SCHEDULES,
    EmpiricalSchedule,
    LinearVarianceSchedule,
    Schedule,
    ScheduleOptions,
    TangentSchedule,
    make_schedule,
)

__all__ = [
    "SCHEDULES",
    "STEP_FORMS",
    "EmpiricalSchedule",
    "LinearVarianceSchedule",
    "Schedule",
    "ScheduleOptions",
    "TangentSchedule",
    "adaptive_loss",
    "average_velocity_target",
    "clean_of_velocity",
    "ddim_step",
    "diffuse",
    "euler_step",
    "gaussian",
    "log_snr",
    "make_schedule",
    "masking",
    "meanflow",
    "noise_of_clean",
    "renoise_time",
    "rotation_from_prediction",
    "sample_times",
    "schedules",
    "velocity_from_prediction",
    "velocity_of_clean",
    "velocity_of_noise",
]
