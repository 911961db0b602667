"""Can I believe it? One check per way a result can be wrong, over all runs of a report, the worst run first."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from rxlab.dataset import effects, stats
from rxlab.dataset.twohosts import facts_of
from rxlab.show.style import MINUS, microseconds
from rxlab.show.text import twohost_lines
from rxlab.stages import STATUSES

GOOD, INFO, WARN, BAD, NONE = "good", "info", "warn", "bad", "none"
_SEVERITY = {NONE: 0, INFO: 0, GOOD: 1, WARN: 2, BAD: 3}
TESTBED_WARNING = "testbed: not transferable to a NIC"
RECORDED_NOTE = "recorded data, not this machine"
WORKLOAD_LATENCIES = ("one_way_latency", "round_trip_latency")
MAX_DRIFT_SPAN = 0.5  # an interval of the drift wider than this says nothing, neither yes nor no
MAX_ABSENT = 0.01  # share of received packets that the sender's capture may lack
CONFOUNDED = 0.6  # share of the runs' order that their configurations explain: shuffled runs have less


@dataclass(frozen=True)
class AnalysedRun:
    """A run with its analysis, as the report takes it.

    Attributes
    ----------
    run, host : dict
        run.json and host.json.
    tree : xarray.DataTree
        The dataset; a run without trace has /app and /counters only.
    verify : dict or None
        What ``rxlab verify`` says; None without trace.
    path : Path
    """

    run: dict[str, Any]
    host: dict[str, Any]
    tree: xr.DataTree
    verify: dict[str, Any] | None
    path: Path = field(default_factory=Path)

    @classmethod
    def of(cls, run: Any) -> AnalysedRun:
        """Return a run as the report takes it: a :class:`rxlab.Run` is analysed and verified where that was not done yet."""
        if isinstance(run, cls):
            return run
        verify = run.verification if hasattr(run, "verification") else run.verify
        return cls(dict(run.run), dict(run.host or {}), run.tree, verify, Path(run.path))

    @property
    def arm(self) -> str:
        return str(self.run.get("arm") or "")

    @property
    def is_traced(self) -> bool:
        return "packets" in self.tree.children

    @cached_property
    def can_explain(self) -> bool:
        """Whether at least one packet was followed to its end."""
        return self.is_traced and len(stats.hop_values(self.tree, "total_latency")) > 0

    @property
    def gates(self) -> dict[str, Any]:
        """The join's hard checks, empty without trace."""
        found = json.loads(str(self.tree.attrs.get("gates") or "{}"))
        return found if isinstance(found, dict) else {}

    def workload_latency(self, name: str) -> np.ndarray | None:
        """Return one of the workload's own latencies (ns, NaN left out), None where the run has none."""
        if "app" not in self.tree.children or name not in self.tree["app"].to_dataset():
            return None
        values = self.tree["app"].to_dataset()[name].values
        values = values[~np.isnan(values)]
        return values if len(values) else None


@dataclass(frozen=True)
class Check:
    """One line of the trust panel: what was checked, its state, what was found."""

    name: str
    state: str
    summary: str


# How a workload was run rather than what it was; and the experiment's words for a workload's fields.
_INCIDENTAL = {"seed", "port", "server_port", "timeout"}
_ALIASES = {"app_cpu": "server_cpu", "load": "rate"}


def workload_differences(runs: Sequence[AnalysedRun]) -> list[dict[str, str]]:
    """Return, for each run, the fields of its workload that differ between runs of one arm, with their values as text.

    Fields that the experiment itself varied belong to the configuration. Traced runs may be shorter than untraced ones: arms
    are never pooled, so a difference between them alone does not count. What a workload does not have is not in its labels.
    """
    workloads = [run.run.get("workload") or {} for run in runs]
    configured = {_ALIASES.get(name, name) for run in runs for name in run.run.get("configuration") or {}}
    values: dict[str, dict[str, set[str]]] = {}
    names = dict.fromkeys(name for workload in workloads for name in workload)
    for run, workload in zip(runs, workloads, strict=True):
        for name in names:
            values.setdefault(name, {}).setdefault(run.arm, set()).add(str(workload.get(name)))
    varied = [
        name
        for name in names
        if name not in _INCIDENTAL | configured and any(len(found) > 1 for found in values[name].values())
    ]
    return [{name: str(workload[name]) for name in varied if workload.get(name) is not None} for workload in workloads]


