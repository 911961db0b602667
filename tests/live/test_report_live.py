"""The report in a real browser: it requests nothing, complains of nothing, shows every figure, and its tables sort.

Chromium is driven over its DevTools pipe (two file descriptors, no port, no package). Screenshots stay in out/browser/.
"""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from report_builder import make_runs

from rxlab.show.explorer import LEVELS, Explorer
from rxlab.show.report import write_report

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update",
    "--disable-sync", "--hide-scrollbars", "--window-size=1200,900", "--remote-debugging-pipe",
)  # fmt: skip
PATIENCE = 60.0

# Share of each figure's pixels that are not white: an empty or broken figure has none.
INK = """(async () => {
  const out = [];
  for (const image of document.querySelectorAll("figure img")) {
    await image.decode();
    const canvas = document.createElement("canvas");
    canvas.width = 400; canvas.height = Math.max(1, Math.round(400 * image.naturalHeight / image.naturalWidth));
    const context = canvas.getContext("2d");
    context.fillStyle = "white"; context.fillRect(0, 0, canvas.width, canvas.height);
    context.drawImage(image, 0, 0, canvas.width, canvas.height);
    const pixels = context.getImageData(0, 0, canvas.width, canvas.height).data;
    let ink = 0;
    for (let i = 0; i < pixels.length; i += 4) ink += Math.min(pixels[i], pixels[i + 1], pixels[i + 2]) < 200;
    out.push([image.alt, image.getBoundingClientRect().width, ink / (pixels.length / 4)]);
  }
  return out;
})()"""

# Sorts every column of every table both ways and tells which ones came out of order.
SORT = """(() => {
  const wrong = [];
  let sorted = 0;
  for (const table of document.querySelectorAll("table.sortable")) for (const head of table.tHead.rows[0].cells) for (const up of [true, false]) {
    head.click();
    const cells = [...table.tBodies[0].rows].map(row => row.cells[head.cellIndex]);
    const keys = cells.map(cell => cell.dataset.v === undefined ? cell.textContent.trim() : Number(cell.dataset.v)).filter(key => key === key);
    const inOrder = keys.every((key, i) => i === 0 || (typeof key === "number" ? (up ? keys[i - 1] <= key : keys[i - 1] >= key) : (keys[i - 1].localeCompare(key) * (up ? 1 : -1) <= 0)));
    if (!inOrder || head.getAttribute("aria-sort") !== (up ? "ascending" : "descending")) wrong.push(head.textContent);
    sorted += 1;
  }
  return [sorted, wrong];
})()"""


class Browser:
    """A headless Chromium with one page."""

    def __init__(self, profile: Path) -> None:
        to_child, write = os.pipe()
        read, from_child = os.pipe()

        def place() -> None:  # DevTools reads descriptor 3 and writes 4; first out of the way of each other
            low, high = os.dup(to_child), os.dup(from_child)
            low, high = os.dup2(low, 30), os.dup2(high, 31)
            os.dup2(low, 3, inheritable=True)
            os.dup2(high, 4, inheritable=True)

        command = [str(shutil.which("chromium")), *FLAGS, f"--user-data-dir={profile}", "about:blank"]
        self.process = subprocess.Popen(
            command, preexec_fn=place, close_fds=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )  # noqa: PLW1509
        os.close(to_child)
        os.close(from_child)
        self._read, self._write, self._buffer, self._number = read, write, b"", 0
        self.events: list[dict[str, Any]] = []
        self.session: str | None = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Call one DevTools method and return its result; events met on the way are kept."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + PATIENCE
        while True:
            answer = self._next(deadline)
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]
            self.events.append(answer)

    def wait_for(self, event: str) -> None:
        """Wait until an event has come."""
        deadline = time.monotonic() + PATIENCE
        while not any(seen.get("method") == event for seen in self.events):
            self.events.append(self._next(deadline))

    def evaluate(self, script: str) -> Any:
        result = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def screenshot(self, path: Path) -> None:
        content = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)["data"]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(base64.b64decode(content))

    def _next(self, deadline: float) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._read], [], [], max(deadline - time.monotonic(), 0))
            assert ready, "the browser did not answer"
            chunk = os.read(self._read, 1 << 20)
            assert chunk, f"the browser ended with status {self.process.poll()}"
            self._buffer += chunk
        line, self._buffer = self._buffer.split(b"\0", 1)
        return json.loads(line)

    def close(self) -> None:
        self.session = None
        try:
            self.call("Browser.close")
            self.process.wait(10)
        except (AssertionError, OSError, subprocess.TimeoutExpired):
            self.process.kill()
            self.process.wait()
        os.close(self._read)
        os.close(self._write)


