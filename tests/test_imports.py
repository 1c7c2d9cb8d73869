"""Who may import whom (the architecture's table), and what importing the library may not do."""

import ast
import graphlib
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
PACKAGE = "diladiff_jax"

ALLOWED = {
    "files": set(),
    "jax_settings": set(),
    "console": set(),
    "options": set(),
    "run_options": {"options"},
    "nn": {"options"},
    "diffusion": {"options"},
    "data": {"files", "options"},
    "objectives": {"nn", "diffusion", "options"},
    "sampling": {"nn", "diffusion", "options"},
    "stages": {"objectives", "sampling", "nn", "diffusion", "options", "run_options"},
    "config": {"stages", "sampling", "nn", "diffusion", "data", "options", "run_options"},
    "storage": {"stages", "config", "data", "nn", "files"},
    "parallel": {"nn"},
    "experiment": {
        "files",
        "config",
        "stages",
        "objectives",
        "sampling",
        "storage",
        "parallel",
        "data",
        "diffusion",
        "nn",
    },
    "arguments": {"stages", "sampling", "diffusion", "data"},
    "programs": {"experiment", "stages", "objectives", "sampling", "parallel"},
    "model": {
        "programs",
        "arguments",
        "experiment",
        "stages",
        "config",
        "sampling",
        "storage",
        "parallel",
        "data",
    },
    "training": {
        "files",
        "experiment",
        "stages",
        "config",
        "objectives",
        "sampling",
        "storage",
        "parallel",
        "data",
    },
    "evaluation": {
        "model",
        "stages",
        "objectives",
        "sampling",
        "storage",
        "parallel",
        "data",
        "diffusion",
        "nn",
        "files",
    },
    "benchmark": {
        "training",
        "preflight",
        "stages",
        "config",
        "sampling",
        "parallel",
        "diffusion",
        "nn",
    },
    "preflight": {
        "experiment",
        "training",
        "stages",
        "config",
        "sampling",
        "storage",
        "parallel",
        "nn",
        "files",
    },
}
LIBRARY = sorted((ROOT / PACKAGE).rglob("*.py"))


def imported(path):
    """Absolute dotted names of everything that a file imports, at any level of nesting."""
    here = path.relative_to(ROOT).with_suffix("").parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(here[: len(here) - node.level]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            yield from (f"{module}.{alias.name}" for alias in node.names)


def room(path):
    part = path.relative_to(ROOT / PACKAGE).parts[0]
    return part.removesuffix(".py")


def violations(path):
    """The imports of a library file that its room may not make."""
    ours = room(path)
    for name in imported(path):
        parts = name.split(".")
        if parts[0] == PACKAGE and parts[1:2] in (["jax_settings"], ["console"]):
            continue  # leaves that every room may import
        if parts[0] == "launch":
            yield name
        elif parts[0] == PACKAGE and ours != "__init__":
            other = parts[1] if len(parts) > 1 else "__init__"
            if other != ours and other not in ALLOWED.get(ours, set()):
                yield name
            if ours == "model" and parts[1:3] == ["training", "loop"]:
                yield name


@pytest.mark.parametrize("path", LIBRARY, ids=lambda p: str(p.relative_to(ROOT / PACKAGE)))
def test_each_room_imports_only_what_it_may(path):
    """The table of the architecture, room by room; a new room needs a line in it."""
    assert room(path) in {*ALLOWED, "__init__"}, (
        f"{room(path)} has no line in the table of who may import whom"
    )
    assert not list(violations(path))


def test_every_permission_is_used():
    """The table allows nothing that no file needs."""
    used = {name: set() for name in ALLOWED}
    for path in LIBRARY:
        parts = (name.split(".") for name in imported(path))
        others = {part[1] for part in parts if part[0] == PACKAGE and len(part) > 1}
        used.setdefault(room(path), set()).update(others)
    assert not {name: rest for name, may in ALLOWED.items() if (rest := may - used[name])}


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def test_no_modules_import_each_other_in_a_circle():
    """Imports inside functions and for type checking count; packages' own exports do not."""
    modules = {module_name(path): path for path in LIBRARY if path.name != "__init__.py"}

    def targets(path):
        for name in imported(path):
            module = name if name in modules else name.rpartition(".")[0]
            if module in modules:
                yield module

    graph = {name: set(targets(path)) - {name} for name, path in modules.items()}
    try:
        tuple(graphlib.TopologicalSorter(graph).static_order())
    except graphlib.CycleError as error:
        pytest.fail("circle: " + " -> ".join(error.args[1]))


def test_launchers_import_the_library_and_each_other_alone():
    """Nothing of ours but the package and launch itself."""
    ours = {p.stem for p in ROOT.iterdir() if p.is_dir() or p.suffix == ".py"} - {"launch", PACKAGE}
    for path in (ROOT / "launch").rglob("*.py"):
        assert not [name for name in imported(path) if name.split(".")[0] in ours], path


def test_the_check_sees_what_it_should(tmp_path, monkeypatch):
    """A forbidden import is found in each of its spellings."""
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    file = tmp_path / PACKAGE / "sampling" / "x.py"
    file.parent.mkdir(parents=True)
    spellings = (
        "import diladiff_jax.objectives.mdlm",
        "from diladiff_jax import objectives",
        "from diladiff_jax.objectives.mdlm import MDLM",
        "from ..objectives import mdlm",
        "from .. import objectives",
        "def f():\n    from launch import train",
    )
    for text in spellings:
        file.write_text(text)
        assert list(violations(file)), text
    file.write_text(
        "from diladiff_jax.sampling import orders\nfrom . import latent\n"
        "from diladiff_jax.nn import layers\nimport jax"
    )
    assert not list(violations(file))


def test_importing_the_library_starts_nothing():
    """In a fresh process: no jax backend, no distributed runtime, no TensorFlow."""
    script = """
import sys
import diladiff_jax, diladiff_jax.training, diladiff_jax.evaluation, diladiff_jax.preflight
from jax._src import distributed, xla_bridge
assert not xla_bridge._backends, f"backends {list(xla_bridge._backends)} were started"
assert distributed.global_state.client is None
assert "tensorflow" not in sys.modules, "tensorflow was imported"
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


def test_the_made_environment_imports_the_library_from_anywhere(tmp_path):
    """In the .venv that the scripts make, from another folder and without a path of its own."""
    if pathlib.Path(sys.prefix) != ROOT / ".venv":
        pytest.skip("not run in the scripts' own environment")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", "import diladiff_jax"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
