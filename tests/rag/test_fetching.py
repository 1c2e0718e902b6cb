"""Documents by path and URL: real files, and real HTTP on this machine."""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import os
import socket
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from urllib.parse import quote

import pytest
from aiohttp import web
from aiohttp.abc import AbstractResolver

from aiqueue.errors import SettingsError
from aiqueue.rag import RagConfig, RagDocument, TenantConfig, sources
from aiqueue.rag.addresses import refusal_of
from aiqueue.rag.byte_budget import ByteBudget
from aiqueue.rag.errors import FetchFailed, FetchRefused
from aiqueue.rag.fetch_share import FetchShare
from aiqueue.rag.fetched import MEMORY_BYTES_MAX, FetchLimits
from aiqueue.rag.fetching import fetch_url, read_path
from aiqueue.rag.parse_pool import ParsePool

SECRET = "secret: outside of the roots"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A root with files, symlinks and special files; beside the root there is a secret."""
    root = tmp_path / "root"
    (root / "sub").mkdir(parents=True)
    (tmp_path / "secret.txt").write_text(SECRET)
    (tmp_path / "rootless").mkdir()
    (tmp_path / "rootless" / "secret.txt").write_text(SECRET)
    (root / "a.txt").write_text("text")
    (root / "sub" / "b..md").write_text("# dots are no parents")
    (root / "link.txt").symlink_to(tmp_path / "secret.txt")
    (root / "inner.txt").symlink_to(root / "a.txt")
    (root / "up").symlink_to(tmp_path)
    (root / "sub" / "loop").symlink_to("loop")
    os.mkfifo(root / "fifo")
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(root / "s"))
    return root


async def test_a_file_below_a_root_is_read_as_it_is(root: Path) -> None:
    with await read_path(f"{root}/a.txt", [root]) as found:
        assert (found.content, found.name, found.size_bytes) == (b"text", "a.txt", 4)
        assert found.sha256 == hashlib.sha256(b"text").hexdigest()
        assert found.source == f"{root}/a.txt"
    for path in (f"{root}//sub/./b..md", f"//{str(root)[1:]}/sub/b..md"):
        assert (await read_path(path, [root.parent / "other", str(root)])).content == b"# dots are no parents"


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("{root}/../secret.txt", "must not hold"),
        ("{root}/sub/../../secret.txt", "must not hold"),
        ("{root}/sub/../a.txt", "must not hold"),
        ("{parent}/secret.txt", "outside of the roots"),
        ("{root}less/secret.txt", "outside of the roots"),
        ("/etc/passwd", "outside of the roots"),
        ("/proc/self/environ", "outside of the roots"),
        ("/dev/zero", "outside of the roots"),
        ("a.txt", "must begin with /"),
        ("", "must begin with /"),
        ("~/a.txt", "must begin with /"),
        ("file:///etc/passwd", "must begin with /"),
        ("{root}/a.txt\0.md", "no NUL"),
        ("{root}/link.txt", "a symlink"),
        ("{root}/inner.txt", "a symlink"),
        ("{root}/up/secret.txt", "'up' is a symlink"),
        ("{root}/up/root/a.txt", "'up' is a symlink"),
        ("{root}/sub/loop", "a symlink"),
        ("{root}/sub/loop/x", "a symlink"),
        ("{root}/fifo", "a device, pipe or socket"),
        ("{root}/s", "a device, pipe or socket"),
        ("{root}/sub", "a directory"),
        ("{root}", "a directory"),
        ("{root}/", "a directory"),
        ("{root}/none.txt", "no such file"),
        ("{root}/none/a.txt", "no such file"),
        ("{root}/a.txt/x", "no directory"),
        ("{root}/" + "x" * 5_000, "not the path of a file"),
        ("{root}/%2e%2e/secret.txt", "no such file"),
    ],
)  # fmt: skip
async def test_a_hostile_path_is_refused_with_a_reason(root: Path, path: str, reason: str) -> None:
    with pytest.raises(FetchRefused, match=reason) as raised:
        await read_path(path.format(root=root, parent=root.parent), [root])
    assert SECRET not in str(raised.value)


async def test_without_a_root_no_path_is_read(root: Path) -> None:
    with pytest.raises(FetchRefused, match="documents by path are off"):
        await read_path(f"{root}/a.txt", [])


async def test_a_device_below_a_root_is_not_opened() -> None:
    with pytest.raises(FetchRefused, match="a device"):
        await read_path("/dev/zero", ["/dev"])


async def test_a_root_may_itself_be_a_symlink_and_one_that_is_gone_may_come_back(root: Path) -> None:
    alias = root.parent / "alias"
    alias.symlink_to(root)
    assert (await read_path(f"{alias}/a.txt", [alias])).content == b"text"
    with pytest.raises(FetchFailed, match=f"root {root}/gone cannot be opened on "):
        await read_path(f"{root}/gone/a.txt", [root / "gone"])


async def test_a_directory_that_turns_into_a_symlink_again_and_again_never_leads_outside(root: Path) -> None:
    (root / "sub" / "secret.txt").write_text("inside")
    stop = threading.Event()

    def swap() -> None:
        while not stop.is_set():
            (root / "sub").rename(root / "aside")
            (root / "sub").symlink_to(root.parent)
            (root / "sub").unlink()
            (root / "aside").rename(root / "sub")
            stop.wait(0.0005)  # or a busy machine never shows the reader the directory

    thread = threading.Thread(target=swap)
    thread.start()
    found = set()
    try:
        for _ in range(400):
            try:
                found.add((await read_path(f"{root}/sub/secret.txt", [root])).content)
            except FetchRefused as error:
                found.add(error.reason)
    finally:
        stop.set()
        thread.join()
    assert SECRET.encode() not in found
    assert b"inside" in found


async def test_a_file_above_the_limit_is_refused_and_a_large_one_is_an_open_file_that_a_pool_reads(root: Path) -> None:
    large = root / "large.txt"
    large.write_text("some words. " * (MEMORY_BYTES_MAX // 10))
    size = large.stat().st_size
    with pytest.raises(FetchRefused, match=f"larger than {size - 1:,} bytes"):
        await read_path(str(large), [root], limits=FetchLimits(size_bytes_max=size - 1))
    with await read_path(str(large), [root], limits=FetchLimits(size_bytes_max=size)) as found:
        assert not isinstance(found.content, bytes)
        large.write_text("changed meanwhile")
        async with ParsePool(size=1) as pool:
            parsed = await pool.parse(found.content, name=found.name)
        assert len(parsed.sections[0].text) == found.size_bytes == size


class FakeResolver(AbstractResolver):
    """Names and their addresses, one list for each time that the name is asked for; the last one stays."""

    def __init__(self, **names: list[list[str]]) -> None:
        self.names = names
        self.asked: list[str] = []

    async def resolve(self, host: str, port: int = 0, family: Any = socket.AF_INET) -> list[Any]:
        self.asked.append(host)
        answers = self.names[host.partition(".")[0]]
        return [
            {
                "hostname": host, "host": address, "port": port, "proto": 0, "flags": socket.AI_NUMERICHOST,
                "family": socket.AF_INET6 if ":" in address else socket.AF_INET,
            }
            for address in (answers.pop(0) if len(answers) > 1 else answers[0])
        ]  # fmt: skip

    async def close(self) -> None: ...


class Site:
    """A web server on this machine, and the paths that it was asked for."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.port = 0

    async def answer(self, request: web.Request) -> web.StreamResponse:  # noqa: PLR0911  (one for each path)
        self.asked.append(request.path)
        match request.path:
            case "/page.html":
                return web.Response(text="<p>hello", content_type="text/html")
            case "/gzip":
                return web.Response(body=gzip.compress(b"a" * 5_000) * 2, headers={"Content-Encoding": "gzip"})
            case "/bomb":
                return web.Response(body=gzip.compress(bytes(50_000_000)), headers={"Content-Encoding": "gzip"})
            case "/cut":
                return web.Response(body=gzip.compress(b"a" * 5_000)[:-9], headers={"Content-Encoding": "gzip"})
            case "/padded":
                return web.Response(body=gzip.compress(b"text") + bytes(700), headers={"Content-Encoding": "gzip"})
            case "/empty":
                return web.Response(headers={"Content-Encoding": "gzip"})
            case "/br":
                return web.Response(body=b"x", headers={"Content-Encoding": "br"})
            case "/large":
                return web.Response(body=bytes(2_000_000))
            case "/endless":
                response = web.StreamResponse()
                await response.prepare(request)
                while True:
                    await response.write(b"x" * 100_000)
            case "/slow":
                response = web.StreamResponse()
                await response.prepare(request)
                await asyncio.sleep(30)
                return response
            case "/to":
                return web.Response(status=302, headers={"Location": request.query["url"]})
            case "/loop":
                return web.Response(status=307, headers={"Location": "/loop"})
        status = int(request.path.strip("/"))
        return web.Response(status=status, headers={"Retry-After": request.query.get("after", "7")})


