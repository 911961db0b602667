"""The few functions that use both sides: record a run, demo, compare, report.

Analysis needs no root, no perf and no NIC; recording needs no xarray. This module is where they meet, so everything heavy is
imported where it is used.
"""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rxlab import rundir
from rxlab.errors import FormatError, UsageError
from rxlab.rundir import DATASET, list_runs
from rxlab.stages import EVENT_PRESETS

if TYPE_CHECKING:
    from rxlab.dataset.run import Run
    from rxlab.follow.join import Joined
    from rxlab.read.columns import Columns
    from rxlab.record.spec import Spec


def open_run(path: str | os.PathLike[str], *, chunks: int | None = None) -> Run:
    """Open a run directory (:func:`rxlab.dataset.run.open_run`)."""
    from rxlab.dataset.run import open_run as open_recorded

    return open_recorded(path, chunks=chunks)


def record_run(
    out: str | os.PathLike[str],
    *,
    iface: str | None = None,
    netns: str | None = None,
    testbed: bool | str = False,
    gro: bool = False,
    settings: Mapping[str, Any] | None = None,
    allow_system_changes: bool = False,
    yes_this_nic: bool = False,
    workload: Mapping[str, Any] | None = None,
    command: Sequence[str] | None = None,
    server: str | None = None,
    server_port: int | None = None,
    pyperf: bool = False,
    idle: str = "auto",
    **options: Any,
) -> rundir.RunDir:
    """Record one run, on the embedded testbed or on an interface, with settings applied and restored.

    Parameters are those of :func:`rxlab.record.capture.capture`, with `testbed` as a flag or
    ``ports:IF1,IF2``, `workload` as the fields of
    :class:`rxlab.record.workload.Workload`, and `settings` as sysfs words (``{"rps_cpus": "0,2"}``). A `command` may have a
    `server`, a command line started on the captured side first.
    """
    from rxlab.host.access import HostAccess
    from rxlab.host.idlecheck import idle_task_is_blind
    from rxlab.host.journal import apply
    from rxlab.host.settings import parse_settings
    from rxlab.host.topology import resolve_intents
    from rxlab.record.capture import capture, note_restored
    from rxlab.record.ports import check_place, open_testbed
    from rxlab.record.sweep import reader_cpu
    from rxlab.record.workload import Command, Workload

    check_place(iface, testbed, netns)
    if server and not command:
        raise UsageError(
            "--server goes with a command", do="Give the client after --, e.g. -- curl http://10.77.0.2:8080/."
        )
    traffic: Workload | Command | None = None
    if command:
        traffic = Command(list(command), shlex.split(server or ""), server_port, pyperf=pyperf)
    elif workload:
        traffic = Workload(**{key: value for key, value in workload.items() if value is not None})
    with ExitStack() as stack:
        journal = stack.enter_context(apply(allow_system_changes=allow_system_changes, yes_this_nic=yes_this_nic))
        bed = stack.enter_context(open_testbed(testbed, gro=gro, registry=journal)) if testbed else None
        iface, netns = (bed.dst.iface, bed.dst.netns) if bed else (iface, netns)
        with HostAccess(None) as host:
            wanted = resolve_intents(settings or {}, reader_cpu(traffic), host)
        stack.enter_context(journal.change(parse_settings(wanted, iface, netns)))
        recorded = capture(
            out,
            iface=None if bed else iface,
            netns=None if bed else netns,
            testbed=bed,
            workload=traffic,
            idle=idle,
            idle_task_is_blind=idle_task_is_blind() if idle == "auto" else None,
            configuration=dict(settings or {}),
            transaction=journal,
            **options,
        )
    return note_restored(recorded, journal)


