"""What a process waits for before the first kernel runs: nothing is compiled at import, and little is imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

CAPTURE = Path(__file__).parents[1] / "data" / "tcp-rps-on" / "rx.pcap"
RECORDING = CAPTURE.with_name("perf.data")

COUNT = "import numpy; from rxlab.read import perfrecords; counts = numpy.zeros(3, numpy.int64); "
COUNT += "perfrecords.count_events(numpy.zeros(1, numpy.int16), counts); "


def run(code: str, *, cache: Path | None = None) -> str:
    environment = {**os.environ, **({"NUMBA_CACHE_DIR": str(cache)} if cache else {})}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# Everything that can be imported, then a kernel, which the recorder must see begin and end.
IMPORT_ALL = f"""
import importlib, json, pkgutil, sys
from numba.core.event import install_recorder
with install_recorder("numba:compile") as compiled:
    import rxlab
    for name in dir(rxlab):
        getattr(rxlab, name)
    for module in pkgutil.walk_packages(rxlab.__path__, "rxlab."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    modules, at_import = list(sys.modules), len(compiled.buffer)
    {COUNT}
    print(json.dumps([modules, at_import, len(compiled.buffer), counts.tolist()]))
"""


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> list:
    """Return modules and compiler events after all imports, and events and result of a first kernel."""
    return json.loads(run(IMPORT_ALL, cache=tmp_path_factory.mktemp("empty")))


def test_no_module_compiles_when_it_is_imported(imported: list) -> None:
    assert imported[1:] == [0, 2, [0, 0, 1]]


def test_slow_libraries_are_imported_when_they_are_used(imported: list) -> None:
    assert {"rxlab.show.report", "rxlab.dataset.stats", "rxlab.dataset.aggregate"} < set(imported[0])
    assert not {"flox", "dask.array", "scipy.stats", "matplotlib.pyplot"} & set(imported[0])


@pytest.mark.parametrize(
    "read", [f"rxlab.read_perfdata({str(RECORDING)!r}).load()", f"rxlab.read_pcap({str(CAPTURE)!r})"]
)
def test_compiled_kernels_run_without_numbas_tables(read: str) -> None:
    # The second process finds all kernels compiled. What Numba imports to type and compile arrays takes longer than they do.
    code = f"import rxlab, sys; n = {read}; print(sorted({{'numba.np.arrayobj', 'numba.np.arraymath', 'scipy.linalg', "
    code += "'numba.typed.dictimpl', 'pycparser'} & set(sys.modules)))"
    run(code)
    assert run(code) == "[]"


def test_compiling_does_not_import_scipys_linear_algebra(tmp_path: Path) -> None:
    code = f"import sys; {COUNT}"
    code += "print('numba.np.arraymath' in sys.modules, [m for m in sys.modules if m.startswith('scipy.linalg')])"
    assert run(code, cache=tmp_path) == "True []"


def test_kernels_of_the_user_still_multiply_matrices(tmp_path: Path) -> None:
    code = f"{COUNT} from numba import njit; a = numpy.arange(4.0).reshape(2, 2); "
    code += "print(njit(lambda a: a @ a)(a).tolist(), round(njit(lambda a: numpy.linalg.det(a))(a), 6)); "
    code += "import scipy.linalg.cython_blas as blas; print(len(blas.__pyx_capi__) > 100)"
    assert run(code, cache=tmp_path) == "[[2.0, 3.0], [6.0, 11.0]] -2.0\nTrue"


def test_who_meets_the_stand_in_for_scipys_linear_algebra_gets_the_real_one() -> None:
    code = "import importlib; from rxlab.read.compiler import _without_blas; manager = _without_blas(); manager.__enter__(); "
    code += "found = importlib.import_module('scipy.linalg.cython_blas'); "
    code += "print(type(found).__name__, len(found.__pyx_capi__) > 100); "
    code += "manager.__exit__(None, None, None); import scipy.stats; print(scipy.stats.norm.cdf(0))"
    assert run(code) == "_DeferredBlas True\n0.5"


def test_without_a_folder_for_the_cache_kernels_are_compiled_in_memory() -> None:
    """As with an installation of root's and no home: Numba finds no place, which was a traceback at import."""
    code = "from numba.core import caching; caching.CacheImpl._locator_classes = []; "
    code += "from rxlab.read import words, flows, compiler; " + COUNT + "print(counts.tolist())"
    assert run(code) == "[0, 0, 1]"
