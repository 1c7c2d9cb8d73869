"""What is installed: pins, locks, version ranges and licences agree. Nothing uses the network."""

import importlib.metadata
import itertools
import pathlib
import re
import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = pathlib.Path(__file__).resolve().parents[2]
ENVIRONMENTS = [
    {
        "sys_platform": system,
        "platform_system": name,
        "platform_machine": machine,
        "os_name": "posix",
        "python_version": python,
        "python_full_version": f"{python}.0",
        "extra": "",
    }
    for system, name, machine in (
        ("linux", "Linux", "x86_64"),
        ("linux", "Linux", "aarch64"),
        ("darwin", "Darwin", "arm64"),
    )
    for python in ("3.11", "3.12", "3.13")
]
"""The machines that the locks are for, as environments of requirement markers."""

ENTRY = re.compile(r"[\w.-]+==\S+( ;.*)?( \\)?$|    --hash=sha256:[0-9a-f]{64}( \\)?$")


def lock_text(name):
    return (ROOT / "launch" / f"{name}.lock").read_text()


def lock_entries(name):
    """(requirement, hashes, packages that require it) of each entry of a lock."""
    # A lock begins with two lines of comment, the second with the command that renews it.
    entries = re.split(r"\n(?=[A-Za-z])", lock_text(name).split("\n", 2)[2])
    return [
        (
            Requirement(re.split(r" \\\n", entry)[0]),
            re.findall(r" --hash=sha256:([0-9a-f]{64})(?= \\\n|\n)", entry + "\n"),
            re.findall(r"(?:via|#  ) (\S[^\n]*)", entry),
        )
        for entry in entries
    ]


def pinned_version(requirement):
    (only,) = requirement.specifier
    assert only.operator == "==" and "*" not in only.version, requirement
    return only.version


def locked_versions(environment):
    """Package name to version, on one kind of machine."""
    found = [
        (canonicalize_name(requirement.name), pinned_version(requirement))
        for requirement, _, _ in lock_entries("requirements")
        if requirement.marker is None or requirement.marker.evaluate(environment)
    ]
    assert len(dict(found)) == len(found), "two versions of one package"
    return dict(found)


def pins():
    """Package name to version, of requirements.txt."""
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    stripped = [line.partition("#")[0].strip() for line in lines]
    requirements = map(Requirement, filter(None, stripped))
    return {canonicalize_name(each.name): pinned_version(each) for each in requirements}


@pytest.mark.parametrize("name", ["requirements", "build", "libtpu", "smollm2"])
def test_a_lock_has_nothing_but_versions_with_hashes(name):
    """No index, no address, and no path of the machine where it was written."""
    for requirement, hashes, _ in lock_entries(name):
        assert pinned_version(requirement) and hashes and requirement.url is None, requirement
    for line in lock_text(name).splitlines():
        if not ENTRY.match(line):
            assert line.lstrip().startswith("#"), line
            assert not re.search(r"://|(?<![\w.])/", line), line


@pytest.mark.parametrize("name", ["requirements", "build", "libtpu", "smollm2"])
def test_a_lock_begins_with_the_command_that_renews_it(name):
    assert lock_text(name).splitlines()[1].endswith(f"--output-file launch/{name}.lock")


def test_the_lock_is_of_the_pins_in_requirements_txt():
    direct = {
        canonicalize_name(requirement.name)
        for requirement, _, required_by in lock_entries("requirements")
        if "-r requirements.txt" in required_by
    }
    assert direct == pins().keys()
    for environment in ENVIRONMENTS:
        assert pins().items() <= locked_versions(environment).items()


@pytest.mark.parametrize(
    "environment",
    ENVIRONMENTS,
    ids=lambda each: f"{each['sys_platform']}-{each['platform_machine']}-{each['python_version']}",
)
def test_the_lock_satisfies_what_its_packages_require(environment):
    """Reads the metadata of the packages that are installed here, so it finds a changed pin."""
    locked, seen, unseen = locked_versions(environment), set(), [(name, "") for name in pins()]
    while unseen:
        name, extra = unseen.pop()
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        try:
            installed = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        if installed.version != locked[name]:
            continue
        for required in map(Requirement, installed.requires or ()):
            if required.marker is None or required.marker.evaluate(environment | {"extra": extra}):
                other = canonicalize_name(required.name)
                fits = required.specifier.contains(locked[other], prereleases=True)
                assert fits, f"{name} requires {required}, and {locked[other]} is locked"
                unseen += [(other, extra) for extra in ("", *required.extras)]
    assert len(seen) > 80


def test_the_library_s_version_ranges_admit_the_pins():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = project["dependencies"], *project["optional-dependencies"].values()
    pinned = pins()
    for required in map(Requirement, itertools.chain(*groups)):
        assert required.specifier.contains(pinned[canonicalize_name(required.name)]), required


def test_the_locked_libtpu_is_the_one_that_the_pinned_jax_requires():
    ((libtpu, _, _),) = lock_entries("libtpu")
    assert importlib.metadata.version("jax") == pins()["jax"], (
        "run launch/test.sh, which installs the pinned packages"
    )
    required = map(Requirement, importlib.metadata.requires("jax"))
    assert any(
        each.specifier.contains(pinned_version(libtpu))
        for each in required
        if each.name == "libtpu" and each.marker.evaluate({"extra": "tpu"})
    )


def licence_table():
    """The prose before the table of docs/licences.md, and its rows (name, version, licence)."""
    prose, _, table = (ROOT / "docs" / "licences.md").read_text().partition("| Name |")
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]
    ]
    return prose, rows


def test_the_licence_table_lists_every_locked_package():
    _, rows = licence_table()
    locked = [locked_versions(environment) for environment in ENVIRONMENTS]
    assert {canonicalize_name(name) for name, _, _ in rows} == set().union(*locked)
    for name, number, licence in rows:
        versions = {versions.get(canonicalize_name(name)) for versions in locked}
        assert number in versions, f"{name}: {number} is listed, {versions} are locked"
        assert licence and licence != "UNKNOWN", name


def test_every_licence_that_is_not_permissive_is_explained():
    prose, rows = licence_table()
    explained = set(re.findall(r"`([\w-]+)`", prose.partition("Some packages are installed")[0]))
    permissive = re.compile(r"MIT|BSD|Apache|PSF|Python Software Foundation|ISC")
    copyleft = re.compile(r"GNU|GPL|MPL|Mozilla|EPL|CDDL")
    for name, _, licence in rows:
        if not permissive.search(licence) or copyleft.search(licence):
            assert name in explained, f"{name} has the licence {licence}"
