"""Analysed runs -> one self-contained HTML page: trust first, then the answer, then the evidence.

The page loads nothing: styles, the few lines of script and all figures are inside. It is made for someone who was not there.
"""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import jinja2

import rxlab
from rxlab.dataset import effects
from rxlab.errors import RxlabError
from rxlab.show import answer, costs, evidence, trust
from rxlab.show.redact import Redactor
from rxlab.show.style import microseconds, told_apart
from rxlab.show.trust import AnalysedRun
from rxlab.stages import STAGES

TEMPLATE = "report.html"
RECORDED_MARK = "RECORDED"
MAX_BYTES = 10_000_000


def write_report(
    runs: Sequence[Any],
    out: str | os.PathLike[str],
    *,
    command: Sequence[str] | str | None = None,
    recorded: bool = False,
    title: str | None = None,
    reveal: bool = False,
    redactor: Redactor | None = None,
    left_out: str = "",
    say: Callable[[str], None] | None = None,
) -> Path:
    """Write the report of one run, a comparison or a sweep.

    Parameters
    ----------
    runs : sequence
        Analysed runs: :class:`rxlab.Run` or other objects with ``run``, ``host``, ``tree``, ``verify`` and ``path``
        (:class:`rxlab.show.trust.AnalysedRun`). The first one's configuration is the baseline; a sweep's own order is kept.
    command : sequence of str or str, optional
        What makes this report again; by default the runs' own command.
    recorded : bool
        The runs are recorded data and not this machine's: the page says so. Runs in a folder ``data`` or with a file
        ``RECORDED`` in them are known to be.
    reveal : bool
        Show host names and addresses; by default they are replaced by consistent pseudonyms.
    redactor : Redactor, optional
        The pseudonyms, where other files are to have the same; by default new ones.
    left_out : str
        Which runs the report lacks, because they could not be read.
    say : callable, optional
        Told the answer, and where it cannot tell the command that would.

    Returns
    -------
    Path
        The page, below 10 MB, mode 0600.
    """
    groups = answer.group_runs(runs)
    analysed = [run for group in groups.values() for run in group]
    recorded = recorded or any(_is_recorded(run.path) for run in analysed)
    if not analysed:
        raise RxlabError(
            "no run to report",
            expected="at least one run directory",
            do="Record one with 'rxlab capture' or 'rxlab demo'.",
        )
    redactor = None if reveal else redactor or Redactor.of_hosts([run.host for run in analysed])
    if redactor is not None:
        groups = {redactor.text(label): group for label, group in groups.items()}
    context = _context(groups, command=command, recorded=recorded, title=title, left_out=left_out)
    page = _render(context, redactor)
    if len(page.encode()) > MAX_BYTES:
        raise RxlabError(
            "report is too large",
            where=str(out),
            found=f"{len(page.encode()):,} bytes",
            expected=f"at most {MAX_BYTES:,}",
            do="Report fewer runs at a time.",
        )
    target = Path(out)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as stream:
        stream.write(page)
    os.replace(temporary, target)
    if say is not None:
        for line in (context["answer"].sentence, context["answer"].takes):
            if line:
                say(line)
    return target


def _is_recorded(path: Path) -> bool:
    return path.resolve().parent.name == "data" or (path / RECORDED_MARK).is_file()


def _redacted(redactor: Redactor, value: Any) -> Any:
    """Redact a text on its way into the page: all of them come by, whatever they are about.

    Markup is made of texts that have been here already; figures are images, whose labels are redacted before they are drawn.
    """
    is_text = isinstance(value, str) and not hasattr(value, "__html__")
    return redactor.text(value) if is_text and not value.startswith("data:image/") else value


