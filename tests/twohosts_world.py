"""A conversation of two hosts whose clocks differ, captured on both, with the true latency of every packet that arrived.

Frames leave a host, are cut into segments (TSO), lost, delayed, merged (GRO) and captured; what was not acknowledged is sent again. Times are
of one true clock until the captures stamp them by the hosts' own.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from rxlab.read.columns import Columns

SECOND = 1_000_000_000
START = 1_790_000_000 * SECOND
MSS = 1_448
TCP, UDP = 6, 17
CLIENT, SERVER = 0x0A4D0001, 0x0A4D0002
ACK, PUSH = 0x10, 0x18


@dataclass(frozen=True)
class Clock:
    """A host's clock: what it shows at a true instant (nanoseconds since the start)."""

    offset: int = 0
    drift: float = 0.0
    sine_ns: float = 0.0
    ramp: float = 0.0  # per second
    step: tuple[float, int] = (np.inf, 0)  # when (seconds), by how much
    slew: tuple[float, float, float] = (0.0, 0.0, 0.0)  # from, to (seconds), how fast
    quantum: int = 1

    def at(self, t: np.ndarray) -> np.ndarray:
        seconds = t / SECOND
        bent = self.drift * t + self.sine_ns * np.sin(2 * np.pi * seconds / 20) + 0.5 * self.ramp * seconds * t
        bent += np.clip(seconds - self.slew[0], 0, self.slew[1] - self.slew[0]) * self.slew[2] * SECOND
        shown = START + self.offset + t + np.rint(bent).astype(np.int64)
        return (shown + np.where(seconds >= self.step[0], self.step[1], 0)) // self.quantum * self.quantum


@dataclass
class Frame:
    """A frame on its way: when it left, what of it arrived when."""

    left: int
    forward: bool
    fields: dict[str, int]
    arrived: int = -1
    # Of a packet that arrived merged: when the frame with its last byte left.
    left_last: int = -1
    row: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Recipe:
    """What the conversation is like."""

    seed: int = 1
    seconds: float = 10.0
    rate: float = 500.0
    loss: float = 0.0
    missed: float = 0.0  # by each capture
    base: tuple[int, int] = (30_000, 70_000)  # least latency, forward and reverse
    jitter: tuple[int, int] = (10_000, 10_000)  # mean of what comes on top
    sender: Clock = Clock()
    receiver: Clock = Clock()
    tso: bool = True
    train: int = 1  # frames that leave one behind the other
    gro: bool = True
    timestamps: bool = True
    ip_ids: bool = True
    version: int = 4
    kinds: tuple[str, ...] = ("rpc", "bulk", "udp")
    one_way: bool = False
    translated: bool = False
    alike: bool = False  # datagrams without a number


