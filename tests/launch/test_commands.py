"""The commands as a user types them: files of samples, bundles, reports, help and bad input."""

import fcntl
import json
import pathlib
import subprocess
import sys
import time

import pytest

slow = pytest.mark.slow

ROOT = pathlib.Path(__file__).parents[2]


def assert_one_line_error(done, words, code=1):
    assert done.code == code and words in done.err, done.err
    assert "Traceback" not in done.err and len(done.err.strip().splitlines()) == 1


@slow
def test_samples_do_not_depend_on_num_and_batch(run_command, trained, tmp_path):
    """One JSON line per sample, with index, seed, model, settings and tokens."""
    files = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    common = [f"--workdir={trained}", "--seed=4", "--decode_steps=3"]
    for path, flags in zip(
        files, (["--num=5"], ["--num=2", "--start=3", "--batch=1"]), strict=True
    ):
        done = run_command("sample.py", *common, f"--out={path}", *flags)
        assert done.code == 0, done.err
    a, b = ([json.loads(line) for line in path.read_text().splitlines()] for path in files)
    assert [record["index"] for record in a] == list(range(5))
    assert [record["index"] for record in b] == [3, 4]
    for record in a + b:
        assert (record["model"], record["seed"], record["decode_steps"]) == ("diladiff", 4, 3)
        assert len(record["tokens"]) == 32
    assert [record["tokens"] for record in a[3:]] == [record["tokens"] for record in b]


@pytest.mark.slow
def test_a_stopped_sample_resumes_after_what_it_has_written(run_command, trained, tmp_path):
    """It keeps two complete records, drops a torn third, and samples the rest.

    Records of another command, or of one with other settings, are not touched.
    """
    out = tmp_path / "a.jsonl"
    command = ["sample.py", f"--workdir={trained}", f"--out={out}"]
    command += ["--num=5", "--batch=2", "--decode_steps=3"]
    assert run_command(*command).code == 0
    complete = out.read_text().splitlines(keepends=True)
    # U+2028 ends a line in some readers, but not in JSON Lines.
    kept = [
        json.dumps(json.loads(line) | {"text": "kept \u2028"}, ensure_ascii=False) + "\n"
        for line in complete[:2]
    ]
    partial, about = tmp_path / "a.jsonl.partial", tmp_path / "a.jsonl.partial.json"
    endless = subprocess.Popen(
        [sys.executable, str(ROOT / "launch" / command[0]), *command[1:], "--num=100000"],
        stdout=subprocess.PIPE,
    )
    while not partial.exists() or partial.read_bytes().count(b"\n") < 4:
        assert endless.poll() is None
        time.sleep(0.05)
    endless.kill()
    endless.communicate()
    origin = about.read_text()

    partial.write_text("".join(kept) + complete[2][:40])
    done = run_command(*command)
    assert done.code == 0 and "2 samples exist already" in done.out
    assert out.read_text() == "".join(kept + complete[2:])
    assert not partial.exists() and not about.exists()

    partial.write_text("".join(kept))
    about.write_text(origin)
    rejections = []
    with partial.open("r+") as held:  # as another process that is writing it
        fcntl.flock(held, fcntl.LOCK_EX)
        rejections.append((run_command(*command), "another sample.py writes to"))
    rejections.append((run_command(*command, "--seed=1"), "its seed is"))
    rejections.append((run_command(*command, "--config.sampling.order=count"), "its order is"))
    about.unlink()  # now the records could be anything
    rejections.append((run_command(*command), "does not say what it is"))
    for done, words in rejections:
        assert_one_line_error(done, words)
        assert partial.read_text() == "".join(kept)
        assert out.read_text() == "".join(kept + complete[2:])


@slow
def test_export_writes_a_bundle_that_sample_reads(run_command, trained, tmp_path):
    """A bundle of one model has only the stages it needs, and gives the workdir's samples."""
    bundle = tmp_path / "bundle"
    done = run_command("export.py", f"--workdir={trained}", f"--out={bundle}", "--model=diladiff")
    assert done.code == 0 and str(bundle) in done.out, done.err
    names = {path.name for path in bundle.iterdir()}
    stages = {f"{name}.safetensors" for name in ("mdlm", "autoencoder", "diladiff", "statistics")}
    assert names == stages | {"bundle.json", "config.json", "tokenizer"}
    samples = [
        run_command("sample.py", f"--workdir={folder}", "--num=3", "--decode_steps=2")
        for folder in (trained, bundle)
    ]
    assert samples[0].code == 0 and samples[0].out == samples[1].out

    before = {path: path.stat().st_mtime_ns for path in bundle.rglob("*")}
    of_bundle, of_workdir = f"--workdir={bundle}", f"--workdir={trained}"
    assert_one_line_error(run_command("export.py", of_bundle, f"--out={bundle}"), "already exists")
    assert_one_line_error(run_command("evaluate.py", of_bundle), "is a bundle")
    assert_one_line_error(run_command("train.py", of_bundle), "is a bundle")
    assert_one_line_error(run_command("evaluate.py", of_workdir, f"--out={bundle}"), "is a bundle")
    assert {path: path.stat().st_mtime_ns for path in bundle.rglob("*")} == before