def _render(context: Mapping[str, Any], redactor: Redactor | None) -> str:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("rxlab.show"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    if redactor is not None:
        environment.finalize = partial(_redacted, redactor)
    environment.filters["duration"] = lambda ns: "-" if ns is None else microseconds(float(ns))
    environment.filters["count"] = lambda n: "-" if n is None else f"{int(n):,}"
    environment.filters["share"] = lambda x: "-" if x is None or x != x else f"{100 * x:.2f} %"
    return environment.get_template(TEMPLATE).render({**context, "pseudonyms": redactor is not None})


def _context(
    groups: Mapping[str, Sequence[AnalysedRun]],
    *,
    command: Sequence[str] | str | None,
    recorded: bool,
    title: str | None,
    left_out: str,
) -> dict[str, Any]:
    runs = [run for group in groups.values() for run in group]
    labels = [label for label, group in groups.items() for _ in group]
    metric = answer.choose_metric(groups)
    pairs = answer.compare_all(groups, metric)
    given = answer.give_answer(groups, pairs, metric)
    overhead = evidence.overheads(groups, metric)
    checks = trust.trust_panel(runs, recorded=recorded, overhead=overhead, left_out=left_out)
    ranks = answer.rank_groups(groups, pairs, metric)
    layout = answer.lay_out(groups, metric)
    found = effects.find_effects(layout) if layout is not None and len(layout.dims) > 2 else []
    return {
        "title": title or _title(groups),
        "made": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "version": rxlab.__version__,
        "measured": _measured(runs),
        "answer": given,
        "checks": checks,
        "overall": trust.overall(checks),
        "rows": trust.run_rows(runs, labels),
        "metric": answer.METRICS.get(metric or "", ""),
        "pairs": pairs,
        "comparison_words": answer.comparison_words,
        "workload_rows": evidence.workload_rows(groups, metric),
        "ranks": ranks,
        "rank_texts": told_apart([one.estimate.value for one in ranks]),
        "effects": found,
        "part_rows": evidence.part_rows(groups, pairs),
        "recording": evidence.recording_rows(groups, metric),
        "hop_rows": evidence.hop_rows(groups),
        "cost_rows": costs.cost_rows(groups),
        "figures": list(evidence.draw_figures(groups, pairs, metric, ranks=ranks, layout=layout, found=found)),
        "host": _host_facts(runs[0]),
        "workload": [
            (key, str(value)) for key, value in (runs[0].run.get("workload") or {}).items() if value is not None
        ],
        "settings": _settings(runs),
        "command": _command(runs, command),
        "run_commands": [(row.path.name, _join_command(row.run.get("command"))) for row in runs],
        "stages": STAGES,
    }


def _title(groups: Mapping[str, Any]) -> str:
    labels = list(groups)
    if len(labels) == 1:
        return f"Received packets, {labels[0]}"
    return f"{labels[1]} against {labels[0]}" if len(labels) == 2 else f"{len(labels)} configurations compared"


def _measured(runs: Sequence[AnalysedRun]) -> str:
    starts = [int(run.run.get("start_ns") or 0) for run in runs]
    known = [start for start in starts if start]
    return (
        datetime.fromtimestamp(min(known) / 1e9, UTC).strftime("%Y-%m-%d %H:%M UTC") if known else "at an unknown time"
    )


def _host_facts(run: AnalysedRun) -> list[tuple[str, Any]]:
    host = run.host
    cpus = host.get("cpus") or []
    iface = str(run.run.get("iface") or "")
    nic = (host.get("ifaces") or {}).get(iface) or {}
    places = {
        name: len({cpu.get(name) for cpu in cpus if cpu.get(name) is not None}) for name in ("core", "llc", "node")
    }
    facts = [
        ("Host", host.get("hostname")),
        ("Kernel", host.get("kernel")),
        (
            "CPUs",
            f"{len(cpus)} in {places['core']} cores, {places['llc']} last level caches, {places['node']} nodes"
            if cpus
            else None,
        ),
        ("Governor", host.get("governor")),
        ("irqbalance", {True: "running", False: "not running"}.get(host.get("irqbalance"))),  # type: ignore[arg-type]
        (
            "Interface",
            f"{iface}, driver {nic.get('driver') or 'unknown'}, {len(nic.get('queues') or [])} queues"
            if iface
            else None,
        ),
        ("Idle tasks", "spinner on every CPU" if (run.run.get("idle") or {}).get("spinners") else "left alone"),
        ("perf", (run.run.get("perf") or {}).get("version")),
        ("tcpdump", (run.run.get("tcpdump") or {}).get("version")),
    ]
    return [(key, value) for key, value in facts if value not in (None, "")]


def _settings(runs: Sequence[AnalysedRun]) -> list[tuple[str, str, bool]]:
    """Return setting, its values over all runs, and whether it varied."""
    configurations = [run.run.get("configuration") or {} for run in runs]
    names = dict.fromkeys(name for configuration in configurations for name in configuration)
    values = {
        name: list(dict.fromkeys(str(configuration.get(name, "-")) for configuration in configurations))
        for name in names
    }
    return [(name, " | ".join(found), len(found) > 1) for name, found in values.items()]


def _command(runs: Sequence[AnalysedRun], command: Sequence[str] | str | None) -> str:
    return _join_command(command if command is not None else runs[0].run.get("command"))


def _join_command(command: Any) -> str:
    if isinstance(command, str):
        return command
    return shlex.join(map(str, command)) if command else json.dumps("not recorded")
