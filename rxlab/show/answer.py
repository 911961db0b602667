"""What did it do, by how much, and do the two kinds of evidence agree: the report's sentences.

The verdict comes from the untraced runs, because recording costs more where RPS adds events; the explanation comes from the
traced ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import xarray as xr

from rxlab.dataset import aggregate, effects, explain, stats
from rxlab.dataset.stats import BETTER, CANNOT_TELL, WORSE, Comparison
from rxlab.show.again import repeating_command
from rxlab.show.costs import compare_cost
from rxlab.show.style import MINUS, microseconds, quantile_words, told_apart
from rxlab.show.trust import AnalysedRun, workload_differences

# The workload's own latencies, the one nearest to the receive path first.
METRICS = {
    "one_way_latency": "message latency, from the client's intended send time to the return of the server's receive call",
    "round_trip_latency": "request latency, from the intended send time to the arrival of the reply",
}
# Repetitions that nobody will record; those that a first experiment should have.
MOST_REPETITIONS, ENOUGH_REPETITIONS = 10_000, 5
TRACED_ARMS = ("min", "std", "full")


@dataclass(frozen=True)
class Pair:
    """A configuration against the baseline.

    Attributes
    ----------
    a, b : str
        Labels of baseline and configuration.
    untraced, traced : list of Comparison
        The verdict (corrected over all pairs) and, for the explanation, total_latency of the traced runs; may be empty.
    explanation : dict of float to Dataset
        Quantile -> contributions of the hops to the traced difference.
    bias : explain.Bias or None
        What recording adds to the difference.
    cost : Comparison or None
        The kernel's CPU time per message, untraced.
    """

    a: str
    b: str
    untraced: list[Comparison]
    traced: list[Comparison]
    explanation: dict[float, xr.Dataset] = field(default_factory=dict)
    bias: explain.Bias | None = None
    cost: Comparison | None = None


@dataclass(frozen=True)
class Answer:
    """The answer: one sentence, its tone, the sentences below it, and what to record where it cannot tell."""

    sentence: str
    tone: str
    more: list[str]
    takes: str = ""


def group_runs(runs: Iterable[Any]) -> dict[str, list[AnalysedRun]]:
    """Return the runs by configuration, under a short label: the settings that differ, ``rps_cpus=2, rfs=on``.

    Runs of different workloads are no repetitions of each other: their label names what differs in the workload too. The first configuration is the baseline. A sweep records in shuffled order; the names of its cells give the order in which
    the configurations were asked for.
    """
    analysed = sorted(map(AnalysedRun.of, runs), key=lambda run: str((run.run.get("sweep") or {}).get("cell", "")))
    configurations = configurations_of(analysed)
    varied = aggregate.varied_settings(configurations)
    groups: dict[str, list[AnalysedRun]] = {}
    for run, configuration, workload in zip(analysed, configurations, workload_differences(analysed), strict=True):
        names = list(varied) or list(configuration)[:3]
        label = ", ".join(f"{name}={configuration[name]}" for name in names if name in configuration)
        label = ", ".join([label or "host as it is", *(f"{name}={value}" for name, value in workload.items())])
        groups.setdefault(label, []).append(run)
    return groups


def configurations_of(runs: Sequence[AnalysedRun]) -> list[dict[str, Any]]:
    """Return each run's configuration: in a sweep with named axes by its labels, else the settings themselves."""
    labels = [(run.run.get("sweep") or {}).get("labels") for run in runs]
    return (
        [dict(label) for label in labels if label]
        if all(labels)
        else [run.run.get("configuration") or {} for run in runs]
    )


def choose_metric(groups: Mapping[str, Sequence[AnalysedRun]]) -> str | None:
    """Return the first of METRICS that every configuration has in its untraced runs; else in any run; else None."""
    for is_candidate in (lambda run: run.arm == "untraced", lambda run: True):
        for name in METRICS:
            if groups and all(
                any(is_candidate(run) and run.workload_latency(name) is not None for run in runs)
                for runs in groups.values()
            ):
                return name
    return None


def latencies(runs: Sequence[AnalysedRun], metric: str | None, arms: Sequence[str]) -> list[np.ndarray]:
    """Return the workload's latencies of the runs recorded in one of the arms."""
    found = [run.workload_latency(metric) for run in runs if metric and run.arm in arms]
    return [values for values in found if values is not None]