def trust_panel(
    runs: Sequence[AnalysedRun], *, recorded: bool, overhead: Sequence[tuple[str, float]], left_out: str = ""
) -> list[Check]:
    """Return all checks of a report, in the order a sceptic asks.

    Parameters
    ----------
    overhead : sequence of (configuration, ratio)
        Median latency of the workload, traced over untraced.
    left_out : str
        Which runs could not be read, and why.
    """
    traced = [run for run in runs if run.is_traced]
    damaged = [Check("Runs left out", BAD, f"could not be read: {left_out}")] if left_out else []
    checks = [_origin(runs, recorded), *damaged, _ended(runs), _repetitions(runs), _order(runs)]
    if traced:
        checks += [
            _verified(traced),
            _coverage(traced),
            _flagged(traced),
            _lost(traced),
            _captured(traced),
            _clock(traced),
            _blind(traced),
            _bytes(traced),
        ]
        checks += _two_hosts(traced)
    checks += [_counters(traced), _overhead(overhead), _restored(runs)]
    return checks


def overall(checks: Sequence[Check]) -> str:
    """Return the worst state of the checks."""
    return max((check.state for check in checks), key=_SEVERITY.__getitem__, default=NONE)


def _is_veth(run: AnalysedRun) -> bool:
    """Tell whether a run is of the embedded testbed; two cabled ports are NICs of the host."""
    return ((run.run.get("testbed") or {}).get("kind")) == "veth"


def _origin(runs: Sequence[AnalysedRun], recorded: bool) -> Check:
    notes = []
    if any(_is_veth(run) for run in runs):
        notes.append(f"{TESTBED_WARNING}. No NIC and no hard interrupt took part, and RPS here relieves the sender")
    if recorded:
        notes.append(RECORDED_NOTE)
    if not notes:
        return Check("Where it was measured", GOOD, "on this host's own interface")
    return Check("Where it was measured", WARN if "testbed" in notes[0] else INFO, "; ".join(notes) + ".")


def _ended(runs: Sequence[AnalysedRun]) -> Check:
    problems = [text for run in runs for text in run.run.get("problems") or []]
    broken = sum(run.run.get("status") != "complete" for run in runs)
    if broken or problems:
        return Check(
            "Runs ended well",
            BAD if broken else WARN,
            f"{broken} of {len(runs)} did not end well. " + "; ".join(problems[:3]),
        )
    return Check("Runs ended well", GOOD, f"all {len(runs)}")


def _repetitions(runs: Sequence[AnalysedRun]) -> Check:
    counts: dict[str, int] = {}
    for run, workload in zip(runs, workload_differences(runs), strict=True):
        key = json.dumps([run.run.get("configuration") or {}, workload], sort_keys=True)
        counts[key] = counts.get(key, 0) + (run.arm == "untraced")
    least = min(counts.values(), default=0)
    if least == 0:
        return Check(
            "Untraced repetitions", WARN, "none for at least one configuration: without them there is no verdict"
        )
    if least == 1:
        return Check(
            "Untraced repetitions",
            WARN,
            "one per configuration: it cannot tell a difference from the next run's; repeat at least 5 times",
        )
    note = (
        ""
        if least >= 5
        else ": no interval below 3"
        if least < stats.MIN_REPETITIONS
        else ": intervals are wide below 5"
    )
    return Check("Untraced repetitions", GOOD if least >= 5 else WARN, f"{least} per configuration{note}")


