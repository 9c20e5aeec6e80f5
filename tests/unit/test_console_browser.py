"""The console in a real headless Chromium: signing in, what it shows, hostile names, keyboard, phone, colours.

Skipped where no Chromium is on the PATH. One browser serves all of these: starting one takes longer than they do.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
from helpers.chromium import Tab, browser, find_browser
from helpers.console_site import Site, Traffic
from redis.asyncio import Redis

from joinwise.cluster import apikeys
from joinwise.cluster.config import GatewayConfig

HOSTILE = '<img src=x onerror="document.title=`taken`">"><script>document.title=`taken`</script>'
pytestmark = pytest.mark.skipif(
    find_browser() is None, reason="no Chromium on the PATH (Debian: apt-get install chromium)"
)


@pytest.fixture
async def stack() -> AsyncIterator[AsyncExitStack]:
    async with AsyncExitStack() as stack:
        yield stack


async def a_site(stack: AsyncExitStack, redis: Redis, cluster: str, **settings: object) -> Site:
    """A console over two models, one of them split, with one request behind it."""
    site = Site(
        redis, cluster, GatewayConfig.model_validate({"console": {"enabled": True, "every_s": 0.2}, **settings})
    )
    stack.push_async_callback(site.close)
    await site.add("p0", "prefill", "prefills", "large", prefill_tokens_per_s=1e6)
    await site.add("d0", "decode", "decodes", "large", step_ms=1, transport="tcp", speculates=True)
    await site.add("m0", "mixed", "both", HOSTILE, step_ms=1)
    await site.beat()
    await stack.enter_async_context(site.serving())
    return site


async def a_tab(stack: AsyncExitStack) -> Tab:
    binary = find_browser()
    assert binary is not None
    return await stack.enter_async_context(browser(binary))


async def text(tab: Tab, selector: str) -> str:
    return str(await tab.run(f"document.querySelector({selector!r}).innerText"))


async def test_signing_in(stack: AsyncExitStack, redis_client: Redis, cluster_name: str, tmp_path: Path) -> None:
    key, entry = apikeys.make("operators", ("metrics",))
    weak, other = apikeys.make("users", ("user",))
    apikeys.KeyRing((entry, other)).save(tmp_path / "keys.yaml")
    site = await a_site(stack, redis_client, cluster_name, keys_file=str(tmp_path / "keys.yaml"))
    tab = await a_tab(stack)
    await tab.open(f"{site.url}/console")
    await tab.until("document.activeElement.id === 'credential'")  # the form asks at once, without a word of failure
    assert await text(tab, "#refusal") == ""
    for wrong, words in (("nonsense", "not known"), (weak, "lacks the role 'metrics'")):
        await tab.type(wrong)
        await tab.press("Enter", 13, "\r")
        await tab.until(f"document.querySelector('#refusal').textContent.includes({words!r})")
    await tab.type(key)
    await tab.press("Enter", 13, "\r")
    await tab.until("document.querySelectorAll('.worker').length === 3")
    assert await tab.run("document.querySelector('#sign-in').hidden")
    assert await text(tab, "#cluster-name") == cluster_name
    # In a header, in this tab, and nowhere else.
    secret = key.rpartition("_")[2]
    assert not [each["url"] for each in tab.requests if secret in each["url"]]
    assert {each["url"].split("/")[2] for each in tab.requests} == {site.url.split("/")[2]}
    assert await tab.run("location.href") == f"{site.url}/console/"
    assert await tab.run("document.cookie + Object.values({...localStorage}).join()") == "auto"
    assert secret not in await tab.run("document.documentElement.outerHTML")
    await tab.open(f"{site.url}/console/")  # again, in the same tab
    await tab.until("document.querySelectorAll('.worker').length === 3")
    # A key that is revoked is out with the next stream.
    apikeys.KeyRing((other,)).save(tmp_path / "keys.yaml")
    await tab.run("document.querySelector('#sign-out').click()")
    await tab.until("document.activeElement.id === 'credential'")
    assert await tab.run("sessionStorage.length") == 0
    assert await tab.run("document.querySelector('#view').hidden")
    assert [each for each in tab.errors if "401" not in each and "403" not in each] == []


async def test_what_it_shows(stack: AsyncExitStack, redis_client: Redis, cluster_name: str, tmp_path: Path) -> None:
    site = await a_site(stack, redis_client, cluster_name)
    traffic = Traffic(site)
    await traffic.request(HOSTILE, "large", 2000, 5)
    await traffic.request("small-1", HOSTILE, 50, 3)
    tab = await a_tab(stack)
    await tab.size(1400, 1000)
    await tab.open(f"{site.url}/console/")
    await tab.until("document.querySelectorAll('#decisions .row').length === 2")
    await tab.until("document.querySelectorAll('#requests .row').length === 2")
    await tab.until("document.querySelectorAll('#links tbody tr').length === 1")
    await tab.until("document.querySelectorAll('.served > .model').length === 2")
    # Pools with their models, workers with their bars, links with how and how much.
    assert await tab.run("[...document.querySelectorAll('.served > .model')].map((each) => each.textContent)") == [
        HOSTILE,
        "large",
    ]
    columns = "[...document.querySelectorAll('[aria-label=large] .map-column')].map((each) => each.dataset.role)"
    assert await tab.run(columns) == ["prefill", "decode"]
    await tab.until("document.querySelectorAll('.worker [role=meter][aria-valuetext]').length === 7")
    drafts = site.workers["d0"].drafts
    assert drafts is not None
    accepted = f"{int(100 * drafts.accepted._value.get() / drafts.drafted._value.get() + 0.5)} %"
    assert await tab.run("document.querySelector('[data-id=d0] [aria-label=drafts]').ariaValueText") == accepted
    assert await tab.run("document.querySelectorAll('.wires path').length") == 1
    link = await text(tab, "#links tbody tr")
    assert "p0" in link and "d0" in link and "tcp" in link and "54.7 MiB" in link and "another host" in link
    # Names that try to be more than text are text.
    assert await tab.run("[document.querySelectorAll('main img, main script').length, document.title]") == [
        0,
        f"{cluster_name} · joinwise console",
    ]
    with pytest.raises(AssertionError, match="TrustedHTML"):
        await tab.run("document.body.innerHTML = 'x'")
    # What comes in is shown; what was there keeps its element, and the focus.
    await tab.run("document.querySelector('#requests .row').focus()")
    held = await text(tab, "#requests .row:focus")
    await traffic.request("later", "large", 100, 2)
    await tab.until("document.querySelectorAll('#requests .row').length === 3")
    assert await text(tab, "#requests .row:focus") == held
    # A request: the keyboard opens it, its waterfall and its decision are there, Escape closes it.
    await tab.run("[...document.querySelectorAll('#requests .row')].at(-1).focus()")
    await tab.press("Enter", 13, "\r")
    await tab.until("document.querySelectorAll('#detail .waterfall li').length >= 5")
    assert await text(tab, "#detail-title") == HOSTILE
    phases = await tab.run("[...document.querySelectorAll('#detail .waterfall i')].map((each) => each.className)")
    assert [each for each in phases if each != "queue"] == ["route", "prefill", "wire", "exposed", "decode"]
    assert await tab.run("[...document.querySelectorAll('#detail tr.chosen th')].map((each) => each.textContent)") == [
        "✓ p0",
        "✓ d0",
    ]
    await tab.press("Escape", 27)
    await tab.until("!document.querySelector('#detail').open")
    assert await tab.run("document.activeElement.classList.contains('row')")
    assert [each for each in tab.errors if "TrustedHTML" not in each] == []  # that one was asked for above


async def test_at_hand_for_everybody(stack: AsyncExitStack, redis_client: Redis, cluster_name: str) -> None:
    """Every control by Tab and with a name, a phone without sideways scrolling, both colours with contrast, a pause."""
    site = await a_site(stack, redis_client, cluster_name)
    await Traffic(site).request("r", "large", 100, 2)
    tab = await a_tab(stack)
    await tab.size(390, 844, phone=True)
    await tab.open(f"{site.url}/console/")
    await tab.until("document.querySelector('#requests .row') && document.querySelector('#links tbody tr')")
    assert await tab.run("document.documentElement.scrollWidth <= 390")
    reached = []
    while "row" not in reached:
        await tab.press("Tab", 9)
        reached.append(await tab.run("document.activeElement.id || document.activeElement.className"))
        assert len(reached) < 12, reached
    assert [each for each in reached if each in ("skip", "pause", "theme", "links", "find-id", "row")] == [
        "skip",
        "pause",
        "theme",
        "links",
        "find-id",
        "row",
    ]
    unnamed = "(each) => each.checkVisibility() && !each.innerText && !each.ariaLabel && !each.labels?.length"
    assert await tab.run(f"[...document.querySelectorAll('button, input')].filter({unnamed}).length") == 0
    contrast = """(() => {
        const light = (colour) => {
            const linear = (each) => (each <= 0.04045 ? each / 12.92 : ((each + 0.055) / 1.055) ** 2.4);
            const parts = colour.match(/[0-9.]+/g).slice(0, 3).map((each) => linear(each / 255));
            return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2];
        };
        const style = (selector) => getComputedStyle(document.querySelector(selector));
        const [a, b] = [light(style('.tile .quiet').color), light(style('.tile').backgroundColor)].sort();
        return (b + 0.05) / (a + 0.05);
    })()"""
    grounds = []
    for scheme in ("dark", "light"):
        await tab.colours(scheme)
        assert await tab.run(contrast) >= 4.5
        grounds.append(await tab.run("getComputedStyle(document.body).backgroundColor"))
    assert grounds[0] != grounds[1]
    await tab.run("document.querySelector('#theme').click()")  # dark, whatever the system has
    assert await tab.run("getComputedStyle(document.body).backgroundColor") == grounds[0]
    await tab.run("document.querySelector('#pause').click()")
    await Traffic(site).request("unseen", "large", 100, 2)
    await asyncio.sleep(0.5)  # more than one look: nothing may be drawn
    assert await tab.run("document.querySelectorAll('#requests .row').length") == 1
    await tab.run("document.querySelector('#pause').click()")
    await tab.until("document.querySelectorAll('#requests .row').length === 2")
    assert tab.errors == []


async def test_it_goes_on_when_the_gateway_is_back(
    stack: AsyncExitStack, redis_client: Redis, cluster_name: str
) -> None:
    site = await a_site(stack, redis_client, cluster_name)
    tab = await a_tab(stack)
    await tab.open(f"{site.url}/console/")
    await tab.until("document.querySelector('#state').textContent === 'live'")
    most, site.feed._most = site.feed._most, 0
    for page in list(site.feed._pages):
        page.let_go()
    await tab.until("document.querySelector('#trouble').textContent.includes('consoles are open')")
    site.feed._most = most
    await tab.until("document.querySelector('#state').textContent === 'live'")
    assert await tab.run("document.querySelector('#trouble').hidden")