def demo(
    out: str | os.PathLike[str], *, messages: int = 20_000, reps: int = 3, say: Callable[[str], None] = print
) -> Path:
    """Record RPS off and on over the testbed, analyse and report; on recorded runs where this host may not capture.

    Returns
    -------
    Path
        The report.
    """
    from rxlab.doctor import examine

    folder = Path(out)
    _set_aside(folder, say)
    _make_room(folder)
    found = examine()
    lacks = [f"{check.name}: {check.found}" for check in found.checks if check.status == "fail"]
    if os.geteuid() != 0:
        lacks.insert(0, "the testbed needs root")
    if lacks:
        say(f"rxlab demo: this host cannot record now ({lacks[0]}); using the recorded runs of data/ instead")
        return _demo_on_recorded(folder, say)
    say("rxlab demo: recording RPS off and on over a veth testbed on this host")
    reader_cpu = max(os.sched_getaffinity(0))
    report = experiment(
        folder,
        [{"rps_cpus": "off"}, {"rps_cpus": str(reader_cpu)}],
        testbed=True,
        reps=reps,
        workload={"proto": "tcp", "messages": messages},
        say=say,
    )
    assert report is not None  # only a dry run has none
    say("RPS is all this asked about; 'rxlab sweep rps_rfs --testbed --allow-system-changes' asks about RFS too")
    return report


def _demo_on_recorded(folder: Path, say: Callable[[str], None]) -> Path:
    """Analyse copies of the recorded runs and report on them."""
    recorded = recorded_runs()
    copies = [Path(shutil.copytree(source.path, folder / source.path.name)) for source in recorded]
    return _analyze_and_report(copies, folder, say, recorded=True)


def recorded_runs() -> list[Run]:
    """Return the recorded runs that come with the source tree, TCP with RPS off and on."""
    for base in (Path.cwd() / "data", Path(__file__).resolve().parent.parent / "data"):
        runs = [open_run(entry.path) for entry in list_runs(base)] if base.is_dir() else []
        runs = [run for run in runs if run.path.name.startswith("tcp-rps")]
        if runs:
            return runs
    raise FormatError("no recorded runs", where="data/", do="Run from a clone of the rxlab repository.")


def compare(
    out: str | os.PathLike[str],
    *,
    settings: Mapping[str, Any],
    iface: str | None = None,
    testbed: bool | str = False,
    reps: int = 3,
    workload: Mapping[str, Any] | None = None,
    command: Sequence[str] | None = None,
    idle: str = "auto",
    allow_system_changes: bool = False,
    yes_this_nic: bool = False,
    seed: int = 1,
    dry_run: bool = False,
    say: Callable[[str], None] = print,
) -> Path | None:
    """Compare the host as it is with the given settings: apply, capture, restore, next; shuffled; then report.

    Returns
    -------
    Path or None
        The report; None after a dry run.
    """
    from rxlab.record.ports import check_place

    if not settings:
        raise UsageError("nothing to compare", expected="--set KEY=VALUE")
    check_place(iface, testbed)
    if iface not in (None, "lo") and not command and not (workload or {}).get("remote"):
        raise UsageError(
            "no traffic would cross the interface: a local client talks to itself over lo",
            where=f"--iface {iface}",
            expected="a command after --, or --remote ssh:HOST",
        )
    return experiment(
        Path(out),
        [{}, dict(settings)],
        testbed=testbed,
        iface=iface,
        reps=reps,
        workload=workload,
        command=command,
        idle=idle,
        allow_system_changes=allow_system_changes,
        yes_this_nic=yes_this_nic,
        seed=seed,
        dry_run=dry_run,
        say=say,
    )


