"""The part of the dataset's contract about two hosts' captures; :mod:`rxlab.dataset.schema` puts it with the rest."""

from __future__ import annotations

from typing import Any

from rxlab.dataset.variables import Variable
from rxlab.follow.crossings import CROSSINGS

WAYS = ("forward", "reverse")  # to the receiver, to the sender
BETWEEN = "receiver's pcap - sender's pcap"


def interval_variables(group: str, *, optional: bool) -> list[Variable]:
    """Return the variables of a packet's interval: in a run's /packets and in /crossings."""

    dims = ("packet",) if group == "packets" else ("arrival",)

    def v(name: str, dtype: str, units: str, clock: str, title: str, text: str, missing: str, **more: Any) -> Variable:
        return Variable(group, name, dims, dtype, units, clock, title, text, missing, optional, **more)

    return [
        v("oneway_min", "float64", "ns", BETWEEN, "least one-way latency",
          "from the stamp in the sender's capture to the stamp where the packet arrived: no less than this", "NaN: not known (crossing says why)"),
        v("oneway_max", "float64", "ns", BETWEEN, "largest one-way latency",
          "no more than this; where between both is not to be known without a common clock", "NaN: not known, or no packets of the other direction"),
        v("sender_frame", "int64", "1", "", "frame number where it left", "number in the capture where it left, of the frame with its first byte", "0: not known"),
        v("crossing", "int8", "1", "", "how it was found there",
          "segment: part of a larger frame (TSO), behind whose other parts it waited; merged: of several frames (GRO); ambiguous: its bytes were sent several times, the interval "
          "holds all of them; step: a clock was stepped meanwhile; inconsistent: it would have arrived before it left; by_gaps: of datagrams all alike, by the gaps between them", "never", flags=CROSSINGS),
    ]  # fmt: skip


def crossing_variables() -> list[Variable]:
    """Return the variables of every packet that arrived at either of two hosts."""
    c = ("arrival",)
    return [
        Variable("crossings", "time", c, "datetime64[ns]", "", "pcap", "arrival", "stamp of the capture where the packet arrived, on that host's clock"),
        Variable("crossings", "frame", c, "int64", "1", "", "frame number", "number in the capture where the packet arrived"),
        Variable("crossings", "way", c, "int8", "1", "", "direction", "forward: to the receiver; reverse: to the sender", flags=WAYS),
        Variable("crossings", "proto", c, "int16", "1", "", "IP protocol", "6 TCP, 17 UDP"),
        Variable("crossings", "sport", c, "int32", "1", "", "source port", "as it arrived"),
        Variable("crossings", "dport", c, "int32", "1", "", "destination port", "as it arrived"),
        Variable("crossings", "payload_len", c, "int32", "byte", "", "payload", "bytes of layer 4 payload"),
        *interval_variables("crossings", optional=False),
    ]  # fmt: skip


def twohost_variables() -> list[Variable]:
    """Return the variables that say how two hosts' captures go together."""

    def v(name: str, dims: tuple[str, ...], dtype: str, units: str, *rest: Any) -> Variable:
        return Variable("twohosts", name, dims, dtype, units, *rest)

    one = "NaN: packets of one direction only"
    return [
        v("instant", ("instant",), "datetime64[ns]", "", "pcap", "instant", "of the receiver's clock, evenly spaced"),
        v("offset_min", ("instant",), "float64", "ns", BETWEEN, "least difference of the clocks",
          "receiver's clock minus sender's, less the constant offset_origin: no less than this", one),
        v("offset_max", ("instant",), "float64", "ns", BETWEEN, "largest difference of the clocks", "no more than this", one),
        v("offset_origin", (), "int64", "ns", BETWEEN, "constant of the difference", "added to offset_min and offset_max"),
        v("drift", (), "float64", "1e-6", BETWEEN, "drift", "mean change of the difference, ppm", "NaN: too few packets"),
        v("wander", (), "float64", "1e-6", BETWEEN, "wander allowed for", "how far a bound opens with the distance from its packet, ppm"),
        v("width_min", (), "float64", "ns", BETWEEN, "least width", "narrowest interval of a packet: about the least round trip", one),
        v("width_median", (), "float64", "ns", BETWEEN, "median width", "of the packets' intervals", one),
        v("clock_error", (), "float64", "ns", BETWEEN, "stated error", "within which both clocks were said to agree", "NaN: nothing was said"),
        v("flags", (), "str", "", "", "what is wrong with the bounds", "words, separated by spaces; empty where nothing is"),
        v("way", ("way",), "str", "", "", "direction", "label"),
        v("found", ("found",), "str", "", "", "how packets were found", "label: the words of crossing"),
        v("packets", ("way", "found"), "int64", "1", "", "packets", "that arrived, by how they were found where they left"),
        v("unseen", ("way",), "int64", "1", "", "packets of which nothing arrived", "in the capture where they left: lost on the way, or not captured"),
        v("median_min", ("way",), "float64", "ns", BETWEEN, "median of the least latencies", "of all packets with one", "NaN: none has"),
        v("median_max", ("way",), "float64", "ns", BETWEEN, "median of the largest latencies", "of all packets with one", "NaN: none has"),
    ]  # fmt: skip
