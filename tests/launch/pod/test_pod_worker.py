"""worker.sh: training on a host, its connection, its exit code, and setting the host up."""

import pathlib
import shutil
import signal
import subprocess
import time

import pytest
from launchers import ROOT, TRAIN


def wait_for(path, seconds=20):
    for _ in range(int(seconds * 20)):
        if path.exists():
            return
        time.sleep(0.05)
    raise AssertionError(f"{path} did not appear")


@pytest.mark.parametrize("code", [0, 1, 75])
def test_a_run_trains_once_and_reports_its_output_and_exit_code_every_time(code, host, fake):
    """Only another run trains again."""
    host(f"echo trained; exit {code}")
    for _ in range(2):
        process = host.worker("run", "first", *TRAIN[1:])
        assert "trained" in process.communicate(timeout=30)[0] and process.returncode == code
    [call] = fake.calls()
    assert call[1].endswith("/launch/train.py") and call[2:] == ["--distributed=auto", *TRAIN[1:]]
    assert host.worker("run", "second").wait(timeout=30) == code and len(fake.calls()) == 2


def test_training_outlives_its_connection(host, fake, tmp_path):
    """The next call follows the training to its end, even for another run."""
    host("""echo begun; touch "$STATE/begun"
      until [[ -e "$STATE/go" ]]; do sleep 0.05; done
      echo finished; exit 75""")
    first = host.worker("run", "first", "--workdir=/w")
    wait_for(tmp_path / "begun")
    first.send_signal(signal.SIGKILL)
    first.wait(timeout=10)
    second = host.worker("run", "another", "--workdir=/w")
    assert "following" in second.stdout.readline()
    (tmp_path / "go").touch()
    output = second.communicate(timeout=30)[0]
    assert "begun" in output and "finished" in output and second.returncode == 75
    assert len(fake.calls()) == 1


def test_a_stop_on_request_exits_with_143_so_that_it_is_not_run_again(host, tmp_path):
    """SIGTERM reaches the training, which saves and itself exits with 75."""
    host('trap "echo saved; exit 75" TERM; touch "$STATE/begun"; while true; do sleep 0.05; done')
    process = host.worker("run", "first", "--workdir=/w")
    wait_for(tmp_path / "begun")
    assert host.worker("stop").wait(timeout=10) == 0
    assert "saved" in process.communicate(timeout=30)[0] and process.returncode == 143
    idle = host.worker("stop")
    assert "no training is running" in idle.communicate(timeout=10)[0] and idle.returncode == 0


def test_a_training_cut_off_with_its_host_counts_as_preempted(host, fake, tmp_path):
    """It has left no exit code."""
    host("exit 0")
    (tmp_path / "diladiff" / ".worker").mkdir()
    (tmp_path / "diladiff" / ".worker" / "run").write_text("first\n")
    (tmp_path / "diladiff" / ".worker" / "pid").write_text("999999999\n")
    (tmp_path / "diladiff" / ".worker" / "log").touch()
    assert host.worker("run", "first", "--workdir=/w").wait(timeout=30) == 75 and not fake.calls()


def test_setup_mounts_the_export_and_installs_python_and_the_locked_packages(fake, tmp_path):
    """The system's Python is too old here, so setup installs another; libtpu has its own lock."""
    shutil.copytree(ROOT / "launch", tmp_path / "diladiff" / "launch")
    fake("mountpoint", "exit 1")
    fake("sudo", '"$@"')
    fake("tee", 'cat > "$STATE/fstab"')
    for tool in ("mount", "mount.nfs", "chmod"):
        fake(tool)
    fake("mkdir", '[[ "$*" == *" /shared" ]] || exec /bin/mkdir "$@"')
    fake(
        "python3",
        'case "$*" in "-c "*) exit 1 ;; *"uv python find"*) echo "$STATE/bin/newer" ;; esac',
    )
    fake(
        "newer",
        """if [[ "$2" == venv ]]; then
          /bin/mkdir -p "$3/bin" "$3/lib/python3/site-packages"; cp "$0" "$3/bin/python"
        fi""",
    )
    done = subprocess.run(
        ["bash", "diladiff/launch/pod/worker.sh", "setup", "10.0.0.2:/vol"],
        cwd=tmp_path,
        env=fake.environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    calls = fake.calls()
    assert (tmp_path / "fstab").read_text().startswith("10.0.0.2:/vol /shared nfs ") and [
        "sudo",
        "mount",
        "/shared",
    ] in calls
    assert ["python3", "-m", "uv", "python", "install", "3.12"] in calls
    installed = [call for call in calls if call[:4] == ["newer", "-m", "pip", "install"]]
    assert [pathlib.Path(call[-1]).name for call in installed] == [
        "build.lock",
        "requirements.lock",
        "libtpu.lock",
    ]
    assert (
        all("--require-hashes" in call and call[-2] == "--requirement" for call in installed)
        and "--no-build-isolation" in installed[1]
    )
