"""The ``rxlab`` command: argument parsing only. What a command does is in pipeline.py, doctor.py and the folders.

Exit status: 0 success, 1 an error (one line on stderr), 2 usage, 3 a result below its threshold, 130 Ctrl-C.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from rxlab.errors import RefusedError, RxlabError, UsageError
from rxlab.hostcommand import Force, Iface, Json, Netns, host_app, print_json

app = typer.Typer(
    help="Follow every received packet from the NIC to recvmsg(), and see what RPS, RFS and affinity really do.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
# Typer has click as a dependency or as a part of itself, by version; its own BadParameter is of the right one.
_ClickError: Any = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")
_INTERRUPTED = 130  # 128 + SIGINT
app.add_typer(host_app, name="host")

Set = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Host setting, e.g. rps_cpus=0,2. Repeatable.")
]
Allow = Annotated[
    bool, typer.Option("--allow-system-changes", help="Let settings of this host be changed (and restored).")
]
YesNic = Annotated[
    bool, typer.Option("--yes-this-nic", help="Even on the interface this session or the default route uses.")
]
TESTBED_HELP = "Two namespaces and a veth pair; or two NIC ports that a cable joins, of which IF2 is captured."
Testbed = Annotated[str | None, typer.Option("--testbed", metavar="[ports:IF1,IF2]", help=TESTBED_HELP)]
Idle = Annotated[str, typer.Option(help="SCHED_IDLE spinner per CPU: auto, spin or off.")]
Proto = Annotated[str, typer.Option(help="Protocol of the built-in workload: tcp or udp.")]
Messages = Annotated[int, typer.Option(min=1, help="Messages the built-in workload sends.")]
Remote = Annotated[str | None, typer.Option(metavar="ssh:HOST", help="Run the built-in client on another host.")]


@app.command()
def doctor(iface: Iface = None, as_json: Json = False) -> None:
    """Tell whether this host can capture, what would be missing, and the command that mends it."""
    from rxlab.doctor import examine

    found = examine(iface)
    if as_json:
        print_json(found.to_dict())
    else:
        found.print()
    if not found.ok:
        raise typer.Exit(1)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the runs and the report.")] = Path("out/demo"),
    messages: Messages = 20_000,
    reps: Annotated[int, typer.Option(min=1, help="Repetitions of each untraced run.")] = 3,
) -> None:
    """Record RPS off and on over the embedded testbed (or use recorded runs), analyse, and write the report."""
    from rxlab.pipeline import demo as run_demo

    with _kept(out, "give the same command again: these runs are then set aside"):
        report = run_demo(out, messages=messages, reps=reps, say=_say)
    print(f"report: {report}")


@app.command(context_settings={"allow_interspersed_args": False})
def capture(
    out: Annotated[Path, typer.Option("--out", "-o", help="Run directory to make.")],
    command: Annotated[
        list[str] | None, typer.Argument(metavar="[-- CMD...]", help="Any command as the workload.")
    ] = None,
    iface: Iface = None,
    netns: Netns = None,
    testbed: Testbed = None,
    gro: Annotated[bool, typer.Option(help="Testbed with GRO: veth then has NAPI.")] = False,
    duration: Annotated[float | None, typer.Option(help="Seconds to record at most.")] = None,
    attach: Annotated[bool, typer.Option("--attach", help="Record live traffic only; nothing is sent.")] = False,
    events: Annotated[str, typer.Option(help="min, std, full; pcap (no perf) or none (untraced).")] = "std",
    bpf: Annotated[str | None, typer.Option("--filter", help="BPF filter for tcpdump.")] = None,
    flow: Annotated[str | None, typer.Option(help="One flow as PROTO:ADDRESS:PORT; added to the filter.")] = None,
    flow_sample: Annotated[
        str | None,
        typer.Option(metavar="1/N", help="Capture one flow in N; events that know their flow are filtered too."),
    ] = None,
    cpus: Annotated[str | None, typer.Option(help="CPUs perf records, e.g. 0-3.")] = None,
    snaplen: Annotated[int, typer.Option(min=64, help="Bytes of each packet kept; headers only by default.")] = 192,
    stamps: Annotated[
        str,
        typer.Option(
            help="Who stamps received packets: software (tcpdump's) or nic (tried with an emulated NIC only: docs/clocks.md)."
        ),
    ] = "software",
    max_size: Annotated[str | None, typer.Option(help="Stop as partial beyond this size, e.g. 2G.")] = None,
    functions: Annotated[
        str | None, typer.Option(help="Also log these kernel functions by ftrace, e.g. 'tcp_*,ipv4_*,*socket*'.")
    ] = None,
    idle: Idle = "auto",
    settings: Set = None,
    allow: Allow = False,
    yes_this_nic: YesNic = False,
    proto: Proto = "tcp",
    family: Annotated[int, typer.Option(help="4 or 6: IPv4 or IPv6, on the testbed.")] = 4,
    messages: Messages = 20_000,
    size: Annotated[int, typer.Option(min=24, help="Bytes of a message.")] = 64,
    flows: Annotated[int, typer.Option(min=1, help="Connections of the built-in workload.")] = 1,
    mode: Annotated[str, typer.Option(help="closed (request, reply) or open (sent on a schedule).")] = "closed",
    rate: Annotated[float, typer.Option(help="Messages per second over all flows, open loop.")] = 2000.0,
    migrate: Annotated[
        float | None, typer.Option(metavar="SECONDS", help="Move the reader to the next CPU this often.")
    ] = None,
    arrivals: Annotated[str, typer.Option(help="poisson or constant, open loop.")] = "poisson",
    remote: Remote = None,
    server: Annotated[
        str | None, typer.Option(help="With a command: its server, started on the captured side first.")
    ] = None,
    server_port: Annotated[int | None, typer.Option(help="The command starts when the server listens here.")] = None,
    pyperf: Annotated[bool, typer.Option("--pyperf", help="The command is a pyperf script: keep its values.")] = False,
    as_json: Json = False,
) -> None:
    """Record one run: kernel events, packets, clocks, counters, host."""
    from rxlab.pipeline import record_run
    from rxlab.record.flowsample import parse_share
    from rxlab.record.functionrecord import parse_functions
    from rxlab.record.pcaprecord import flow_filter
    from rxlab.record.recording import parse_size

    load = {
        "proto": proto, "family": family, "messages": messages, "size": size, "flows": flows, "mode": mode, "rate": rate,
        "arrivals": arrivals, "migrate": migrate, "remote": remote, "duration": duration if mode == "open" else None,
    }  # fmt: skip
    # A client on this host cannot send through an interface of this host: there, live traffic is recorded.
    is_live = attach or bool(command) or (iface is not None and not testbed and not remote)
    with _kept(out, "give the same command again"), _working("recording") as progress:
        run = record_run(
            out,
            iface=iface,
            netns=netns,
            testbed=testbed or False,
            gro=gro,
            settings=_settings(settings),
            allow_system_changes=allow,
            yes_this_nic=yes_this_nic,
            workload=None if is_live else load,
            command=command or None,
            server=server,
            server_port=server_port,
            pyperf=pyperf,
            duration=duration,
            attach=attach,
            events=events,
            filter=flow_filter(bpf, flow),
            flow_sample=parse_share(flow_sample),
            cpus=cpus,
            snaplen=snaplen,
            stamps=stamps,
            max_size=parse_size(max_size),
            idle=idle,
            functions=parse_functions(functions) if functions is not None else (),
            progress=progress,
        )
    if as_json:
        print_json(run.run)
    else:
        from rxlab.show.facts import run_text

        print(run_text(run.path, run.run))
    if run.run["status"] != "complete":
        raise typer.Exit(1)


@app.command(context_settings={"allow_interspersed_args": False})
def compare(
    settings: Annotated[
        list[str], typer.Option("--set", metavar="KEY=VALUE", help="What to compare with the host as it is.")
    ],
    command: Annotated[list[str] | None, typer.Argument(metavar="[-- CMD...]")] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the runs and the report.")] = Path("out/compare"),
    iface: Iface = None,
    testbed: Testbed = None,
    reps: Annotated[int, typer.Option(min=1, help="Repetitions of each configuration.")] = 3,
    proto: Proto = "tcp",
    messages: Messages = 20_000,
    remote: Remote = None,
    idle: Idle = "auto",
    allow: Allow = False,
    yes_this_nic: YesNic = False,
    seed: Annotated[int, typer.Option(help="Seed of the shuffled order.")] = 1,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")] = False,
) -> None:
    """Compare the host as it is with the given settings: apply, capture, restore, next; shuffled; then the report."""
    from rxlab.pipeline import compare as run_compare

    with _kept(out, "choose another --out"):
        report = run_compare(
            out,
            settings=_settings(settings),
            iface=iface,
            testbed=testbed or False,
            reps=reps,
            workload={"proto": proto, "messages": messages, "remote": remote},
            command=command or None,
            idle=idle,
            allow_system_changes=allow,
            yes_this_nic=yes_this_nic,
            seed=seed,
            dry_run=dry_run,
            say=_say,
        )
    if report is not None:
        print(f"report: {report}")


@app.command()
def sweep(
    spec: Annotated[str, typer.Argument(metavar="SPEC.toml", help="A sweep spec, or the name of a shipped one.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the runs and the dataset.")] = Path("out/sweep"),
    iface: Iface = None,
    testbed: Testbed = None,
    resume: Annotated[bool, typer.Option("--resume", help="Record only what is missing.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print plan, duration and size, and stop.")] = False,
    reps: Annotated[int | None, typer.Option(min=1, help="Repetitions, instead of the spec's.")] = None,
    remote: Remote = None,
    scheduler: Annotated[
        str | None, typer.Option(help="Dask scheduler (tcp://... or tls://...): its workers with NIC=1 record.")
    ] = None,
    allow: Allow = False,
    yes_this_nic: YesNic = False,
) -> None:
    """Record every combination of a sweep spec, and lay all runs out as one Zarr dataset."""
    from rxlab.pipeline import run_sweep

    with _kept(out, "give the same command with --resume"):
        store = run_sweep(
            spec,
            out,
            testbed=testbed or False,
            iface=iface,
            reps=reps,
            remote=remote,
            scheduler=scheduler,
            resume=resume,
            allow_system_changes=allow,
            yes_this_nic=yes_this_nic,
            dry_run=dry_run,
            say=_say,
        )
    if store is not None:
        print(f"dataset: {store}")


@app.command()
def analyze(
    run: Annotated[Path | None, typer.Argument(help="Run directory.")] = None,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="netCDF file; RUN/run.nc by default.")] = None,
    perf: Annotated[Path | None, typer.Option(help="perf.data recorded elsewhere with -k CLOCK_MONOTONIC.")] = None,
    pcap: Annotated[Path | None, typer.Option(help="Packet capture of the same time.")] = None,
    iface: Iface = None,
    chunks: Annotated[
        int | None,
        typer.Option(help="Events to hold at a time; by default all, or a million of a recording above 1 GB."),
    ] = None,
    sender_pcap: Annotated[
        Path | None, typer.Option(help="Capture of the host that sent: one-way latencies, as intervals.")
    ] = None,
    clock_error: Annotated[
        int | None, typer.Option(min=0, metavar="NS", help="The two hosts' clocks agree to within NS (PTP).")
    ] = None,
    as_json: Json = False,
) -> None:
    """Join a run's packets and events into the dataset."""
    from rxlab.pipeline import analysis_threshold, analyze_run
    from rxlab.show.text import analysis_text

    hosts: dict[str, Any] = {"sender_pcap": sender_pcap, "clock_error": clock_error}
    with _working("analysing"):
        result = analyze_run(run, out=out, perf=perf, pcap=pcap, iface=iface, chunks=chunks, say=_say, **hosts)
    if as_json:
        print_json(result)
    else:
        print(analysis_text(result))
    below = analysis_threshold(result)
    if below:
        raise RefusedError(below, where=str(run or perf))


