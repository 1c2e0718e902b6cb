"""A document by HTTP or HTTPS: see `fetching.fetch_url`."""

from __future__ import annotations

import asyncio
import re
import socket
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, NamedTuple

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

from ..errors import SettingsError
from .addresses import refusal_of
from .errors import FetchFailed, FetchRefused
from .fetched import Collecting, Fetched, FetchLimits, too_large

Resolver = AbstractResolver

# Not the threads of the event loop: those that wait for a name server that does not answer would hold up all else.
_NAME_THREADS: Final = ThreadPoolExecutor(8, thread_name_prefix="aiqueue-rag-names")
URL_CHARS_MAX: Final = 4_096
_PIECE = 64 * 1024
_UNPACKED_PIECE = 1024**2
_PORTS = {"http": 80, "https": 443}
_ODD = re.compile(r"[\x00-\x20\x7f-\xa0\\]")  # programs differ on what these mean in a URL
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_TRANSIENT = frozenset({408, 425, 429})
_RETRY_AFTER_S = (5.0, 3_600.0)  # the least and most that is waited on a server's word: 8 attempts at once are in vain
_HEADERS = {"User-Agent": "aiqueue", "Accept": "*/*", "Accept-Encoding": "gzip"}


class _AllowedHost(NamedTuple):
    """An allowed host. `port`: None: that of the scheme."""

    host: str
    port: int | None
    private: bool


class HostRules:
    """Which hosts may be asked, and which of them may have private addresses. Raises SettingsError."""

    def __init__(self, hosts: Sequence[str], private_hosts: Sequence[str]) -> None:
        self._rules = [_parse_rule(each, private=True) for each in private_hosts]
        self._rules += [_parse_rule(each, private=False) for each in hosts]

    def find(self, source: str, url: URL) -> _AllowedHost:
        """Return the rule that allows a URL. Raises FetchRefused."""
        if not self._rules:
            raise FetchRefused(source, "documents by URL are off: list the host in `hosts` of this tenant in rag.toml")
        if url.scheme not in _PORTS:
            raise FetchRefused(source, "a URL must begin with http:// or https://")
        if url.user is not None or url.password is not None:
            raise FetchRefused(source, "a URL must hold no user or password")
        for rule in self._rules:
            if url.raw_host == rule.host and url.port == (rule.port or _PORTS[url.scheme]):
                return rule
        raise FetchRefused(
            source, f"the host {str(url.raw_host)[:100]!r} with port {url.port} is not allowed for this tenant"
        )


def _parse_rule(entry: str, *, private: bool) -> _AllowedHost:
    try:
        url = URL(f"http://{entry}")
        if (
            not _ODD.search(entry)
            and url.raw_host
            and url.raw_path == "/"
            and url.user is None
            and not url.query_string
            and not url.fragment
        ):
            return _AllowedHost(url.raw_host, url.explicit_port, private)
    except ValueError:
        pass
    raise SettingsError(f"the allowed host {entry!r} must be a name or address, with or without a port")


async def fetch(source: str, rules: HostRules, limits: FetchLimits, resolver: Resolver | None) -> Fetched:
    """Fetch a URL; each redirect is checked as the URL itself is."""
    url = _parse(source, source)
    try:
        async with asyncio.timeout(limits.total_s):
            for _ in range(limits.redirects_max + 1):
                found = await _get(source, url, rules.find(source, url), limits, resolver)
                if isinstance(found, Fetched):
                    return found
                target = url.join(_parse(source, found))
                if url.scheme == "https" and target.scheme == "http":
                    raise FetchRefused(source, "it redirects from https to http")
                url = target
    except TimeoutError:
        raise FetchFailed(source, f"it takes longer than {limits.total_s:g} s") from None
    raise FetchRefused(source, f"it redirects more than {limits.redirects_max} times")


def _parse(source: str, text: str) -> URL:
    if len(text) > URL_CHARS_MAX or _ODD.search(text):
        raise FetchRefused(
            source, "a URL must hold no blanks, control characters or backslashes, and be of 4,096 characters at most"
        )
    try:
        return URL(text)
    except ValueError as error:
        raise FetchRefused(source, f"it is not a valid URL: {error}") from None


async def _get(
    source: str, url: URL, rule: _AllowedHost, limits: FetchLimits, resolver: Resolver | None
) -> Fetched | str:
    """Return the document, or where a redirect leads. Raises FetchRefused, FetchFailed, TimeoutError."""
    guard = _Guard(source, resolver or _SystemResolver(), private=rule.private)
    connector = aiohttp.TCPConnector(
        resolver=guard, use_dns_cache=False, force_close=True, limit=1, socket_factory=guard.open_socket
    )
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=limits.connect_s)
    try:
        async with (
            aiohttp.ClientSession(
                connector=connector, cookie_jar=aiohttp.DummyCookieJar(), timeout=timeout, auto_decompress=False
            ) as session,
            session.get(url, headers=_HEADERS, allow_redirects=False) as response,
        ):
            if response.status in _REDIRECTS and (target := response.headers.get("Location")):
                return target
            _refuse_status(source, response)
            return await _read(source, url, response, limits)
    except aiohttp.ClientConnectorCertificateError:
        raise FetchRefused(source, "its server's certificate is not valid") from None
    except (aiohttp.InvalidURL, aiohttp.NonHttpUrlClientError) as error:
        raise FetchRefused(source, f"it is not a valid URL: {error}") from None
    except aiohttp.ServerTimeoutError:
        raise FetchFailed(source, f"no connection within {limits.connect_s:g} s") from None
    except (aiohttp.ClientError, OSError) as error:
        raise FetchFailed(source, f"{type(error).__name__}: {' '.join(str(error)[:200].split())}") from None