def test_evaluate_does_not_overwrite_a_folder_that_is_no_report(run_command, trained, tmp_path):
    (tmp_path / "table.txt").write_text("mine")
    done = run_command("evaluate.py", f"--workdir={trained}", f"--out={tmp_path}")
    assert_one_line_error(done, "has a table.txt but no results.json")
    assert (tmp_path / "table.txt").read_text() == "mine"


def write_evaluated_workdir(folder, trained):
    """A workdir with other results, as --compare reads it."""
    (folder / "report").mkdir(parents=True)
    config = (trained / "config.json").read_text()
    (folder / "config.json").write_text(config.replace('"num_latents": 4', '"num_latents": 8'))
    row = dict.fromkeys(
        ("latent_steps", "decode_steps", "temperature", "top_p", "seconds", "tokens_per_second")
    )
    metrics = {name: {"value": 0.5, "low": 0.4, "high": 0.6} for name in ("recovery", "valid")}
    row |= {"corpus": "stories", "samples": 4, "metrics": metrics}
    rows = [row | {"model": name} for name in ("autoencoder bound", "diladiff")]
    results = {"setting": {}, "rows": rows}
    (folder / "report" / "results.json").write_text(json.dumps(results))


@slow
def test_evaluate_writes_a_complete_report(run_command, trained, tmp_path):
    """The files, the figures, the page with samples of every model, and another workdir's rows."""
    import diladiff_jax as dl
    from diladiff_jax.evaluation import check_analyses, check_results

    other, out = tmp_path / "other", tmp_path / "out"
    write_evaluated_workdir(other, trained)
    flags = ["--analyses=False", "--config.evaluation.samples=16", f"--compare={other}"]
    flags += ["--config.evaluation.decode_steps=(1,2)"]
    done = run_command("evaluate.py", f"--workdir={trained}", f"--out={out}", *flags)
    assert done.code == 0 and f"report: {out / 'report.html'}" in done.out, done.err
    documents = {"results.json", "analyses.json"}
    shown = {"table.txt", "picture.png", "report.html", "figures"}
    assert {path.name for path in out.iterdir()} == documents | shown
    check_results(json.loads((out / "results.json").read_text()))

    found = json.loads((out / "analyses.json").read_text())
    check_analyses(found)
    by_id = {figure["id"]: figure for figure in found["figures"]}
    expected = {"speed_valid", "valid_by_decode_steps", "schedule_alpha"}
    assert expected | {"compression_recovery", "tradeoff_valid"} <= set(by_id)
    assert by_id["compression_recovery"]["series"][0]["x"] == [4, 8]
    assert {path.stem for path in (out / "figures").iterdir()} == set(by_id)

    page = (out / "report.html").read_text()
    replayed = json.loads(page.split('id="decoding-data">')[1].split("</script>")[0])
    assert [each["model"] for each in replayed] == list(dl.load(trained).models)
    for each in replayed:
        for sample in each["samples"]:
            assert len(sample["tokens"]) == len(sample["unmasked_at"]) == 32
            assert max(sample["unmasked_at"]) < each["decode_steps"]
            assert isinstance(sample["valid"], bool)


@pytest.mark.parametrize(
    "script",
    [
        "prepare.py",
        "train.py",
        "sample.py",
        "evaluate.py",
        "export.py",
        "compile.py",
        "benchmark.py",
    ],
)
def test_help_begins_with_a_command_to_copy(run_command, script):
    done = run_command(script, "--help")
    assert done.code == 0 and "Traceback" not in done.err
    assert f"python launch/{script} --" in done.out.split("flags:")[0]
    assert "--out" in done.out or "--workdir" in done.out
    assert "{stages}" not in done.out and "{models}" not in done.out


