"""What leaves the lab: consistent pseudonyms for addresses, MACs and host names.

IP addresses keep their prefixes: two addresses that share their first k bits still do afterwards, so subnets stay visible
(Xu, Fan, Ammar, Moon: Prefix-preserving IP address anonymization, ICNP 2002, with HMAC-SHA256 as the keyed function). Without
the key nobody can undo it; with a new key per report two reports cannot be linked.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import re
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

_MAC = re.compile(r"(?<![0-9A-Fa-f:])(?:[0-9A-Fa-f]{2}:){5}[0-9A-Fa-f]{2}(?![0-9A-Fa-f:])")
_IPV4 = re.compile(r"(?<![0-9.])(?:[0-9]{1,3}\.){3}[0-9]{1,3}(?![0-9.])")
_IPV6 = re.compile(r"(?<![0-9A-Za-z:])(?=[0-9A-Fa-f:]*:[0-9A-Fa-f:]*:)[0-9A-Fa-f:]{3,39}(?![0-9A-Za-z:])")


class Redactor:
    """Replaces addresses, MACs and known host names, the same one always by the same pseudonym.

    Parameters
    ----------
    key : bytes, optional
        Secret of this set of pseudonyms; by default a new random one.
    hosts : sequence of str
        Host names to replace wherever they stand as a word.
    tasks : sequence of str
        Task names to replace too: they stay unless asked.
    """

    def __init__(self, key: bytes | None = None, hosts: Sequence[str] = (), tasks: Sequence[str] = ()) -> None:
        self._key = key or secrets.token_bytes(32)
        self._hosts = {name: f"host-{index}" for index, name in enumerate(dict.fromkeys(filter(None, hosts)), start=1)}
        self._tasks = {name: f"task-{index}" for index, name in enumerate(dict.fromkeys(filter(None, tasks)), start=1)}

    @classmethod
    def of_hosts(
        cls, hosts: Sequence[Mapping[str, Any]], key: bytes | None = None, tasks: Sequence[str] = ()
    ) -> Redactor:
        """Return a redactor that knows the names in these host.json contents."""
        names = [str(host.get("hostname") or "") for host in hosts]
        # A short name inside a fully qualified one would leave the domain readable: longest first.
        return cls(key, sorted({*names, *(name.split(".")[0] for name in names)}, key=len, reverse=True), tasks)

    def text(self, value: Any) -> str:
        """Return the value as text with everything identifying replaced."""
        text = str(value)
        text = _MAC.sub(lambda found: self.mac(found[0]), text)
        text = _IPV4.sub(lambda found: self.address(found[0]), text)
        text = _IPV6.sub(lambda found: self.address(found[0]), text)
        for name, pseudonym in (*self._hosts.items(), *self._tasks.items()):
            text = re.sub(rf"(?<![\w-]){re.escape(name)}(?![\w-])", pseudonym, text)
        return text

    def values(self, content: Any) -> Any:
        """Return JSON-like content with every text in it redacted, keys too."""
        if isinstance(content, str):
            return self.text(content)
        if isinstance(content, Mapping):
            return {self.text(key): self.values(value) for key, value in content.items()}
        if isinstance(content, list | tuple):
            return [self.values(value) for value in content]
        return content

    def address(self, text: str) -> str:
        """Return the pseudonym of an IPv4 or IPv6 address; anything else, loopback and unspecified stay."""
        try:
            address = ipaddress.ip_address(text)
        except ValueError:
            return text
        if address.is_loopback or address.is_unspecified or address.is_multicast:
            return text
        return str(type(address)(self._flip(int(address), address.max_prefixlen)))

    def mac(self, text: str) -> str:
        """Return a locally administered unicast MAC instead of a unicast one; broadcast and multicast stay."""
        number = bytes.fromhex(text.replace(":", ""))
        if number[0] & 1:
            return text
        digest = bytearray(self._digest(b"mac", number)[:6])
        digest[0] = digest[0] & 0xFC | 0x02
        return ":".join(f"{byte:02x}" for byte in digest)

    def _digest(self, kind: bytes, message: bytes) -> bytes:
        return hmac.new(self._key, kind + message, hashlib.sha256).digest()

    def _flip(self, number: int, bits: int) -> int:
        # Whether bit i is flipped depends on the key and the bits before it alone: that is what keeps prefixes.
        flipped = 0
        for position in range(bits):
            prefix = number >> (bits - position)
            message = bits.to_bytes(2, "big") + position.to_bytes(2, "big") + prefix.to_bytes(16, "big")
            bit = number >> (bits - 1 - position) & 1
            flipped = flipped << 1 | (bit ^ self._digest(b"ip", message)[0] & 1)
        return flipped
