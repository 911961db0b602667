"""The report: trust first, the right answer from the untraced arm, and a page that loads nothing."""

from __future__ import annotations

import base64
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
import xarray as xr
from joined_builder import make_app_logs, make_host, make_joined, make_run, plant_steering
from report_builder import VERIFIED, make_runs

from rxlab.dataset import store
from rxlab.errors import RxlabError
from rxlab.show import answer, evidence, plots, trust
from rxlab.show.report import write_report
from rxlab.stages import STAGE_INDEX


class _Page(HTMLParser):
    """Collects what a browser would load, and the text in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.text: list[str] = []
        self.tags: list[str] = []
        self._hidden = 0
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self._hidden += tag in ("style", "script")
        given = dict(attrs)
        self.loads += [given[name] for name in ("src", "href", "srcset", "data", "poster", "action") if given.get(name)]

    def handle_endtag(self, tag):
        self._hidden -= tag in ("style", "script")

    def handle_data(self, data):
        if not self._hidden and data.strip():
            self.text.append(" ".join(data.split()))


@pytest.fixture(scope="module")
def runs():
    return make_runs()


@pytest.fixture(scope="module")
def html(runs, tmp_path_factory):
    path = write_report(
        runs, tmp_path_factory.mktemp("report") / "deep" / "report.html", command=["rxlab", "demo", "--out", "out/a b"]
    )
    assert path.stat().st_mode & 0o777 == 0o600
    return path.read_text()


@pytest.fixture
def without_figures(monkeypatch):
    """Leave out the figures, whose drawing takes nearly all the time, where only words matter."""
    monkeypatch.setattr(evidence, "draw_figures", lambda *_, **__: iter(()))


def test_where_it_cannot_tell_the_page_and_the_command_line_give_the_command_that_could(tmp_path):
    runs = make_runs(ratio=1.0005, reps=3, n=100, traced=False, between=0.02)
    recorded = ["rxlab", "compare", "--testbed", "--set", "rps_cpus=2", "--out", "out/x"]
    said: list[str] = []
    for run in runs:
        run.run["command"] = recorded
    page = _Page(write_report(runs, tmp_path / "r.html", say=said.append).read_text())
    n = re.search(r"about ([0-9,]+) repetitions of each", said[1])[1].replace(",", "")
    wanted = f"rxlab compare --testbed --set rps_cpus=2 --reps {n} --out out/x-{n}"
    assert said[0].startswith("Cannot tell rps_cpus=2 from rps_cpus=0")
    assert said[1].endswith(f"to be seen: {wanted}")
    assert wanted in page.text, "as a line of its own, to be copied"


def test_page_loads_nothing(html):
    page = _Page(html)
    assert all(load.startswith(("data:", "#")) for load in page.loads), [load[:60] for load in page.loads]
    for svg in (
        base64.b64decode(load.split(",")[1]).decode() for load in page.loads if load.startswith("data:image/svg")
    ):
        assert not re.search(r"""(?:href|src)\s*=\s*["'](?!#|data:)""", svg)
        assert "url(http" not in svg
    assert not re.search(r"https?://", html)
    assert not re.search(r"@import|url\(|fetch\(|XMLHttpRequest|import\(", html)
    assert not {"link"} & set(page.tags) - {"link"}
    assert len(html) < 2_000_000


def test_what_the_template_makes_is_markup_and_not_text(html):
    page = _Page(html)
    assert page.tags.count("figure") >= 10
    assert not [text for text in page.text if re.search(r"</?(figure|td|small|br|tr)\b", text)]


def test_trust_comes_first_then_the_answer_then_evidence(html):
    order = [
        html.index(f'id="{name}"')
        for name in ("trust", "answer", "verdict", "explanation", "packets", "checks", "host", "again")
    ]
    assert order == sorted(order)


def test_the_answer_is_the_planted_one(html):
    text = " ".join(_Page(html).text)
    assert "With rps_cpus=2 the median is slower than with rps_cpus=0" in text
    found = re.search(
        r"median is slower than with rps_cpus=0: \S+ µs → \S+ µs, \+(\d+) % \(95 % interval \+(\d+) % to \+(\d+) %, over repetitions; 5 runs each\)",
        text,
    )
    assert found, text[:3000]
    ratio, low, high = map(int, found.groups())
    assert low <= 30 <= high
    assert ratio == pytest.approx(30, abs=4)
    assert "rps_ipi +2." in text
    assert "Traced and untraced runs agree on the direction of the median." in text