SAMPLE = ("sample.py", "--workdir=WORKDIR")
EVALUATE = ("evaluate.py", "--workdir=WORKDIR")
EXPORT = ("export.py", "--workdir=WORKDIR")
TRAIN = ("train.py", "--workdir=NEW")
COMPILE = ("compile.py", "--config=ROOT/configs/owt.py", "--stage=mdlm", "--topology=v5e:4x4")
BENCHMARK = ("benchmark.py", "--out=NEW.json")


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["sample.py"], "--workdir is missing"),
        (["sample.py", "--workdir=/nowhere"], "/nowhere/config.json"),
        (["sample.py", "--workdir=" + "x" * 300], "File name too long"),
        ([*SAMPLE, "--num=0"], "--num: got 0, expected a positive integer"),
        ([*SAMPLE, "--num=x"], "--num: got 'x', expected a whole number"),
        ([*SAMPLE, "--model=gpt"], "--model: got 'gpt', expected one of mdlm,"),
        ([*SAMPLE, "--model=mdlm", "--latent_steps=3"], "--model=mdlm has no latent"),
        ([*SAMPLE, "--prompt="], "prompt"),
        ([*SAMPLE, "--out=WORKDIR/config.json"], "is not a file of samples"),
        ([*SAMPLE, "--flagfile=WORKDIR"], "Unable to open flagfile"),
        (
            [*SAMPLE, "--config.sampling.batc=3"],
            "--config.sampling.batc: there is no setting batc. Did you mean batch?",
        ),
        (
            [*SAMPLE, "--config.smpling=3"],
            "--config.smpling: there is no setting smpling. Did you mean sampling?",
        ),
        (["train.py", "--workdir=WORKDIR", "--workdir="], "--workdir is empty"),
        ([*TRAIN, "--config=/nowhere.py"], "--config=/nowhere.py cannot be read"),
        ([*TRAIN, "--config=ROOT/README.md"], "is not an experiment file"),
        ([*TRAIN, "--config=ROOT/configs/large.py:9b"], "got size '9b', expected 1b or 8b"),
        ([*TRAIN, "--config=ROOT/configs/tiny.py", "--stage=gpt"], "--stage: got 'gpt'"),
        ([*EVALUATE, "--config.evaluation.samples=0"], "evaluation.samples: got 0"),
        ([*EVALUATE, "stray"], "unexpected argument 'stray'"),
        ([*EVALUATE, "--compare=/nowhere"], "--compare: /nowhere/config.json"),
        ([*EVALUATE, "--out=/dev/null/x"], "--out=/dev/null/x cannot be written"),
        (EXPORT, "--out is missing"),
        ([*EXPORT, "--out=NEW", "--model=gpt"], "--model: got 'gpt'"),
        # The flag without a value has taken --config as its value.
        (["compile.py", "--scaling", "--config=configs/owt.py"], "--config is missing"),
        ([*COMPILE, "--out=ROOT/README.md"], "is not a result of compile.py"),
        (["benchmark.py", "--out=ROOT/README.md"], "is not a result of benchmark.py"),
        ([*BENCHMARK, "--timed_steps=100"], "got 100, expected at most --decode_steps=64"),
        ([*BENCHMARK, "--batch=a"], "--batch: got 'a'"),
    ],
)
def test_bad_input_is_rejected_in_one_line(run_command, trained, tmp_path, command, words):
    places = {"WORKDIR": trained, "ROOT": ROOT, "NEW": tmp_path / "new"}
    for name, path in places.items():
        command = [word.replace(name, str(path)) for word in command]
    assert_one_line_error(run_command(*command), words)


def quickstart(*words):
    return subprocess.run(
        ["bash", str(ROOT / "launch" / "quickstart.sh"), *words],
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )


@slow
@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--bogus"], "--bogus is not an option"),
        (["a", "b"], "WORKDIR: got two"),
        (["--corpus=/nowhere/at/all"], "no such folder or file"),
        (["--config=/nowhere.py"], "no such file"),
    ],
)
def test_the_quickstart_rejects_bad_options_before_it_installs_anything(flags, words):
    done = quickstart(*flags)
    assert done.returncode == 2 and words in done.stderr and len(done.stderr.splitlines()) == 1
    assert not done.stdout


@slow
def test_the_quickstart_has_help():
    done = quickstart("--help")
    assert done.returncode == 0 and "--corpus" in done.stdout and "WORKDIR" in done.stdout
