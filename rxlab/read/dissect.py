"""pyshark in a worker process: any field tshark knows for chosen packets, and HTTP requests with their responses.

pyshark drives tshark with asyncio and its child watcher, which works in the main thread of a process without a running
event loop and nowhere else reliably: in a notebook cell it raises, in a thread it fails now and then. So it runs in the
main thread of a process of its own (``python -m rxlab.read.dissect``), which speaks JSON lines and takes its tshark
with it when it ends. For columns of whole captures use `rxlab.read_pcap`, a million times faster.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from typing import Any

from rxlab.errors import FormatError, RxlabError, UsageError

DEFAULT_FIELDS = ("frame.protocols", "ip.src", "ip.dst", "tcp.stream", "http.request.method", "http.request.uri")
_HTTP_FIELDS = (
    "tcp.stream",
    "http.request.method",
    "http.request.uri",
    "http.host",
    "http.response.code",
    "http.request_in",
)
# Linux takes no single argument above 128 KiB; a longer frame list becomes its hull and is filtered by the worker.
_MAX_FILTER = 60_000
# Seconds a worker has beyond its timeout: to start Python and to end tshark.
_GRACE = 15.0
# What tshark says of a capture that ends inside a packet, after it has printed all whole ones.
_CUT = "cut short in the middle of a packet"


def dissect(
    path: str | os.PathLike[str],
    *,
    frames: Iterable[int] | None = None,
    display_filter: str | None = None,
    fields: Sequence[str] = DEFAULT_FIELDS,
    timeout: float = 120.0,
) -> list[dict[str, Any]]:
    """Return tshark's fields of chosen packets.

    Parameters
    ----------
    path : path
        A capture that tshark reads.
    frames : iterable of int, optional
        1-based frame numbers (the `frame` column of `rxlab.read_pcap`); all by default.
    display_filter : str, optional
        Wireshark display filter, combined with `frames` by "and".
    fields : sequence of str
        Wireshark field names ("http.request.uri"), or protocol names ("tls") for "is it there".
    timeout : float, seconds
        After it, the worker and its tshark are killed.

    Returns
    -------
    list of dict, in file order
        "frame" int, "time" int ns of CLOCK_REALTIME, and each field by its name: text as tshark prints it, bool for a
        flag or a protocol, a list where the packet has several, None where it has none. A capture cut inside a packet
        gives the packets before.

    Raises
    ------
    UsageError
        tshark does not understand the filter.
    RxlabError
        tshark or pyshark is missing, the time is over, or tshark cannot read the capture.
    """
    where = os.fspath(path)
    if not os.path.isfile(where):
        raise FormatError("cannot read capture", where=where, found="no such file")
    bad = [
        field for field in fields if not field or not field.replace(".", "").replace("_", "").replace("-", "").isalnum()
    ]
    if bad:
        raise UsageError("not a field name", found=repr(bad[0]), expected="names as in Wireshark's field reference")
    wanted = None if frames is None else sorted({int(frame) for frame in frames})
    if wanted == []:
        return []
    request = {
        "path": os.path.abspath(where),
        "frames": wanted,
        "filter": _display_filter(wanted, display_filter),
        "fields": list(fields),
        "timeout": timeout,
    }
    return list(_run_worker(request, where))


def http_requests(path: str | os.PathLike[str], *, timeout: float = 120.0) -> list[dict[str, Any]]:
    """Return the HTTP/1 requests of a capture, each with its response.

    Returns
    -------
    list of dict, in file order
        "method", "uri", "host" (text), "stream" (tshark's TCP stream number), "frame" and "time" of the packet that
        completed the request; "status" (int), "response_frame", "response_time" and "latency_ns" (both packets'
        capture times) of the response, None without one. Times are int ns of CLOCK_REALTIME.
    """
    requests: list[dict[str, Any]] = []
    by_frame: dict[int, dict[str, Any]] = {}
    waiting: defaultdict[str, deque[dict[str, Any]]] = defaultdict(deque)
    rows = dissect(path, display_filter="http.request || http.response", fields=_HTTP_FIELDS, timeout=timeout)
    for row in rows:
        stream = _one(row["tcp.stream"])
        if row["http.request.method"] is not None:
            request = {
                "method": _one(row["http.request.method"]),
                "uri": _one(row["http.request.uri"]),
                "host": _one(row["http.host"]),
                "stream": None if stream is None else int(stream),
                "frame": row["frame"],
                "time": row["time"],
                **dict.fromkeys(("status", "response_frame", "response_time", "latency_ns")),
            }
            requests.append(request)
            by_frame[row["frame"]] = request
            waiting[stream].append(request)
        if row["http.response.code"] is not None:
            _pair(row, by_frame, waiting[stream])
    return requests


def _pair(row: dict[str, Any], by_frame: dict[int, dict[str, Any]], waiting: deque[dict[str, Any]]) -> None:
    """Give a response to its request: the one tshark names, else the stream's oldest without a response."""
    named = _one(row["http.request_in"])
    request = by_frame.get(int(named)) if named is not None else None
    if request is None:
        request = waiting[0] if waiting else None
    if request is None:
        return
    status = int(_one(row["http.response.code"]))
    request.update(
        status=status,
        response_frame=row["frame"],
        response_time=row["time"],
        latency_ns=row["time"] - request["time"],
    )
    if status >= 200 or status == 101:  # 1xx announces another response to the same request (RFC 9110 15.2)
        with contextlib.suppress(ValueError):
            waiting.remove(request)


def _one(value: Any) -> Any:
    return value[0] if isinstance(value, list) else value


def _display_filter(frames: list[int] | None, display_filter: str | None) -> str | None:
    parts = [f"({display_filter})"] if display_filter else []
    if frames:
        ranges: list[list[int]] = []
        for frame in frames:
            if ranges and frame == ranges[-1][1] + 1:
                ranges[-1][1] = frame
            else:
                ranges.append([frame, frame])
        listed = ", ".join(str(low) if low == high else f"{low}..{high}" for low, high in ranges)
        hull = f"frame.number >= {frames[0]} && frame.number <= {frames[-1]}"
        parts.append(f"frame.number in {{{listed}}}" if len(listed) < _MAX_FILTER else hull)
    return " && ".join(parts) or None


def _run_worker(request: dict[str, Any], where: str) -> Iterator[dict[str, Any]]:
    if shutil.which("tshark") is None:
        raise RxlabError("tshark is not installed, and dissects the packets", do="apt install tshark")
    # A session of its own: should the worker hang past its own timeout, one signal ends it and its tshark.
    worker = subprocess.Popen(
        [sys.executable, "-m", "rxlab.read.dissect"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        out, err = worker.communicate(json.dumps(request).encode(), request["timeout"] + _GRACE)
    except subprocess.TimeoutExpired:
        raise _late(request, where) from None
    finally:
        _end(worker)
    lines = out.splitlines()
    end = json.loads(lines[-1]) if lines and lines[-1].startswith(b'{"end"') else None
    if end is None:
        last = err.decode("utf-8", "replace").strip().splitlines()[-1:] or [f"exit status {worker.returncode}"]
        raise RxlabError("the dissection worker failed", where=where, found=last[0])
    if end["timed_out"]:
        raise _late(request, where)
    if end["end"] != 0 and _CUT not in end["message"]:
        raise _tshark_error(end["message"], request, where)
    for line in lines[:-1]:
        yield json.loads(line)


def _end(worker: subprocess.Popen[bytes]) -> None:
    """Kill what may be left of the worker's session and reap the worker."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(worker.pid, signal.SIGKILL)
    worker.communicate()


def _late(request: dict[str, Any], where: str) -> RxlabError:
    what = f"dissection took more than {request['timeout']:g} s and was stopped"
    return RxlabError(what, where=where, do="Choose fewer frames or a longer timeout.")


def _tshark_error(message: str, request: dict[str, Any], where: str) -> RxlabError:
    # tshark ends a complaint about a filter with a line that underlines the place.
    if request["filter"] and (set(message) <= set(" ^~") or "filter" in message or "protocol field" in message):
        return UsageError("tshark does not understand the display filter", found=repr(request["filter"]))
    return RxlabError("tshark cannot read the capture", where=where, found=message)


# --------------------------------------------------------------------------------------------------- the worker


def _epoch_ns(text: str) -> int:
    """Return int ns of a frame.time_epoch: decimal seconds (tshark 4.0) or ISO 8601 in UTC (since 4.2)."""
    if "T" in text:
        whole, _, fraction = text.rstrip("Z").partition(".")
        seconds, sign = int(datetime.fromisoformat(whole + "+00:00").timestamp()), 1
    else:
        whole, _, fraction = text.partition(".")
        seconds, sign = int(whole), -1 if whole.startswith("-") else 1
    return seconds * 1_000_000_000 + sign * int(fraction[:9].ljust(9, "0"))


def _epoch_text(time_ns: int) -> str:
    """Return int ns as decimal seconds."""
    seconds, fraction = divmod(abs(time_ns), 1_000_000_000)
    return f"{'-' if time_ns < 0 else ''}{seconds}.{fraction:09d}"


def _field(layers: dict[str, list[dict[str, Any]]], name: str) -> Any:
    """Return the value or values of a Wireshark field in the packet's layers, None without."""
    protocol, _, rest = name.partition(".")
    if not rest:
        return protocol in layers
    key = f"{protocol}_{name.replace('.', '_')}"
    values: list[Any] = []
    for layer in layers.get(protocol, []):
        value = layer.get(key)
        values.extend(value if isinstance(value, list) else [] if value is None else [value])
    return None if not values else values[0] if len(values) == 1 else values


def _work() -> None:
    """Read one request from stdin, write one JSON line per packet and a last one with tshark's exit status."""
    from pyshark import FileCapture
    from pyshark.tshark.output_parser.tshark_ek import TsharkEkJsonParser

    class Capture(FileCapture):
        """pyshark's capture, with two habits changed."""

        exit_status, timed_out = 0, False

        def _setup_tshark_output_parser(self) -> Any:
            # pyshark would first write a type mapping into the user's cache, unsafe for two workers at once.
            return TsharkEkJsonParser()

        async def _cleanup_subprocess(self, process: Any) -> None:
            # pyshark kills a tshark that has closed its output but not exited yet, and so loses its exit status.
            self.exit_status = await process.wait()

        def stop(self) -> None:
            self.timed_out = True
            for process in self._running_processes:
                process.kill()

    request = json.load(sys.stdin)
    protocols = sorted({"frame", *(field.partition(".")[0] for field in request["fields"])})
    # -J: print only these protocols' fields, which makes the rest of the pipe several times faster.
    parameters = ["-J", " ".join(protocols)]
    frames = request["frames"] and set(request["frames"])
    if frames:
        parameters += ["-c", str(max(frames))]
    capture = Capture(
        request["path"],
        keep_packets=False,
        use_ek=True,
        display_filter=request["filter"],
        custom_parameters=parameters,
    )
    # tshark's parent has to end it: were both killed from outside, nobody might be left to reap it.
    capture.eventloop.call_later(request["timeout"], capture.stop)
    for packet in capture:
        if frames and int(packet.number) not in frames:
            continue
        layers: dict[str, list[dict[str, Any]]] = {"frame": [packet.frame_info._fields_dict]}
        for layer in packet.layers:
            content = layer._fields_dict
            layers.setdefault(layer.layer_name, []).extend(content if isinstance(content, list) else [content])
        row: dict[str, Any] = {"frame": int(packet.number), "time": _epoch_ns(packet.sniff_timestamp)}
        row.update((name, _field(layers, name)) for name in request["fields"])
        if "frame.time_epoch" in row:  # seconds in every version, as tshark prints them where it does not write JSON
            row["frame.time_epoch"] = _epoch_text(row["time"])
        sys.stdout.write(json.dumps(row) + "\n")
    capture.close()
    message = capture._last_error_line or ""
    end = {"end": capture.exit_status, "message": message, "timed_out": capture.timed_out}
    sys.stdout.write(json.dumps(end) + "\n")


if __name__ == "__main__":
    _work()
