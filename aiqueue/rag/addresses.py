"""Which network addresses a fetch may connect to."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address

_NAT64 = IPv6Network("64:ff9b::/96")


def refusal_of(address: str, *, private: bool) -> str:
    """Return why no connection is made to an address, "" if one may be.

    `private`: the host is allowed to be in a private network or on this machine. Addresses that no host is reached by,
    and link-local ones (the metadata services of clouds have such), are refused even then.
    """
    try:
        found = ip_address(address.partition("%")[0])
    except ValueError:
        return f"{address!r} is not an address"
    for each in _reached(found):
        if each.is_multicast or each.is_unspecified or each.is_link_local or getattr(each, "is_site_local", False):
            return f"{each} is a multicast, unspecified or link-local address"
        if (each.is_reserved and not each.is_loopback) or _is_broadcast(each):
            return f"{each} is a reserved address"
        if not private and not each.is_global:
            return f"{each} is not a public address"
    return ""


def _reached(address: IPv4Address | IPv6Address) -> list[IPv4Address | IPv6Address]:
    """Return the addresses that a connection may reach: behind some of IPv6 there is one of IPv4."""
    if isinstance(address, IPv4Address):
        return [address]
    if address.ipv4_mapped is not None:
        return [address.ipv4_mapped]
    if address in _NAT64:
        return [IPv4Address(int(address) & 0xFFFFFFFF)]
    inner = address.sixtofour or (address.teredo and address.teredo[1])
    return [address, inner] if inner else [address]


def _is_broadcast(address: IPv4Address | IPv6Address) -> bool:
    return isinstance(address, IPv4Address) and int(address) == 0xFFFFFFFF