def experiment(
    folder: Path,
    configurations: Sequence[Mapping[str, Any]],
    *,
    testbed: bool | str,
    iface: str | None = None,
    reps: int = 3,
    workload: Mapping[str, Any] | None = None,
    command: Sequence[str] | None = None,
    idle: str = "auto",
    allow_system_changes: bool = False,
    yes_this_nic: bool = False,
    seed: int = 1,
    dry_run: bool = False,
    say: Callable[[str], None] = print,
) -> Path | None:
    """Record each configuration untraced and traced, `reps` times in shuffled order, analyse, and report."""
    from rxlab.host.idlecheck import idle_task_is_blind
    from rxlab.host.journal import apply
    from rxlab.record.plan import check_disk, host_lines
    from rxlab.record.ports import open_testbed
    from rxlab.record.runfolder import unused_removed
    from rxlab.record.sweep import plan_sweep, sweep
    from rxlab.record.workload import Command, Workload

    arms = ("untraced", "std")
    cells = plan_sweep(configurations, reps=reps, arms=arms, seed=seed)
    if dry_run:
        runs_text = (f"{cell.name}: {_settings_text(cell.configuration)}" for cell in cells)
        say("\n".join([*runs_text, *host_lines(configurations, testbed)]))
        return None
    fields = {key: value for key, value in (workload or {}).items() if value is not None}
    traffic = Command(list(command)) if command else Workload(**fields)
    check_disk(folder, traffic, cells)
    blind = idle_task_is_blind() if idle == "auto" else None
    runs = []
    with ExitStack() as stack:
        stack.enter_context(unused_removed(folder))
        _make_room(folder)
        journal = stack.enter_context(apply(allow_system_changes=allow_system_changes, yes_this_nic=yes_this_nic))
        bed = stack.enter_context(open_testbed(testbed, registry=journal)) if testbed else None
        recorded = sweep(
            folder,
            configurations,
            testbed=bed,
            iface=iface,
            workload=traffic,
            reps=reps,
            arms=arms,
            seed=seed,
            transaction=journal,
            idle=idle,
            idle_task_is_blind=blind,
            progress=lambda number, total, cell: say(
                f"[{number + 1}/{total}] {cell.arm}, {_settings_text(cell.configuration)}, repetition {cell.repetition + 1}"
            ),
        )
        for rundir_of_cell in recorded:
            for problem in rundir_of_cell.run.get("problems") or []:
                say(f"  {rundir_of_cell.path.name}: {problem}")
            runs.append(rundir_of_cell.path)
    return _analyze_and_report(runs, folder, say)


def run_sweep(
    spec: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    testbed: bool | str = False,
    iface: str | None = None,
    reps: int | None = None,
    remote: str | None = None,
    scheduler: str | None = None,
    dry_run: bool = False,
    say: Callable[[str], None] = print,
    **options: Any,
) -> Path | None:
    """Record a sweep spec (options as :func:`rxlab.record.specrun.record_spec` takes them); return its Zarr store.

    With a `scheduler` (``tcp://...`` of a Dask cluster) its workers record (:mod:`rxlab.record.cluster`) and analyse.
    """
    from rxlab.dataset.sweepstore import aggregate_sweep
    from rxlab.host.idlecheck import idle_task_is_blind
    from rxlab.record.plan import plan_lines
    from rxlab.record.spec import plan_spec
    from rxlab.record.specrun import record_spec

    if scheduler is not None:
        plan = plan_spec(spec, testbed=testbed, iface=iface, reps=reps, remote=remote, elsewhere=True)
    else:
        plan = plan_spec(spec, testbed=testbed, iface=iface, reps=reps, remote=remote)
    if dry_run:
        say("\n".join(plan_lines(plan, testbed)))
        return None
    if scheduler is not None:
        return _sweep_on_cluster(plan, Path(out), scheduler, testbed=testbed, iface=iface, say=say, **options)
    blind = idle_task_is_blind() if plan.idle == "auto" else None
    record_spec(plan, out, testbed=testbed, iface=iface, idle_task_is_blind=blind, say=say, **options)
    return aggregate_sweep(out, say=say)


def _sweep_on_cluster(plan: Spec, out: Path, scheduler: str, *, say: Callable[[str], None], **options: Any) -> Path:
    """Record and aggregate on the workers of a Dask cluster."""
    from rxlab.dataset.sweepstore import aggregate_sweep
    from rxlab.record.cluster import connect, record_on_cluster

    with connect(scheduler) as client:
        record_on_cluster(plan, out, client, say=say, **options)
        return aggregate_sweep(
            out, each=lambda write, paths: client.gather(client.map(write, paths, pure=False)), say=say
        )