def _order(runs: Sequence[AnalysedRun]) -> Check:
    """Tell whether the machine drifted over the experiment, or a run left something to the next one."""
    name = "Order of the runs"
    untraced = [run for run in runs if run.arm == "untraced" and run.run.get("start_ns")]
    for metric in WORKLOAD_LATENCIES:
        values = [run.workload_latency(metric) for run in untraced]
        if untraced and all(value is not None for value in values):
            break
    else:
        return Check(name, NONE, "nothing to check it with: no untraced runs with latencies of their own")
    labels = [json.dumps(run.run.get("configuration") or {}, sort_keys=True) for run in untraced]
    labels = [
        label + json.dumps(workload) for label, workload in zip(labels, workload_differences(untraced), strict=True)
    ]
    medians = [stats.quantile_interval(value, 0.5).value for value in values if value is not None]
    found = effects.check_order(labels, [int(run.run["start_ns"]) for run in untraced], medians)
    return _order_words(name, found, len(set(labels)))


def _order_words(name: str, found: effects.Order, configurations: int) -> Check:
    if found.confounded > CONFOUNDED and configurations > 1:
        text = (
            "the configurations were recorded one after the other, so a drift of the machine would look like an effect"
        )
        return Check(name, WARN, f"{text}; 'rxlab compare' and 'rxlab sweep' shuffle them")
    if not found.is_known:
        return Check(name, NONE, f"too few runs to see a drift ({found.runs})")
    change = [f"{100 * (ratio - 1):+.1f} %".replace("-", MINUS) for ratio in (found.drift, found.low, found.high)]
    drift = f"{change[0]} from the first run to the last (95 % interval {change[1]} to {change[2]})"
    if found.p_drift < effects.LEVEL:
        return Check(
            name, WARN, f"latency drifts: {drift}. The runs are shuffled, so this widens intervals and favours nobody"
        )
    if found.p_carry < effects.LEVEL:
        return Check(
            name, WARN, f"a run depends on the configuration before it (p = {found.p_carry:.2g}); no drift: {drift}"
        )
    if found.high - found.low > MAX_DRIFT_SPAN:
        return Check(name, NONE, f"{found.runs} untraced runs cannot tell whether there is a drift: {drift}")
    return Check(name, GOOD, f"no drift shown by {found.runs} untraced runs: {drift}")


def _verified(runs: Sequence[AnalysedRun]) -> Check:
    found = [run.verify for run in runs if run.verify]
    checked = sum(int(v.get("checked") or 0) for v in found)
    if not checked:
        return Check("Join against the workload's log", NONE, "no workload log to compare with")
    wrong = sum(int(v.get("misjoined") or 0) for v in found)
    return Check(
        "Join against the workload's log",
        GOOD if wrong == 0 else BAD,
        f"{wrong} mis-joined of {checked:,} packets checked",
    )


def _coverage(runs: Sequence[AnalysedRun]) -> Check:
    """Tell the least covered stage, and the least complete run: shares of different packets, each said."""
    worst, text = 1.0, "every stage of all packets whose path has it"
    for run in runs:
        coverage = run.tree["coverage"].to_dataset()
        # tcpdump runs a little longer than perf: packets outside perf's window were not for it to see.
        outside = coverage["missing"].sel(cause="outside_window").values
        expected = coverage["expected"].values - outside
        fraction = np.where(expected > 0, coverage["matched"].values / np.maximum(expected, 1), 1.0)
        least = int(np.argmin(fraction))
        if fraction[least] < worst:
            worst = float(fraction[least])
            stage, of = str(coverage["stage"].values[least]), int(expected[least])
            text = f"{100 * worst:.2f} % at the worst stage ({stage}: of {of:,} packets whose path has it)"
    told = [run.verify for run in runs if run.verify and run.verify.get("complete") is not None]
    low = worst
    if told:
        least_complete = min(told, key=lambda verify: float(verify["complete"]))
        complete, of = float(least_complete["complete"]), int(least_complete["data_packets"])
        low = min(worst, complete)
        text += f"; {100 * complete:.2f} % of the {of:,} data packets complete, seen at every stage of their path"
        text += ", in the worst run" if len(runs) > 1 else ""
    return Check("Coverage per stage", GOOD if low >= 0.99 else WARN if low >= 0.95 else BAD, text)


