"""Plain text about what was recorded and where: run.json and a host snapshot, with no analysis library, for a bare test machine."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from rxlab.stages import stages_without

# https://www.tcpdump.org/linktypes.html
_LINKS = {1: "Ethernet", 101: "raw IP", 113: "Linux cooked", 276: "Linux cooked v2"}


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


def inspection_text(path: Any, found: Mapping[str, Any]) -> str:
    """Return what a recording holds (:func:`rxlab.read.inspect.inspect_file`) as lines for a person."""
    is_perf = "samples" in found
    lines = [*(_perf_lines if is_perf else _capture_lines)(path, found)]
    if found.get("truncated"):
        lines.append("  cut or damaged: this is what could be read")
    lines += [f"  warning: {warning}" for warning in found.get("warnings") or []]
    return "\n".join(lines)


def _perf_lines(path: Any, found: Mapping[str, Any]) -> Iterator[str]:
    kinds = found["samples_per_event"]
    yield f"{path}: {found['kind']}, {_count(found['samples'], 'event')} of {_count(len(kinds), 'kind')}"
    if found["first_ns"] is not None and found["samples"]:
        first, last = found["first_ns"], found["last_ns"]
        yield f"  from {_seconds(first)} s to {_seconds(last)} s of perf's clock: {_seconds(last - first)} s"
    yield f"  lost: {_count(found['lost'], 'event')}"
    if found.get("duplicates"):
        yield f"  written twice by perf, left out: {_count(found['duplicates'], 'event')}"
    if found.get("unknown_ids"):
        yield f"  of no event that the file describes: {_count(found['unknown_ids'], 'sample')}"
    width = max(map(len, kinds), default=0)
    yield from (f"  {name:{width}}  {kinds[name]:>13,}" for name in sorted(kinds, key=lambda name: -kinds[name]))


def _capture_lines(path: Any, found: Mapping[str, Any]) -> Iterator[str]:
    kind = f"{found['compression']}-compressed {found['format']}" if found["compression"] else found["format"]
    yield f"{path}: {kind}, {_count(found['packets'], 'packet')}"
    if found["min_ns"] is not None:
        low, high = found["min_ns"], found["max_ns"]
        yield f"  from {_utc(low)} to {_utc(high)} UTC: {_seconds(high - low)} s"
    yield f"  {_count(found['sum_len'], 'byte')} on the wire, {found['sum_caplen']:,} of them captured"
    for link in found["interfaces"]:
        name = f" {link['name']}" if link.get("name") else ""
        kind = _LINKS.get(link["linktype"], f"link type {link['linktype']}")
        yield f"  interface {link['id']}{name}: {kind}, {_count(link['packets'], 'packet')}, at most {link['snaplen']:,} bytes of each"


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _seconds(ns: int) -> str:
    whole, rest = divmod(ns, 1_000_000_000)
    return f"{whole:,}.{rest:09d}"


def _utc(ns: int) -> str:
    """Return nanoseconds since 1970 as a date and time that keeps all of them."""
    whole, rest = divmod(ns, 1_000_000_000)
    return f"{datetime.fromtimestamp(whole, UTC):%Y-%m-%d %H:%M:%S}.{rest:09d}"
