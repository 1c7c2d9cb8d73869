"""The paper's numbers (arXiv 2605.23605), for comparison with a run's own."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

CORPUS, LENGTH = "openwebtext", 1024


@dataclasses.dataclass(frozen=True)
class MainRow:
    """A row of the main comparison: OpenWebText, L = 1024, scored by GPT-2 large.

    Attributes:
      name: what the paper calls it.
      model: the model of this project, or None if the method is not part of it.
    """

    name: str
    model: str | None = None
    latent_steps: int | None = None
    decode_steps: int | None = None
    temperature: float = 1.0
    gen_ppl: float | None = None
    entropy: float | None = None
    mauve: float | None = None


MAIN = (
    MainRow("data", "data", gen_ppl=14.8, entropy=5.44, mauve=1.00),
    MainRow("MDLM", "mdlm", None, 1024, gen_ppl=90.5, entropy=5.50, mauve=0.74),
    MainRow("SDDM", gen_ppl=75.3, entropy=5.31),
    MainRow("DUO", gen_ppl=71.7, entropy=5.22),
    MainRow("LaDiff 200 + 1024", "ladiff", 200, 1024, gen_ppl=62.9, entropy=5.40, mauve=0.82),
    MainRow("LaDiff, temperature 0.7", "ladiff", 200, 1024, 0.7, gen_ppl=47.8, entropy=5.26),
    # MAUVE is printed as 0.775 in one place and 0.81 in another, so it is left out.
    MainRow("LaDiff 200 + 64", "ladiff", 200, 64, gen_ppl=68.3, entropy=5.40),
    MainRow("DiLaDiff 5 + 64", "diladiff", 5, 64, gen_ppl=97.0, entropy=5.50, mauve=0.79),
    MainRow("DiLaDiff 5 + 32", "diladiff", 5, 32, gen_ppl=108.7, entropy=5.53),
    MainRow("DiLaDiff 5 + 32, temperature 0.7", "diladiff", 5, 32, 0.7, gen_ppl=76.3, entropy=5.39),
    MainRow("MDLM + SDTT, 32 steps", gen_ppl=62.3, entropy=5.49),
    MainRow("DUO + DCD, 32 steps (greedy tail)", gen_ppl=46.3, entropy=5.38),
)


class Autoencoder(NamedTuple):
    """An autoencoder: its compression L / N and augmentation, its bound as printed, the share of
    masked tokens recovered, and MAUVE of what is then generated."""

    compression: int
    augmentation: str
    bound: float
    recovery: float
    mauve: float


AUTOENCODERS = (
    Autoencoder(32, "Mild", 6.83, 0.533, 0.77),
    Autoencoder(16, "Mild", 6.83, 0.533, 0.80),
    Autoencoder(8, "Mild", 3.28, 0.610, 0.77),
    Autoencoder(4, "Mild", 2.58, 0.683, 0.74),
    Autoencoder(2, "Mild", 2.25, 0.752, 0.73),
    Autoencoder(1, "Mild", 2.15, 0.745, 0.14),
    Autoencoder(2, "the model's", 3.25, 0.694, 0.82),
)


SCHEDULE = {2.0: 92.0, 5.0: 71.4, 10.0: 62.3, 15.0: 75.4}
"""Generative perplexity of LaDiff by the schedule's d."""


class Overhead(NamedTuple):
    """Time to sample the latent over the time to decode it, at batch 32."""

    model: str
    latent_steps: int
    decode_steps: int
    share: float


OVERHEAD = (
    Overhead("ladiff", 200, 1024, 0.07),
    Overhead("ladiff", 200, 64, 1.12),
    Overhead("diladiff", 5, 64, 0.05),
)


class Speedup(NamedTuple):
    """How many times as fast as a baseline a model is at fewer decoding steps."""

    model: str
    decode_steps: int
    baseline: str
    baseline_steps: int
    factor: float


SPEEDUP = Speedup("ladiff", 64, "mdlm", 1024, 7.0)