def _flagged(runs: Sequence[AnalysedRun]) -> Check:
    shares, left, trusted = [], 0, 0
    for run in runs:
        packets = run.tree["packets"].to_dataset()
        data = packets["is_data"].values.astype(bool)
        doubtful = np.isin(
            packets["status"].values,
            [STATUSES.index(name) for name in ("ambiguous", "negative", "incomplete", "unmatched", "lost", "blind")],
        )
        shares.append(float((doubtful & data).sum() / max(data.sum(), 1)))
        left += sum(stats.left_out(packets).values())
        trusted += int((data & stats.usable(packets)).sum())
    worst = max(shares)
    return Check(
        "Packets that could not be followed",
        GOOD if worst <= 0.01 else WARN if worst <= 0.05 else BAD,
        f"at most {100 * worst:.2f} % of a run's data packets; statistics use {trusted:,} and leave out {left:,}",
    )


def _lost(runs: Sequence[AnalysedRun]) -> Check:
    lost = sum(int(run.tree.attrs.get("lost") or 0) for run in runs)
    return Check("Kernel events lost by perf", GOOD if lost == 0 else BAD, f"{lost:,}")


def _captured(runs: Sequence[AnalysedRun]) -> Check:
    counts = [run.run.get("tcpdump") or {} for run in runs]
    known = [c for c in counts if c.get("captured") is not None and c.get("received") is not None]
    if not known:
        return Check("Packets captured = received", NONE, "tcpdump's counts were not recorded")
    captured, received, dropped = (
        sum(int(c.get(key) or 0) for c in known) for key in ("captured", "received", "dropped")
    )
    is_equal = all(c["captured"] == c["received"] for c in known) and dropped == 0
    return Check(
        "Packets captured = received",
        GOOD if is_equal else BAD,
        f"{captured:,} captured, {received:,} received, {dropped:,} dropped by the kernel",
    )


def _clock(runs: Sequence[AnalysedRun]) -> Check:
    bounds = [float(run.tree["clocks"].to_dataset()["bound"]) for run in runs]
    places = sorted({str(run.tree["clocks"].to_dataset()["stamp_position"].values) for run in runs})
    worst = max(bounds)
    state = NONE if not np.isfinite(worst) else GOOD if worst <= 1000 and "unknown" not in places else WARN
    return Check("Clocks", state, f"error bound ±{worst:.0f} ns; capture stamps taken at: {', '.join(places)}")


def _two_hosts(runs: Sequence[AnalysedRun]) -> list[Check]:
    """Return what is known of the way from the sender, of runs that were analysed with its capture."""
    checks = []
    for run in runs:
        if "twohosts" not in run.tree.children:
            continue
        found = facts_of(run.tree)
        absent = found["forward"]["packets"]["absent"] / max(sum(found["forward"]["packets"].values()), 1)
        state = WARN if found["flags"] or absent > MAX_ABSENT or found["width_median_ns"] is None else GOOD
        checks.append(Check(f"Sender's capture, {run.path.name}", state, "; ".join(twohost_lines(found))))
    return checks


def _blind(runs: Sequence[AnalysedRun]) -> Check:
    windows = hidden = 0
    share = 0.0
    for run in runs:
        gate = run.gates.get("blind") or {}
        length = max(int(run.run.get("stop_ns") or 0) - int(run.run.get("start_ns") or 0), 1)
        windows += int(gate.get("violations") or 0)
        share = max(share, float(gate.get("window_ns") or 0) / length)
        hidden += int(run.tree["coverage"].to_dataset()["packets"].sel(cause="blind").values)
    if not windows:
        return Check("Blind windows", GOOD, "none: perf delivered every task switch")
    return Check(
        "Blind windows",
        GOOD if share < 0.01 else WARN,
        f"{windows:,} in which perf delivered nothing, up to {100 * share:.2f} % of a run; they hid {hidden:,} packets",
    )