def traced_trees(runs: Sequence[AnalysedRun]) -> list[xr.DataTree]:
    """Return the datasets of the traced runs that have at least one packet with a total latency."""
    return [run.tree for run in runs if run.can_explain]


def compare_all(groups: Mapping[str, Sequence[AnalysedRun]], metric: str | None) -> list[Pair]:
    """Compare every configuration with the first one of the same workload, correcting all verdicts together."""
    runs = [run for group in groups.values() for run in group]
    workloads = dict(zip(map(id, runs), workload_differences(runs), strict=True))
    baselines: dict[str, str] = {}
    pairs, trees = [], {label: traced_trees(group) for label, group in groups.items()}
    for label, group in groups.items():
        first = baselines.setdefault(str(workloads[id(group[0])]), label)
        if first == label:
            continue
        sides = [latencies(groups[name], metric, ("untraced",)) for name in (first, label)]
        untraced = stats.compare(*sides) if all(sides) else []
        traced = []
        if trees[first] and trees[label]:
            totals = [[stats.hop_values(tree, "total_latency") for tree in trees[name]] for name in (first, label)]
            traced = stats.compare(*totals)
        both = [
            [latencies(groups[name], metric, arms) for arms in (("untraced",), TRACED_ARMS)] for name in (first, label)
        ]
        bias = explain.tracing_bias((both[0][0], both[0][1]), (both[1][0], both[1][1]))
        pairs.append(Pair(first, label, untraced, traced, bias=bias, cost=compare_cost(groups[first], groups[label])))
    flat = stats.correct([comparison for pair in pairs for comparison in pair.untraced])
    corrected = []
    for pair in pairs:
        mine, flat = flat[: len(pair.untraced)], flat[len(pair.untraced) :]
        levels = sorted({0.5, 0.99, *(c.quantile for c in mine[:1] and [deciding(mine)])}) if pair.traced else []
        explanation = {level: explain.explain(trees[pair.a], trees[pair.b], quantile=level) for level in levels}
        corrected.append(replace(pair, untraced=mine, explanation=explanation))
    return corrected


def rank_groups(
    groups: Mapping[str, Sequence[AnalysedRun]], pairs: Sequence[Pair], metric: str | None, *, quantile: float = 0.5
) -> list[effects.Rank]:
    """Rank three or more configurations of one workload by a quantile of their untraced runs; empty otherwise."""
    if len(pairs) < 2 or len({pair.a for pair in pairs}) > 1:
        return []
    values = {label: quantiles_of(latencies(runs, metric, ("untraced",)), quantile) for label, runs in groups.items()}
    return effects.rank(values, quantile=quantile)


def quantiles_of(runs: Sequence[np.ndarray], quantile: float) -> list[float]:
    """Return one quantile of each run, ns."""
    return [stats.quantile_interval(run, quantile).value for run in runs]


def lay_out(
    groups: Mapping[str, Sequence[AnalysedRun]], metric: str | None, *, quantile: float = 0.5
) -> xr.DataArray | None:
    """Lay a quantile of the untraced runs out over the settings that varied; None where none or only one workload's did.

    Returns
    -------
    DataArray or None
        dims (settings..., repetition), ns; NaN where a combination has no such run.
    """
    runs = [run for group in groups.values() for run in group if run.arm == "untraced"]
    if not runs or any(workload_differences(runs)):
        return None
    configurations = configurations_of(runs)
    axes = aggregate.varied_settings(configurations)
    found: dict[tuple[str, ...], list[float]] = {}
    for run, configuration in zip(runs, configurations, strict=True):
        if metric and (values := run.workload_latency(metric)) is not None:
            key = tuple(str(configuration.get(name, "")) for name in axes)
            found.setdefault(key, []).append(stats.quantile_interval(values, quantile).value)
    if not axes or not found:
        return None
    shape = (*map(len, axes.values()), max(map(len, found.values())))
    table = np.full(shape, np.nan)
    for key, row in found.items():
        place = tuple(labels.index(label) for labels, label in zip(axes.values(), key, strict=True))
        table[place][: len(row)] = row
    return xr.DataArray(table, dims=(*axes, "repetition"), coords=axes, attrs={"units": "ns"})


def deciding(untraced: Sequence[Comparison]) -> Comparison:
    """Return the comparison the verdict comes from: the median's, else the tail's, else any that tells; else the median's."""
    order = (untraced[0], untraced[-1], *untraced[1:-1])
    return next((comparison for comparison in order if comparison.verdict != CANNOT_TELL), untraced[0])


