"""A sweep on a Dask cluster: each lab machine runs a worker with the resource ``NIC=1`` and records whole repetitions.

A repetition is a block of all configurations and arms, and stays on one machine: configurations are then compared on the same
hardware, and machines differ only between repetitions. Dask does the scheduling; a block of a worker that died goes to another
one, and what it had changed on its host is put back by that host's own watchdog. Runs are written into a folder that all
machines see.
"""

from __future__ import annotations

import platform
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rxlab.errors import CaptureError, RxlabError, UsageError
from rxlab.host.idlecheck import idle_task_is_blind
from rxlab.host.journal import apply
from rxlab.host.kinds import HOST_WIDE, KINDS, normal_key
from rxlab.host.settings import parse_settings
from rxlab.record.plan import check_disk
from rxlab.record.ports import open_testbed
from rxlab.record.spec import Spec, check_host
from rxlab.record.specrun import check_resume
from rxlab.record.sweep import (
    Cell,
    Engine,
    complete_run,
    record_cells,
    remember_plan,
    remember_repeated,
    split_configuration,
)
from rxlab.rundir import HOST_JSON, SWEEP_JSON, RunDir, open_rundir

if TYPE_CHECKING:
    from distributed import Client

# What a worker that may record is started with: ``dask worker --resources "NIC=1"``.
RESOURCE = "NIC"
# In the sweep's folder: blocks stop before their next run.
STOP = ".stop"


@dataclass(frozen=True)
class Block:
    """One repetition, as it is sent to a worker.

    Attributes
    ----------
    spec : Spec
    folder : str
        The sweep's folder, by the same path on all machines.
    repetition : int
    testbed, iface, allow_system_changes, yes_this_nic
        As :func:`rxlab.record.specrun.record_spec` takes them.
    holds_host : bool
        See :class:`rxlab.record.sweep.Engine`.
    """

    spec: Spec
    folder: str
    repetition: int
    testbed: bool | str
    iface: str | None
    allow_system_changes: bool
    yes_this_nic: bool
    holds_host: bool

    @property
    def cells(self) -> list[Cell]:
        """The repetition's runs, in their order."""
        return [cell for cell in self.spec.cells() if cell.repetition == self.repetition]


@dataclass(frozen=True)
class Recorded:
    """What a worker answers: its host, how many runs it made, which it threw away, and what was wrong with those it kept."""

    host: str
    runs: int
    repeated: list[tuple[Cell, list[str]]]
    problems: dict[str, list[str]]


def record_block(block: Block) -> Recorded:
    """Record one repetition on this machine; the task of a worker.

    Raises
    ------
    RxlabError
        The folder is not there, this host lacks something, or a run failed. Its host is named.
    """
    host = platform.node()
    folder = Path(block.folder)
    try:
        if not (folder / SWEEP_JSON).exists():
            raise CaptureError(
                "the sweep's folder is not there",
                where=str(folder),
                do="All machines of a cluster need a shared folder, by the same path.",
            )
        check_host(block.spec, testbed=block.testbed, iface=block.iface)
        return _record(block, folder, host)
    except RxlabError as error:
        raise type(error)(
            error.what, where=f"{host}: {error.where or ''}", found=error.found, expected=error.expected, do=error.do
        ) from None


def _record(block: Block, folder: Path, host: str) -> Recorded:
    spec, repeated = block.spec, list[tuple[Cell, list[str]]]()
    for cell in block.cells:
        _drop_foreign(folder / cell.name, host)
    missing = [cell for cell in block.cells if complete_run(folder / cell.name) is None]
    problems: dict[str, list[str]] = {}
    if not missing:
        return Recorded(host, 0, repeated, problems)
    blind = idle_task_is_blind() if spec.idle == "auto" else None
    with ExitStack() as stack:
        journal = stack.enter_context(
            apply(allow_system_changes=block.allow_system_changes, yes_this_nic=block.yes_this_nic)
        )
        bed = stack.enter_context(open_testbed(block.testbed, registry=journal)) if block.testbed else None
        engine = Engine(
            folder,
            bed,
            bed.dst.iface if bed is not None else block.iface,
            bed.dst.netns if bed is not None else None,
            spec.workload,
            journal,
            spec.retries,
            {"idle": spec.idle, "idle_task_is_blind": blind},
            lambda cell, found: repeated.append((cell, list(found))),
            block.holds_host,
        )
        for run in record_cells(engine, missing, warm_up=spec.warm_up, progress=lambda *_: _check_stop(folder)):
            if run.run.get("problems"):
                problems[run.path.name] = list(run.run["problems"])
    return Recorded(host, len(missing), repeated, problems)


def _check_stop(folder: Path) -> None:
    if (folder / STOP).exists():
        raise CaptureError("the sweep was stopped", where=str(folder), do="Go on with --resume.")


def _drop_foreign(path: Path, host: str) -> None:
    """Remove a run of this block that another machine recorded before it was lost: a block is of one machine."""
    run = complete_run(path)
    if run is not None and host_of(run) != host:
        shutil.rmtree(path)


def host_of(run: RunDir) -> str | None:
    """Return the name of the machine a run was recorded on."""
    name = run.json(HOST_JSON).get("hostname")
    return str(name) if name is not None else None


