"""The published sampler of masked diffusion models in PyTorch, written from its description.

A transformer of the same size as the backbone, with rotary positions, LayerNorm and PyTorch's fused
attention, decodes as MDLM (arXiv 2406.07524) does:

- Every call computes the logits of all positions, in float32.
- The prediction of a call is kept and reused while no token changes.
- A step samples every position from p(x_s | x_t) by exponential noise, and keeps it where masked.
- The nucleus, if there is one, is found by sorting the vocabulary.

Where the two differ, this is the faster: there is no time conditioning (which the published sampler
feeds a constant), and the last step fills what is left instead of one more call.
"""

from __future__ import annotations

import dataclasses
import importlib
import time
from types import ModuleType
from typing import Any

import numpy as np

Tensor = Any  # PyTorch is optional, so its types are not known

_COPIES = {False: 4, True: 9}
"""Arrays of the size of all logits that a step holds at once, without and with a nucleus."""


def import_torch() -> ModuleType | None:
    """PyTorch, or None if it is not installed."""
    try:
        return importlib.import_module("torch")
    except ImportError:
        return None


@dataclasses.dataclass(frozen=True)
class Size:
    """The size of the network: vocabulary V, tokens L, width D, layers, heads, MLP ratio."""

    vocab: int
    length: int
    width: int
    layers: int
    heads: int
    mlp_ratio: float


