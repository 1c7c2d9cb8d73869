"""Times several ways of decoding from the same latents, and the samplers of the latents.

The cases:

- `naive`: all logits in every step, the nucleus by a full sort, the latent read in every step.
- `bisection`: the same with the library's nucleus instead of the sort.
- `ours`: what the library does: only the positions of a step, and the latent read once.
- `approx_skip`: the same with `sampling.skip_layers`: the second half of the steps skips every
  second layer, but never the first or the last.
- `approx_refresh_R`: as `ours` with `sampling.refresh_every=R`: keys and values of all positions
  are re-computed only every R steps.

All cases attend in the library's own way, so that their ratios show the decoding and not the
attention. The products of the backbone are timed separately, as a lower bound of a step. With
`peers`, other samplers with a network of the same size take their turns too.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from diladiff_jax.benchmark.decoding_flops import decoding_flops
from diladiff_jax.benchmark.peers import Peer, build_peers
from diladiff_jax.benchmark.sampling_programs import (
    Programs,
    SamplingBenchmark,
    Workload,
    build_workload,
    compile_programs,
)
from diladiff_jax.benchmark.sizes import experiment_config
from diladiff_jax.benchmark.timing import OutOfMemoryError, matmul_rate, time_run
from diladiff_jax.parallel import sharding

Document = dict[str, Any]


def run(benchmark: SamplingBenchmark, log: Callable[[str], None] = print) -> Document:
    """Runs the benchmark at every length and batch.

    Args:
      benchmark: what to time.
      log: called with a line after each round.

    Returns:
      The machine; for each length and batch a row for each case and for each peer, the times of
      the latents, and the cases that need more memory than the device has ("left_out") and the
      peers that cannot run ("peers_left_out").

    Raises:
      OutOfMemoryError: no case fits at any length and batch.
      ConfigError: the networks cannot read texts of one of the lengths.
    """
    lengths: list[int] = [  # all are checked before anything is measured
        experiment_config(benchmark.size, length=length).data.length for length in benchmark.lengths
    ]
    documents = [
        _run_batch(benchmark, batch, length, log)
        for length in lengths
        for batch in benchmark.batches
    ]
    measured = [document for document in documents if document["rows"]]
    if not measured:
        left_out = [row for document in documents for row in document["left_out"]]
        raise OutOfMemoryError(min(row["held_bytes"] for row in left_out if row["case"] == "ours"))
    parts = ("rows", "latents", "left_out", "peers", "peers_left_out")
    return {"machine": measured[-1]["machine"]} | {
        part: [row for document in documents for row in document[part]] for part in parts
    }


def _run_batch(
    benchmark: SamplingBenchmark, batch: int, length: int, log: Callable[[str], None]
) -> Document:
    workload = build_workload(benchmark, batch, length)
    peers, peers_left_out = build_peers(benchmark, workload) if benchmark.peers else ([], [])
    programs = compile_programs(benchmark, workload)
    cases, common = programs.cases, _common_fields(benchmark, workload)
    left_out = [
        common
        | {
            "case": case,
            "decode_memory_bytes": program.temporary_bytes,
            "held_bytes": program.held_bytes,
        }
        for case, program in programs.decode.items()
        if case not in cases
    ]
    if not cases:
        return {"rows": [], "latents": [], "left_out": left_out, "peers": [], "peers_left_out": []}
    rates = [matmul_rate(benchmark.dtype)]
    times, tokens = _time(benchmark, workload, programs, peers, log)
    rates.append(matmul_rate(benchmark.dtype))
    machine = {
        "device": sharding.available_devices()[0].device_kind,
        "count": jax.device_count(),
        "matmul_flops_per_second": max(rates),
    }
    same_as_first = {
        case: float((tokens[case] == tokens[cases[0]])[workload.masked].mean()) for case in cases
    }
    return {
        "machine": machine,
        "rows": [
            _row(benchmark, workload, programs, times, case, rate=max(rates))
            | {"tokens_as_first": same_as_first[case]}
            for case in cases
        ],
        "latents": _latent_rows(benchmark, workload, times),
        "left_out": left_out,
        "peers": [_peer_row(common, peer, times) for peer in peers],
        "peers_left_out": [common | each for each in peers_left_out],
    }


def _time(
    benchmark: SamplingBenchmark,
    workload: Workload,
    programs: Programs,
    peers: list[Peer],
    log: Callable[[str], None],
) -> tuple[dict[str, list[float]], dict[str, np.ndarray]]:
    """Runs every program in turns. Returns the seconds of each round and the last tokens."""
    w, batch = workload, len(workload.prompt)
    times: dict[str, list[float]] = {
        name: [] for name in ("student", "prior", "linear maps", "attention products")
    } | {case: [] for case in [*programs.cases, *(peer.case for peer in peers)]}
    tokens: dict[str, Any] = {}
    prior_scale = benchmark.prior_steps / benchmark.timed_prior_steps
    decode_scale = benchmark.decode_steps / benchmark.timed_steps
    for turn in range(1, benchmark.rounds + 1):
        seconds, z = time_run(programs.latents["student"].run, w.params, w.keys, w.controls)
        times["student"].append(seconds)
        seconds, _ = time_run(programs.latents["prior"].run, w.params, w.keys, w.prior_controls)
        times["prior"].append(seconds * prior_scale)
        times["linear maps"].append(programs.linear_maps())
        times["attention products"].append(programs.attention_products())
        for case in programs.cases:
            seconds, tokens[case] = time_run(
                programs.decode[case].run, w.params, w.keys, w.prompt, z, w.controls
            )
            times[case].append(seconds * decode_scale)
        for peer in peers:
            times[peer.case].append(peer.seconds())
        latest = ", ".join(f"{name} {values[-1]:.2f} s" for name, values in times.items())
        setting = f"batch {batch}, {w.prompt.shape[1]} tokens"
        log(f"{setting}, round {turn} of {benchmark.rounds}: {latest}")
    return times, {case: np.asarray(found) for case, found in tokens.items()}


def _common_fields(benchmark: SamplingBenchmark, workload: Workload) -> Document:
    batch, length = workload.prompt.shape
    return {
        "suite": "sampling",
        "size": benchmark.size,
        "dtype": benchmark.dtype,
        "batch": batch,
        "length": length,
        "rounds": benchmark.rounds,
    }


def _row(
    benchmark: SamplingBenchmark,
    workload: Workload,
    programs: Programs,
    times: Mapping[str, list[float]],
    case: str,
    *,
    rate: float,
) -> Document:
    """The row of one case, given the machine's rate of matrix products in FLOP/s."""
    batch, length = workload.prompt.shape
    vocab, steps = workload.config.tokenizer.vocab_size, benchmark.decode_steps
    student, decode = programs.latents["student"], programs.decode[case]
    middle = {name: statistics.median(values) for name, values in times.items()}
    total, cold = middle["student"] + middle[case], student.cold_seconds + decode.cold_seconds
    flops = decoding_flops(case, workload.config, vocab, batch, steps, benchmark.refresh_every)
    return _common_fields(benchmark, workload) | {
        "case": case,
        "vocab": vocab,
        "decode_steps": steps,
        "timed_steps": benchmark.timed_steps,
        "latent_steps": benchmark.latent_steps,
        "top_p": benchmark.top_p,
        "seconds": total,
        "tokens_per_second": batch * length / total,
        "first_result_seconds": cold + total,
        "latent_seconds": middle["student"],
        "decode_seconds": middle[case],
        "decode_seconds_low": min(times[case]),
        "decode_seconds_high": max(times[case]),
        "linear_maps_seconds": middle["linear maps"],
        "attention_products_seconds": middle["attention products"],
        "peak_memory_bytes": max(student.temporary_bytes, decode.temporary_bytes),
        "decode_memory_bytes": decode.temporary_bytes,
        "device_peak_bytes": programs.device_peaks[case],
        "compile_seconds_cold": cold,
        "compile_seconds_cached": student.cached_seconds + decode.cached_seconds,
        "tracing_seconds": student.tracing_seconds + decode.tracing_seconds,
        "fraction_of_matmul_rate": flops / middle[case] / rate,
    }


