"""The compiler's start: scipy is left alone until a kernel multiplies matrices, and then works."""

from __future__ import annotations

import subprocess
import sys


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_reading_does_not_import_scipys_linear_algebra() -> None:
    code = "import sys, rxlab; [rxlab.read_perfdata, rxlab.read_pcap]; from rxlab.read import perfrecords, headers; "
    code += "import numpy; perfrecords.count_events(numpy.zeros(1, numpy.int16), numpy.zeros(3, numpy.int64)); "
    code += "print('numba.np.arraymath' in sys.modules, [m for m in sys.modules if m.startswith('scipy.linalg')])"
    assert run(code) == "True []"


def test_kernels_of_the_user_still_multiply_matrices() -> None:
    code = "import rxlab.read.compiler, numpy; from numba import njit; a = numpy.arange(4.0).reshape(2, 2); "
    code += "print(njit(lambda a: a @ a)(a).tolist(), round(njit(lambda a: numpy.linalg.det(a))(a), 6)); "
    code += "import scipy.linalg.cython_blas as blas; print(len(blas.__pyx_capi__) > 100)"
    assert run(code) == "[[2.0, 3.0], [6.0, 11.0]] -2.0\nTrue"