class World:
    """Two captures (``sender``, ``receiver``, with digests), and the truth by the row of the capture where a packet arrived.

    ``true[direction][row]`` is (least, most): from when the frame with the packet's last byte left, and the one with its first.
    """

    def __init__(self, **changed: Any) -> None:
        self.recipe = replace(Recipe(), **changed)
        self.rng = np.random.default_rng(self.recipe.seed)
        self.frames: list[Frame] = []
        self.heard: list[Frame] = []
        self.ids = {True: 7, False: 9}
        for number, kind in enumerate(self.recipe.kinds):
            getattr(self, f"_{kind}")(40_000 + number)
        self._capture()

    def _latency(self, forward: bool, n: int = 1) -> np.ndarray:
        base, jitter = self.recipe.base[not forward], self.recipe.jitter[not forward]
        return (base + self.rng.exponential(jitter, n)).astype(np.int64)

    def _send(
        self,
        left: int,
        forward: bool,
        port: int,
        length: int,
        *,
        lossy: bool = True,
        not_before: int = 0,
        **fields: int,
    ) -> Frame | None:
        """Send one frame; return what arrived of it last, None if all was lost."""
        told = self.recipe
        pieces = max(1, -(-length // MSS)) if fields["proto"] == TCP else 1
        ident = self.ids[forward] % 65536 if told.ip_ids and told.version == 4 else 0
        self.ids[forward] += pieces
        common = {
            "forward": forward,
            "port": port,
            "tsval": 0,
            "tsecr": 0,
            "seq": 0,
            "ack": 0,
            "tcp_flags": 0,
            "digest": 0,
            **fields,
        }
        if told.timestamps and fields["proto"] == TCP:
            common["tsval"] = 1_000 + left // 1_000_000
        frame = Frame(left, forward, {**common, "payload_len": length, "ip_id": ident})
        self.frames.append(frame)
        got: list[Frame] = []
        at = not_before
        for piece in range(pieces):
            size = min(MSS, length - piece * MSS) if fields["proto"] == TCP else length
            at = max(at, left + int(self._latency(forward)[0]) + piece * 1_200)
            if lossy and self.rng.random() < told.loss:
                continue
            cut = {**common, "payload_len": size, "ip_id": (ident + piece) % 65536 if ident else 0}
            cut["seq"] = (common["seq"] + piece * MSS) % 2**32
            got.append(Frame(left, forward, cut, at, left))
        if told.gro:
            got = merged(got)
        self.heard += got
        return got[-1] if got else None

    def _rpc(self, port: int) -> None:
        """Requests and replies on one connection, one at a time."""
        told = self.recipe
        t, seq, ack = 0, 3_999_900_000, 77
        while t < told.seconds * SECOND:
            t += int(self.rng.exponential(SECOND / told.rate))
            size = int(self.rng.integers(20, 400))
            got = self._send(t, True, port, size, proto=TCP, seq=seq, ack=ack, tcp_flags=PUSH)
            while got is None:
                t += 2_000_000
                got = self._send(t, True, port, size, proto=TCP, seq=seq, ack=ack, tcp_flags=PUSH)
            seq = (seq + size) % 2**32
            t = got.arrived + 5_000
            if told.one_way:
                continue
            size = int(self.rng.integers(20, 400))
            got = self._send(t, False, port, size, proto=TCP, seq=ack, ack=seq, tcp_flags=PUSH)
            while got is None:
                t += 2_000_000
                got = self._send(t, False, port, size, proto=TCP, seq=ack, ack=seq, tcp_flags=PUSH)
            ack = (ack + size) % 2**32
            t = got.arrived

    def _bulk(self, port: int) -> None:
        """Large frames to the receiver; what is lost of one is sent again soon, within a tick of the timestamps; acknowledged."""
        told = self.recipe
        t, seq = 100, 4_294_000_000
        gap = SECOND / told.rate * 2
        while t < told.seconds * SECOND:
            t += int(self.rng.exponential(gap))
            size = int(self.rng.integers(1, 30)) * MSS if told.tso else MSS
            before = len(self.heard)
            self._send(t, True, port, size, proto=TCP, seq=seq, ack=5, tcp_flags=ACK)
            for number in range(1, told.train):
                late = max(frame.arrived for frame in self.heard[before:]) + 1_200 if len(self.heard) > before else 0
                place = (seq + number * size) % 2**32
                self._send(
                    t + 1_200 * number, True, port, size, not_before=late, proto=TCP, seq=place, ack=5, tcp_flags=ACK
                )
            size *= told.train
            if told.gro:
                self.heard[before:] = merged(self.heard[before:])
            got = {frame.fields["seq"]: frame for frame in self.heard[before:]}
            at = max([t, *(frame.arrived for frame in got.values())])
            held = sum(frame.fields["payload_len"] for frame in got.values())
            if held < size:
                covered = {
                    (frame.fields["seq"] + k) % 2**32
                    for frame in got.values()
                    for k in range(0, frame.fields["payload_len"], MSS)
                }
                for piece in range(-(-size // MSS)):
                    place = (seq + piece * MSS) % 2**32
                    if place not in covered:
                        at += 150_000
                        self._send(at, True, port, MSS, lossy=False, proto=TCP, seq=place, ack=5, tcp_flags=ACK)
                        at += 200_000
            seq = (seq + size) % 2**32
            if not told.one_way:
                self._send(at + 3_000, False, port, 0, proto=TCP, seq=5, ack=seq, tcp_flags=ACK)
            t = at + 10_000

    def _udp(self, port: int) -> None:
        """Datagrams with a number in them, each answered."""
        told = self.recipe
        for at in np.cumsum(self.rng.exponential(SECOND / told.rate, int(told.seconds * told.rate))).astype(np.int64):
            digest = 5 if told.alike else int(self.rng.integers(1, 2**63))
            got = self._send(int(at), True, port, 64, proto=UDP, digest=digest)
            if got is not None and not told.one_way:
                self._send(got.arrived + 4_000, False, port, 64, proto=UDP, digest=digest + 1)

    def _capture(self) -> None:
        told = self.recipe
        ends = {}
        for name, clock, is_sender in (("sender", told.sender, True), ("receiver", told.receiver, False)):
            seen = [(frame.left, frame, True) for frame in self.frames if frame.forward == is_sender]
            seen += [(frame.arrived, frame, False) for frame in self.heard if frame.forward != is_sender]
            seen = [one for one in seen if self.rng.random() >= told.missed]
            seen.sort(key=lambda one: one[0])
            ends[name] = (
                columns([one[1] for one in seen], clock.at(np.array([one[0] for one in seen])), told, is_sender),
                seen,
            )
        (self.sender, sent), (self.receiver, got) = ends["sender"], ends["receiver"]
        self.true = {}
        for forward, seen in ((True, got), (False, sent)):
            self.true[forward] = {
                row: (frame.arrived - frame.left_last, frame.arrived - frame.left)
                for row, (_, frame, is_left) in enumerate(seen)
                if not is_left
            }


def merged(got: list[Frame]) -> list[Frame]:
    """Merge segments that arrived one behind the other within 20 us, up to 5 of them; the merged packet is seen with its last."""
    result: list[Frame] = []
    for frame in got:
        last = result[-1] if result else None
        if (
            last is not None
            and frame.fields["proto"] == TCP
            and frame.fields["tsval"] == last.fields["tsval"]
            and (last.fields["seq"] + last.fields["payload_len"]) % 2**32 == frame.fields["seq"]
            and last.fields["payload_len"] < 5 * MSS
            and frame.arrived - last.arrived < 20_000
        ):
            last.fields["payload_len"] += frame.fields["payload_len"]
            last.arrived, last.left_last = frame.arrived, frame.left_last
        else:
            result.append(frame)
    return result


def columns(frames: list[Frame], time: np.ndarray, told: Recipe, is_sender: bool) -> Columns:
    """Return a capture's packets as the reader gives them."""
    n = len(frames)
    of = {name: np.array([frame.fields[name] for frame in frames]) for name in (frames[0].fields if frames else ())}
    forward = of["forward"].astype(bool)
    # A translator between the hosts shows the receiver another client.
    client, shift = (CLIENT + 99, 1_000) if told.translated and not is_sender else (CLIENT, 0)
    client_port, server_port = of["port"] + shift, np.full(n, 80)
    ends = {
        "src_hi": np.zeros(n), "dst_hi": np.zeros(n),
        "src_lo": np.where(forward, client, SERVER), "dst_lo": np.where(forward, SERVER, client),
    }  # fmt: skip
    flows, first = {}, []
    for port, way in zip(of["port"].tolist(), forward.tolist(), strict=True):
        flows.setdefault(port, (len(flows), way))
        first.append(way != flows[port][1])
    arrays = {
        "time": time.astype(np.int64),
        "frame": np.arange(1, n + 1),
        "caplen": np.full(n, 128, np.uint32),
        "proto": of["proto"].astype(np.uint8),
        "flow": np.array([flows[port][0] for port in of["port"].tolist()], np.int32),
        "flow_dir": np.array(first, np.int8),
        "fragment": np.zeros(n, np.uint8),
        "ip_version": np.full(n, told.version, np.uint8),
        "sport": np.where(forward, client_port, server_port).astype(np.uint16),
        "dport": np.where(forward, server_port, client_port).astype(np.uint16),
        "digest": of["digest"].astype(np.uint64),
        "payload_len": of["payload_len"].astype(np.int32),
        "tcp_flags": of["tcp_flags"].astype(np.uint16),
        **{name: of[name].astype(np.uint32) for name in ("seq", "ack", "tsval", "tsecr", "ip_id")},
        **{name: value.astype(np.uint64) for name, value in ends.items()},
    }
    return Columns(arrays, {"clock": "CLOCK_REALTIME"})