def test_the_bias_of_recording_and_the_cpu_cost_are_said(html):
    """Untraced +3 us, traced +4.5 us: half of the effect is the recording's own."""
    text = " ".join(_Page(html).text)
    found = re.search(r"Recording itself adds \+(\S+ [nµ]s) .*?, (\d+) % of the effect", text)
    assert found, text[:4000]
    size, unit = found[1].split()
    assert float(size) * {"ns": 1e-3, "µs": 1}[unit] == pytest.approx(1.5, abs=0.75)  # of one traced run each
    assert 20 <= int(found[2]) <= 80
    assert "CPU cost of rps_cpus=2 against rps_cpus=0" in text
    assert "less the estimated cost of recording" in text


@pytest.mark.usefixtures("without_figures")
def test_a_small_bias_is_not_mentioned(tmp_path):
    runs = make_runs(ratio=4.0)  # traced 15 -> 60 us, untraced 10 -> 40: made equal to the untraced difference below
    logs = make_app_logs(np.full(600, 45_000.0))
    runs = [
        replace(run, tree=store.build(make_joined(600, seed=9), run=run.run, host=run.host, app_latency=logs))
        if run.is_traced and run.run["configuration"]["rps_cpus"] == "2"
        else run
        for run in runs
    ]
    assert "Recording itself adds" not in write_report(runs, tmp_path / "r.html").read_text()


def test_counters_are_the_sum_of_all_runs():
    tree = store.build(make_joined(600), run=make_run(), host=make_host())
    runs = [
        trust.AnalysedRun(run, make_host(), tree, {**VERIFIED, "counters_agree": {"ok": True, "received_rps": pair}})
        for run, pair in (
            (make_run(), {"counter": 1_200, "joined": 1_190}),
            (make_run(), {"counter": 800, "joined": 799}),
        )
    ]
    (said,) = [
        check.summary for check in trust.trust_panel(runs, recorded=False, overhead=[]) if "counters" in check.name
    ]
    assert said == "agree in 2 of 2 runs; RPS packets: 2,000 counted by the kernel, 1,989 joined"


def test_a_run_larger_than_memory_is_read_a_column_at_a_time(tmp_path):
    """What is drawn and told of a run leaves its tables (packet, stage) and (packet, hop) on disk."""
    run = make_run()
    path = store.save(store.build(make_joined(3000), run=run, host=make_host()), tmp_path / "run.nc")
    with store.open_dataset(path) as tree:
        runs = {"it": [trust.AnalysedRun(run, make_host(), tree, VERIFIED)]}
        evidence.hop_rows(runs)
        answer.give_answer(runs, [], None)
        for draw in (plots.plot_steering, plots.plot_clock, plots.plot_packet):
            draw(tree)
        plots.plot_stage_bars({"it": [tree]})
        for group, name in (("packets", "time"), ("packets", "cpu"), ("hops", "latency"), ("hops", "hop_from")):
            assert not tree[group].variables[name]._in_memory, f"{group}/{name} was loaded whole"


def test_a_sweep_has_ranks_effects_and_a_runner_up(tmp_path, monkeypatch):
    drawn: dict = {}
    monkeypatch.setattr(evidence, "draw_figures", lambda *_, **found: drawn.update(found) or iter(()))
    runs = []
    for gro, ratio in (("off", 0.8), ("on", 1.2)):
        for run in make_runs(ratio=ratio, traced=False):
            run.run["configuration"]["gro"] = gro
            runs.append(run)
    text = " ".join(_Page(write_report(runs, tmp_path / "r.html").read_text()).text)
    assert "Of 4 configurations rps_cpus=2, gro=off has the lowest median" in text
    assert "Runner-up to rps_cpus=2, gro=off is rps_cpus=0, gro=o" in text
    assert "CPU cost of rps_cpus=2, gro=off against rps_cpus=0, gro=off" in text
    assert "rps_cpus=2 with gro=on" in text
    assert drawn["layout"].dims == ("rps_cpus", "gro", "repetition")
    assert [(one.first, one.last) for one in drawn["ranks"]] == [(1, 1), (2, 3), (2, 3), (4, 4)]


