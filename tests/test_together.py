"""Two parts of a join at once: the same results on any number of threads, and none where they cost what they save."""

from __future__ import annotations

import os
import threading
from typing import Any

import pytest

from rxlab.follow import together
from rxlab.follow.join import join
from tests.simulate import simulate
from tests.slab_builder import differences


def names_of(jobs: int) -> list[str]:
    """Return the threads on which some jobs ran."""
    begun = [together.beside(lambda: threading.current_thread().name) for _ in range(jobs)]
    return [one() for one in begun]


def test_a_second_thread_is_used_where_there_is_a_cpu_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    running, done = threading.Event(), threading.Event()

    def job() -> list[str]:
        running.set()
        assert done.wait(10)
        return [threading.current_thread().name, *names_of(2)]

    with together.side_threads(2, together.WORTHWHILE):
        first = together.beside(job)
        assert running.wait(10)
        # The one other thread is busy: what nobody began is done by who asks for it.
        assert names_of(1) == [threading.current_thread().name]
        done.set()
        # What runs there has nothing done beside itself.
        assert first() == ["rxlab-join_0"] * 3
    assert names_of(1) == [threading.current_thread().name]


@pytest.mark.parametrize(("threads", "cpus", "n_events"), [(1, 2, 10**6), (2, 1, 10**6), (2, 2, 1_000)])
def test_no_thread_is_started_where_it_would_cost(
    threads: int, cpus: int, n_events: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cpus)))
    before = threading.active_count()
    with together.side_threads(threads, n_events):
        assert names_of(3) == [threading.current_thread().name] * 3
        assert threading.active_count() == before


def test_an_error_beside_the_caller_reaches_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    with together.side_threads(2, together.WORTHWHILE), pytest.raises(ZeroDivisionError):
        together.beside(lambda: 1 // 0)()


@pytest.mark.parametrize(
    "recipe", [{"proto": "tcp", "rps": True}, {"proto": "udp", "polling": True}, {"proto": "udp", "lost_share": 0.1}]
)
def test_threads_change_nothing(recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    monkeypatch.setattr(together, "WORTHWHILE", 0)
    world = simulate(n=300, **recipe)
    told = (world.events, world.packets, world.clock, world.machine)
    lost = {"lost": world.lost, "lost_records": world.lost_records}
    assert differences(join(*told, threads=1, **lost), join(*told, threads=2, **lost)) == {}