def percent(ratio: float) -> str:
    """Return a ratio as a signed change: 1.21 -> ``+21 %``, 0.995 -> minus half a percent with a real minus sign."""
    change = 100 * (ratio - 1)
    return (f"{change:+.1f} %" if abs(change) < 9.95 else f"{change:+.0f} %").replace("-", MINUS)


def comparison_words(comparison: Comparison) -> str:
    """Return numbers, ratio and interval of one comparison."""
    runs = (
        f"{comparison.runs_a} and {comparison.runs_b} runs"
        if comparison.runs_a != comparison.runs_b
        else f"{comparison.runs_a} runs each"
        if comparison.runs_a > 1
        else "one run each"
    )
    if np.isfinite(comparison.ratio_low):
        low, high = percent(comparison.ratio_low), percent(comparison.ratio_high)
        said = f"95 % interval {low} to {high}, {comparison.kind}; {runs}"
    elif comparison.kind == "over repetitions" and min(comparison.runs_a, comparison.runs_b) >= stats.MIN_REPETITIONS:
        said = f"interval not known: the runs differ too much among themselves; {runs}"
    else:
        said = f"{runs}: no interval"
    return f"{' → '.join(told_apart([comparison.a, comparison.b]))}, {percent(comparison.ratio)} ({said})"


def give_answer(groups: Mapping[str, Sequence[AnalysedRun]], pairs: Sequence[Pair], metric: str | None) -> Answer:
    """Return the report's answer for any number of configurations."""
    runs = [run for group in groups.values() for run in group]
    if len(pairs) > 1:
        given = _answer_many(pairs, metric, rank_groups(groups, pairs, metric), runs)
    elif pairs:
        given = _answer_pair(pairs[0], metric, runs)
    else:
        given = _answer_single(groups)
    given = replace(given, more=[*given.more, *_rfs_words(groups)])
    differences = aggregate.varied_settings(workload_differences(runs))
    if differences:
        facts = "; ".join(f"{name} {' | '.join(values)}" for name, values in differences.items())
        note = f"The runs are of different workloads ({facts}): they are neither pooled nor compared across workloads."
        given = replace(given, more=[note, *given.more])
    return given


def rfs_is_on(run: AnalysedRun) -> bool:
    """Tell whether RFS was on while a run was recorded: both of its tables have entries (host.json)."""
    queues = ((run.host.get("ifaces") or {}).get(str(run.run.get("iface"))) or {}).get("queues") or []
    entries = (run.host.get("settings") or {}).get("rps_sock_flow_entries") or 0
    return int(entries) > 0 and any(queue.get("rps_flow_cnt") for queue in queues)


def _rfs_words(groups: Mapping[str, Sequence[AnalysedRun]]) -> list[str]:
    """Return how many packets RFS delivered where it is on, and how many are there without it."""
    lines, without = [], ""
    for label, runs in groups.items():
        counts = [stats.steered(run.tree)["rfs_delivered"] for run in runs if run.can_explain]
        there, known = (sum(column) for column in zip(*counts, strict=True)) if counts else (0, 0)
        if not known:
            continue
        share = f"{100 * there / known:.0f} %"
        if any(map(rfs_is_on, runs)):
            lines.append(
                f"With {label} RFS delivered {share} of the packets to the CPU of their reader, where the socket was read last ({there:,} of {known:,} in the traced runs)"
            )
        elif not without:
            without = f"; without RFS ({label}) {share} came there."
    return [line + (without or ".") for line in lines]