def _settings_text(configuration: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={value}" for key, value in configuration.items()) or "host as it is"


def _make_room(folder: Path) -> None:
    """Make a folder for runs; refuse one that holds anything: recordings are never overwritten."""
    folder.mkdir(parents=True, exist_ok=True)
    held = sorted(entry.name for entry in folder.iterdir())
    if held:
        raise UsageError(
            "the folder for the runs is not empty",
            where=str(folder),
            found=", ".join(held[:3]),
            do="Choose another --out.",
        )


def _set_aside(folder: Path, say: Callable[[str], None]) -> None:
    """Rename the folder of an earlier demo, so that this one can take its name and nothing is lost."""
    if not (folder / rundir.SWEEP_JSON).exists() and not (folder / "report.html").exists():
        return
    number = next(n for n in range(1, 10_000) if not folder.with_name(f"{folder.name}.{n}").exists())
    kept = folder.with_name(f"{folder.name}.{number}")
    folder.rename(kept)
    say(f"the runs of an earlier demo are kept as {kept}")


def _analyze_and_report(
    paths: Sequence[Path], folder: Path, say: Callable[[str], None], *, recorded: bool = False
) -> Path:
    """Analyse runs in place and write one report about them; `recorded` runs are not this machine's."""
    from rxlab.dataset.run import each_run, left_out_text, refuse_left_out

    number = count(1)

    def analysed(run: Run) -> Run:
        say(f"analysing [{next(number)}/{len(paths)}] {run.path.name}")
        run.analyze_in_place()
        return run

    runs, damaged = each_run(paths, analysed)
    say("writing the report")
    report = write_report(runs, folder / "report.html", recorded=recorded, left_out=left_out_text(damaged), say=say)
    refuse_left_out(damaged, len(paths), str(report))
    return report


def function_phases(path: str | os.PathLike[str], **options: Any) -> Columns:
    """Return the phases of a run's function log, or of a text file with one (:func:`rxlab.follow.functionphases.find_phases`)."""
    from rxlab.follow.functionphases import find_phases
    from rxlab.read.tracetext import read_function_log

    if Path(path).is_file():
        return find_phases(read_function_log(path), **options)
    run = rundir.open_rundir(path)
    if not run.has(rundir.FUNCTIONS_LOG):
        raise FormatError(
            "no function log in this run", where=str(path), do="Record one: rxlab capture --functions 'tcp_*,*socket*'."
        )
    return find_phases(read_function_log(run.file(rundir.FUNCTIONS_LOG)), **options)


def write_report(runs: Iterable[Run], out: str | os.PathLike[str], **options: Any) -> Path:
    """Write one self-contained HTML page about runs (options as :func:`rxlab.show.report.write_report` has them)."""
    from rxlab.show.report import write_report as write

    return Path(write(list(runs), Path(out), **options))


def analyze_run(
    path: str | os.PathLike[str] | None,
    *,
    out: str | os.PathLike[str] | None = None,
    perf: str | os.PathLike[str] | None = None,
    pcap: str | os.PathLike[str] | None = None,
    iface: str | None = None,
    chunks: int | None = None,
    sender_pcap: str | os.PathLike[str] | None = None,
    clock_error: int | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Analyse a run directory (`chunks` as :class:`rxlab.dataset.run.Run` has it), save the dataset and return what to tell about it.

    With a `sender_pcap` also the one-way latencies from its host (`clock_error`: ns within which both clocks agree); of two captures only these.

    Returns
    -------
    dict
        ``dataset, packets, data_packets, trusted, complete, left_out`` (by status), ``verdict, reasons, missing_stages``; with a
        sender's capture ``one_way`` (:func:`rxlab.dataset.twohosts.facts_of`).
    """
    from rxlab.dataset.twohosts import analyze_two_captures, facts_of

    if out is not None:
        rundir.check_out(rundir.in_folder(Path(out)), lambda begin: begin.startswith(b"\x89HDF"))
    if clock_error is not None and sender_pcap is None:
        raise UsageError("--clock-error is about two hosts' clocks", expected="--sender-pcap FILE")
    if sender_pcap and pcap and not perf and path is None:
        target = Path(out or Path(pcap).with_suffix(".nc"))
        tree = analyze_two_captures(sender_pcap, pcap, target, clock_error=clock_error)
        return {**_untraced(target), "packets": tree["crossings"].sizes["arrival"], "one_way": facts_of(tree)}
    if sender_pcap and path is None:
        raise UsageError("the sender's capture is alone", expected="a run directory, or --pcap FILE of the receiver")
    if (perf or pcap) and chunks is not None:
        raise UsageError("two files are aligned as a whole: no --chunks", do="Leave it out, or use 'rxlab capture'.")
    if perf or pcap:
        return _analyze_recordings(path, out, perf, pcap, iface)
    if path is None:
        raise UsageError("nothing to analyse", expected="a run directory [--chunks N], or --perf FILE --pcap FILE")
    run = open_run(path, chunks=chunks)
    target = Path(out) if out is not None else run.rundir.file(DATASET)
    if not run.is_traced and run.run.get("arm") in EVENT_PRESETS:
        missing = rundir.PERF_DATA if not run.rundir.has(rundir.PERF_DATA) else rundir.PCAP
        raise FormatError(
            "a traced run without its recording", where=str(path), expected=missing, do="Record it again."
        )
    gone = run.missing_stages() if run.is_traced else []
    if gone:
        say(f"stages of which this recording has no event: {', '.join(gone)}")
    tree = run.analyze(target, sender_pcap=sender_pcap, clock_error=clock_error)
    told = _outcome(target, run.joined, run.verify()) if run.is_traced else _untraced(target)
    if sender_pcap is not None:
        told["one_way"] = facts_of(tree)
    return {**told, "missing_stages": gone}


def _untraced(target: Path) -> dict[str, Any]:
    """Return what to tell where no packet was followed."""
    return {
        "dataset": str(target),
        "packets": 0,
        "data_packets": 0,
        "complete": 0.0,
        "verdict": "untraced",
        "reasons": [],
    }


def _analyze_recordings(
    path: str | os.PathLike[str] | None,
    out: str | os.PathLike[str] | None,
    perf: str | os.PathLike[str] | None,
    pcap: str | os.PathLike[str] | None,
    iface: str | None,
) -> dict[str, Any]:
    """Analyse a perf.data and a capture made elsewhere, whose clocks are found from the packets."""
    from rxlab.dataset.elsewhere import analyze_recordings
    from rxlab.follow.verify import verify_join

    if path is not None or not perf or not pcap:
        raise UsageError("give either a run directory or both files", expected="RUN, or --perf FILE --pcap FILE")
    target = Path(out) if out is not None else Path(perf).with_suffix(".nc")
    _, joined = analyze_recordings(perf, pcap, iface, target)
    return {**_outcome(target, joined, verify_join(joined, None)), "clock_bound_ns": joined.clock.bound_ns}


def _outcome(target: Path, joined: Joined, found: Mapping[str, Any]) -> dict[str, Any]:
    """Return what to tell about an analysis."""
    told = {key: found[key] for key in ("data_packets", "trusted", "complete", "left_out", "verdict", "reasons")}
    return {"dataset": str(target), "packets": joined.packets.n, **told}


COMPLETE_THRESHOLD = 0.99


def analysis_threshold(result: Mapping[str, Any]) -> str | None:
    """Return why an analysis is below its threshold, None where it is not."""
    if result["verdict"] == "refused":
        return "verdict refused: " + "; ".join(result["reasons"])
    if result["verdict"] != "untraced" and result["complete"] < COMPLETE_THRESHOLD:
        return f"only {result['complete']:.4f} of the data packets are complete (threshold {COMPLETE_THRESHOLD})"
    return None


def verification_threshold(result: Mapping[str, Any]) -> str | None:
    """Return why a verification is below its threshold, None where it is not."""
    if result["misjoined"]:
        return f"{result['misjoined']} packets are joined to the wrong receive call"
    return analysis_threshold(result)
