"""The plan of a sweep, and its engine with a capture that only writes run.json."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from rxlab.errors import CaptureError, HostSettingError, UsageError
from rxlab.host.settings import Setting
from rxlab.record import sweep as sweeping
from rxlab.record.sweep import Cell, plan_sweep, split_configuration, sweep, with_fields
from rxlab.record.workload import Command, Workload
from rxlab.rundir import RunDir, open_rundir, read_json, write_json

TWO = [{"flows": 1}, {"flows": 4}]


class Journal:
    """Stands in for the transaction: notes what is in force while a run is recorded."""

    def __init__(self) -> None:
        self.in_force: list[Setting] | None = None

    @contextmanager
    def change(self, settings: list[Setting]) -> Iterator[None]:
        assert self.in_force is None, "the last cell's settings were not restored"
        self.in_force = settings
        try:
            yield
        finally:
            self.in_force = None


class Recorder:
    """Stands in for capture: writes run.json, and notes the calls."""

    def __init__(self, journal: Journal) -> None:
        self.journal = journal
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.statuses: dict[str, str] = {}
        self.broken: str | None = None

    def __call__(self, out: Path, **options: Any) -> RunDir:
        assert self.journal.in_force is not None, "recorded outside the change"
        self.calls.append((out.name, options))
        out.mkdir(parents=True)
        if out.name == self.broken:
            write_json(out / "run.json", {"status": "running"})
            raise CaptureError("the lights went out")
        write_json(out / "run.json", {"status": self.statuses.get(out.name, "complete")})
        return open_rundir(out)


@pytest.fixture
def journal() -> Journal:
    return Journal()


@pytest.fixture
def recorder(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> Recorder:
    made = Recorder(journal)
    monkeypatch.setattr(sweeping, "capture", made)
    return made


def run_all(out: Path, journal: Journal, configurations: Any = TWO, **options: Any) -> list[str]:
    arguments = {"iface": "lo", "workload": Workload(), "reps": 2, "arms": ("untraced", "std"), **options}
    return [run.path.name for run in sweep(out, configurations, transaction=journal, **arguments)]  # type: ignore[arg-type]


def test_each_repetition_holds_every_configuration_and_arm_once() -> None:
    cells = plan_sweep(TWO, reps=5, arms=("untraced", "pcap", "std"), seed=3)
    assert len(cells) == 2 * 5 * 3
    for repetition in range(5):
        block = cells[repetition * 6 : (repetition + 1) * 6]
        assert {cell.repetition for cell in block} == {repetition}
        assert Counter((cell.index, cell.arm) for cell in block) == Counter(
            (index, arm) for index in (0, 1) for arm in ("untraced", "pcap", "std")
        )


def test_the_order_follows_the_seed() -> None:
    def order(seed: int) -> list[str]:
        return [cell.name for cell in plan_sweep(TWO, reps=6, arms=("untraced", "std"), seed=seed)]

    assert order(1) == order(1)
    assert order(1) != order(2)
    assert sorted(order(1)) == sorted(order(2))
    assert len({tuple(order(1)[at : at + 4]) for at in range(0, 24, 4)}) > 1


def test_more_repetitions_keep_the_order_of_those_before() -> None:
    short = plan_sweep(TWO, reps=2, arms=("std",), seed=9)
    assert plan_sweep(TWO, reps=4, arms=("std",), seed=9)[: len(short)] == short


@pytest.mark.parametrize("wrong", [{"reps": 0}, {"arms": ()}, {"arms": ("loud",)}, {"configurations": []}])
def test_an_empty_or_unknown_plan_is_a_usage_error(wrong: dict[str, Any]) -> None:
    arguments: dict[str, Any] = {"configurations": TWO, "reps": 1, "arms": ("std",), **wrong}
    with pytest.raises(UsageError):
        plan_sweep(arguments.pop("configurations"), **arguments)


def test_a_misspelt_setting_is_refused_before_the_first_run() -> None:
    with pytest.raises(HostSettingError, match="rps_cpu"):
        plan_sweep([{"rps_cpu": "1"}], reps=1, arms=("std",))


def test_a_configuration_holds_settings_workload_and_capture_options() -> None:
    configuration = {"rps_cpus": "0,1", "app_cpu": 1, "load": "5000", "flows": 4, "idle": "off"}
    assert split_configuration(configuration) == (
        {"rps_cpus": "0,1"}, {"server_cpu": 1, "rate": "5000", "flows": 4}, {"idle": "off"},
    )  # fmt: skip


def test_text_becomes_the_type_of_the_field() -> None:
    load = with_fields(Workload(mode="open"), {"rate": "2500", "flows": "4", "server_cpu": "1", "proto": "udp"})
    assert isinstance(load, Workload)
    assert (load.rate, load.flows, load.server_cpu, load.proto) == (2500.0, 4, 1, "udp")
    assert with_fields(load, {}) is load
    with pytest.raises(UsageError, match="flows cannot be 'many'"):
        with_fields(load, {"flows": "many"})
    with pytest.raises(UsageError, match="built-in workload"):
        with_fields(Command(["true"]), {"flows": 2})


def test_each_cell_is_recorded_with_its_settings_in_force(tmp_path: Path, journal: Journal, recorder: Recorder) -> None:
    seen: list[tuple[int, int, str]] = []

    def progress(number: int, total: int, cell: Cell) -> None:
        assert journal.in_force is None
        seen.append((number, total, cell.name))

    names = run_all(tmp_path, journal, progress=progress, snaplen=128)
    assert names == [name for name, _ in recorder.calls] == [name for _, _, name in seen]
    assert [number for number, _, _ in seen] == list(range(8))
    assert {total for _, total, _ in seen} == {8}
    for name, options in recorder.calls:
        index, arm = int(name[1:3]), name.rsplit("-", 1)[1]
        assert options["workload"].flows == TWO[index]["flows"]
        assert (options["events"], options["configuration"], options["snaplen"]) == (arm, TWO[index], 128)
        assert options["sweep"] == {"cell": name, "repetition": int(name[5:7])}


def test_a_capture_option_of_a_configuration_wins(tmp_path: Path, journal: Journal, recorder: Recorder) -> None:
    run_all(tmp_path, journal, [{"idle": "off"}, {"idle": "spin"}], idle="auto", reps=1, arms=("std",))
    assert {options["idle"] for _, options in recorder.calls} == {"off", "spin"}


def test_host_settings_are_parsed_for_the_interface(tmp_path: Path, journal: Journal, recorder: Recorder) -> None:
    wanted: list[tuple[str, str | None]] = []
    inner = journal.change

    @contextmanager
    def change(settings: list[Setting]) -> Iterator[None]:
        wanted.extend((setting.label, setting.wanted) for setting in settings)
        with inner(settings):
            yield

    journal.change = change  # type: ignore[method-assign]
    run_all(tmp_path, journal, [{"rps_cpus": "0"}], reps=1, arms=("std",))
    assert [value for label, value in wanted] == ["0"]
    assert "rps_cpus" in wanted[0][0]
    assert "lo" in wanted[0][0]


def test_a_sweep_that_was_cut_short_goes_on_where_it_stopped(
    tmp_path: Path, journal: Journal, recorder: Recorder
) -> None:
    plan = [cell.name for cell in plan_sweep(TWO, reps=2, arms=("untraced", "std"))]
    recorder.broken = plan[3]
    with pytest.raises(CaptureError, match="lights"):
        run_all(tmp_path, journal)
    assert [name for name, _ in recorder.calls] == plan[:4]
    recorder.calls.clear()
    recorder.broken = None
    assert run_all(tmp_path, journal) == plan, "finished runs are handed out again, in the plan's order"
    assert [name for name, _ in recorder.calls] == plan[3:], "the one that broke is recorded anew, the others are not"


def test_partial_runs_are_recorded_anew(tmp_path: Path, journal: Journal, recorder: Recorder) -> None:
    recorder.statuses["c00-r00-std"] = "partial"
    run_all(tmp_path, journal)
    recorder.calls.clear()
    recorder.statuses.clear()
    run_all(tmp_path, journal)
    assert [name for name, _ in recorder.calls] == ["c00-r00-std"]


def test_another_sweep_in_the_same_folder_is_refused(tmp_path: Path, journal: Journal, recorder: Recorder) -> None:
    run_all(tmp_path, journal)
    changes: list[Mapping[str, Any]] = [{"seed": 2}, {"arms": ("std",)}, {"configurations": [{"flows": 2}]}]
    for change in changes:
        with pytest.raises(UsageError, match="another sweep"):
            run_all(tmp_path, journal, **change)
    assert len(run_all(tmp_path, journal, reps=3)) == 12, "more repetitions are the same sweep, continued"


def test_blocked_order_finishes_one_configuration_before_the_next() -> None:
    blocked = plan_sweep(TWO, reps=3, arms=("untraced", "std"), seed=4, order="blocked")
    assert [cell.index for cell in blocked] == [0] * 6 + [1] * 6
    assert sorted(cell.name for cell in blocked) == sorted(
        cell.name for cell in plan_sweep(TWO, reps=3, arms=("untraced", "std"), seed=4)
    )
    with pytest.raises(UsageError, match="shuffled, blocked"):
        plan_sweep(TWO, reps=1, arms=("std",), order="sorted")


def test_labels_go_with_their_configuration_into_the_run(tmp_path: Path, journal: Journal, recorder: Recorder) -> None:
    labels = [{"load": "light"}, {"load": "heavy"}]
    run_all(tmp_path, journal, labels=labels, reps=1, arms=("std",))
    assert {options["configuration"]["flows"]: options["sweep"]["labels"] for _, options in recorder.calls} == {
        1: {"load": "light"}, 4: {"load": "heavy"},
    }  # fmt: skip


def test_degraded_runs_are_recorded_again_a_bounded_number_of_times(
    tmp_path: Path, journal: Journal, recorder: Recorder
) -> None:
    recorder.statuses["c00-r00-std"] = "partial"
    names = run_all(tmp_path, journal, retries=2, reps=1, arms=("std",))
    assert Counter(name for name, _ in recorder.calls) == {"c00-r00-std": 3, "c01-r00-std": 1}
    assert sorted(names) == ["c00-r00-std", "c01-r00-std"], "each cell is handed out once"
    assert open_rundir(tmp_path / "c00-r00-std").run["status"] == "partial", "the last try is kept as it is"
    repeated = read_json(tmp_path / "sweep.json")["repeated"]
    assert [entry["cell"] for entry in repeated] == ["c00-r00-std"] * 2
    assert run_all(tmp_path / "other", journal, retries=2, reps=1, arms=("untraced",))
    assert read_json(tmp_path / "other" / "sweep.json")["repeated"] == []


def test_a_degraded_run_that_gets_well_is_the_one_kept(
    tmp_path: Path, journal: Journal, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries: list[str] = []

    def heals(out: Path, **options: Any) -> RunDir:
        recorder.statuses[out.name] = "complete" if out.name in tries else "partial"
        tries.append(out.name)
        return recorder(out, **options)

    monkeypatch.setattr(sweeping, "capture", heals)
    run_all(tmp_path, journal, retries=5, reps=1, arms=("std",))
    assert Counter(tries) == {"c00-r00-std": 2, "c01-r00-std": 2}
    assert {open_rundir(path.parent).run["status"] for path in tmp_path.glob("c*/run.json")} == {"complete"}


def test_warm_up_runs_come_first_and_leave_nothing(tmp_path: Path, journal: Journal, recorder: Recorder) -> None:
    run_all(tmp_path, journal, warm_up=2, reps=1, arms=("std",))
    assert [name for name, _ in recorder.calls[:2]] == [sweeping.WARM_UP] * 2
    assert {options["events"] for _, options in recorder.calls[:2]} == {"untraced"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c00-r00-std", "c01-r00-std", "sweep.json"]
    recorder.calls.clear()
    run_all(tmp_path, journal, warm_up=2, reps=1, arms=("std",))
    assert recorder.calls == [], "nothing is missing, so nothing needs warming up"


def test_intents_become_the_cpu_of_each_configuration(
    tmp_path: Path, journal: Journal, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_force = []
    plain = recorder.__call__

    def look(out: Path, **options: Any) -> RunDir:
        in_force.append((options["workload"].server_cpu, [setting.wanted for setting in journal.in_force or []]))
        return plain(out, **options)

    monkeypatch.setattr(sweeping, "capture", look)
    both = [{"rps_cpus": "same-core", "app_cpu": cpu} for cpu in sorted(os.sched_getaffinity(0))[:2]]
    run_all(tmp_path, journal, both, reps=1, arms=("std",))
    assert in_force
    assert all(wanted == [str(cpu)] for cpu, wanted in in_force)


def test_nothing_is_recorded_when_one_configuration_cannot_be_set(
    tmp_path: Path, journal: Journal, recorder: Recorder
) -> None:
    with pytest.raises(HostSettingError, match="online"):
        run_all(tmp_path, journal, [{"rps_cpus": "off"}, {"rps_cpus": "4000"}])
    assert recorder.calls == []


def test_another_workload_is_another_sweep(tmp_path: Path, journal: Journal, recorder: Recorder) -> None:
    run_all(tmp_path, journal)
    with pytest.raises(UsageError, match="another sweep"):
        run_all(tmp_path, journal, workload=Workload(messages=7))


def test_a_sweep_refused_at_its_first_run_leaves_nothing(
    tmp_path: Path, journal: Journal, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(out: Path, **options: Any) -> RunDir:
        raise CaptureError("the lights are out")

    monkeypatch.setattr(sweeping, "capture", refuse)
    with pytest.raises(CaptureError, match="lights are out"):
        run_all(tmp_path / "new" / "sweep", journal)
    assert list(tmp_path.iterdir()) == []
    # Where a run is there the plan stays, so that the sweep can be taken up again.
    monkeypatch.setattr(sweeping, "capture", recorder)
    run_all(tmp_path / "sweep", journal, reps=1)
    monkeypatch.setattr(sweeping, "capture", refuse)
    with pytest.raises(CaptureError, match="lights are out"):
        run_all(tmp_path / "sweep", journal, reps=2)
    assert (tmp_path / "sweep" / "sweep.json").exists()