@pytest.fixture
async def site() -> AsyncIterator[Site]:
    site = Site()
    app = web.Application()
    app.router.add_get("/{path:.*}", site.answer)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    listening = web.TCPSite(runner, "127.0.0.1", 0)
    await listening.start()
    site.port = runner.addresses[0][1]
    yield site
    await runner.cleanup()


async def get(site: Site, path: str, **limits: Any) -> Any:
    """Fetch from a host that may be private, and that is this machine."""
    resolver = FakeResolver(docs=[["127.0.0.1"]], evil=[["127.0.0.1"]])
    host = f"docs.test:{site.port}"
    return await fetch_url(
        f"http://{host}{path}", [], private_hosts=[host], resolver=resolver, limits=FetchLimits(**limits)
    )


async def test_a_page_of_an_allowed_host_is_fetched(site: Site) -> None:
    found = await get(site, "/page.html")
    assert (found.content, found.name, found.content_type) == (b"<p>hello", "page.html", "text/html; charset=utf-8")
    assert found.sha256 == hashlib.sha256(b"<p>hello").hexdigest()
    assert (await get(site, "/gzip")).content == b"a" * 10_000
    with await get(site, "/large") as large:
        assert large.size_bytes == 2_000_000


async def test_a_redirect_is_followed_to_an_allowed_host(site: Site) -> None:
    found = await get(site, "/to?url=/page.html")
    assert found.content == b"<p>hello"
    assert found.source.endswith("/page.html")


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("http://evil.test:{port}/page.html", "is not allowed"),
        ("http://docs.test/page.html", "port 80 is not allowed"),
        ("http://docs.test:{other}/page.html", "is not allowed"),
        ("http://docs.test.:{port}/page.html", "is not allowed"),
        ("http://xdocs.test:{port}/page.html", "is not allowed"),
        ("http://docs.test.evil.test:{port}/page.html", "is not allowed"),
        ("http://127.0.0.1:{port}/page.html", "is not allowed"),
        ("http://2130706433:{port}/page.html", "is not allowed|not a valid URL"),
        ("http://0x7f.1:{port}/page.html", "is not allowed|not a valid URL"),
        ("http://0177.0.0.1:{port}/page.html", "is not allowed|not a valid URL"),
        ("http://127.1:{port}/page.html", "is not allowed|not a valid URL"),
        ("http://[::1]:{port}/page.html", "is not allowed"),
        ("http://[::ffff:127.0.0.1]:{port}/page.html", "is not allowed"),
        ("http://[::ffff:7f00:1]:{port}/page.html", "is not allowed"),
        ("http://localhost:{port}/page.html", "is not allowed"),
        ("http://169.254.169.254/latest/meta-data", "is not allowed"),
        ("http://docs.test:{port}@127.0.0.1:{port}/page.html", "is not allowed|no user or password|not a valid URL"),
        ("http://user:pw@docs.test:{port}/page.html", "no user or password"),
        ("http://docs.test:{port}\\@127.0.0.1/page.html", "backslashes"),
        ("http://docs.test:{port}/ page.html", "blanks"),
        ("http://docs.test:{port}/\r\nHost: evil", "control characters"),
        ("http://127.0.0.1:{port}#@docs.test:{port}/", "is not allowed"),
        ("http://127.0.0.1:{port}?@docs.test:{port}/", "is not allowed"),
        ("file:///etc/passwd", "must begin with http"),
        ("ftp://docs.test:{port}/page.html", "must begin with http"),
        ("gopher://docs.test:{port}/_x", "must begin with http"),
        ("//docs.test:{port}/page.html", "must begin with http"),
        ("docs.test", "must begin with http"),
        ("http://", "is not allowed|not a valid URL"),
        ("http://docs.test:99999/page.html", "not a valid URL"),
        ("http://docs.test:{port}/" + "x" * 5_000, "4,096 characters"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("redirected", [False, True], ids=["asked", "redirected"])
async def test_a_hostile_url_is_refused_also_as_the_target_of_a_redirect(
    site: Site, url: str, reason: str, redirected: bool
) -> None:
    url = url.replace("{port}", str(site.port)).replace("{other}", str(site.port + 1))
    host = f"docs.test:{site.port}"
    resolver = FakeResolver(docs=[["127.0.0.1"]])
    if redirected and ("\r" in url or "://" not in url or url == "http://" or len(url) > 4_096):
        pytest.skip("no header can hold this, or the target is a relative one")
    asked = f"http://{host}/to?url={quote(url, safe='')}" if redirected else url
    with pytest.raises(FetchRefused, match=reason):
        await fetch_url(asked, [], private_hosts=[host], resolver=resolver)
    assert site.asked == (["/to"] if redirected else [])


async def test_without_a_host_no_url_is_fetched(site: Site) -> None:
    with pytest.raises(FetchRefused, match="documents by URL are off"):
        await fetch_url(f"http://127.0.0.1:{site.port}/page.html", [])
    assert site.asked == []


PRIVATE = [
    "127.0.0.1", "127.8.8.8", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0",
    "224.0.0.1", "255.255.255.255", "240.0.0.1", "192.0.0.1", "198.18.0.1", "::1", "::", "fe80::1", "fc00::1",
    "ff02::1",
    "::ffff:127.0.0.1", "::ffff:10.0.0.1", "::ffff:169.254.169.254", "::127.0.0.1", "64:ff9b::7f00:1", "2002:7f00:1::",
    "2002:a9fe:a9fe::", "fec0::1", "fd00:ec2::254", "2001:db8::1", "64:ff9b:1::7f00:1", "not an address",
]  # fmt: skip


@pytest.mark.parametrize("address", PRIVATE)
async def test_a_name_that_leads_to_a_private_address_is_refused_though_another_of_its_addresses_is_public(
    site: Site, address: str
) -> None:
    host = f"docs.test:{site.port}"
    for addresses in ([address], ["93.184.215.14", address]):
        with pytest.raises(FetchRefused, match="leads to a private network or nowhere"):
            await fetch_url(f"http://{host}/page.html", [host], resolver=FakeResolver(docs=[addresses]))
    assert site.asked == []


@pytest.mark.parametrize("address", ["93.184.215.14", "2606:2800:21f:cb07:6820:80da:af6b:8b2c", "::ffff:93.184.215.14"])
def test_a_public_address_is_allowed(address: str) -> None:
    assert refusal_of(address, private=False) == ""


@pytest.mark.parametrize(
    "address", ["169.254.169.254", "0.0.0.0", "fe80::1%eth0", "224.0.0.1", "::ffff:169.254.169.254"]
)
def test_a_private_host_may_be_this_machine_but_never_a_metadata_service(address: str) -> None:
    assert refusal_of("127.0.0.1", private=True) == refusal_of("10.0.0.1", private=True) == ""
    assert refusal_of(address, private=True)


async def test_a_name_that_is_rebound_is_asked_for_once_and_what_it_led_to_then_is_what_counts(site: Site) -> None:
    host = f"docs.test:{site.port}"
    public_first = FakeResolver(docs=[["192.0.2.1"], ["127.0.0.1"]])
    with pytest.raises(FetchRefused, match=r"192\.0\.2\.1 is not a public address"):
        await fetch_url(f"http://{host}/page.html", [host], resolver=public_first)
    once = FakeResolver(docs=[["127.0.0.1"], ["127.0.0.2"]])
    assert (await fetch_url(f"http://{host}/page.html", [], private_hosts=[host], resolver=once)).content
    assert once.asked == ["docs.test"]


@pytest.mark.parametrize("literal", ["127.0.0.1", "[::1]", "[::ffff:127.0.0.1]"])
async def test_an_address_in_an_allowed_url_is_checked_though_nothing_resolves_it(site: Site, literal: str) -> None:
    host = f"{literal}:{site.port}"
    with pytest.raises(FetchRefused, match="leads to a private network"):
        await fetch_url(f"http://{host}/page.html", [host])
    assert site.asked == []


async def test_a_redirect_to_a_name_that_leads_to_a_private_address_is_refused(site: Site) -> None:
    host, other = f"docs.test:{site.port}", f"evil.test:{site.port}"
    resolver = FakeResolver(docs=[["127.0.0.1"]], evil=[["127.0.0.1"]])
    with pytest.raises(FetchRefused, match="leads to a private network"):
        await fetch_url(
            f"http://{host}/to?url=http://{other}/page.html", [other], private_hosts=[host], resolver=resolver
        )
    assert site.asked == ["/to"]


@pytest.mark.parametrize(
    ("path", "limits", "reason"),
    [
        ("/bomb", {"size_bytes_max": 1_000_000}, "larger than 1,000,000 bytes"),
        ("/large", {"size_bytes_max": 1_000_000}, "larger than 1,000,000 bytes"),
        ("/endless", {"size_bytes_max": 1_000_000}, "larger than 1,000,000 bytes"),
        ("/loop", {"redirects_max": 3}, "redirects more than 3 times"),
        ("/br", {}, "'br', which was not asked for"),
        ("/404", {}, "answers 404 Not Found"),
        ("/401", {}, "answers 401"),
        ("/204", {}, "answers 204"),
        ("/304", {}, "answers 304"),
    ],
)
async def test_what_will_never_be_a_document_is_refused(site: Site, path: str, limits: Any, reason: str) -> None:
    with pytest.raises(FetchRefused, match=reason):
        await get(site, path, **limits)


@pytest.mark.parametrize("status", [408, 425, 429, 500, 502, 503])
async def test_what_may_pass_can_be_retried_after_the_time_that_the_server_asks_for(site: Site, status: int) -> None:
    with pytest.raises(FetchFailed, match=f"answers {status}") as raised:
        await get(site, f"/{status}")
    assert (raised.value.retryable, raised.value.retry_after_s) == (True, 7.0)


@pytest.mark.parametrize(("asked", "waited_s"), [("0", 5.0), ("1", 5.0), ("999999999", 3_600.0), ("-1", None)])
async def test_a_server_that_asks_for_no_pause_or_for_years_decides_neither(
    site: Site, asked: str, waited_s: float | None
) -> None:
    with pytest.raises(FetchFailed) as raised:
        await get(site, f"/503?after={asked}")
    assert raised.value.retry_after_s == waited_s


async def test_a_name_server_that_does_not_answer_holds_up_no_other_work(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = threading.Event()

    def ask(*_: Any, **__: Any) -> Any:
        answers.wait()
        raise socket.gaierror(socket.EAI_AGAIN, "no answer")

    monkeypatch.setattr(socket, "getaddrinfo", ask)
    fetches = [asyncio.create_task(fetch_url("http://docs.test/", ["docs.test"])) for _ in range(40)]
    try:
        await asyncio.sleep(0)  # all have begun
        await asyncio.wait_for(asyncio.gather(*(asyncio.to_thread(int) for _ in range(40))), 20)
        assert (await asyncio.wait_for(read_path(f"{root}/a.txt", [root]), 20)).content == b"text"
        assert not any(each.done() for each in fetches)
    finally:
        answers.set()
        ends = await asyncio.gather(*fetches, return_exceptions=True)
    assert {type(each) for each in ends} == {FetchFailed}


async def test_what_follows_the_compressed_content_is_padding_and_no_content_is_none(site: Site) -> None:
    assert (await get(site, "/padded")).content == b"text"
    assert (await get(site, "/empty")).content == b""


async def test_a_content_type_of_any_bytes_is_a_text_that_a_parser_can_be_sent() -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/html; charset=\xff\r\nContent-Length: 7\r\n\r\n<p>text")
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        host = "{}:{}".format(*server.sockets[0].getsockname())
        found = await fetch_url(f"http://{host}/", [], private_hosts=[host])
    async with ParsePool(size=1) as pool:
        parsed = await pool.parse(found.content, name="page", content_type=found.content_type)
    assert parsed.sections[0].text == "text"


async def test_a_document_by_url_keeps_the_url_that_was_given(site: Site) -> None:
    """Where a redirect leads may hold a secret for a moment, as of cloud storage, and is another one each time."""
    host = f"127.0.0.1:{site.port}"
    config = RagConfig(tenants={"acme": TenantConfig(private_hosts=(host,))})
    message = RagDocument(url=f"http://{host}/to?url=/page.html%3Fsignature=abc")
    job = cast("Any", SimpleNamespace(tenant="acme"))
    async with sources.opened(job, message, config, FetchLimits(), FetchShare(1), ByteBudget(1)) as content:
        assert (content.content, content.source) == (b"<p>hello", message.url)


async def test_slow_servers_broken_answers_and_closed_ports_can_be_retried(site: Site) -> None:
    with pytest.raises(FetchFailed, match=r"longer than 0\.2 s"):
        await get(site, "/slow", total_s=0.2)
    with pytest.raises(FetchFailed, match="ended too early"):
        await get(site, "/cut")
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        host = f"127.0.0.1:{unused.getsockname()[1]}"
        with pytest.raises(FetchFailed, match="ClientConnectorError"):
            await fetch_url(f"http://{host}/", [], private_hosts=[host])


@pytest.mark.parametrize("host", ["http://docs.test", "docs.test/path", "user@docs.test", "", "docs.test?x", "a b"])
async def test_an_allowed_host_that_is_none_is_an_error_of_the_settings(host: str) -> None:
    with pytest.raises(SettingsError, match="must be a name or address"):
        await fetch_url("http://docs.test/", [host])
