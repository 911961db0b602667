"""The command that would record an experiment with more repetitions, from the one its runs were recorded with."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from rxlab.show.trust import AnalysedRun

# What each command that repeats does about the runs that are there: a sweep adds to them, a demo sets them aside.
FOLDERS = {"compare": "out/compare", "demo": "out/demo", "sweep": "out/sweep"}
TAKEN_OFF = ("--reps", "--out", "-o")


def repeating_command(runs: Sequence[AnalysedRun], repetitions: int) -> str | None:
    """Return the command line that gets so many repetitions of each configuration.

    Parameters
    ----------
    runs : sequence of AnalysedRun
    repetitions : int
        In all, those recorded among them.

    Returns
    -------
    str or None
        None where the runs are not all of one ``rxlab compare``, ``demo`` or ``sweep``.
    """
    found = {_without_repetitions([str(word) for word in run.run.get("command") or []]) for run in runs}
    if len(found) != 1 or (one := found.pop()) is None:
        return None
    words, folder = one
    if words[1] == "compare":
        folder = f"{folder.rstrip('/')}-{repetitions}"  # it refuses a folder that holds runs
    options = ["--reps", str(repetitions), "--out", folder, *(["--resume"] if words[1] == "sweep" else [])]
    end = words.index("--") if "--" in words else len(words)
    return shlex.join([*words[:end], *options, *words[end:]])


def _without_repetitions(words: list[str]) -> tuple[tuple[str, ...], str] | None:
    """Return a command without what says how often and where to, and its folder; None where it does not repeat."""
    if len(words) < 2 or words[0] != "rxlab" or words[1] not in FOLDERS:
        return None
    end = words.index("--") if "--" in words else len(words)
    kept, folder, at = words[:2], FOLDERS[words[1]], 2
    while at < end:
        name, equals, value = words[at].partition("=")
        if name in TAKEN_OFF:
            value = value if equals else words[at + 1] if at + 1 < end else ""
            folder = folder if name == "--reps" else value
            at += 1 if equals else 2
            continue
        if words[at] != "--resume":
            kept.append(words[at])
        at += 1
    return (*kept, *words[end:]), folder
