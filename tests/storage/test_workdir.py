"""A workdir has one writer at a time."""

import fcntl

import pytest

from diladiff_jax.storage import WorkdirError, workdir_lock


def test_the_lock_excludes_others_until_it_is_released(tmp_path):
    for _ in range(2):
        with workdir_lock(tmp_path) as locked:
            assert locked
            with (
                pytest.raises(WorkdirError, match=r"another process .* training\.lock"),
                workdir_lock(tmp_path),
            ):
                pass


def test_a_file_system_without_locks_yields_false(tmp_path, monkeypatch):
    def unsupported(file, operation):
        raise OSError("no locks available")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with workdir_lock(tmp_path) as locked:
        assert not locked


def test_errors_inside_the_block_pass_through(tmp_path):
    """Even those that taking the lock would explain differently."""
    with pytest.raises(BlockingIOError), workdir_lock(tmp_path):
        raise BlockingIOError
