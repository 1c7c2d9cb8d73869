"""The commands as a user types them: samples to a file, help, and one line for bad input."""

import fcntl
import json
import os
import pathlib
import subprocess
import sys
import time

import pytest

slow = pytest.mark.slow  # all but one, which goes through a whole command twice

ROOT = pathlib.Path(__file__).parents[2]


def run(script, *flags):
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {
        "JAX_PLATFORMS": "cpu"
    }
    words = [sys.executable, str(ROOT / "launch" / script), *flags]
    return subprocess.run(
        words, env=environment, capture_output=True, text=True, timeout=300, check=False
    )


@slow
def test_sample_writes_one_json_line_a_sample(trained, tmp_path):
    """Index, seed, model, text and tokens; the same sample whatever --num and --batch."""
    files = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    for path, flags in zip(
        files, (["--num=5"], ["--num=2", "--start=3", "--batch=1"]), strict=True
    ):
        done = run(
            "sample.py",
            f"--workdir={trained}",
            "--seed=4",
            "--decode_steps=3",
            f"--out={path}",
            *flags,
        )
        assert done.returncode == 0, done.stderr
    a, b = ([json.loads(line) for line in path.read_text().splitlines()] for path in files)
    assert [r["index"] for r in a] == list(range(5)) and [r["index"] for r in b] == [3, 4]
    assert all(
        r["model"] == "diladiff"
        and r["seed"] == 4
        and r["decode_steps"] == 3
        and len(r["tokens"]) == 32
        for r in a + b
    )
    assert [r["tokens"] for r in a[3:]] == [r["tokens"] for r in b]


def test_a_stopped_sample_goes_on_after_what_it_has_written(trained, tmp_path):
    """Two records and a torn third: the same command keeps the two and draws the rest, to the same file as one run's; what another command, or
    one with other settings, has written stays."""
    out = tmp_path / "a.jsonl"
    command = [
        "sample.py",
        f"--workdir={trained}",
        "--num=5",
        "--batch=2",
        "--decode_steps=3",
        f"--out={out}",
    ]
    assert run(*command).returncode == 0
    whole = out.read_text().splitlines(keepends=True)
    kept = [
        json.dumps(json.loads(line) | {"text": "kept \u2028"}, ensure_ascii=False) + "\n"
        for line in whole[:2]
    ]  # no end of a line
    partial, about = tmp_path / "a.jsonl.partial", tmp_path / "a.jsonl.partial.json"
    slow = subprocess.Popen(
        [sys.executable, str(ROOT / "launch" / command[0]), *command[1:], "--num=100000"],
        stdout=subprocess.PIPE,
    )
    while not partial.exists() or partial.read_bytes().count(b"\n") < 4:
        assert slow.poll() is None
        time.sleep(0.05)
    slow.kill()
    slow.communicate()
    origin = about.read_text()
    partial.write_text("".join(kept) + whole[2][:40])
    done = run(*command)
    assert done.returncode == 0 and "2 samples are there already" in done.stdout
    assert (
        out.read_text() == "".join(kept + whole[2:]) and not partial.exists() and not about.exists()
    )
    partial.write_text("".join(kept))
    about.write_text(origin)
    with partial.open("r+") as held:  # another process that writes to it
        fcntl.flock(held, fcntl.LOCK_EX)
        refusals = [(run(*command), "another sample.py writes to")]
    refusals += [
        (run(*command, *changed), f"its {name} is")
        for name, changed in (("seed", ["--seed=1"]), ("order", ["--config.sampling.order=count"]))
    ]
    about.unlink()  # it may be anything now
    refusals.append((run(*command), "does not say what it is"))
    for refused, words in refusals:
        assert (
            refused.returncode == 1 and words in refused.stderr and refused.stderr.count("\n") == 1
        ), refused.stderr
        assert partial.read_text() == "".join(kept) and out.read_text() == "".join(kept + whole[2:])


