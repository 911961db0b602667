"""The compiler of the kernels, made ready without what they do not use.

Whoever reads a small recording waits for imports, not for bytes. Numba's first use looks whether scipy has a BLAS by
importing ``scipy.linalg``, which takes longer than all of Numba's own start and which no kernel here calls.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types

from numba import njit

__all__ = ["njit"]

_BLAS = "scipy.linalg.cython_blas"


def _defer_blas() -> None:
    """Let Numba register its linear algebra without importing scipy's: the first kernel that multiplies matrices does.

    Numba asks by an import statement, which takes what is in ``sys.modules``; its compiled code asks for the module by name
    when it is called, and then gets the real one.
    """
    if _BLAS in sys.modules or "numba.np.arraymath" in sys.modules or not importlib.util.find_spec("scipy"):
        return
    sys.modules[_BLAS] = types.ModuleType(_BLAS)
    try:
        importlib.import_module("numba.np.arraymath")
    finally:
        del sys.modules[_BLAS]


_defer_blas()