def _peer_row(common: Document, peer: Peer, times: Mapping[str, list[float]]) -> Document:
    """The row of a peer, with its time as a multiple of this library's in the same rounds."""
    middle = {name: statistics.median(values) for name, values in times.items()}
    ours, seconds = middle["ours"], middle[peer.case]
    return common | {
        "case": peer.case,
        "framework": peer.framework,
        "decode_seconds": seconds,
        "decode_seconds_low": min(times[peer.case]),
        "decode_seconds_high": max(times[peer.case]),
        "tokens_per_second": common["batch"] * common["length"] / seconds,
        "over_ours": seconds / ours,
        "over_ours_with_latents": seconds / (ours + middle["student"]),
        "decode_memory_bytes": peer.temporary_bytes,
        "device_peak_bytes": peer.device_peak_bytes,
    }


def _latent_rows(
    benchmark: SamplingBenchmark, workload: Workload, times: Mapping[str, list[float]]
) -> list[Document]:
    steps = {
        "student": (benchmark.latent_steps, benchmark.latent_steps),
        "prior": (benchmark.prior_steps, benchmark.timed_prior_steps),
    }
    return [
        _common_fields(benchmark, workload)
        | {
            "sampler": name,
            "steps": total,
            "timed_steps": timed,
            "seconds": statistics.median(times[name]),
            "seconds_low": min(times[name]),
            "seconds_high": max(times[name]),
        }
        for name, (total, timed) in steps.items()
    ]
