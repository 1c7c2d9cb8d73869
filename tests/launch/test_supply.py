"""What is installed: pins, locks with hashes, ranges and licences agree with each other. Nothing is asked of the network."""

import importlib.metadata
import pathlib
import re
import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = pathlib.Path(__file__).resolve().parents[2]
PLACES = [
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


def lock(name):
    """(requirement, hashes, what asks for it) of each entry."""
    text = (ROOT / "launch" / f"{name}.lock").read_text()
    entries = re.split(
        r"\n(?=[A-Za-z])", text.split("\n", 2)[2]
    )  # two lines of comment first, the second with the command
    assert text.splitlines()[1].endswith(f"--output-file launch/{name}.lock")
    return [
        (
            Requirement(re.split(r" \\\n", entry)[0]),
            re.findall(r" --hash=sha256:([0-9a-f]{64})(?= \\\n|\n)", entry + "\n"),
            re.findall(r"(?:via|#  ) (\S[^\n]*)", entry),
        )
        for entry in entries
    ]


def version(requirement):
    (only,) = requirement.specifier
    assert only.operator == "==" and "*" not in only.version, requirement
    return only.version


def locked(place):
    """Name to version of what the lock holds for a machine."""
    found = [
        (canonicalize_name(r.name), version(r))
        for r, _, _ in lock("requirements")
        if r.marker is None or r.marker.evaluate(place)
    ]
    assert len(dict(found)) == len(found), "two versions of one package"
    return dict(found)


def pins():
    lines = [
        line.partition("#")[0].strip()
        for line in (ROOT / "requirements.txt").read_text().splitlines()
    ]
    return {canonicalize_name(r.name): version(r) for r in map(Requirement, filter(None, lines))}


@pytest.mark.parametrize("name", ["requirements", "build", "libtpu"])
def test_every_entry_of_a_lock_is_a_version_with_hashes_and_nothing_else_stands_in_it(name):
    """No index, address or path of the machine where it was made."""
    entries = lock(name)
    assert all(
        version(requirement) and hashes and requirement.url is None
        for requirement, hashes, _ in entries
    )
    rest = [
        line
        for line in (ROOT / "launch" / f"{name}.lock").read_text().splitlines()
        if not re.match(r"[\w.-]+==\S+( ;.*)?( \\)?$|    --hash=sha256:[0-9a-f]{64}( \\)?$", line)
    ]
    assert all(
        line.lstrip().startswith("#") and not re.search(r"://|(?<![\w.])/", line) for line in rest
    )


def test_the_lock_is_of_these_pins():
    asked = {
        canonicalize_name(requirement.name)
        for requirement, _, by in lock("requirements")
        if "-r requirements.txt" in by
    }
    assert asked == pins().keys()
    for place in PLACES:
        assert pins().items() <= locked(place).items()


def test_the_lock_holds_all_that_its_packages_ask_for():
    """As those that are installed here state it, for every platform: a pin that was changed by hand would be found."""
    for place in PLACES:
        held, seen, unseen = locked(place), set(), [(name, "") for name in pins()]
        while unseen:
            name, extra = unseen.pop()
            if (name, extra) in seen:
                continue
            seen.add((name, extra))
            try:
                installed = importlib.metadata.distribution(name)
            except importlib.metadata.PackageNotFoundError:
                continue
            for wanted in map(
                Requirement, installed.requires or () if installed.version == held[name] else ()
            ):
                if wanted.marker is None or wanted.marker.evaluate(place | {"extra": extra}):
                    other = canonicalize_name(wanted.name)
                    assert wanted.specifier.contains(held[other], prereleases=True), (
                        name,
                        wanted,
                        held[other],
                    )
                    unseen += [(other, extra) for extra in ("", *wanted.extras)]
        assert len(seen) > 80


def test_the_ranges_of_the_library_admit_the_pins():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    ranges = [
        Requirement(text)
        for text in [*project["dependencies"], *sum(project["optional-dependencies"].values(), [])]
    ]
    pinned = pins()
    assert all(
        wanted.specifier.contains(pinned[canonicalize_name(wanted.name)]) for wanted in ranges
    )


def test_libtpu_is_the_one_of_the_pinned_jax():
    ((libtpu, _, _),) = lock("libtpu")
    assert importlib.metadata.version("jax") == pins()["jax"], (
        "run launch/test.sh, which installs the pinned packages"
    )
    wanted = [
        Requirement(text)
        for text in importlib.metadata.requires("jax")
        if text.startswith("libtpu")
    ]
    assert any(
        one.specifier.contains(version(libtpu))
        for one in wanted
        if one.marker.evaluate({"extra": "tpu"})
    )


def test_the_list_of_licences_is_of_the_lock():
    prose, _, table = (ROOT / "docs" / "licences.md").read_text().partition("| Name |")
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]
    ]
    places = [locked(place) for place in PLACES]
    assert {canonicalize_name(name) for name, _, _ in rows} == set().union(*places)
    assert all(
        number in {place.get(canonicalize_name(name)) for place in places}
        for name, number, _ in rows
    )
    assert all(licence and licence != "UNKNOWN" for *_, licence in rows)
    told = set(re.findall(r"`([\w-]+)`", prose.partition("Some packages are installed")[0]))
    for name, _, licence in rows:
        permissive = re.search(
            r"MIT|BSD|Apache|PSF|Python Software Foundation|ISC", licence
        ) and not re.search(r"GNU|GPL|MPL|Mozilla|EPL|CDDL", licence)
        assert permissive or name in told, (name, licence)