@slow
def test_export_writes_what_sample_reads(trained, tmp_path):
    """A bundle of one model: only its stages; the samples are the workdir's; a second export into it is refused and changes nothing."""
    bundle = tmp_path / "bundle"
    done = run("export.py", f"--workdir={trained}", f"--out={bundle}", "--model=diladiff")
    assert done.returncode == 0 and str(bundle) in done.stdout, done.stderr
    names = {path.name for path in bundle.iterdir()}
    stages = {f"{name}.safetensors" for name in ("mdlm", "autoencoder", "diladiff", "statistics")}
    assert names == stages | {"bundle.json", "config.json", "tokenizer"}
    drawn = [
        run("sample.py", f"--workdir={folder}", "--num=3", "--decode_steps=2")
        for folder in (trained, bundle)
    ]
    assert drawn[0].returncode == 0 and drawn[0].stdout == drawn[1].stdout
    before = {path: path.stat().st_mtime_ns for path in bundle.rglob("*")}
    for script, flags, words in (
        ("export.py", [f"--out={bundle}"], "already exists"),
        ("evaluate.py", [], "is a bundle"),
        ("train.py", [], "is a bundle"),
    ):
        done = run(script, f"--workdir={bundle}", *flags)
        assert done.returncode == 1 and words in done.stderr and len(done.stderr.splitlines()) == 1
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "table.txt").write_text("mine")
    for out, words in ((bundle, "is a bundle"), (theirs, "has a table.txt and no results.json")):
        done = run("evaluate.py", f"--workdir={trained}", f"--out={out}")
        assert done.returncode == 1 and words in done.stderr and len(done.stderr.splitlines()) == 1
    assert (theirs / "table.txt").read_text() == "mine"
    assert {path: path.stat().st_mtime_ns for path in bundle.rglob("*")} == before


@slow
def test_evaluate_writes_one_folder(trained, tmp_path):
    """The files, the figures of the rows, and the page with samples of every model; and another workdir's compression beside it."""
    import diladiff_jax as dl
    from diladiff_jax.evaluation import figures
    from diladiff_jax.evaluation.report import report

    other = tmp_path / "other"
    (other / "report").mkdir(parents=True)
    (other / "config.json").write_text(
        (trained / "config.json").read_text().replace('"num_latents": 4', '"num_latents": 8')
    )
    metrics = {name: {"value": 0.5, "low": 0.4, "high": 0.6} for name in ("recovery", "valid")}
    row = {
        "corpus": "stories",
        "latent_steps": None,
        "decode_steps": None,
        "temperature": None,
        "top_p": None,
        "samples": 4,
        "seconds": None,
        "tokens_per_second": None,
        "metrics": metrics,
    }
    (other / "report" / "results.json").write_text(
        json.dumps(
            {
                "setting": {},
                "rows": [row | {"model": name} for name in ("autoencoder bound", "diladiff")],
            }
        )
    )
    out = tmp_path / "out"
    flags = [
        "--analyses=False",
        "--config.evaluation.decode_steps=(1,2)",
        "--config.evaluation.samples=16",
        f"--compare={other}",
    ]
    done = run("evaluate.py", f"--workdir={trained}", f"--out={out}", *flags)
    assert done.returncode == 0 and f"report: {out / 'report.html'}" in done.stdout, done.stderr
    assert {p.name for p in out.iterdir()} == {
        "results.json",
        "analyses.json",
        "table.txt",
        "picture.png",
        "report.html",
        "figures",
    }
    report.check_results(json.loads((out / "results.json").read_text()))
    found = json.loads((out / "analyses.json").read_text())
    figures.check_analyses(found)
    figures = {f["id"]: f for f in found["figures"]}
    assert {
        "speed_valid",
        "valid_by_decode_steps",
        "schedule_alpha",
        "compression_recovery",
        "tradeoff_valid",
    } <= set(figures)
    assert figures["compression_recovery"]["series"][0]["x"] == [4, 8]
    assert {p.stem for p in (out / "figures").iterdir()} == set(figures)
    drawn = json.loads(
        (out / "report.html").read_text().split('id="decoding-data">')[1].split("</script>")[0]
    )
    model = dl.load(trained)
    assert [d["model"] for d in drawn] == list(model.models)
    for d in drawn:
        assert all(
            len(s["tokens"]) == len(s["unmasked_at"]) == 32
            and max(s["unmasked_at"]) < d["decode_steps"]
            for s in d["samples"]
        )
        assert all(isinstance(s["valid"], bool) for s in d["samples"])


@slow
@pytest.mark.parametrize(
    "script", ["prepare.py", "train.py", "sample.py", "evaluate.py", "export.py"]
)
def test_help_shows_how(script):
    """--help begins with what the command does and a command line to copy."""
    done = run(script, "--help")
    assert (
        done.returncode == 0
        and f"python launch/{script} --" in done.stdout
        and "--workdir" in done.stdout
        and "Traceback" not in done.stderr
    )


