"""Pseudonyms are consistent, keep prefixes, and leave no original behind."""

from __future__ import annotations

import ipaddress

from hypothesis import given
from hypothesis import strategies as st

from rxlab.show.redact import Redactor

KEY = b"k" * 32
V4 = st.integers(0x0B000000, 0x7EFFFFFF).map(lambda n: str(ipaddress.IPv4Address(n)))


def _shared_bits(a: str, b: str) -> int:
    left, right = ipaddress.ip_address(a), ipaddress.ip_address(b)
    return left.max_prefixlen - (int(left) ^ int(right)).bit_length()


@given(V4, V4)
def test_prefixes_are_kept_and_addresses_stay_distinct(a, b):
    redactor = Redactor(KEY)
    assert _shared_bits(redactor.address(a), redactor.address(b)) == _shared_bits(a, b)


def test_ipv6_prefixes_are_kept():
    redactor = Redactor(KEY)
    assert _shared_bits(redactor.address("2001:db8::1"), redactor.address("2001:db8::2")) == 126


def test_one_key_one_pseudonym_and_another_key_another():
    assert Redactor(KEY).address("192.0.2.7") == Redactor(KEY).address("192.0.2.7") != Redactor().address("192.0.2.7")


def test_text_loses_every_original():
    redactor = Redactor(KEY, ["lab-machine.example.org", "lab-machine"])
    text = "host lab-machine.example.org (lab-machine) [2001:db8::17]:443 > 192.0.2.7:5000, 52:54:00:12:34:56, at 12:30:01 with perf 6.1.187"
    out = redactor.text(text)
    for original in ("lab-machine", "example", "2001:db8::17", "192.0.2.7", "52:54:00:12:34:56"):
        assert original not in out
    assert "12:30:01" in out
    assert "perf 6.1.187" in out
    assert ":5000" in out


def test_what_identifies_nobody_stays():
    redactor = Redactor(KEY)
    for text in ("127.0.0.1", "::1", "0.0.0.0", "ff:ff:ff:ff:ff:ff", "01:00:5e:00:00:01"):
        assert redactor.text(text) == text
    assert int(redactor.mac("52:54:00:12:34:56")[:2], 16) & 3 == 2


def test_a_name_inside_a_word_stays():
    assert Redactor(KEY, ["vm"]).text("kvm vm vmlinux vm-2") == "kvm host-1 vmlinux vm-2"
