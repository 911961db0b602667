"""The kernel's function tracer, in a tracefs instance of its own: the host's trace buffer and tracer stay untouched.

An instance has its own ring buffer, filter, tracer and clock (Documentation/trace/ftrace.rst, "Instances"); it goes with its
folder. A kernel in lockdown mode, or one without CONFIG_FUNCTION_TRACER, refuses: :func:`function_tracing_lack` says so without
changing anything.
"""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path

from rxlab.errors import CaptureError
from rxlab.host.tracepoints import TRACEFS

# What an instance's name begins with.
PREFIX = "rxlab-"
LOCKDOWN = "sys/kernel/security/lockdown"
# A tracer that was just stopped keeps its instance busy for a moment.
_BUSY_SECONDS = 2.0


def tracefs_root(root: Path = Path("/")) -> Path | None:
    """Return tracefs if this process may look into it."""
    for name in TRACEFS:
        folder = root / name
        if os.access(folder / "available_tracers", os.R_OK):
            return folder
    return None


def function_tracing_lack(root: Path = Path("/")) -> str | None:
    """Return why no function log can be recorded here, in a few words; None where nothing speaks against it."""
    folder = tracefs_root(root)
    if folder is None:
        return "tracefs cannot be read: needs root"
    try:
        tracers = (folder / "available_tracers").read_text().split()
        if "function" not in tracers:
            return "this kernel has no function tracer (CONFIG_FUNCTION_TRACER)"
        with open(folder / "set_ftrace_filter"):
            pass
    except OSError as error:
        return f"the kernel refuses it ({_reason(error, root)})"
    return None if os.access(folder / "instances", os.W_OK) else "tracefs instances cannot be made: needs root"


def _reason(error: OSError, root: Path) -> str:
    """Name kernel lockdown where it is on: it forbids the function filter even to root (security_locked_down, LOCKDOWN_TRACEFS)."""
    try:
        modes = (root / LOCKDOWN).read_text()
    except OSError:
        modes = ""
    mode = modes.partition("[")[2].partition("]")[0]
    if error.errno == errno.EPERM and mode not in ("", "none"):
        return f"lockdown mode {mode}"
    return error.strerror or str(error)


def instance_folder(name: str, root: Path = Path("/")) -> Path:
    """Return where an instance of this name is or would be."""
    folder = tracefs_root(root)
    if folder is None:
        raise CaptureError("cannot trace functions", found="tracefs cannot be read", do="Run with sudo.")
    return folder / "instances" / name


def remove_instance(name: str, root: Path = Path("/")) -> bool:
    """Stop an instance's tracer and remove it; False where there is none.

    Raises
    ------
    OSError
        Somebody has one of its files open.
    """
    folder = tracefs_root(root)
    if folder is None or not (folder / "instances" / name).is_dir():
        return False
    instance = folder / "instances" / name
    (instance / "tracing_on").write_text("0")
    (instance / "current_tracer").write_text("nop")
    deadline = time.monotonic() + _BUSY_SECONDS
    while True:
        try:
            instance.rmdir()
            return True
        except OSError as error:
            if error.errno != errno.EBUSY or time.monotonic() > deadline:
                raise
            time.sleep(0.02)