@slow
@pytest.mark.parametrize(
    ("script", "flags", "words"),
    [
        ("sample.py", ["--workdir=/nowhere"], "/nowhere/config.json does not exist"),
        ("sample.py", [], "--workdir"),
        ("sample.py", ["--workdir=" + "x" * 300], "File name too long"),
        ("compile.py", ["--scaling", "--config=configs/owt.py"], "--config is missing"),
        (
            "train.py",
            ["--workdir=/tmp/w", "--config=/nowhere.py"],
            "--config=/nowhere.py cannot be read",
        ),
        ("sample.py", ["--workdir=WORKDIR", "--num=0"], "--num=0"),
        (
            "sample.py",
            ["--workdir=WORKDIR", "--config.sampling.batc=3"],
            "--config.sampling.batc: there is no setting batc; did you mean batch?",
        ),
        (
            "sample.py",
            ["--workdir=WORKDIR", "--config.smpling=3"],
            "--config.smpling: there is no setting smpling; did you mean sampling?",
        ),
        (
            "sample.py",
            ["--workdir=WORKDIR", "--model=mdlm", "--latent_steps=3"],
            "--latent_steps is 3, and --model=mdlm has no latent",
        ),
        (
            "train.py",
            ["--workdir=/tmp/w", f"--config={ROOT}/README.md"],
            "is no experiment file, which is Python",
        ),
        (
            "train.py",
            ["--workdir=/tmp/w", f"--config={ROOT}/configs/large.py:9b"],
            "error: the size is '9b'; it must be 1b or 8b",
        ),
        ("benchmark.py", [f"--out={ROOT}/README.md"], "holds no such result"),
        (
            "benchmark.py",
            ["--out=/tmp/nothing.json", "--timed_steps=100"],
            "--timed_steps is 100; it must be at most --decode_steps=64",
        ),
        (
            "compile.py",
            [
                f"--config={ROOT}/configs/owt.py",
                "--stage=mdlm",
                "--topology=v5e:4x4",
                f"--out={ROOT}/README.md",
            ],
            "holds no such result",
        ),
        ("sample.py", ["--workdir=WORKDIR", "--model=gpt"], "model is 'gpt'"),
        ("sample.py", ["--workdir=WORKDIR", "--num=x"], "--num=x: it must be a whole number"),
        ("sample.py", ["--workdir=WORKDIR", "--prompt="], "the prompt is empty"),
        (
            "sample.py",
            ["--workdir=WORKDIR", "--out=WORKDIR/config.json"],
            "holds no samples; give another file",
        ),
        ("sample.py", ["--workdir=WORKDIR", "--flagfile=WORKDIR"], "Unable to open flagfile"),
        ("train.py", ["--workdir=WORKDIR", "--workdir="], "--workdir is empty"),
        (
            "evaluate.py",
            ["--workdir=WORKDIR", "--config.evaluation.samples=0"],
            "evaluation.samples is 0",
        ),
        ("evaluate.py", ["--workdir=WORKDIR", "stray"], "unexpected argument 'stray'"),
        (
            "evaluate.py",
            ["--workdir=WORKDIR", "--compare=/nowhere"],
            "--compare: /nowhere/config.json does not exist",
        ),
        ("export.py", ["--workdir=WORKDIR"], "--out is missing"),
        ("export.py", ["--workdir=WORKDIR", "--out=/tmp/b", "--model=gpt"], "--model is 'gpt'"),
        (
            "evaluate.py",
            ["--workdir=WORKDIR", "--out=/dev/null/x"],
            "--out=/dev/null/x cannot be written",
        ),
    ],
)
def test_bad_input_is_one_line(trained, script, flags, words):
    """Non-zero exit, one line that says what, no traceback."""
    done = run(script, *[flag.replace("WORKDIR", str(trained)) for flag in flags])
    assert done.returncode == 1 and words in done.stderr and "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@slow
@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--bogus"], "--bogus is not an option"),
        (["a", "b"], "two working folders"),
        (["--corpus=/nowhere/at/all"], "no such folder or file"),
        (["--config=/nowhere.py"], "no such file"),
    ],
)
def test_the_quickstart_refuses_before_it_installs(flags, words):
    """Bad options end at once."""
    done = subprocess.run(
        ["bash", str(ROOT / "launch" / "quickstart.sh"), *flags],
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    assert done.returncode == 2 and words in done.stderr and not done.stdout


@slow
def test_the_quickstart_has_help():
    """Usage without side effects."""
    done = subprocess.run(
        ["bash", str(ROOT / "launch" / "quickstart.sh"), "--help"],
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    assert done.returncode == 0 and "--corpus" in done.stdout and "WORKDIR" in done.stdout


@slow
def test_ci_calls_the_readmes_test_command():
    """.ci/run is that one command."""
    assert (
        "launch/test.sh" in (ROOT / ".ci" / "run").read_text()
        and "bash launch/test.sh" in (ROOT / "README.md").read_text()
    )
