"""Every command that a page shows has the flags that it is shown with."""

import concurrent.futures
import functools
import itertools
import os
import re
import shlex
import subprocess
import sys

import pytest
from docs.pages import PAGES, ROOT, parse
from ml_collections import ConfigDict

from diladiff_jax.config import default_config

SCRIPT = re.compile(r"(?:launch|tools)/[\w/]+\.(?:py|sh)")


def commands(name):
    """(script, words after it) of every command in the page's shell blocks and inline code."""
    page = parse(name)
    shell = [f.text for f in page.fences if f.info in ("bash", "")]
    lines = "\n".join(shell).replace("\\\n", " ").splitlines()
    for line in [*lines, *(span.replace("\\|", "|") for span in page.spans)]:
        words = shlex.split(line.replace("'", ""), comments=True) if SCRIPT.search(line) else []
        for i, (program, script) in enumerate(itertools.pairwise(words)):
            if program in ("python", "bash") and SCRIPT.fullmatch(script):
                yield script, [word.strip("[]") for word in words[i + 2 :]]


SHOWN = {(script, *words) for name in PAGES for script, words in commands(name)}


@functools.cache
def usage(script):
    """What `--help` prints."""
    program = sys.executable if script.endswith(".py") else "bash"
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    done = subprocess.run(
        [program, str(ROOT / script), "--help"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module", autouse=True)
def _usages():
    """All at once: each waits for an interpreter to start."""
    with concurrent.futures.ThreadPoolExecutor() as pool:
        list(pool.map(usage, {"launch/train.py", *(script for script, *_ in SHOWN)}))


def check_flags(script, words):
    for word in words:
        flag, _, value = word.partition("=")
        if flag == "--config" and value and value.isascii() and "/" in value:
            assert (ROOT / value.partition(":")[0]).is_file(), f"{value} is not a file"
        if flag.startswith("--config."):
            setting(flag.removeprefix("--config."))
        elif flag.startswith("--"):
            negated = flag.replace("--no", "--", 1)
            known = re.findall(r"--(?:\[no\])?[\w-]+", usage(script))
            known = {k.replace("[no]", "") for k in known}
            assert {flag, negated} & known, f"{script} has no flag {flag}; it has {sorted(known)}"


def setting(key):
    """A setting of the config, which must exist."""
    node = default_config()
    for part in key.split("."):
        assert part in node or part in ("KEY", "STAGE"), f"--config.{key} is not a setting"
        node = node.get(part, ConfigDict())


@pytest.mark.parametrize("command", sorted(SHOWN), ids=" ".join)
def test_a_shown_command_has_these_flags(command):
    script, *words = command
    if script.endswith(".sh") and "--" in words:  # what follows is passed to train.py
        end = words.index("--")
        check_flags("launch/train.py", words[end + 1 :])
        words = words[:end]
    check_flags(script, words)


def test_commands_are_found_in_the_pages():
    assert {script for script, *_ in SHOWN} >= {
        "launch/quickstart.sh",
        "launch/test.sh",
        "launch/train.py",
        "launch/sample.py",
        "launch/evaluate.py",
        "launch/pod/slurm.sh",
        "tools/reliability/faults.py",
    }


@pytest.mark.parametrize("name", PAGES)
def test_settings_in_inline_code_exist(name):
    """Code that reads like BLOCK.SETTING, perhaps with =VALUE, is a setting."""
    blocks = set(default_config())
    for span in parse(name).spans:
        key = span.partition("=")[0]
        block, _, leaf = key.partition(".")
        if block in blocks and re.fullmatch("[a-z_]+", leaf) and leaf != "json":
            setting(key)
