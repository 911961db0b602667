"""The project's own files: one environment in three spellings, notebooks without outputs, nothing of one machine."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import rxlab

REPO = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
REQUIRED = [
    Requirement(line)
    for lines in (PROJECT["dependencies"], *PROJECT["optional-dependencies"].values())
    for line in lines
]
TOP_LEVEL = {
    "notebooks", "rxlab", "data", "environment.yml", "tests", "README.md",  # fixed by the user
    "pyproject.toml", "Makefile", "LICENSE", "CHANGELOG.md", "CONTRIBUTING.md", "docs", "constraints.txt",
    ".ci", ".gitignore", ".pre-commit-config.yaml",
}  # fmt: skip


def tracked_files() -> list[Path]:
    """Return the files of the project: git's list, or in an unpacked archive what lies in the known folders."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=REPO, capture_output=True, text=True, check=False)
    if listed.returncode == 0:
        return [path for name in listed.stdout.split("\0") if name and (path := REPO / name).is_file()]
    return [path for name in sorted(TOP_LEVEL) for path in [REPO / name, *(REPO / name).rglob("*")] if path.is_file()]


FILES = tracked_files()
MODULES = sorted((REPO / "rxlab").rglob("*.py"))
NOTEBOOKS = [path for path in FILES if path.suffix == ".ipynb"]


def read_text(path: Path) -> str | None:
    """Return a file's text, or None for a binary file."""
    content = path.read_bytes()
    return None if b"\0" in content[:8192] else content.decode(errors="replace")


# ---- one environment in three spellings -----------------------------------------------------------------------------


def test_environment_yml_agrees_with_pyproject() -> None:
    entries = yaml.safe_load((REPO / "environment.yml").read_text())["dependencies"]
    conda = {Requirement(entry).name: str(Requirement(entry).specifier) for entry in entries if isinstance(entry, str)}
    assert conda.pop("python") == PROJECT["requires-python"]
    assert conda.pop("pip") == ""
    # What has wheels for some platforms only (a marker says which) is not for conda.
    # The peers of a benchmark are installed by who runs it.
    peers = set(PROJECT["optional-dependencies"]["bench"])
    everywhere = [
        requirement for requirement in REQUIRED if requirement.marker is None and str(requirement) not in peers
    ]
    assert conda == {requirement.name: str(requirement.specifier) for requirement in everywhere}
    assert [entry for entry in entries if not isinstance(entry, str)] == [{"pip": ["--no-deps --editable ."]}]