@app.command()
def inspect(file: Path, as_json: Json = False) -> None:
    """Tell what a perf.data, pcap or pcapng file holds."""
    from rxlab.read.inspect import inspect_file

    found = inspect_file(file)
    if as_json:
        print_json(found)
    else:
        from rxlab.show.facts import inspection_text

        print(inspection_text(file, found))


@app.command()
def show(
    run: Path,
    packet: Annotated[int | None, typer.Option(help="Frame number, as Wireshark shows it.")] = None,
    slowest: Annotated[int, typer.Option(help="List the N slowest packets and the hop that made each slow.")] = 0,
    functions: Annotated[
        bool, typer.Option("--functions", help="The log of kernel functions by phase; RUN may be such a text file.")
    ] = False,
    moves: Annotated[
        bool, typer.Option("--moves", help="When a reader changed its CPU, and how long RFS took to follow.")
    ] = False,
) -> None:
    """Print the life of one packet, hop by hop."""
    from rxlab.dataset.run import open_run
    from rxlab.show.life import run_packet_life
    from rxlab.show.text import slowest_packets

    if functions:
        from rxlab.pipeline import function_phases
        from rxlab.show.functions import phases_text

        print(phases_text(function_phases(run)))
        return
    if moves:
        from rxlab.show.text import reader_moves_text

        print(reader_moves_text(run))
        return
    if packet is None and not slowest:
        raise UsageError("nothing to show", expected="--packet N, --slowest N, --moves or --functions")
    opened = open_run(run)
    if packet is None:
        print(slowest_packets(opened.tree, slowest))
    else:
        print(run_packet_life(opened, packet))


