"""Record all runs of a sweep spec into a folder."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rxlab.errors import HostSettingError, UsageError
from rxlab.host.journal import apply
from rxlab.record.plan import Progress, check_disk
from rxlab.record.ports import open_testbed
from rxlab.record.spec import Spec, check_host
from rxlab.record.sweep import sweep
from rxlab.rundir import SWEEP_JSON, RunDir


def record_spec(
    spec: Spec,
    out: str | os.PathLike[str],
    *,
    testbed: bool | str,
    iface: str | None = None,
    resume: bool = False,
    allow_system_changes: bool = False,
    yes_this_nic: bool = False,
    say: Callable[[str], None] = print,
    **capture_options: Any,
) -> list[RunDir]:
    """Record all runs of a spec into a folder; with `resume` only those that are missing.

    Returns
    -------
    list of RunDir
        In the order of the plan; the last of a cell's tries even when it is degraded.
    """
    folder = Path(out)
    check_resume(folder, resume)
    if check_host(spec, testbed=testbed, iface=iface) and not allow_system_changes:
        raise HostSettingError(
            "this sweep changes settings of the host itself",
            where=spec.name,
            do="Nothing was changed. Give --allow-system-changes to have them changed and put back.",
        )
    check_disk(folder, spec.workload, spec.cells())
    progress = Progress(spec, folder, say)
    with ExitStack() as stack:
        journal = stack.enter_context(apply(allow_system_changes=allow_system_changes, yes_this_nic=yes_this_nic))
        bed = stack.enter_context(open_testbed(testbed, registry=journal)) if testbed else None
        recorded = sweep(
            folder,
            spec.configurations,
            testbed=bed,
            iface=None if testbed else iface,
            workload=spec.workload,
            reps=spec.repetitions,
            arms=spec.arms,
            seed=spec.seed,
            order=spec.order,
            labels=spec.labels,
            warm_up=spec.warm_up,
            retries=spec.retries,
            transaction=journal,
            progress=progress,
            idle=spec.idle,
            **capture_options,
        )
        runs = []
        for run in recorded:
            for problem in run.run.get("problems") or []:
                say(f"  {run.path.name}: {problem}")
            runs.append(run)
    return runs


def check_resume(folder: Path, resume: bool) -> None:
    """Refuse to go on with a sweep that is there unless that is asked for."""
    if (folder / SWEEP_JSON).exists() and not resume:
        raise UsageError(
            "a sweep is there already", where=str(folder), do="Go on with --resume, or choose another --out."
        )
