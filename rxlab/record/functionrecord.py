"""A log of kernel functions around a workload: ftrace's function tracer with a filter, as text (``functions.log``).

It answers another question than perf and tcpdump do: not how long, but *through which functions* a request went. A call costs
a few hundred nanoseconds here too, so a run with a function log is an explanation, never a verdict.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rxlab.errors import CaptureError, UsageError
from rxlab.host.functiontrace import PREFIX, function_tracing_lack, instance_folder, remove_instance

# Per CPU. A call takes about 30 bytes: some 500,000 calls.
BUFFER_KB = 16_384
# perf's stamps and those of the pcap's readings are on it too.
CLOCK = "mono"
_PATTERN = re.compile(r"[\w.*?\[\]!^-]+")
_COUNT = re.compile(r"^(overrun|dropped events|entries): (\d+)$", re.MULTILINE)


def parse_functions(text: str) -> tuple[str, ...]:
    """Return the patterns of ``tcp_*,ipv4_*,*socket*``.

    Raises
    ------
    UsageError
        A pattern the kernel's filter would read as something else (``:`` begins a command there).
    """
    patterns = tuple(part.strip() for part in re.split(r"[,\s]+", text) if part.strip())
    wrong = [pattern for pattern in patterns if not _PATTERN.fullmatch(pattern)]
    if wrong or not patterns:
        raise UsageError(
            "not a function filter",
            where="--functions",
            found=repr(wrong[0] if wrong else text),
            expected="names or patterns, e.g. 'tcp_*,ipv4_*,*socket*'",
        )
    return patterns


def check_functions(root: Path = Path("/")) -> None:
    """Raise the one-line error where this host cannot record a function log, before anything is made."""
    if lack := function_tracing_lack(root):
        raise CaptureError(
            "cannot record a function log",
            found=lack,
            do="Leave --functions out, or record it in a virtual machine (its kernel is its own).",
        )


class FunctionRecorder:
    """The function tracer in an instance of its own.

    Parameters
    ----------
    path : Path
        Text file to write at the end, mode 0600.
    patterns : sequence of str
        As ``set_ftrace_filter`` takes them; one that matches no function of this kernel is reported, none at all is an error.
    register : callable
        Told the instance's name *before* it is made (:meth:`rxlab.host.journal.Transaction.register_instance`).
    root : Path
        Where ``/sys`` is; tests give a made-up one.

    Attributes
    ----------
    problems : list of str
        What makes the log incomplete.
    is_on : bool
        Whether the instance exists.
    """

    def __init__(
        self, path: Path, patterns: Sequence[str], register: Callable[[str], None], *, root: Path = Path("/")
    ) -> None:
        self._path, self._patterns, self._register, self._root = path, tuple(patterns), register, root
        self.name = PREFIX + secrets.token_hex(4)
        self.problems: list[str] = []
        self._missing: list[str] = []
        self.is_on = False

    def start(self) -> None:
        """Make the instance with filter, clock, buffer and tracer; nothing is logged before :meth:`switch_on`.

        Raises
        ------
        CaptureError
            The kernel refused, or no pattern matches a function.
        """
        self._register(self.name)
        instance = instance_folder(self.name, self._root)
        try:
            instance.mkdir()
            self.is_on = True
            # The newest calls are lost when the buffer is full, never the first: the log then has an end, not holes.
            for file, text in (
                ("tracing_on", "0"),
                ("options/overwrite", "0"),
                ("buffer_size_kb", str(BUFFER_KB)),
                ("trace_clock", CLOCK),
            ):
                (instance / file).write_text(text)
            self._missing = [pattern for pattern in self._patterns if not _filter(instance, pattern)]
            if len(self._missing) == len(self._patterns):
                raise CaptureError(
                    "no kernel function matches",
                    where="--functions",
                    found=", ".join(self._patterns),
                    do=_SEE_FUNCTIONS,
                )
            (instance / "current_tracer").write_text("function")
        except OSError as error:
            raise CaptureError(
                "cannot record a function log",
                where=str(error.filename or instance),
                found=error.strerror,
                do="Run 'rxlab doctor', or leave --functions out.",
            ) from None

    def switch_on(self) -> None:
        """Log from now on: the log is then of the traffic, not of its preparation."""
        (instance_folder(self.name, self._root) / "tracing_on").write_text("1")

    def stop(self) -> dict[str, Any]:
        """Switch it off, write the log, remove the instance; return what run.json keeps."""
        instance = instance_folder(self.name, self._root)
        (instance / "tracing_on").write_text("0")
        counts = {"entries": 0, "overrun": 0, "dropped events": 0}
        for stats in sorted(instance.glob("per_cpu/cpu*/stats")):
            for name, number in _COUNT.findall(stats.read_text()):
                counts[name] += int(number)
        descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with open(descriptor, "wb") as log, open(instance / "trace", "rb") as trace:
            shutil.copyfileobj(trace, log, 1 << 20)
        self.remove()
        lost = counts["overrun"] + counts["dropped events"]
        if lost:
            self.problems.append(f"the function log lacks its last {lost} calls: the buffer was full")
        return {
            "patterns": list(self._patterns),
            "missing_patterns": self._missing,
            "clock": CLOCK,
            "calls": counts["entries"],
            "lost": lost,
        }

    def remove(self) -> None:
        """Remove the instance, with what it recorded; fine where there is none."""
        if self.is_on:
            remove_instance(self.name, self._root)
            self.is_on = False


_SEE_FUNCTIONS = "See /sys/kernel/tracing/available_filter_functions."


def _filter(instance: Path, pattern: str) -> bool:
    """Add one pattern to the instance's filter; False where the kernel has no such function (EINVAL)."""
    try:
        with open(instance / "set_ftrace_filter", "a") as file:
            file.write(pattern + "\n")
    except OSError as error:
        if error.errno == errno.EINVAL:
            return False
        raise
    return True