@app.command()
def verify(run: Path, as_json: Json = False) -> None:
    """Check the join against the workload's own log, byte sums and counters."""
    from rxlab.dataset.run import open_run
    from rxlab.pipeline import verification_threshold
    from rxlab.show.text import verification_text

    with _working("verifying"):
        result = open_run(run).verify()
    print(json.dumps(result, indent=1) if as_json else verification_text(result))
    below = verification_threshold(result)
    if below:
        raise RefusedError(below, where=str(run))


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Run directories, or folders that hold some.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="HTML file to write.")] = Path("report.html"),
    reveal: Annotated[
        bool, typer.Option("--reveal", help="Real addresses and host names instead of pseudonyms.")
    ] = False,
    notebook: Annotated[bool, typer.Option(help="Also the executed notebook, beside the page.")] = True,
) -> None:
    """Write one self-contained HTML page about runs, and the executed notebook of its analysis."""
    from rxlab.show.share import report_runs

    with _working("writing the report"):
        report_runs(runs, out, reveal=reveal, notebook=notebook, say=_say)


@app.command()
def export(
    run: Path,
    to: Annotated[str, typer.Option("--to", help="pyperf, parquet, csv, netcdf, pcapng or perfetto.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="File to write.")],
    reveal: Annotated[
        bool, typer.Option("--reveal", help="As recorded: no pseudonyms for addresses and hosts; pcapng with payload.")
    ] = False,
    hide_tasks: Annotated[bool, typer.Option("--hide-tasks", help="Pseudonyms for task names too.")] = False,
    force: Force = False,
) -> None:
    """Write a run for another tool or to give away: pyperf, table, dataset, Wireshark with comments, ui.perfetto.dev."""
    from rxlab.show.exports import export_run

    print(export_run(run, to, out, reveal=reveal, hide_tasks=hide_tasks, force=force))


@app.command()
def restore() -> None:
    """Put back what an rxlab that died had changed: settings, namespaces, helper processes."""
    from rxlab.host.recovery import restore as restore_host

    done = restore_host()
    for line in done.lines() or ["nothing to restore"]:
        print(line)
    if not done.ok:
        raise typer.Exit(1)


@contextmanager
def _kept(out: Path, go_on: str) -> Iterator[None]:
    """Say after Ctrl-C what is kept of a recording, and how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        from rxlab.record.runfolder import stopped

        raise stopped(out, go_on) from None


@contextmanager
def _working(what: str) -> Iterator[Callable[[float], None]]:
    """Show on a terminal that something goes on; yields a function that takes the seconds done of a known duration."""
    if not sys.stderr.isatty():
        yield lambda seconds: None
        return
    from rich.console import Console

    console = Console(stderr=True)
    with console.status(what) as status:
        yield lambda seconds: status.update(f"{what}: {seconds:.0f} s")


def _settings(pairs: list[str] | None) -> dict[str, str]:
    """Return ``["rps_cpus=0,2"]`` as a dict."""
    settings = {}
    for pair in pairs or []:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise UsageError("setting is not KEY=VALUE", where="--set", found=repr(pair), expected="e.g. rps_cpus=0,2")
        settings[key.strip()] = value.strip()
    return settings


def _say(text: str) -> None:
    print(text, flush=True)


def _usage(error: Any) -> int:
    """Print a usage error as one line, or the help when nothing was asked for; return the exit status."""
    if type(error).__name__ == "NoArgsIsHelpError":
        error.show()
        return int(error.exit_code)
    message = " ".join(error.format_message().split()).rstrip(".")
    context = getattr(error, "ctx", None)
    stop = "" if message.endswith("?") else "."
    hint = f"{stop} Try '{context.command_path} --help'." if context is not None else ""
    print(f"rxlab: {message}{hint}", file=sys.stderr)
    return int(error.exit_code)


def with_testbed_named(words: list[str]) -> list[str]:
    """Give a bare ``--testbed`` its value: Typer knows no option whose value may be left out."""
    end = words.index("--") if "--" in words else len(words)
    named = {at for at in range(end - 1) if words[at + 1] == "veth" or ":" in words[at + 1]}
    bare = {at for at in range(end) if words[at] == "--testbed"} - named
    return ["--testbed=veth" if at in bare else word for at, word in enumerate(words)]


def main() -> None:
    """Run the command line; a user's mistake is one line on stderr, never a traceback."""
    try:
        # Not standalone: Typer would draw boxes around usage errors, and end without a word on Ctrl-C.
        status = app(args=with_testbed_named(sys.argv[1:]), standalone_mode=False)
        if status == _INTERRUPTED:
            raise KeyboardInterrupt
        raise SystemExit(status or 0)
    except _ClickError as error:
        raise SystemExit(_usage(error)) from None
    except RxlabError as error:
        print(f"rxlab: {error.line()}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
    except BrokenPipeError:
        # The reader of our output left (`rxlab show ... | head`): nothing is wrong.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"rxlab: {where}{error.strerror or error}", file=sys.stderr)
        raise SystemExit(1) from None
    except (KeyboardInterrupt, typer.Abort):
        print("rxlab: interrupted", file=sys.stderr)
        raise SystemExit(_INTERRUPTED) from None


if __name__ == "__main__":
    main()