def _answer_pair(pair: Pair, metric: str | None, runs: Sequence[AnalysedRun]) -> Answer:
    more = [f"Measured is the {METRICS[metric]}."] if metric and pair.untraced else []
    if not pair.untraced:
        sentence = f"No verdict on {pair.b} against {pair.a}: there are no untraced runs of both."
        return Answer(sentence, "none", more + _explain(pair))
    median, tail, decided = pair.untraced[0], pair.untraced[-1], deciding(pair.untraced)
    takes = ""
    if decided.verdict == CANNOT_TELL:
        sentence = f"Cannot tell {pair.b} from {pair.a}: the median goes {comparison_words(median)}."
        takes = _what_it_takes(median, runs)
        more[:0] = [takes] if takes else []
    elif decided is median:
        sentence = (
            f"With {pair.b} the median is {_word(median.verdict)} than with {pair.a}: {comparison_words(median)}."
        )
    else:
        slowest = f"the slowest {100 * (1 - decided.quantile):.3g} % is {_word(decided.verdict)} than with {pair.a}"
        sentence = (
            f"With {pair.b} {slowest}: {quantile_words(decided.quantile)} {comparison_words(decided)}. "
            "The median does not tell them apart."
        )
    if decided is not tail:
        more.insert(
            0,
            f"The p99 goes {comparison_words(tail)}: {_verdict_words(tail)}.",
        )
    verdicts = {c.verdict for c in pair.untraced} - {CANNOT_TELL}
    tone = {frozenset(): "cannot", frozenset({BETTER}): "better", frozenset({WORSE}): "worse"}.get(
        frozenset(verdicts), "mixed"
    )
    return Answer(sentence, tone, more + _cost(pair) + _explain(pair), takes)


def _cost(pair: Pair) -> list[str]:
    """Return what the configuration costs the CPUs."""
    if pair.cost is None:
        return []
    word = {BETTER: "cheaper", WORSE: "dearer", CANNOT_TELL: "cannot tell"}[pair.cost.verdict]
    return [
        f"CPU cost of {pair.b} against {pair.a}, time in the kernel per message: {comparison_words(pair.cost)}: {word}."
    ]


def _what_it_takes(median: Comparison, runs: Sequence[AnalysedRun]) -> str:
    """Return what to do about a median that cannot be told apart, with the command that does it; empty where nothing is known to help."""
    n = median.more_repetitions
    if n and n >= MOST_REPETITIONS:
        return f"A difference of this size in the median would need more than {n:,} repetitions of each configuration to be seen."
    if n:
        said = f"A difference of this size in the median would need about {n:,} repetitions of each configuration to be seen"
    elif median.kind == "within one run":
        n = ENOUGH_REPETITIONS
        said = f"One run of each says how exact that run is, not whether the next one would be the same; repeat at least {n} times"
    elif min(median.runs_a, median.runs_b) < stats.MIN_REPETITIONS:
        n = ENOUGH_REPETITIONS
        said = f"2 runs: no interval. How much runs differ cannot be known from two; repeat at least {n} times"
    else:
        return ""
    command = repeating_command(runs, n)
    return f"{said}: {command}" if command else f"{said} (--reps {n})."


def _verdict_words(comparison: Comparison) -> str:
    if comparison.verdict != CANNOT_TELL:
        return _word(comparison.verdict)
    is_lone = comparison.ratio_high < 1 or comparison.ratio_low > 1
    return "cannot tell, once corrected for the number of comparisons made" if is_lone else "cannot tell"


def _word(verdict: str) -> str:
    return "faster" if verdict == BETTER else "slower"


def _explain(pair: Pair) -> list[str]:
    """Return the traced runs' explanation and whether it agrees with the verdict."""
    if not pair.explanation:
        return ["There are no traced runs of both configurations, so nothing explains it."]
    decided = deciding(pair.untraced) if pair.untraced else None
    level = decided.quantile if decided else 0.5
    explanation = pair.explanation[level]
    total = float(explanation["total"])
    order = np.argsort(-np.abs(explanation["difference"].values))[:3]
    parts = [f"{explanation['hop'].values[i]} {_signed(float(explanation['difference'].values[i]))}" for i in order]
    lines = [
        f"Explanation from the traced runs: the {quantile_words(level)} packet takes {microseconds(abs(total))} {'longer' if total > 0 else 'less'} from the first kernel stage to recvmsg; the hops that carry most of it are {', '.join(parts)}."
    ]
    if pair.bias is not None:
        lines += _bias_words(pair.bias)
    if decided:
        lines.append(_agreement(decided, next(c for c in pair.traced if c.quantile == level)))
    return lines


def _bias_words(bias: explain.Bias) -> list[str]:
    if not bias.is_large:
        return []
    share = (
        "there is no effect without tracing to compare it with"
        if not np.isfinite(bias.share)
        else f"{100 * bias.share:.0f} % of the effect seen without tracing ({_signed(bias.effect)})"
    )
    interval = f" (95 % interval {_signed(bias.low)} to {_signed(bias.high)})" if np.isfinite(bias.low) else ""
    return [
        f"Recording itself adds {_signed(bias.bias)}{interval} to the difference of the medians (geometric means over the runs, as in the tables), {share}: the hops' sizes below are biased by that, their order less so."
    ]


