"""The arrows of the design: who imports whom, and what the recording side must do without.

``host -> record`` on one side, ``read -> follow -> dataset -> show`` on the other, each room importing only from those
before it; the two sides meet in files. Imports are read from the source, those inside functions too: a lazy import is still
an arrow. What libraries bring in behind one's back is seen in a fresh interpreter.
"""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import tomllib
from graphlib import TopologicalSorter
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from rxlab import _PUBLIC

REPO = Path(__file__).resolve().parent.parent
PACKAGE = REPO / "rxlab"

EVERYONE = {"stages", "errors", "rundir"}
SIDES = (("host", "record"), ("read", "follow", "dataset", "show"))
ROOMS = {room for side in SIDES for room in side}
# hostcommand is the part of __main__ that holds ``rxlab host``.
SEE_BOTH = {"doctor", "pipeline", "__main__", "hostcommand"}
ANALYSIS_ONLY = {"xarray", "numba", "matplotlib", "pandas", "scipy", "dask", "h5netcdf", "zarr", "pyarrow", "pyshark"}

MODULES = sorted(PACKAGE.rglob("*.py"))


def module_name(path: Path) -> str:
    """Return the dotted name of a module file; a package is named without ``__init__``."""
    parts = path.relative_to(REPO).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module: str) -> str:
    """Return the folder or top-level module that a dotted name lies in, "" for the package itself."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


def imports_of(tree: ast.AST, module: str, *, is_package: bool = False) -> set[str]:
    """Return the dotted names that a module imports anywhere in it, by statement or by ``import_module("...")``."""
    package = module.split(".") if is_package else module.split(".")[:-1]
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            found.update(f"{source}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in {
            "import_module",
            "__import__",
        }:
            found.update(argument.value for argument in node.args[:1] if isinstance(argument, ast.Constant))
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "rxlab":
            found.add(f"rxlab.{node.attr}")
    # A lazily loaded public name (rxlab.read_pcap) is an import of the module it lives in.
    return {_PUBLIC.get(name.removeprefix("rxlab."), name) if name.count(".") == 1 else name for name in found}


def forbidden(module: str, imported: str) -> str | None:
    """Return why `module` may not import `imported`, or None when it may."""
    here, there = room_of(module), room_of(imported)
    if not imported.startswith("rxlab.") or here == there or here in SEE_BOTH or there in EVERYONE:
        return None
    if here in EVERYONE or here == "":
        return f"{here or 'rxlab'} is everyone's and imports no room"
    if there not in ROOMS:
        return f"{there} sees both sides; rooms do not import it" if there in SEE_BOTH else None
    for side in SIDES:
        if here in side and there in side:
            return None if side.index(there) < side.index(here) else f"{there} comes after {here}"
    return f"{here} and {there} are on different sides; they meet in the run directory"


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_a_room_imports_only_rooms_before_it(path: Path) -> None:
    module = module_name(path)
    imported = imports_of(ast.parse(path.read_text()), module, is_package=path.name == "__init__.py")
    if module == "rxlab":
        imported -= set(_PUBLIC.values())  # the lazy table itself, and its TYPE_CHECKING twin
    wrong = {name: reason for name in sorted(imported) if (reason := forbidden(module, name))}
    assert wrong == {}


@pytest.mark.parametrize(
    ("module", "line", "reason"),
    [
        ("rxlab.record.capture", "from rxlab.read.pcap import read_pcap", "different sides"),
        ("rxlab.record.capture", "def f():\n    import rxlab.read.columns", "different sides"),
        ("rxlab.record.capture", "from ..follow import join", "different sides"),
        ("rxlab.record.capture", "import rxlab\nrxlab.read_pcap('x')", "different sides"),
        ("rxlab.record.capture", "from rxlab import read_pcap", "different sides"),
        ("rxlab.record.capture", "import_module('rxlab.show.plots')", "different sides"),
        ("rxlab.host.settings", "from rxlab.record import sweep", "comes after"),
        ("rxlab.read.pcap", "from rxlab.dataset import schema", "comes after"),
        ("rxlab.show.report", "from rxlab.pipeline import open_run", "sees both sides"),
        ("rxlab.stages", "import rxlab.host", "everyone's"),
        ("rxlab.record.capture", "from rxlab.host import settings", None),
        ("rxlab.record.capture", "from . import workload", None),
        ("rxlab.show.plots", "from rxlab.read.columns import Columns", None),
        ("rxlab.pipeline", "from rxlab.record import capture", None),
        ("rxlab.host.journal", "from rxlab.errors import HostSettingError", None),
    ],
)
def test_the_guard_sees_every_spelling(module: str, line: str, reason: str | None) -> None:
    reasons = [forbidden(module, name) for name in imports_of(ast.parse(line), module)]
    found = " ".join(text for text in reasons if text)
    assert (reason in found) if reason else found == ""


def test_no_two_modules_need_each_other() -> None:
    # Imports for the type checker only count too: who cannot be understood without the other is one module, or needs a third.
    names = {module_name(path) for path in MODULES}
    needs: dict[str, set[str]] = {}
    for path in MODULES:
        module = module_name(path)
        imported = imports_of(ast.parse(path.read_text()), module, is_package=path.name == "__init__.py")
        needs[module] = {name if name in names else name.rpartition(".")[0] for name in imported} & names - {
            "rxlab",
            module,
        }
    del needs["rxlab"]  # its table of public names is of everything
    sorter = TopologicalSorter(needs)
    sorter.prepare()  # CycleError names the modules


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("*/__init__.py")), ids=module_name)
def test_a_rooms_init_holds_a_sentence_and_nothing_else(path: Path) -> None:
    body = ast.parse(path.read_text()).body
    assert len(body) == 1
    assert isinstance(body[0], ast.Expr)
    assert ast.get_docstring(ast.parse(path.read_text()))


def test_every_folder_is_a_room_of_the_design() -> None:
    assert {path.parent.name for path in PACKAGE.glob("*/*.py")} <= ROOMS
    assert {path.stem for path in PACKAGE.glob("*.py")} <= EVERYONE | SEE_BOTH | {"__init__"}


# The one module of the recording side with an extra of its own: what a lab machine of a cluster installs.
EXTRA_OF = {"rxlab.record.cluster": "cluster"}
RECORDING = [
    path for path in MODULES if room_of(module_name(path)) in {*SIDES[0], *EVERYONE, ""} and path.name != "__init__.py"
]


@pytest.mark.parametrize("path", RECORDING, ids=module_name)
def test_the_recording_side_needs_only_the_base_dependencies(path: Path) -> None:
    # `pip install rxlab` without extras records on a bare test machine.
    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    needs = project["dependencies"] + project["optional-dependencies"].get(EXTRA_OF.get(module_name(path), ""), [])
    base = {re.split(r"[^A-Za-z0-9_-]", line)[0].lower() for line in needs}
    owners = packages_distributions()
    tops = {name.split(".")[0] for name in imports_of(ast.parse(path.read_text()), module_name(path))}
    outside = {top for top in tops if top and top not in sys.stdlib_module_names and top != "rxlab"}
    assert {top for top in outside if not base & {owner.lower() for owner in owners.get(top, [top])}} == set()


def loaded_by(statement: str) -> set[str]:
    """Return the top-level modules in a fresh interpreter after `statement`."""
    code = f"{statement}\nimport sys, json\nprint(json.dumps(sorted({{name.split('.')[0] for name in sys.modules}})))"
    shown = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=False)
    assert shown.returncode == 0, shown.stderr
    return set(json.loads(shown.stdout))


def test_import_rxlab_loads_nothing_heavy() -> None:
    assert loaded_by("import rxlab") & {"numpy", "typer", "rich", "pyroute2", *ANALYSIS_ONLY} == set()


def test_recording_brings_in_no_analysis_library() -> None:
    names = [module_name(path) for path in RECORDING]
    assert "rxlab.record.capture" in names
    assert loaded_by("import " + ", ".join(names)) & ANALYSIS_ONLY == set()


@pytest.mark.parametrize("module", sorted(SEE_BOTH))
def test_command_line_and_doctor_start_without_the_analysis_extras(module: str) -> None:
    # On a bare test machine the libraries of rxlab[analysis] are not there: make them as absent as that.
    absent = "import sys; sys.modules.update(dict.fromkeys(" + repr(sorted(ANALYSIS_ONLY)) + "))"
    assert "rxlab" in loaded_by(f"{absent}\nimport rxlab.{module}")


def test_a_capture_is_recorded_and_told_without_the_analysis_extras() -> None:
    # All that `rxlab capture` imports up to its last line, around a capture that is there already.
    absent = "import sys; sys.modules.update(dict.fromkeys(" + repr(sorted(ANALYSIS_ONLY)) + "))"
    record = (
        "import rxlab.record.capture as c; from rxlab import pipeline, rundir; from rxlab.show.facts import run_text\n"
        "c.capture = lambda *_, **options: rundir.open_rundir('data/tcp-rps-off')\n"
        "run = pipeline.record_run('x', iface='lo', duration=1, idle='off')\n"
        "assert 'complete' in run_text(run.path, run.run)"
    )
    assert "rxlab" in loaded_by(f"{absent}\n{record}")