def test_two_settings_that_changed_together_have_no_heat_map():
    values = np.full((2, 2, 5), np.nan)
    values[0, 0], values[1, 1] = 20_000, 22_000
    coords = {"rps_cpus": ["", "0,1"], "rps_flow_cnt": ["", "4096"]}
    layout = xr.DataArray(values, dims=("rps_cpus", "rps_flow_cnt", "repetition"), coords=coords)
    assert not list(evidence.draw_sweep([], layout, []))
    values[0, 1] = 21_000
    (drawn,) = evidence.draw_sweep([], layout, [])
    assert drawn["question"] == "How do two settings go together?"


def test_what_a_colleague_must_know_is_said(html):
    text = " ".join(_Page(html).text)
    assert trust.TESTBED_WARNING in text
    assert trust.RECORDED_NOTE not in text
    assert "0 mis-joined of 1,200 packets checked" in text
    assert "error bound ±25 ns" in text
    assert "rxlab demo --out 'out/a b'" in text
    assert "rps_cpus=0: ×1.5" in text
    assert "gro" in text


def test_numbers_sort_by_value(html):
    cells = re.findall(r'<td data-v="([^"]*)"', html)
    assert len(cells) > 100
    for cell in cells:
        float(cell)


@pytest.mark.usefixtures("without_figures")
def test_equal_configurations_cannot_be_told_apart(tmp_path):
    text = write_report(make_runs(ratio=1.0, traced=False), tmp_path / "r.html").read_text()
    assert "Cannot tell rps_cpus=2 from rps_cpus=0" in text
    assert "repetitions of each configuration to be seen" in text
    assert "no traced runs" in text


@pytest.mark.usefixtures("without_figures")
def test_one_run_each_gives_no_verdict(tmp_path):
    text = write_report(make_runs(reps=1), tmp_path / "r.html").read_text()
    assert "Cannot tell" in text
    assert "repeat at least 5 times" in text


@pytest.mark.usefixtures("without_figures")
def test_no_untraced_run_gives_no_verdict(tmp_path):
    text = write_report(make_runs(reps=0), tmp_path / "r.html").read_text()
    assert "No verdict on rps_cpus=2 against rps_cpus=0" in text
    assert "Explanation from the traced runs" in text


@pytest.mark.usefixtures("without_figures")
def test_disagreement_of_the_arms_is_shouted(tmp_path):
    text = write_report(make_runs(ratio=0.7), tmp_path / "r.html").read_text()
    assert "the median is faster" in text
    assert "DISAGREE" in text


@pytest.mark.usefixtures("without_figures")
def test_one_configuration_is_described(tmp_path):
    text = write_report(make_runs(settings=("0",)), tmp_path / "r.html").read_text()
    assert "The median packet takes" in text
    assert "One configuration gives no comparison" in text


@pytest.mark.usefixtures("without_figures")
def test_several_configurations_name_the_best(tmp_path):
    text = write_report(make_runs(ratio=0.8, settings=("0", "1", "2"), traced=False), tmp_path / "r.html").read_text()
    assert "Of 3 configurations rps_cpus=2 has the lowest median" in text


@pytest.mark.usefixtures("without_figures")
def test_a_sweeps_first_configuration_is_the_baseline_whatever_the_order(runs, tmp_path):
    shuffled = [replace(run, run={**run.run, "sweep": {"cell": run.path.name}}) for run in runs]
    shuffled = shuffled[-1:] + shuffled[:-1]
    assert "With rps_cpus=2 the median is slower" in write_report(shuffled, tmp_path / "r.html").read_text()


def test_settings_that_one_side_lacks_read_as_the_host_is(runs):
    changed = [
        replace(run, run={**run.run, "configuration": {}}) if run.run["configuration"]["rps_cpus"] == "0" else run
        for run in runs
    ]
    assert set(answer.group_runs(changed)) == {"host as it is", "rps_cpus=2, gro=off"}


