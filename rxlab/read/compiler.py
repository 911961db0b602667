"""The compiler of the kernels, made ready without what they do not use.

Whoever reads a small recording waits for imports, not for bytes. Before Numba runs a compiled function from its cache it
fills its tables of everything that can be typed and compiled, arrays to dictionaries to C declarations, which takes longer
than all kernels of a reader together; and filling them it looks whether scipy has a BLAS by importing ``scipy.linalg``. Code
that is already compiled needs neither, and no kernel here calls a BLAS.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import numba
from numba.core.caching import FunctionCache
from numba.core.runtime import rtsys

_BLAS = "scipy.linalg.cython_blas"


class _DeferredBlas(types.ModuleType):
    """Stands for scipy's BLAS while Numba looks whether there is one; who asks it for anything gets the real one."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name != "__pyx_capi__":
            raise AttributeError(name)
        if sys.modules.get(_BLAS) is self:
            del sys.modules[_BLAS]
        return getattr(importlib.import_module(_BLAS), name)


@contextlib.contextmanager
def _without_blas() -> Iterator[None]:
    """Let Numba register its linear algebra without importing scipy's: the first kernel that multiplies matrices does.

    Numba asks by an import statement, which takes what is in ``sys.modules``; its compiled code asks for the module by name
    when it is called, and then gets the real one.
    """
    if _BLAS in sys.modules or "numba.np.arraymath" in sys.modules or not importlib.util.find_spec("scipy"):
        yield
        return
    stand_in = sys.modules[_BLAS] = _DeferredBlas(_BLAS)
    try:
        yield
    finally:
        if sys.modules.get(_BLAS) is stand_in:
            del sys.modules[_BLAS]


class _CompiledFirst(FunctionCache):
    """Numba's cache on disk, asked before Numba's tables are filled; they are filled when something is to be compiled."""

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """Return the compiled function for a signature, None when there is none."""
        # What compiled code calls: the runtime's allocator and reference counts.
        rtsys.initialize(target_context)
        with _without_blas():
            with self._guard_against_spurious_io_errors():
                found = self._load_overload(sig, target_context)
                if found is not None:
                    return found
            return super().load_overload(sig, target_context)


def njit(function: Callable | None = None, *, cache: bool = False, **options: Any) -> Any:
    """Compile a function as ``numba.njit`` does, but start from the cache without filling Numba's tables.

    Where no folder for a cache may be written (an installation of root's, and no home of one's own), each process compiles anew.
    """
    if function is None:
        return lambda function: njit(function, cache=cache, **options)
    dispatcher: Any = numba.njit(function, **options)
    if cache:  # as Dispatcher.enable_caching() does
        with contextlib.suppress(RuntimeError):  # Numba's "no locator available"
            dispatcher._cache = _CompiledFirst(function)
    return dispatcher
