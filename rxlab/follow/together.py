"""Two parts of a join at once: what does not look at each other's results, on another thread where the process has a CPU for it.

NumPy and the compiled kernels release the interpreter's lock. What is done beside the caller only reads what the caller reads, or
fills columns of its own, so the results are the same on any number of threads.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

# With fewer events starting a thread costs what it saves.
WORTHWHILE = 200_000
# A worker does not have it: what is done beside the caller has nothing done beside itself.
_POOL: ContextVar[ThreadPoolExecutor | None] = ContextVar("pool", default=None)


@contextmanager
def side_threads(threads: int, n_events: int) -> Iterator[None]:
    """Let :func:`beside` use up to `threads` threads in all, no more than the CPUs this process may run on."""
    others = min(threads, len(os.sched_getaffinity(0))) - 1
    if others < 1 or n_events < WORTHWHILE:
        yield
        return
    with ThreadPoolExecutor(others, thread_name_prefix="rxlab-join") as pool:
        token = _POOL.set(pool)
        try:
            yield
        finally:
            _POOL.reset(token)


def beside(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Callable[[], T]:
    """Begin a call on another thread; return what gives its result. Where no thread is free it is made when that is asked for."""
    pool = _POOL.get()
    if pool is None:
        return lambda: function(*args, **kwargs)
    begun = pool.submit(function, *args, **kwargs)
    return lambda: function(*args, **kwargs) if begun.cancel() else begun.result()
