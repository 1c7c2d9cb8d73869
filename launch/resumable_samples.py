"""A JSON Lines file of samples that is written batch by batch, and continued after a stop.

Samples go to `FILE.partial`, with `FILE.partial.json` beside it to record what they were sampled
with. The partial file replaces `FILE` when all samples are there.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, BinaryIO

import cli


def write(
    path: pathlib.Path,
    batches: Callable[[int], Iterator[Any]],
    *,
    start: int,
    num: int,
    fields: Mapping[str, Any],
    origin: Mapping[str, Any],
    raw_text: Callable[[Any], str],
) -> None:
    """Writes samples to `path`, after those that an earlier run with the same `origin` has left.

    Args:
      path: the file to write.
      batches: given the number of samples that exist already, samples the others in batches with
        `texts`, `tokens [B, L]` and `nll [B]` (or None).
      start: index of the first sample.
      num: number of samples.
      fields: what each record has beside its index, text, tokens and negative log-likelihood.
      origin: everything that determines the samples, as JSON.
      raw_text: maps a sample's tokens to its `raw_text`, in which documents have visible ends.

    Raises:
      UsageError: the file cannot be written, another process is writing it, or the partial file is
        from another command.
    """
    from diladiff_jax import files
    from diladiff_jax.console import say

    partial = path.with_name(path.name + ".partial")
    origin_path = path.with_name(path.name + ".partial.json")
    try:
        with partial.open("a+b") as out:
            _lock(out, partial)
            done, size = _existing_records(partial, origin_path, origin, start=start, num=num)
            out.truncate(size)
            if done:
                say(f"{done} samples exist already: {partial}")
            else:
                # Only now, because samples of another run must not be taken for this one's.
                files.atomic_write_text(origin_path, json.dumps(origin))
            for batch in batches(done) if done < num else ():
                for record in _records(batch, start + done, fields, raw_text):
                    out.write((json.dumps(record, ensure_ascii=False) + "\n").encode())
                    done += 1
                out.flush()
            os.fsync(out.fileno())
            partial.replace(path)  # while the lock is held
            origin_path.unlink(missing_ok=True)
    except OSError as error:
        raise cli.UsageError(
            f"--out={path} cannot be written: {error.strerror}. Give a file in a writable folder."
        ) from None


def _records(
    batch: Any, first_index: int, fields: Mapping[str, Any], raw_text: Callable[[Any], str]
) -> Iterator[dict[str, Any]]:
    for i, (text, tokens) in enumerate(zip(batch.texts, batch.tokens, strict=True)):
        nll = {} if batch.nll is None else {"nll": float(batch.nll[i])}
        index = first_index + i
        texts = {"text": text, "raw_text": raw_text(tokens)}
        yield {"index": index, **texts, "tokens": tokens.tolist(), **nll, **fields}


def _lock(out: BinaryIO, partial: pathlib.Path) -> None:
    """Locks the file until it is closed, if the file system supports locks.

    Raises:
      UsageError: another process holds the lock, or has just finished the file.
    """
    with contextlib.suppress(OSError):
        try:
            fcntl.flock(out, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise cli.UsageError(
                f"--out: another sample.py writes to {partial}. Wait for it or stop it, or give"
                " another file."
            ) from None
    if not partial.exists() or os.fstat(out.fileno()).st_ino != partial.stat().st_ino:
        raise cli.UsageError(
            f"--out: another sample.py has just finished {partial.with_suffix('')}. Give another"
            " file, or run the same command again."
        )


def _existing_records(
    partial: pathlib.Path,
    origin_path: pathlib.Path,
    origin: Mapping[str, Any],
    *,
    start: int,
    num: int,
) -> tuple[int, int]:
    """Counts the complete records of an earlier run with the same origin, and their bytes.

    Raises:
      UsageError: the partial file is from another command.
    """
    if not partial.stat().st_size:
        return 0, 0
    _check_origin(partial, origin_path, origin)
    count = size = 0
    with partial.open("rb") as lines:  # as bytes: text mode would also split at other line ends
        for line in lines:
            try:
                complete = line.endswith(b"\n") and json.loads(line)["index"] == start + count
            except (ValueError, KeyError, TypeError):
                complete = False
            if not complete or count == num:
                break
            count, size = count + 1, size + len(line)
    return count, size


def _check_origin(
    partial: pathlib.Path, origin_path: pathlib.Path, origin: Mapping[str, Any]
) -> None:
    try:
        found = json.loads(origin_path.read_text())
        different = next((key for key in origin if found.get(key) != origin[key]), None)
        same = found == origin
    except (OSError, ValueError, RecursionError, AttributeError):
        raise cli.UsageError(
            f"--out: {partial} exists, and {origin_path.name} beside it does not say what it is."
            " Give another file, or move it elsewhere."
        ) from None
    if not same:
        key = different or "settings"
        raise cli.UsageError(
            f"--out: {partial} has samples of another command: its {key} is"
            f" {str(found.get(key))[:100]}, expected {str(origin.get(key))[:100]}. Finish that"
            " command, or move the file elsewhere."
        )