@pytest.mark.usefixtures("without_figures")
def test_recorded_data_are_named_so(runs, tmp_path):
    marked = tmp_path / "copy"
    marked.mkdir()
    (marked / "RECORDED").touch()
    assert trust.RECORDED_NOTE in write_report([replace(runs[0], path=marked)], tmp_path / "r.html").read_text()
    assert (
        trust.RECORDED_NOTE
        in write_report([replace(runs[0], path=tmp_path / "data" / "tcp")], tmp_path / "r.html").read_text()
    )
    assert trust.RECORDED_NOTE in write_report(runs[:1], tmp_path / "r.html", recorded=True).read_text()


@pytest.mark.usefixtures("without_figures")
def test_host_names_and_addresses_are_pseudonyms_unless_revealed(runs, tmp_path):
    run = replace(runs[0], run={**runs[0].run, "command": ["rxlab", "capture", "--filter", "host 192.0.2.7"]})
    shared = write_report([run], tmp_path / "r.html").read_text()
    assert "lab-machine" not in shared
    assert "192.0.2.7" not in shared
    own = write_report([run], tmp_path / "r.html", reveal=True).read_text()
    assert "lab-machine" in own
    assert "192.0.2.7" in own


@pytest.mark.usefixtures("without_figures")
def test_markup_in_names_is_text(runs, tmp_path):
    run = replace(runs[0], run={**runs[0].run, "configuration": {"rps_cpus": "<script>alert(1)</script>"}})
    assert "<script>alert" not in write_report([run], tmp_path / "r.html").read_text()


@pytest.mark.usefixtures("without_figures")
def test_a_run_verifies_itself(runs, tmp_path):
    class Run:
        run, host, tree, path = runs[5].run, runs[5].host, runs[5].tree, runs[5].path
        verification = {**VERIFIED, "misjoined": 3}

    assert "3 mis-joined of 600 packets checked" in write_report([Run()], tmp_path / "r.html").read_text()


@pytest.mark.usefixtures("without_figures")
def test_no_runs_are_one_clear_error(tmp_path):
    with pytest.raises(RxlabError, match="no run to report"):
        write_report([], tmp_path / "r.html")


def _state(runs, name, **given):
    checks = trust.trust_panel(runs, **{"recorded": False, "overhead": [], **given})
    return next(check.state for check in checks if check.name == name)


def _started(runs, order):
    """Return the untraced runs, started in this order of configurations and repetitions."""
    untraced = [run for run in runs if run.arm == "untraced"]
    return [replace(untraced[at], run={**untraced[at].run, "start_ns": 10**9 * (n + 1)}) for n, at in enumerate(order)]