def _signed(ns: float) -> str:
    return ("+" if ns >= 0 else MINUS) + microseconds(abs(ns))


def _agreement(untraced: Comparison, traced: Comparison) -> str:
    if untraced.verdict == CANNOT_TELL:
        return "The untraced runs do not tell the configurations apart, so the traced difference explains no verdict; it includes the cost of recording."
    is_same = (untraced.ratio < 1) == (traced.ratio < 1)
    if is_same:
        return f"Traced and untraced runs agree on the direction of the {quantile_words(untraced.quantile)}."
    return f"Traced and untraced runs DISAGREE on the direction of the {quantile_words(untraced.quantile)}: recording adds time where it adds events, so trust the untraced verdict and not the explanation."


def _answer_many(
    pairs: Sequence[Pair], metric: str | None, ranks: Sequence[effects.Rank], runs: Sequence[AnalysedRun]
) -> Answer:
    known = [pair for pair in pairs if pair.untraced]
    if not known:
        return Answer("No verdict: there are no untraced runs of the configurations.", "none", [])
    better = [pair for pair in known if pair.untraced[0].verdict == BETTER]
    more = [f"Measured is the {METRICS[metric]}."] if metric else []
    second = ranks[1].against_best if len(ranks) > 1 else None
    takes = _what_it_takes(second, runs) if second is not None and second.verdict == CANNOT_TELL else ""
    below = [*_runner_up(ranks), *([takes] if takes else [])]
    if better:
        best = min(better, key=lambda pair: pair.untraced[0].ratio)
        first = (
            f"Of {len(pairs) + 1} configurations {best.b} has the lowest median"
            if len({pair.a for pair in pairs}) == 1
            else f"Of {len(pairs)} comparisons within a workload {best.b} gains most in the median"
        )
        sentence = f"{first}: {comparison_words(best.untraced[0])} against {best.a}."
        return Answer(sentence, "better", below + more + _cost(best) + _explain(best), takes)
    worse = sum(pair.untraced[0].verdict == WORSE for pair in known)
    baseline = known[0].a if len({pair.a for pair in pairs}) == 1 else "its baseline"
    others = "" if worse == len(known) else ", the others cannot be told from it"
    sentence = f"No configuration has a lower median than {baseline}: {worse} of {len(known)} are slower{others}."
    runner_up = next((pair for pair in known if len(ranks) > 1 and pair.b == ranks[1].label), None)
    costs = _cost(runner_up) if runner_up else []
    return Answer(sentence, "baseline" if worse == len(known) else "cannot", below + costs + more, takes)


def _runner_up(ranks: Sequence[effects.Rank]) -> list[str]:
    """Return who comes second, and which configurations may be the fastest."""
    if len(ranks) < 2 or ranks[1].against_best is None:
        return []
    second = ranks[1].against_best
    told = (
        "is slower"
        if second.verdict == WORSE
        else "cannot be told from it once all pairs of configurations are corrected together"
    )
    lines = [f"Runner-up to {ranks[0].label} is {ranks[1].label}, which {told}: {comparison_words(second)}."]
    rivals = [one.label for one in ranks if one.first == 1]
    if len(rivals) > 2:
        lines.append(f"These {len(rivals)} cannot be told from the fastest: {', '.join(rivals)}.")
    return lines


def _answer_single(groups: Mapping[str, Sequence[AnalysedRun]]) -> Answer:
    for runs in groups.values():
        trees = traced_trees(runs)
        if not trees:
            continue
        total = stats.estimate_quantile([stats.hop_values(tree, "total_latency") for tree in trees], 0.5)
        parts = explain.contributions(trees[0], 0.5)
        first = np.argsort(-parts.values)[:3]
        words = [f"{parts['hop'].values[i]} {microseconds(float(parts.values[i]))}" for i in first]
        interval = (
            f" (95 % interval {microseconds(total.low)} to {microseconds(total.high)}, {total.kind})"
            if np.isfinite(total.low)
            else ""
        )
        sentence = f"The median packet takes {microseconds(total.value)}{interval} from the first kernel stage seen to recvmsg."
        return Answer(
            sentence,
            "none",
            [
                f"Most of it: {', '.join(words)}. One configuration gives no comparison, and these times include the cost of recording."
            ],
        )
    return Answer("There is nothing to say: no packet was followed.", "none", [])
