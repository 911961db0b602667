"""Plain text about what was recorded and where: run.json and a host snapshot, with no analysis library, for a bare test machine."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from rxlab.stages import stages_without


def run_text(path: Any, run: Mapping[str, Any]) -> str:
    """Return what a capture recorded, in a few lines."""
    perf, tcpdump = run.get("perf") or {}, run.get("tcpdump") or {}
    lines = [f"{path}: {run.get('status')}, arm {run.get('arm')}, interface {run.get('iface')}"]
    if tcpdump:
        lines.append(
            f"  packets: captured {tcpdump.get('captured')}, received {tcpdump.get('received')}, "
            f"dropped {tcpdump.get('dropped')}"
        )
    if perf:
        lines.append(f"  kernel events: {len(perf.get('events') or [])} kinds, lost {perf.get('lost')}")
    costs = {"perf": perf.get("cpu_seconds"), "tcpdump": tcpdump.get("cpu_seconds")}
    known = [f"{tool} {cost:.2f} s" for tool, cost in costs.items() if cost is not None]
    if known:
        lines.append(f"  CPU time of the recorder, starting and ending included: {', '.join(known)}")
    if tcpdump.get("captured") == 0:
        lines.append("  no packet was captured: there was none on this interface, or the filter let none through")
    if perf.get("missing_events"):
        gone = ", ".join(stages_without(set(perf.get("events") or []))) or "none"
        lines.append(f"  not on this kernel: {', '.join(perf['missing_events'])}; stages that go: {gone}")
    lines += [f"  problem: {problem}" for problem in run.get("problems") or []]
    return "\n".join(lines)


def host_text(snapshot: Mapping[str, Any]) -> str:
    """Return a host snapshot as lines: CPUs, interfaces, queues with their IRQs and CPUs."""
    cpus = snapshot.get("cpus") or []
    lines = [
        f"{snapshot.get('hostname')}  Linux {snapshot.get('kernel')}",
        f"{len(cpus)} CPUs, {len({(cpu.get('package'), cpu.get('core')) for cpu in cpus})} cores, "
        f"{len({cpu.get('node') for cpu in cpus})} NUMA nodes; governor {snapshot.get('governor') or 'none'}; "
        f"irqbalance {'running' if snapshot.get('irqbalance') else 'not running'}",
    ]
    for name, iface in (snapshot.get("ifaces") or {}).items():
        lines.append(
            f"{name}: {iface.get('driver') or 'no driver'}  {', '.join(iface.get('addresses') or []) or 'no address'}"
        )
        for queue in iface.get("queues") or []:
            facts = [
                f"{key} {queue[key]}"
                for key in ("irq", "irq_cpus", "rps_cpus", "rps_flow_cnt", "xps_cpus")
                if queue.get(key) not in (None, "")
            ]
            lines.append(f"  queue {queue.get('queue')}: " + ", ".join(facts))
        lines += _settings_lines(iface.get("settings") or {}, f"@{name}", "  ")
    return "\n".join([*lines, *_settings_lines(snapshot.get("settings") or {}, "", "")])


def _settings_lines(settings: Mapping[str, str], owner: str, indent: str) -> list[str]:
    """Return settings that are not of one queue as lines, several to a line; queues have theirs."""
    texts = [f"{label.removesuffix(owner)}={value}" for label, value in settings.items() if "/" not in label]
    return textwrap.wrap("  ".join(texts), 118, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)


def moves_text(moves: Mapping[str, Any], flows: Sequence[str]) -> str:
    """Return the moves of readers (:func:`rxlab.follow.steering.reader_moves`) as lines for a person."""
    lines = []
    for row in range(len(moves["time"])):
        cell = {name: int(column[row]) for name, column in moves.items()}
        follows = f"the first on CPU {cell['to_cpu']} {cell['lag_ns'] / 1000:.1f} us later"
        lines.append(
            f"reader {cell['tid']}, CPU {cell['from_cpu']} -> {cell['to_cpu']}: {cell['lag_packets']} packets of "
            f"{flows[cell['flow']]} processed elsewhere, {follows if cell['lag_ns'] >= 0 else 'until it moved again'}"
        )
    return "\n".join(lines) or "no reader changed its CPU while packets came for it"