def _refuse_status(source: str, response: aiohttp.ClientResponse) -> None:
    if response.status in (200, 203):
        return
    problem = f"its server answers {response.status} {(response.reason or '')[:60]}".rstrip()
    if response.status in _TRANSIENT or response.status >= 500:
        asked, (least, most) = response.headers.get("Retry-After", ""), _RETRY_AFTER_S
        after_s = min(max(float(asked), least), most) if re.fullmatch(r"[0-9]{1,9}", asked) else None
        raise FetchFailed(source, problem, retry_after_s=after_s)
    raise FetchRefused(source, problem)


async def _read(source: str, url: URL, response: aiohttp.ClientResponse, limits: FetchLimits) -> Fetched:
    unpack = _Unpacking(source, response.headers.get("Content-Encoding", ""))
    if (response.content_length or 0) > limits.size_bytes_max:
        raise too_large(source, limits.size_bytes_max)
    collecting = Collecting(str(url), limits.size_bytes_max)
    try:
        async for piece in response.content.iter_chunked(_PIECE):
            for part in unpack.parts(piece):
                collecting.add(part)
        unpack.finish()
        content_type = response.headers.get("Content-Type", "").encode("utf-8", "replace").decode()  # any bytes
        return collecting.finish(url.name or str(url.raw_host), content_type)
    except BaseException:
        collecting.close()
        raise


class _Unpacking:
    """A body as it comes, decompressed piece by piece, so that a bomb meets the limit before it is in memory."""

    def __init__(self, source: str, encoding: str) -> None:
        encoding = encoding.strip().lower()
        if encoding not in ("", "identity", "gzip", "x-gzip", "deflate"):
            raise FetchRefused(source, f"its server sends it as {encoding[:40]!r}, which was not asked for")
        self._source = source
        self._inflate: Any = None if encoding in ("", "identity") else zlib.decompressobj(32 + zlib.MAX_WBITS)
        self._is_whole = True  # what came so far: nothing, or whole members of a gzip file and what else follows them
        self._has_member = False

    def parts(self, piece: bytes) -> Iterator[bytes]:
        """Yield what a piece of the body holds, at most 1 MiB at once. Raises FetchRefused."""
        if self._inflate is None:
            yield piece
            return
        while piece:
            if self._inflate.eof:  # another member of the gzip file
                self._has_member = True
                self._inflate = zlib.decompressobj(32 + zlib.MAX_WBITS)
            try:
                part = self._inflate.decompress(piece, _UNPACKED_PIECE)
            except zlib.error as error:
                if self._has_member and self._is_whole:
                    return  # no member, but padding
                raise FetchRefused(self._source, f"it cannot be decompressed: {error}") from None
            self._is_whole = self._inflate.eof or (self._has_member and self._is_whole and not part)
            yield part
            piece = self._inflate.unused_data if self._inflate.eof else self._inflate.unconsumed_tail

    def finish(self) -> None:
        """Raises FetchFailed if the body ended too early."""
        if self._inflate is not None and not self._is_whole:
            raise FetchFailed(self._source, "its compressed content ended too early")


class _SystemResolver(AbstractResolver):
    """Asks the system for the addresses of a name."""

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        """Return the addresses of a name. Raises OSError."""

        def ask() -> list[Any]:
            return socket.getaddrinfo(host, port, family, socket.SOCK_STREAM, flags=socket.AI_ADDRCONFIG)

        found = await asyncio.get_running_loop().run_in_executor(_NAME_THREADS, ask)
        numeric = socket.AI_NUMERICHOST | socket.AI_NUMERICSERV
        return [
            ResolveResult(hostname=host, host=address[0], port=port, family=kind, proto=proto, flags=numeric)
            for kind, _, proto, _, address in found
        ]

    async def close(self) -> None:
        """Leave the threads to others."""


class _Guard(AbstractResolver):
    """Resolves names, and refuses a name if one of its addresses may not be reached. Each socket is checked again,
    since an address may stand in the URL itself, which is not resolved.
    """

    def __init__(self, source: str, inner: Resolver, *, private: bool) -> None:
        self._source = source
        self._inner = inner
        self._private = private

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        """Return the addresses of a name: the connection is made to one of these, and asks for no others."""
        found = await self._inner.resolve(host, port, family)
        for each in found:
            self._refuse(each["host"])
        return found

    def open_socket(self, info: Any) -> socket.socket:
        """Return the socket for a connection to an address."""
        family, kind, protocol, _, address = info
        self._refuse(str(address[0]))
        return socket.socket(family, kind, protocol)

    async def close(self) -> None:
        """Leave the inner resolver open: it is the caller's."""

    def _refuse(self, address: str) -> None:
        if problem := refusal_of(address, private=self._private):
            raise FetchRefused(self._source, f"its host leads to a private network or nowhere ({problem})")