class TorchMDLM:
    """The network with random weights, and its sampler.

    Attributes:
      device: "cuda" or "cpu".
    """

    def __init__(self, torch: ModuleType, size: Size, device: str, dtype: str) -> None:
        self._torch, self.device, self._size = torch, device, size
        self._dtype = getattr(torch, dtype)
        self._generator = torch.Generator(device).manual_seed(0)
        d, hidden = size.width, int(size.mlp_ratio * size.width)
        self._embedding = self._matrix(size.vocab, d, std=0.02)
        self._head = self._matrix(size.vocab, d)
        self._gain = torch.ones(d, device=device, dtype=self._dtype)
        self._layers = [
            {
                "qkv": self._matrix(3 * d, d),
                "out": self._matrix(d, d),
                "up": self._matrix(hidden, d),
                "up_bias": self._matrix(hidden),
                "down": self._matrix(d, hidden),
                "down_bias": self._matrix(d),
            }
            for _ in range(size.layers)
        ]
        half = d // size.heads // 2
        frequency = 10_000.0 ** (-torch.arange(half, device=device) / half)
        angle = torch.arange(size.length, device=device)[:, None] * frequency[None, :]
        self._rotation = angle.cos().to(self._dtype), angle.sin().to(self._dtype)

    def needed_bytes(self, batch: int, *, nucleus: bool) -> int:
        """About what a step of `sample` needs."""
        return _COPIES[nucleus] * 4 * batch * self._size.length * self._size.vocab

    def logits(self, tokens: Tensor) -> Tensor:
        """Float32 logits `[B, L, V]` of tokens `[B, L]`."""
        functional, gain = self._torch.nn.functional, self._gain
        h = self._embedding[tokens]
        (batch, length, d), heads = h.shape, self._size.heads
        for layer in self._layers:
            x = functional.layer_norm(h, (d,), gain)
            x = functional.linear(x, layer["qkv"]).view(batch, length, 3, heads, d // heads)
            q, k, v = (part.transpose(1, 2) for part in x.unbind(2))
            x = functional.scaled_dot_product_attention(self._rotate(q), self._rotate(k), v)
            h = h + functional.linear(x.transpose(1, 2).reshape(batch, length, d), layer["out"])
            x = functional.layer_norm(h, (d,), gain)
            x = functional.linear(x, layer["up"], layer["up_bias"])
            x = functional.gelu(x, approximate="tanh")
            h = h + functional.linear(x, layer["down"], layer["down_bias"])
        return functional.linear(functional.layer_norm(h, (d,), gain), self._head).float()

    def sample(
        self, prompt: np.ndarray, steps: int, mask_id: int, top_p: float | None = None
    ) -> tuple[np.ndarray, int]:
        """Fills the masked positions of `prompt [B, L]` in `steps` steps.

        Args:
          prompt: tokens, `mask_id` where the model is free.
          steps: number of steps.
          mask_id: the mask's id.
          top_p: mass of the nucleus; None leaves it out.

        Returns:
          The tokens `[B, L]`, and the number of network calls.
        """
        torch, calls, kept = self._torch, 0, None
        with torch.inference_mode():
            x = torch.as_tensor(np.array(prompt), device=self.device).long()
            for i in range(steps):
                t, s = 1 - i / steps, 1 - (i + 1) / steps  # linear schedule
                if kept is None:
                    kept, calls = self._prediction(x, mask_id, top_p), calls + 1
                posterior = kept * (t - s)
                posterior[:, :, mask_id] = s
                drawn = torch.where(x == mask_id, self._draw(posterior), x)
                if not torch.equal(drawn, x):
                    kept = None
                x = drawn
            return x.cpu().numpy(), calls

    def choose_threads(self, prompt: np.ndarray, mask_id: int) -> None:
        """On CPUs, uses a single thread if that is faster for one step.

        PyTorch's threads wait for each other in every operation. On a busy machine, or for a small
        network, that can take most of the time.
        """
        if self.device != "cpu":
            return
        seconds = {}
        for threads in (1, self._torch.get_num_threads()):
            self._torch.set_num_threads(threads)
            seconds[threads] = min(self.time(prompt, 1, mask_id) for _ in range(2))
        self._torch.set_num_threads(min(seconds, key=lambda threads: seconds[threads]))

    def time(self, *arguments: Any) -> float:
        """Seconds of one call of `sample`."""
        start = time.perf_counter()
        self.sample(*arguments)  # ends with a copy to the host
        return time.perf_counter() - start

    def peak_bytes(self, *arguments: Any) -> int | None:
        """What a call of `sample` needs beyond the weights, by PyTorch's count; None on CPUs."""
        if self.device == "cpu":
            self.sample(*arguments)
            return None
        cuda = self._torch.cuda
        cuda.reset_peak_memory_stats()
        before = cuda.memory_allocated()
        self.sample(*arguments)
        return cuda.max_memory_allocated() - before

    def release(self) -> None:
        """Gives cached memory back to the device, for programs outside PyTorch."""
        if self.device == "cuda":
            self._torch.cuda.empty_cache()

    def _matrix(self, *shape: int, std: float | None = None) -> Tensor:
        """Random weights `[D_out, D_in]` scaled by fan-in, or zero biases `[D_out]`."""
        if len(shape) == 1:
            return self._torch.zeros(shape, device=self.device, dtype=self._dtype)
        noise = self._torch.randn(shape, device=self.device, generator=self._generator)
        return (noise * (std or shape[1] ** -0.5)).to(self._dtype)

    def _rotate(self, x: Tensor) -> Tensor:
        """Rotary positions for queries or keys `[B, H, L, K]`."""
        cos, sin = self._rotation
        a, b = x.chunk(2, dim=-1)
        return self._torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)

    def _prediction(self, x: Tensor, mask_id: int, top_p: float | None) -> Tensor:
        """Probabilities of the clean token at every position, `[B, L, V]`."""
        logits = self.logits(x)
        logits[:, :, mask_id] = -float("inf")
        p = logits.softmax(dim=-1)
        if top_p is None:
            return p
        ordered, order = p.sort(dim=-1, descending=True)
        kept = ordered.cumsum(dim=-1) - ordered < top_p
        ordered = ordered * kept
        ordered = ordered / ordered.sum(dim=-1, keepdim=True)
        return self._torch.zeros_like(p).scatter_(-1, order, ordered)

    def _draw(self, p: Tensor) -> Tensor:
        """Samples from unnormalized probabilities `[B, L, V]`."""
        uniform = self._torch.rand(p.shape, device=self.device, generator=self._generator)
        return (p / (1e-10 - (uniform + 1e-10).log())).argmax(dim=-1)