def record_on_cluster(
    spec: Spec,
    out: Path,
    client: Client,
    *,
    testbed: bool | str,
    iface: str | None = None,
    resume: bool = False,
    allow_system_changes: bool = False,
    yes_this_nic: bool = False,
    say: Callable[[str], None] = print,
) -> list[RunDir]:
    """Record all runs of a spec on the workers of a cluster; those that are complete are left as they are.

    Returns
    -------
    list of RunDir
        In the order of the plan.

    Raises
    ------
    UsageError
        No worker has a NIC; or several share a host and the sweep varies a setting of that host, or the host is not this one.
    RxlabError
        A block failed; the others are stopped after their current run.
    """
    check_resume(out, resume)
    # The workers write into this folder, wherever they are.
    check_disk(out, spec.workload, spec.cells())
    shared = shared_hosts(nic_workers(client))
    content = {
        "configurations": spec.configurations,
        "arms": list(spec.arms),
        "seed": spec.seed,
        "order": spec.order,
        "workload": spec.workload.describe(),
        "labels": spec.labels,
    }
    remember_plan(out, content, spec.repetitions)
    with ExitStack() as stack:
        if shared:
            held = held_settings(spec, shared, testbed)
            settings = parse_settings(held) if held else []
            stack.enter_context(apply(settings, allow_system_changes=allow_system_changes, yes_this_nic=yes_this_nic))
        blocks = [
            Block(spec, str(out.resolve()), repetition, testbed, iface, allow_system_changes, yes_this_nic, not shared)
            for repetition in range(spec.repetitions)
        ]
        _gather(client, blocks, out, say)
    return [open_rundir(out / cell.name) for cell in spec.cells()]


@contextmanager
def connect(scheduler: str, *, seconds: float = 10.0) -> Iterator[Client]:
    """Connect to a cluster whose workers have the same rxlab as this process.

    Encryption is Dask's (``distributed.comm.tls`` in its configuration); a ``tls://`` address wants it.
    """
    try:
        from distributed import Client
    except ImportError:
        raise UsageError("--scheduler needs Dask", do="pip install 'rxlab[cluster]'") from None
    try:
        client = Client(scheduler, timeout=seconds)
    except (OSError, ValueError, TypeError) as error:
        raise UsageError(
            "no Dask scheduler answers",
            where=scheduler,
            found=str(error),
            do="Start one: dask scheduler --host 127.0.0.1",
        ) from None
    with client:
        ours = version("rxlab")
        for address, theirs in client.run(version, "rxlab").items():
            if theirs != ours:
                raise UsageError("a worker has another rxlab", where=address, found=str(theirs), expected=ours)
        yield client


def nic_workers(client: Client) -> dict[str, str]:
    """Return the workers that may record, and the name of each one's machine."""
    workers = client.scheduler_info(n_workers=-1)["workers"]
    with_nic = [address for address, facts in workers.items() if facts.get("resources", {}).get(RESOURCE, 0) >= 1]
    if not with_nic:
        raise UsageError(
            "no worker may record",
            where=str(client.scheduler.address if client.scheduler else ""),
            found=f"{len(workers)} workers, none with the resource {RESOURCE}",
            do=f'Start one per machine: dask worker SCHEDULER --nthreads 1 --resources "{RESOURCE}=1"',
        )
    return client.run(platform.node, workers=with_nic)


def shared_hosts(workers: Mapping[str, str]) -> list[str]:
    """Return the machines on which several workers record."""
    return sorted(host for host, n in Counter(workers.values()).items() if n > 1)


def held_settings(spec: Spec, shared: Sequence[str], testbed: bool | str) -> dict[str, Any]:
    """Return the settings of a whole host that are held during a sweep whose workers share this host.

    Raises
    ------
    UsageError
        They vary; the shared host is another one; or the workers would share an interface.
    """
    if testbed is not True and testbed != "veth":
        raise UsageError(
            "several workers of one machine cannot share its interface",
            where=", ".join(shared),
            do=f'Start one worker with "{RESOURCE}=1" per machine, or use --testbed.',
        )
    found: list[dict[str, Any]] = []
    for configuration in spec.configurations:
        settings = split_configuration(configuration)[0]
        found.append({key: value for key, value in settings.items() if _is_host_wide(key)})
    if any(one != found[0] for one in found):
        raise UsageError(
            "several workers share a host, and this sweep varies a setting of that host",
            where=", ".join(shared),
            found=", ".join(sorted({key for one in found for key in one})),
            do="Fix it for the sweep, or start one worker per machine.",
        )
    if found[0] and shared != [platform.node()]:
        raise UsageError(
            "several workers share a host whose settings cannot be held from here",
            where=", ".join(shared),
            found=", ".join(sorted(found[0])),
            do="Start the sweep on that host, or one worker per machine.",
        )
    return found[0]


def _is_host_wide(key: str) -> bool:
    kind = KINDS.get(normal_key(key))
    return kind is not None and kind.scope in HOST_WIDE


def _gather(client: Client, blocks: Sequence[Block], folder: Path, say: Callable[[str], None]) -> None:
    """Submit all blocks and wait for them, telling of each."""
    from distributed import as_completed, wait

    futures = {
        client.submit(record_block, block, resources={RESOURCE: 1}, pure=False): block.repetition for block in blocks
    }
    try:
        for number, future in enumerate(as_completed(list(futures)), start=1):
            recorded = future.result()
            say(f"[{number}/{len(blocks)}] repetition {futures[future] + 1}: {recorded.runs} runs on {recorded.host}")
            for name, problems in recorded.problems.items():
                say(f"  {name}: {'; '.join(problems)}")
            for cell, problems in recorded.repeated:
                remember_repeated(folder, cell, problems)
    except BaseException:
        # What a worker records now it records to its end; a second Ctrl-C does not wait for that.
        (folder / STOP).touch()
        wait(list(futures))
        raise
    finally:
        (folder / STOP).unlink(missing_ok=True)