def test_constraints_pin_every_requirement_exactly_and_within_its_bounds() -> None:
    lines = [line for line in (REPO / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pins = {}
    for line in lines:
        name, _, version = line.partition("==")
        assert re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.!+]*", line), f"not an exact pin from PyPI: {line}"
        pins[canonicalize_name(name)] = version
    assert len(pins) == len(lines)
    assert "rxlab" not in pins
    unmet = [str(want) for want in REQUIRED if not want.specifier.contains(pins.get(canonicalize_name(want.name), "0"))]
    assert unmet == []


def test_python_floor_is_written_once() -> None:
    floor = re.fullmatch(r">=(3\.\d+)", PROJECT["requires-python"])
    assert floor, "the set-up reads requires-python and understands '>=3.N'"
    writes = {
        path.name
        for path in FILES
        if path.suffix in {".toml", ".yml", ".yaml", ".txt", ""} and re.search(rf"(?<![\d.]){re.escape(floor[1])}(?![\d.])", read_text(path) or "")
    }  # fmt: skip
    assert writes == {"pyproject.toml", "environment.yml"}  # the latter is compared above
    assert re.findall(r"Python \| (3\.\d+) or newer", (REPO / "README.md").read_text()) == [floor[1]]


def test_version_is_the_packages() -> None:
    assert rxlab.__version__ == PROJECT["version"]
    assert f"## {rxlab.__version__}" in (REPO / "CHANGELOG.md").read_text()


# ---- files ----------------------------------------------------------------------------------------------------------


def test_top_level_holds_what_the_design_names() -> None:
    assert {path.relative_to(REPO).parts[0] for path in FILES} <= TOP_LEVEL


# Folders of a developer's machine, with the slash that makes them a path. Built from parts so that this file passes too.
MACHINE_PATHS = re.compile(
    r"(?<![A-Za-z0-9_.])/(?:" + "|".join(["work", "farm", "root", "home/[a-z]+", "tmp/v"]) + r")/|[.]library/"
)


def test_no_file_names_a_machine() -> None:
    found = [
        f"{path.relative_to(REPO)}: {match[0]}"
        for path in FILES
        if path.suffix != ".svg" and (match := MACHINE_PATHS.search(read_text(path) or ""))
    ]
    assert found == []


def test_tests_have_names_of_their_own() -> None:
    # pytest imports test files by their bare name: two of one name cannot be collected together.
    names = [path.name for path in (REPO / "tests").rglob("test_*.py")]
    assert sorted(name for name in set(names) if names.count(name) > 1) == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_notebook_has_no_outputs_and_a_parameters_cell(path: Path) -> None:
    cells = json.loads(path.read_text())["cells"]
    kept = [index for index, cell in enumerate(cells) if cell.get("outputs") or cell.get("execution_count")]
    assert kept == [], "clear all outputs before committing: rendered pages are artifacts"
    assert ["parameters" in cell["metadata"].get("tags", []) for cell in cells].count(True) == 1


def test_notebooks_are_numbered_in_reading_order() -> None:
    assert [path.name for path in NOTEBOOKS if not re.match(r"\d\d_[a-z0-9_]+\.ipynb$", path.name)] == []


def test_readme_and_contributing_name_targets_that_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (REPO / "Makefile").read_text(), re.MULTILINE))
    for page in ("README.md", "CONTRIBUTING.md"):
        named = set(re.findall(r"`make ([a-z-]+)", (REPO / page).read_text()))
        assert named <= targets, page


def test_links_between_pages_lead_somewhere() -> None:
    broken = []
    for page in (path for path in FILES if path.suffix == ".md"):
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text()):
            if "://" not in target and not (page.parent / target).exists():
                broken.append(f"{page.relative_to(REPO)} -> {target}")
    assert broken == []


# ---- the package ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", rxlab._PUBLIC)
def test_public_name_resolves(name: str) -> None:
    assert getattr(rxlab, name) is not None
    assert name in dir(rxlab)


def test_unknown_public_name_lists_the_known_ones() -> None:
    with pytest.raises(AttributeError, match="public names: .*open_run.*read_pcap"):
        _ = rxlab.read_packets


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(REPO)))
def test_module_can_be_read_in_one_sitting(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 500
    functions = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    assert {node.name: lines for node in functions if (lines := body_lines(node)) > 80} == {}


def body_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Count the lines of a function's body without its docstring."""
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    return body[-1].end_lineno - body[0].lineno + 1 if body else 0


@pytest.mark.parametrize("path", sorted((REPO / "tests" / "bench").glob("bench_*.py")), ids=lambda path: path.stem)
def test_workers_of_a_benchmark_see_what_their_manager_sees(path: Path) -> None:
    """pyperf gives its workers a bare environment: one that reads a variable itself counts other benchmarks than its manager."""
    script, runner = path.read_text(), (REPO / "tests" / "bench" / "run").read_text()
    handed_on = " ".join(re.findall(r"(?:--inherit-environ |inherit_environ = ).*", runner + script))
    assert all(name in handed_on for name in re.findall(r"environ(?:\.get\(|\[)\"(\w+)\"", script))


def test_no_room_for_odds_and_ends() -> None:
    assert [path.name for path in MODULES if path.stem in {"utils", "util", "helpers", "common", "misc"}] == []