def _bytes(runs: Sequence[AnalysedRun]) -> Check:
    answers = [run.verify.get("byte_sums_equal") for run in runs if run.verify]
    known = [answer for answer in answers if answer is not None]
    if not known:
        return Check("Bytes read = bytes on the wire", NONE, "not checked")
    return Check(
        "Bytes read = bytes on the wire",
        GOOD if all(known) else BAD,
        f"equal in {sum(map(bool, known))} of {len(known)} runs",
    )


def _counters(runs: Sequence[AnalysedRun]) -> Check:
    answers = [run.verify.get("counters_agree") for run in runs if run.verify]
    oks = [
        bool(answer.get("ok")) if isinstance(answer, dict) else bool(answer) for answer in answers if answer is not None
    ]
    if not oks:
        return Check("Kernel counters against the join", NONE, "not compared")
    pairs = [answer["received_rps"] for answer in answers if isinstance(answer, dict) and answer.get("received_rps")]
    counted, joined = (sum(int(pair.get(key) or 0) for pair in pairs) for key in ("counter", "joined"))
    detail = f"; RPS packets: {counted:,} counted by the kernel, {joined:,} joined" if counted else ""
    return Check(
        "Kernel counters against the join",
        GOOD if all(oks) else BAD,
        f"agree in {sum(oks)} of {len(oks)} runs{detail}",
    )


def _overhead(overhead: Sequence[tuple[str, float]]) -> Check:
    if not overhead:
        return Check("Cost of recording", NONE, "no untraced and traced run of one configuration to compare")
    text = "; ".join(f"{label}: ×{ratio:.2f}" for label, ratio in overhead)
    return Check(
        "Cost of recording",
        INFO,
        f"median latency of the workload, traced over untraced: {text}. So verdicts come from untraced runs",
    )


def _restored(runs: Sequence[AnalysedRun]) -> Check:
    answers = [(run.run.get("got") or {}).get("restored") for run in runs]
    if any(answer is False for answer in answers):
        return Check("Settings restored", BAD, "not all: run 'rxlab restore'")
    if runs and all(_is_veth(run) for run in runs):
        return Check("Settings restored", GOOD, "settings were made inside the testbed and went with it")
    if all(answer is None for answer in answers):
        return Check("Settings restored", NONE, "no setting was changed, or the run does not say")
    return Check("Settings restored", GOOD, "the host is as it was before")


def run_rows(runs: Sequence[AnalysedRun], labels: Sequence[str]) -> list[dict[str, Any]]:
    """Return one row of facts per run, for the table under the panel."""
    rows = []
    for run, label in zip(runs, labels, strict=True):
        row: dict[str, Any] = {
            "name": run.path.name or "-",
            "configuration": label,
            "arm": run.arm,
            "verdict": "-",
            "reasons": "",
            "packets": None,
            "complete": None,
            "misjoined": None,
            "lost": None,
        }
        for name in WORKLOAD_LATENCIES:
            values = run.workload_latency(name)
            row[name] = None if values is None else stats.quantile_interval(values, 0.5).value
        if run.is_traced:
            verify = run.verify or {}
            row |= {
                "verdict": str(run.tree.attrs.get("verdict", "-")),
                "reasons": str(run.tree.attrs.get("reasons", "")),
                "packets": int(run.tree["packets"].sizes["packet"]),
                "complete": verify.get("complete"),
                "misjoined": verify.get("misjoined"),
                "lost": int(run.tree.attrs.get("lost") or 0),
                "bound": float(run.tree["clocks"].to_dataset()["bound"]),
                "stamp": str(run.tree["clocks"].to_dataset()["stamp_position"].values),
            }
        row["median_text"] = microseconds(row["one_way_latency"]) if row["one_way_latency"] else "-"
        rows.append(row)
    return rows
