"""The console's server part: what is open, what is not, the stream of events, and what is said of a request."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from helpers.console_site import Site, Traffic, nothing_else
from redis.asyncio import Redis

from joinwise.actors.gateway import console as module
from joinwise.actors.gateway.acceptance import acceptance
from joinwise.actors.gateway.console import EVENTS, REQUEST, ROOT
from joinwise.actors.gateway.front import Front
from joinwise.actors.gateway.ledgers import Ledgers
from joinwise.cluster import apikeys
from joinwise.cluster.config import GatewayConfig, JoinwiseConfig, RouterConfig
from joinwise.cluster.router.registry import Registry, WorkerInfo
from joinwise.cluster.router.why import latest_decisions
from joinwise.cluster.store.embedded import EmbeddedRedis

PAGE = Path(module.__file__).parent / "page"
HOSTILE = '<img src=x onerror="alert(1)">\n\nevent: pulse\ndata: {}'


@pytest.fixture
def keys(tmp_path: Path) -> dict[str, str]:
    """A credential of each role."""
    made = {role: apikeys.make(f"tenant-{role}", (role,)) for role in apikeys.ROLES}
    apikeys.KeyRing(tuple(entry for _, entry in made.values())).save(tmp_path / "keys.yaml")
    return {role: token for role, (token, _) in made.items()}


@pytest.fixture
async def site(redis_client: Redis, cluster_name: str, tmp_path: Path, keys: dict[str, str]) -> AsyncIterator[Site]:
    """A console that asks for credentials."""
    settings = {"keys_file": str(tmp_path / "keys.yaml"), "console": {"enabled": True, "every_s": 0.2, "pages": 2}}
    site = Site(redis_client, cluster_name, GatewayConfig.model_validate(settings))
    yield site
    await site.close()


def client(site: Site, token: str = "") -> httpx.AsyncClient:
    headers = {"authorization": f"Bearer {token}"} if token else {}
    return httpx.AsyncClient(transport=httpx.ASGITransport(app=site.app), base_url="http://gateway", headers=headers)


class Stream:
    """A client of the stream, over ASGI: reads when it is told to."""

    def __init__(self, app: Any, token: str = "") -> None:
        self.chunks: asyncio.Queue[Any] = asyncio.Queue()
        self.gone = asyncio.Event()
        self.reads = asyncio.Event()
        self.reads.set()
        credential = [(b"authorization", f"Bearer {token}".encode())] if token else []
        scope = {"type": "http", "method": "GET", "path": EVENTS, "headers": credential, "client": None}
        self.task = asyncio.create_task(app({**scope, "query_string": b""}, self._receive, self._send))

    async def _receive(self) -> Any:
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Any) -> None:
        await self.reads.wait()
        self.chunks.put_nowait(message)

    async def begin(self) -> int:
        message = await self.chunks.get()
        self.headers = {name.decode(): value.decode() for name, value in message["headers"]}
        return int(message["status"])

    async def events(self, name: str) -> Any:
        """The data of the next event of a name."""
        while True:
            message = await self.chunks.get()
            assert message.get("more_body"), "the stream has ended"
            for event in message["body"].decode().split("\n\n")[:-1]:
                first, second = event.split("\n")  # never more lines, whatever clients are called
                if first == f"event: {name}":
                    return json.loads(second.removeprefix("data: "))

    async def leave(self) -> None:
        self.gone.set()
        await self.task


# Who may see what.


def test_it_is_off_unless_it_is_enabled() -> None:
    assert GatewayConfig().console.enabled is False


@pytest.mark.parametrize("wrong", [{"every_s": 0}, {"pages": 0}, {"enabled": "perhaps"}, {"port": 1}])
def test_wrong_settings_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        GatewayConfig.model_validate({"console": wrong})


def test_the_page_is_whole_and_its_own() -> None:
    """Nothing from elsewhere, nothing inline: the policy would refuse it. Nothing that makes elements of text."""
    names = {file.name for file in PAGE.iterdir()}
    texts = {name: (PAGE / name).read_text(encoding="utf-8") for name in names}
    asked_for = set(re.findall(r'(?:href|src)="([^"#]+)"|from "\./([^"]+)"', "\n".join(texts.values())))
    assert {one or other for one, other in asked_for} == names - {"index.html"}
    for name, text in texts.items():
        assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)|url\(|@import", text), name
        assert not re.search(
            r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\b|new Function|srcdoc", text
        ), name
    page = texts["index.html"]
    assert not re.search(r"\son\w+=|\sstyle=|javascript:|<style|<script(?![^>]*\ssrc=)", page)
    assert sum(map(len, texts.values())) < 80_000


async def test_the_files_are_open_and_say_nothing(site: Site) -> None:
    paths = site.console.open_paths
    assert paths == {ROOT, f"{ROOT}/", *(f"{ROOT}/{file.name}" for file in PAGE.iterdir() if file.name != "index.html")}
    async with client(site) as stranger:
        for path in paths - {ROOT}:
            answer = await stranger.get(path)
            assert answer.status_code == 200
            assert answer.headers["x-content-type-options"] == "nosniff"
            policy = answer.headers["content-security-policy"]
            assert "default-src 'none'" in policy and "unsafe" not in policy and "*" not in policy
            again = await stranger.get(path, headers={"if-none-match": answer.headers["etag"]})
            assert (again.status_code, again.content) == (304, b"")
            head = await stranger.head(path)
            assert (head.status_code, head.content, head.headers["etag"]) == (200, b"", answer.headers["etag"])
        answer = await stranger.get(ROOT)
        assert (answer.status_code, answer.headers["location"]) == (308, "console/")
        assert (await stranger.get(f"{ROOT}/")).headers["content-type"] == "text/html; charset=utf-8"
        assert (await stranger.get(f"{ROOT}/page.js")).headers["content-type"] == "text/javascript; charset=utf-8"
        assert (await stranger.post(f"{ROOT}/")).status_code == 405


@pytest.mark.parametrize("path", [EVENTS, f"{REQUEST}?id=x"])
async def test_the_data_needs_the_role_metrics(site: Site, keys: dict[str, str], path: str) -> None:
    async with client(site) as stranger:
        for wrong in ("", "?token={0}", "?authorization=Bearer%20{0}", "?api_key={0}"):
            joined = path + wrong.format(keys["admin"]).replace("?", "&" if "?" in path else "?")
            assert (await stranger.get(joined)).status_code == 401
    async with client(site, keys["user"]) as user:
        answer = await user.get(path)
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "forbidden")
        assert "metrics" in answer.json()["error"]["message"]


async def test_a_page_of_another_site_gets_nothing(site: Site, keys: dict[str, str]) -> None:
    async with client(site, keys["metrics"]) as other:
        for path in (EVENTS, f"{REQUEST}?id=x"):
            assert (await other.get(path, headers={"sec-fetch-site": "cross-site"})).status_code == 403
        assert (await other.options(EVENTS)).status_code == 405  # a preflight, which no header of ours lets pass
        assert (await other.get(f"{REQUEST}?id=x", headers={"sec-fetch-site": "same-origin"})).status_code == 200


async def test_what_is_disabled_is_not_there(site: Site, keys: dict[str, str]) -> None:
    site.app._app, site.app._open = site.console._app, frozenset({"/health"})  # type: ignore[attr-defined]
    async with client(site) as stranger:
        assert (await stranger.get(f"{ROOT}/")).status_code == 401
    async with client(site, keys["admin"]) as admin:
        for path in (ROOT, f"{ROOT}/", EVENTS):
            assert (await admin.get(path)).text == "nothing else"


TRAVERSALS = [
    "/console/../guard.py",
    "/console/../../auth.py",
    "/console/..%2f..%2fauth.py",
    "/console/%2e%2e/console.py",
    "/console/%2e%2e%2fconsole.py",
    "/console/..%5cconsole.py",
    "/console//etc/passwd",
    "/console/%2fetc%2fpasswd",
    "/console/page/index.html",
    "/console/page.css%00.js",
    "/console/./page.css",
    "/console/page.css/",
    "/console/index.html",
    "/consolee",
    "/console%2f",
]


@pytest.mark.parametrize("path", TRAVERSALS)
async def test_nothing_else_of_the_disk_can_be_asked_for(site: Site, keys: dict[str, str], path: str) -> None:
    """Over a real socket, where nobody has tidied the path up."""
    async with site.serving():
        for token, expected in (("", b"401"), (keys["admin"], b"404")):
            reader, writer = await asyncio.open_connection("127.0.0.1", int(site.url.rpartition(":")[2]))
            credential = f"Authorization: Bearer {token}\r\n" if token else ""
            writer.write(f"GET {path} HTTP/1.1\r\nHost: x\r\n{credential}Connection: close\r\n\r\n".encode())
            answer = await reader.read()
            writer.close()
            if path == "/console%2f":  # decoded, this is the page
                expected = b"200"
            assert answer.split(b" ", 2)[1] == expected
            assert b"import" not in answer and b"root:" not in answer


async def test_the_gateway_puts_it_before_its_application(
    redis_server: EmbeddedRedis, redis_client: Redis, cluster_name: str, make_worker: Callable[..., WorkerInfo]
) -> None:
    from joinwise.actors.gateway.gateway import Gateway

    config = JoinwiseConfig.model_validate(
        {
            "cluster": cluster_name,
            "models": [{"name": "m", "model": "smollm2-135m-instruct"}],
            "pools": [{"name": "both", "model": "m", "role": "mixed"}],
            "gateway": {"console": {"enabled": True, "every_s": 0.2}},
        }
    )
    await Registry(redis_client, cluster_name, RouterConfig()).register(make_worker("w"))
    gateway = Gateway(config, redis_server.url)
    console = gateway._console(Front(nothing_else, Ledgers(None), max_body_bytes=1000))
    stream = Stream(console)
    assert await stream.begin() == 200
    assert (await stream.events("hello"))["gateway"] == gateway.gateway_id
    assert [each["id"] for each in (await stream.events("pulse"))["workers"]] == ["w"]
    await gateway.stop()  # ends the stream, or it would hold the listener open
    await stream.task


# The stream.


async def test_the_stream_tells_what_top_status_and_explain_tell(site: Site, keys: dict[str, str]) -> None:
    await site.add("p", "prefill", "prefills", "large", prefill_tokens_per_s=1e6)
    await site.add("d", "decode", "decodes", "large", step_ms=1, transport="tcp")
    await site.add("m", "mixed", "both", "small")
    await site.beat()
    stream = Stream(site.app, keys["metrics"])
    assert await stream.begin() == 200
    assert stream.headers["content-type"] == "text/event-stream"
    assert stream.headers["cache-control"] == "no-store"
    assert (await stream.events("hello"))["cluster"] == site.cluster
    await Traffic(site).request(HOSTILE, "large", 100, 4)
    (decision,) = await stream.events("decisions")
    assert (decision["request_id"], decision["chosen"]) == (HOSTILE, ["p", "d"])
    assert {each["worker_id"] for each in decision["candidates"]} == {"p", "d"}
    while not (pulse := await stream.events("pulse"))["hand_offs"]:
        pass
    assert [[p, d] for p, d, _ in pulse["hand_offs"]] == [["p", "d"]]
    assert [(each["pool"], each["model"], each["roles"]) for each in pulse["pools"]] == [
        ("both", "small", {"mixed": 1}),
        ("decodes", "large", {"decode": 1}),
        ("prefills", "large", {"prefill": 1}),
    ]
    worker = next(each for each in pulse["workers"] if each["id"] == "d")
    assert (worker["kv_blocks_total"], worker["pool"], worker["role"]) == (
        4096,
        "decodes",
        "decode",
    )
    await stream.leave()
    later = Stream(site.app, keys["admin"])
    (ledger,) = await later.events("requests") if await later.begin() == 200 else ()
    assert (ledger["request_id"], ledger["transport"], ledger["output_tokens"]) == (HOSTILE, "tcp", 4)
    await later.leave()
    assert site.feed.open_pages == 0


async def test_links_come_over_the_workers_own_interface(site: Site, keys: dict[str, str]) -> None:
    await site.add("p", "prefill", "prefill", "m", prefill_tokens_per_s=1e6)
    await site.add("d", "decode", "decode", "m", step_ms=1)
    await Traffic(site).request("r", "m", 100, 2)
    async with site.serving():
        stream = Stream(site.app, keys["metrics"])
        assert await stream.begin() == 200
        (link,) = await stream.events("links")
        await stream.leave()
    assert (link["sender"], link["receiver"], link["transport"]) == ("p", "d", "shm")
    assert link["bytes"] == 100 * 28_672


async def test_drafts_are_told_of_by_the_workers_that_speculate(site: Site, keys: dict[str, str]) -> None:
    fast = await site.add("fast", "mixed", "both", "m", speculates=True)
    await site.add("plain", "mixed", "both", "m")
    assert fast.drafts is not None
    fast.drafts.step(4, 3)
    fast.drafts.step(2, 0)
    stream = Stream(site.app, keys["metrics"])
    assert await stream.begin() == 200
    assert await stream.events("acceptance") == [{"worker_id": "fast", "drafted": 6, "accepted": 3, "steps": 2}]
    await stream.leave()


@pytest.mark.parametrize(
    "told",
    [
        None,
        "",
        "python_info 1\n",
        "vllm:spec_decode_num_draft_tokens_total{",
        "vllm:spec_decode_num_draft_tokens_total nan\n",
        "vllm:spec_decode_num_draft_tokens_total inf\n",
        "vllm:spec_decode_num_draft_tokens_total_more 1\n",
    ],
)
async def test_what_says_nothing_of_drafts_is_left_out(
    make_worker: Callable[..., WorkerInfo], told: str | None
) -> None:
    worker = make_worker("fast", capabilities=frozenset())
    assert await acceptance([worker], lambda _: told) == ()


async def test_no_more_pages_than_may_be_open(site: Site, keys: dict[str, str]) -> None:
    open_ones = [Stream(site.app, keys["metrics"]) for _ in range(2)]
    assert [await each.begin() for each in open_ones] == [200, 200]
    async with client(site, keys["metrics"]) as third:
        refused = await third.get(EVENTS)
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "5")
        await open_ones[0].leave()
        room = Stream(site.app, keys["metrics"])
        assert await room.begin() == 200
    for each in (room, open_ones[1]):
        await each.leave()
    assert site.feed.open_pages == 0


async def test_a_page_shows_its_credential_anew_after_a_while(
    site: Site, keys: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_LONGEST_S", 0.0)
    stream = Stream(site.app, keys["metrics"])
    assert await stream.begin() == 200
    await stream.task
    assert stream.chunks.get_nowait() == {"type": "http.response.body", "body": b""}  # ended, not cut
    assert site.feed.open_pages == 0


async def test_a_client_that_does_not_read_is_dropped(
    site: Site, keys: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_PATIENCE_S", 0.05)
    slow, good = Stream(site.app, keys["metrics"]), Stream(site.app, keys["metrics"])
    assert [await slow.begin(), await good.begin()] == [200, 200]
    slow.reads.clear()
    await slow.task
    assert site.feed.open_pages == 1
    assert await good.events("pulse")
    await good.leave()


async def test_a_socket_that_nobody_reads_is_given_up(
    site: Site, keys: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_PATIENCE_S", 0.05)
    async with site.serving():
        reader, writer = await asyncio.open_connection("127.0.0.1", int(site.url.rpartition(":")[2]), limit=1024)
        writer.write(f"GET {EVENTS} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {keys['metrics']}\r\n\r\n".encode())
        assert (await reader.readline()).split()[1] == b"200"
        while site.feed.open_pages:
            site.feed._tell(b": more than sockets hold\n\n" * 100_000)
            await asyncio.sleep(0.01)
        writer.close()


async def test_a_gateway_that_stops_ends_its_streams(site: Site, keys: dict[str, str]) -> None:
    stream = Stream(site.app, keys["metrics"])
    await stream.begin()
    site.feed.close()
    await stream.task
    async with client(site, keys["metrics"]) as late:
        assert (await late.get(EVENTS)).status_code == 429


# One request.


async def test_all_that_is_known_of_a_request(site: Site, keys: dict[str, str]) -> None:
    await site.add("p", "prefill", "prefill", "m", prefill_tokens_per_s=1e6)
    await site.add("d", "decode", "decode", "m", step_ms=1)
    await Traffic(site).request("chatcmpl-mine", "m", 100, 3)
    async with client(site, keys["metrics"]) as page:
        for name in ("chatcmpl-mine", "mine"):  # as vLLM and as its client call it
            answer = await page.get(REQUEST, params={"id": name})
            assert answer.headers["cache-control"] == "no-store"
            known = answer.json()
            assert [each["output_tokens"] for each in known["ledgers"]] == [3]
            assert [each["chosen"] for each in known["decisions"]] == [["p", "d"]]
        assert (await page.get(REQUEST, params={"id": "other"})).json() == {"ledgers": [], "decisions": []}
        for wrong in ({}, {"id": ""}, {"id": "x" * 257}):
            assert (await page.get(REQUEST, params=wrong)).status_code == 400


async def test_the_latest_decisions_are_the_last_in_order(site: Site, redis_client: Redis) -> None:
    await site.add("m", "mixed", "both", "m")
    traffic = Traffic(site)
    for number in range(4):
        await traffic.request(f"r{number}", "m", 10, 1)
    latest = await latest_decisions(redis_client, site.cluster, 3)
    assert [each.request_id for each in latest] == ["r1", "r2", "r3"]
    assert [each.request_id for each in site.ledgers.latest(2)] == ["r2", "r3"]
    assert await latest_decisions(redis_client, f"{site.cluster}-none", 3) == []
