"""Which network addresses a list of URLs may lead to.

Lists come from strangers: their URLs, or redirects of them, must not reach a cluster's own metadata
service, dashboards or databases. Looked at is the very address that a socket is opened for, so that
neither redirects nor names that resolve anew (DNS rebinding) get around it.
"""

import errno
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import (
    IPv4Address,
    IPv4Network,
    IPv6Address,
    IPv6Network,
    ip_address,
    ip_network,
)
from typing import Any

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network

_NAT64 = IPv6Network("64:ff9b::/96")


class RefusedAddressError(OSError):
    """An address that must not be connected to."""

    def __init__(self, address: str) -> None:
        super().__init__(errno.EACCES, f"address {address} is not public")


@dataclass(frozen=True)
class Guard:
    """Opens sockets to public addresses, and to the networks that are allowed beside them."""

    allowed: tuple[Network, ...] = ()

    @classmethod
    def allowing(cls, networks: Sequence[str]) -> "Guard":
        """Allow networks such as `10.0.0.0/8`.

        Raises:
            ValueError: one is no network.
        """
        return cls(tuple(ip_network(network) for network in networks))

    def open_socket(self, info: tuple[Any, ...]) -> socket.socket:
        """Open a socket for an entry of `getaddrinfo`.

        Raises:
            RefusedAddressError: its address is not allowed.
        """
        family, kind, protocol, _, address = info
        if not self.allows(address[0]):
            raise RefusedAddressError(address[0])
        return socket.socket(family, kind, protocol)

    def allows(self, text: str) -> bool:
        """Tell whether an address may be connected to."""
        address = ip_address(text.partition("%")[0])
        reached = (address, *_embedded(address))
        if any(each in network for each in reached for network in self.allowed):
            return True
        return all(each.is_global and not each.is_multicast for each in reached)


def _embedded(address: Address) -> tuple[Address, ...]:
    """Find the IPv4 addresses that an IPv6 address stands for."""
    if isinstance(address, IPv4Address):
        return ()
    found: list[Address | None] = [address.ipv4_mapped, address.sixtofour]
    found += address.teredo or ()
    if address in _NAT64:
        found.append(IPv4Address(int(address) & 0xFFFFFFFF))
    return tuple(each for each in found if each is not None)
