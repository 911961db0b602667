"""What every test may use: the repository, the corpus, and the rule for live tests.

A live test needs root, perf, tcpdump, network namespaces and tracepoints. Where one of them is missing it is skipped with
the reason; under ``RXLAB_REQUIRE_LIVE=1`` (CI) it fails with the reason instead, so that nothing goes missing silently.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from functools import cache
from pathlib import Path

import pytest
from hypothesis import settings

REPO = Path(__file__).resolve().parent.parent

# Tools of the system's administrator: Debian leaves these folders out of an ordinary user's PATH.
os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("JUPYTER_PLATFORM_DIRS", "1")

# A shared or traced machine makes any single example slow; examples are the same in each run so that a red CI can be repeated.
settings.register_profile("rxlab", deadline=None, derandomize=True)
settings.load_profile("rxlab")


@cache
def live_obstacle() -> str | None:
    """Return why live tests cannot run on this machine, or None when they can."""
    if os.geteuid() != 0:
        return "not root"
    missing = [tool for tool in ("perf", "tcpdump", "ip") if shutil.which(tool) is None]
    if missing:
        return f"not installed: {', '.join(missing)}"
    counted = ["perf", "stat", "--all-cpus", "--event", "sched:sched_switch", "--", "true"]
    perf = subprocess.run(counted, capture_output=True, text=True, check=False)
    if perf.returncode != 0:
        return f"perf cannot count sched:sched_switch: {' '.join(perf.stderr.split())[:200]}"
    # `unshare` leaves nothing behind, which `ip netns add` would on a crash.
    namespace = subprocess.run(["unshare", "--net", "true"], capture_output=True, text=True, check=False)
    if namespace.returncode != 0:
        return f"no network namespaces: {namespace.stderr.strip()}"
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark everything in tests/live as live, so that no file there can forget it."""
    for item in items:
        if REPO / "tests" / "live" in item.path.parents:
            item.add_marker(pytest.mark.live)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a live test that cannot run; fail it where live tests are required."""
    if item.get_closest_marker("live") is None:
        return
    obstacle = live_obstacle()
    if obstacle is None:
        return
    if os.environ.get("RXLAB_REQUIRE_LIVE") == "1":
        pytest.fail(f"live test required (RXLAB_REQUIRE_LIVE=1) but cannot run: {obstacle}", pytrace=False)
    pytest.skip(f"live test: {obstacle}")


@pytest.fixture(scope="session")
def repo() -> Path:
    """Return the top folder of the repository."""
    return REPO


@pytest.fixture(scope="session")
def corpus() -> Path:
    """Return the folder of recordings made by others: ``RXLAB_CORPUS``, else ``../shared/corpus``.

    A corpus that was asked for by the variable and is not there is a failure; without the variable it is a skip.
    """
    asked = os.environ.get("RXLAB_CORPUS")
    folder = Path(asked) if asked else REPO.parent / "shared" / "corpus"
    if (folder / "manifest.json").is_file():
        return folder
    if asked:
        pytest.fail(f"RXLAB_CORPUS={asked} has no manifest.json", pytrace=False)
    pytest.skip(f"no corpus at {folder}; set RXLAB_CORPUS")