@pytest.fixture
def browser(tmp_path):
    if shutil.which("chromium") is None:
        reason = "chromium is not installed"
        pytest.fail(reason) if os.environ.get("RXLAB_REQUIRE_LIVE") == "1" else pytest.skip(reason)
    opened = Browser(tmp_path / "profile")
    yield opened
    opened.close()


def open_page(browser: Browser, page: Path) -> None:
    """Go to a page, listening to what it requests and complains of."""
    for domain in ("Network", "Runtime", "Log", "Page"):
        browser.call(f"{domain}.enable")
    browser.call("Page.navigate", url=page.as_uri())
    browser.wait_for("Page.loadEventFired")


def assert_quiet(browser: Browser, page: Path) -> None:
    """Check that the page asked for nothing but itself and complained of nothing."""
    requested = [
        event["params"]["request"]["url"]
        for event in browser.events
        if event.get("method") == "Network.requestWillBeSent"
    ]
    assert page.as_uri() in requested
    assert [url for url in requested if not url.startswith("data:") and url != page.as_uri()] == []
    complaints = [
        event
        for event in browser.events
        if event.get("method") in ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")
    ]
    assert complaints == []
    assert browser.evaluate("document.documentElement.scrollWidth <= innerWidth"), "the page scrolls sideways"


def sweep_runs() -> list[Any]:
    """Return the runs of a sweep over two settings."""
    runs = []
    for gro in ("off", "on"):
        for run in make_runs(ratio=1.3 if gro == "off" else 0.9, reps=3, n=300, traced=gro == "off"):
            run.run["configuration"]["gro"] = gro
            runs.append(run)
    return runs


@pytest.mark.parametrize("kind", ["comparison", "sweep"])
def test_report_in_a_browser(browser, tmp_path, repo, kind):
    runs = make_runs() if kind == "comparison" else sweep_runs()
    page = write_report(runs, tmp_path / "report.html", command="rxlab demo")
    open_page(browser, page)
    figures = browser.evaluate(INK)
    sorted_columns, wrong = browser.evaluate(SORT)
    browser.screenshot(repo / "out" / "browser" / f"{kind}.png")
    browser.call("Emulation.setEmulatedMedia", media="print")
    browser.screenshot(repo / "out" / "browser" / f"{kind}-print.png")

    assert len(figures) >= 10
    for name, width, ink in figures:
        assert width > 300, name
        assert ink > 0.005, f"figure {name!r} is empty"
    assert sorted_columns >= 40
    assert wrong == []
    assert_quiet(browser, page)
    questions = [name for name, *_ in figures]
    assert any(name.startswith("How do two settings go together") for name in questions) == (kind == "sweep")
    assert ("What does each setting do?" in questions) == (kind == "sweep")


def test_a_click_shows_the_life_of_a_packet(browser, tmp_path, repo):
    trees = [run.tree for run in make_runs() if run.is_traced]
    made = Explorer({"rps_cpus=0": trees[:1], "rps_cpus=2": trees[1:]})
    page = made.save(tmp_path / "explorer.html")
    open_page(browser, page)
    first, second = made.content["configurations"]
    slowest = max(range(len(first["packets"])), key=lambda k: first["packets"][k]["total"])
    browser.evaluate(f"""document.querySelector('circle[data-k="{slowest}"]').dispatchEvent(new MouseEvent("click"))""")
    life = browser.evaluate("[$('life-title').textContent, $('life').textContent]")
    packet = first["packets"][slowest]
    assert life[0].startswith(f"Frame {packet['frame']}: {packet['total'] / 1e3:.1f} µs")
    assert all(stage in life[1] for stage, *_ in packet["steps"])
    assert "ttwu_do_activate" in life[1]
    browser.evaluate("$('faster').click()")
    assert browser.evaluate("$('life-title').textContent") != life[0]
    # The second configuration at p99: its own name, its own packets, its own sum.
    level = LEVELS.index(0.99)
    browser.evaluate(
        f"slider.value = 1; slider.dispatchEvent(new Event('input')); level.value = {level}; level.dispatchEvent(new Event('input'))"
    )
    named, title, points = browser.evaluate(
        "[$('name').textContent, $('bar-title').textContent, document.querySelectorAll('circle').length]"
    )
    assert named == "rps_cpus=2"
    assert title == f"Where the time of the p99 packet goes: {sum(second['parts'][level]) / 1e3:.1f} µs"
    assert points == len(second["packets"])
    assert_quiet(browser, page)
    browser.screenshot(repo / "out" / "browser" / "explorer.png")