def test_configurations_in_rank_order_read_unequal_where_they_are(tmp_path):
    runs = []
    for index, run in enumerate(make_runs(reps=3, n=100, traced=False, settings=("0", "1", "2"))):
        latency = np.full(100, 23_010.0 + 3 * (index // 3) + index % 3 / 10)
        tree = store.build(None, run=run.run, host=make_host(), app_latency=make_app_logs(latency))
        runs.append(replace(run, tree=tree))
    html = write_report(runs, tmp_path / "r.html").read_text()
    table = html[html.index("Configurations in rank order") :]
    medians = re.findall(r'<td data-v="[0-9.]+">([0-9.]+ µs)<br>', table[: table.index("</table>")])
    assert medians == ["23.010 µs", "23.013 µs", "23.016 µs"]


def test_shares_of_different_packets_say_of_which(runs):
    traced = runs[5]
    coverage = traced.tree["coverage"].to_dataset().copy(deep=True)
    at = STAGE_INDEX["copy"]
    expected = int(coverage["matched"][at]) + 3
    coverage["expected"][at] = expected
    tree = traced.tree.copy()
    tree["coverage"] = xr.DataTree(coverage)
    run = replace(traced, tree=tree, verify={**VERIFIED, "complete": 0.995, "data_packets": 1234})
    checks = trust.trust_panel([run], recorded=False, overhead=[])
    summary = next(check.summary for check in checks if check.name == "Coverage per stage")
    assert f"{100 * (expected - 3) / expected:.2f} % at the worst stage (copy: of {expected:,} packets" in summary
    assert "99.50 % of the 1,234 data packets complete" in summary


def test_the_order_of_the_runs_is_checked(runs):
    shuffled = _started(runs, (0, 5, 6, 1, 2, 7, 8, 3, 9, 4))
    assert _state(shuffled, "Order of the runs") == "good"
    assert _state(_started(runs, range(10)), "Order of the runs") == "warn"  # one configuration after the other
    assert _state(shuffled[:2], "Order of the runs") == "none"


@pytest.mark.parametrize(
    ("name", "spoil", "state"),
    [
        ("Runs ended well", lambda r: replace(r, run={**r.run, "status": "partial"}), "bad"),
        ("Join against the workload's log", lambda r: replace(r, verify={**VERIFIED, "misjoined": 1}), "bad"),
        ("Join against the workload's log", lambda r: replace(r, verify={**VERIFIED, "checked": 0}), "none"),
        ("Coverage per stage", lambda r: replace(r, verify={**VERIFIED, "complete": 0.97}), "warn"),
        (
            "Packets captured = received",
            lambda r: replace(r, run={**r.run, "tcpdump": {"captured": 1, "received": 2, "dropped": 0}}),
            "bad",
        ),
        ("Packets captured = received", lambda r: replace(r, run={**r.run, "tcpdump": None}), "none"),
        (
            "Kernel counters against the join",
            lambda r: replace(r, verify={**VERIFIED, "counters_agree": False}),
            "bad",
        ),
        ("Bytes read = bytes on the wire", lambda r: replace(r, verify={**VERIFIED, "byte_sums_equal": False}), "bad"),
        ("Where it was measured", lambda r: replace(r, run={**r.run, "testbed": {"kind": "ports"}}), "good"),
        ("Settings restored", lambda r: replace(r, run={**r.run, "testbed": None, "got": {"restored": False}}), "bad"),
        ("Settings restored", lambda r: replace(r, run={**r.run, "testbed": None, "got": {"restored": True}}), "good"),
    ],
)
def test_a_spoilt_run_is_seen(runs, name, spoil, state):
    traced = runs[5]
    if state not in ("good", "none"):
        assert _state([traced], name) == "good"
    assert _state([spoil(traced)], name) == state


def test_packets_outside_the_recording_are_not_missing_from_it(runs):
    """Background traffic while tcpdump runs on, of which perf saw nothing, is no lack; the same packets unmatched are."""
    traced, at = runs[5], STAGE_INDEX["netif_receive_skb"]
    for cause, state in (("outside_window", "good"), ("unmatched", "bad")):
        coverage = traced.tree["coverage"].to_dataset().copy(deep=True)
        more = int(coverage["expected"][at]) // 5
        coverage["expected"][at] += more
        coverage["missing"].loc[{"stage": "netif_receive_skb", "cause": cause}] += more
        coverage["fraction"][at] = float(coverage["matched"][at] / coverage["expected"][at])
        tree = traced.tree.copy()
        tree["coverage"] = xr.DataTree(coverage)
        assert _state([replace(traced, tree=tree)], "Coverage per stage") == state


def test_lost_events_and_uncovered_packets_are_seen(runs):
    tree = runs[5].tree.copy()
    tree.attrs["lost"] = 7
    assert _state([replace(runs[5], tree=tree)], "Kernel events lost by perf") == "bad"
    assert trust.overall(trust.trust_panel([replace(runs[5], tree=tree)], recorded=False, overhead=[])) == "bad"


def test_percent_words():
    assert [answer.percent(ratio) for ratio in (1.213, 0.995, 1.0)] == ["+21 %", "\N{MINUS SIGN}0.5 %", "+0.0 %"]


@pytest.mark.usefixtures("without_figures")
def test_two_runs_each_give_no_interval_and_no_verdict(tmp_path):
    text = write_report(make_runs(ratio=40.0, reps=2, traced=False), tmp_path / "r.html").read_text()
    assert "Cannot tell" in text
    assert "(2 runs each: no interval)" in text
    assert "2 runs: no interval" in text
    assert "nan" not in re.sub(r'data-v="nan"|<style>.*?</style>', "", text, flags=re.S)


def _spread_medians(runs):
    """Return untraced runs whose median says nothing and whose p99 is ten times less in the second configuration."""
    rng = np.random.default_rng(3)
    changed = []
    for number, run in enumerate(runs):
        if run.arm == "untraced":
            slow = 1e6 if run.run["configuration"]["rps_cpus"] == "0" else 1e5
            latency = 1e4 * np.exp(rng.normal(0, 0.1, 600) + (0.3 if number % 2 else -0.3))
            latency[::30] = slow * np.exp(rng.normal(0, 0.02, 20))
            run = replace(run, tree=store.build(None, run=run.run, host=run.host, app_latency=make_app_logs(latency)))
        changed.append(run)
    return changed


def test_agreement_and_explanation_follow_the_quantile_of_the_verdict(runs):
    groups = answer.group_runs(_spread_medians(runs))
    metric = answer.choose_metric(groups)
    (pair,) = pairs = answer.compare_all(groups, metric)
    assert [c.verdict for c in pair.untraced][::2] == ["cannot tell", "better"]
    given = answer.give_answer(groups, pairs, metric)
    more = " ".join(given.more)
    assert "the slowest 1 % is faster" in given.sentence
    assert "the p99 packet takes" in more
    assert "on the direction of the p99" in more
    assert "explains no verdict" not in more


def _with_rfs(run, entries="32768", flows=4096):
    settings, queues = {"rps_sock_flow_entries": entries}, [{"queue": 0, "rps_cpus": "0-1", "rps_flow_cnt": flows}]
    return replace(run, host={**run.host, "settings": settings, "ifaces": {"rx0": {"queues": queues}}})


def test_where_rfs_is_on_it_is_said_how_much_it_delivered():
    off, on = (make_runs(reps=2, settings=(cpus,)) for cpus in ("0", "0,1"))
    for group, there in ((off, 312), (on, 558)):
        plant_steering(group[-1].tree, delivered=there, elsewhere=600 - there, on_target=0, off_target=0)
    runs = [*off, *map(_with_rfs, on)]
    groups = answer.group_runs(runs)
    (said,) = [line for line in answer.give_answer(groups, [], None).more if "RFS" in line]
    assert said == (
        "With rps_cpus=0,1 RFS delivered 93 % of the packets to the CPU of their reader, where the socket was read last "
        "(558 of 600 in the traced runs); without RFS (rps_cpus=0) 52 % came there."
    )
    for half in (_with_rfs(on[-1], entries="0"), _with_rfs(on[-1], flows=0)):  # one table alone does nothing
        without = answer.give_answer(answer.group_runs([*off, half]), [], None)
        assert not [line for line in without.more if "RFS" in line]


def test_runs_of_different_workloads_are_not_pooled(runs):
    other = [
        replace(run, run={**run.run, "workload": {**run.run["workload"], "size": 1400}})
        for run in make_runs(traced=False, ratio=1.3)
    ]
    groups = answer.group_runs([*runs, *other])
    assert {label: len(group) for label, group in groups.items()} == {
        "rps_cpus=0, size=64": 6,
        "rps_cpus=2, size=64": 6,
        "rps_cpus=0, size=1400": 5,
        "rps_cpus=2, size=1400": 5,
    }
    metric = answer.choose_metric(groups)
    pairs = answer.compare_all(groups, metric)
    assert {(pair.a, pair.b) for pair in pairs} == {
        ("rps_cpus=0, size=64", "rps_cpus=2, size=64"),
        ("rps_cpus=0, size=1400", "rps_cpus=2, size=1400"),
    }
    assert "different workloads (size 64 | 1400)" in answer.give_answer(groups, pairs, metric).more[0]


def test_shorter_traced_runs_and_varied_fields_are_no_other_workload(runs):
    def with_workload(run, **fields):
        return replace(run, run={**run.run, "workload": {**run.run["workload"], **fields}})

    shorter = [with_workload(run, messages=2000 if run.arm == "untraced" else 400) for run in runs]
    assert set(answer.group_runs(shorter)) == {"rps_cpus=0", "rps_cpus=2"}
    swept = [
        replace(
            with_workload(run, rate=rate), run={**with_workload(run, rate=rate).run, "configuration": {"load": rate}}
        )
        for run, rate in zip(runs[:4], (1, 1, 2, 2), strict=True)
    ]
    assert set(answer.group_runs(swept)) == {"load=1", "load=2"}
