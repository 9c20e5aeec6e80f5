"""Take pictures of /console under load: docs/images/console*.png, by a headless Chromium.

No engine runs. Workers are registered, requests routed and KV links told of by the real code on a real Redis; only the
time that an engine would take is waited for instead of computed (`tests/helpers/console_site.py`).

    python scripts/screenshots.py [--out docs/images] [--seconds 25]
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from helpers.chromium import Tab, browser, find_browser  # noqa: E402
from helpers.console_site import Site, Traffic  # noqa: E402

from joinwise.cluster.config import GatewayConfig, RouterConfig  # noqa: E402
from joinwise.cluster.store.client import connect  # noqa: E402
from joinwise.cluster.store.embedded import EmbeddedRedis  # noqa: E402

CODER, CHAT = "qwen2.5-coder-1.5b", "smollm2-135m"


async def main() -> None:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "images")
    parser.add_argument("--seconds", type=float, default=25.0, help="of load before the first picture")
    options = parser.parse_args()
    binary = find_browser()
    if binary is None:
        sys.exit("no Chromium on the PATH: install one (Debian's package is called chromium)")
    options.out.mkdir(parents=True, exist_ok=True)
    server = EmbeddedRedis.start()
    client = connect(server.url)
    try:
        settings = GatewayConfig.model_validate({"console": {"enabled": True, "every_s": 0.5}})
        site = Site(client, "stockholm", settings, RouterConfig(worker_ttl_s=60, max_pending_tokens=24_000))
        await build(site)
        async with site.serving(), browser(binary) as tab:
            load = asyncio.create_task(under_load(Traffic(site)))
            await take(tab, site, options.out, options.seconds)
            load.cancel()
            await asyncio.wait([load])
        await site.close()
    finally:
        await client.aclose()
        server.stop()


async def build(site: Site) -> None:
    """Two models: one split over two pools on three machines, a small one whole."""
    for number in range(3):
        await site.add(f"prefill-{number}", "prefill", "prefill", CODER, prefill_tokens_per_s=7000 + 800 * number)
    for number in range(4):
        transport = "shm" if number < 2 else "tcp"
        await site.add(f"decode-{number}", "decode", "decode", CODER, step_ms=24 + 3 * number, transport=transport)
    await site.add("fast-0", "decode", "fast", CODER, step_ms=34, transport="tcp", speculates=True)
    for number in range(2):
        await site.add(f"chat-{number}", "mixed", "chat", CHAT, prefill_tokens_per_s=21_000, step_ms=9)


async def under_load(traffic: Traffic) -> None:
    """Heartbeats and requests until cancelled."""
    async with asyncio.TaskGroup() as group:
        group.create_task(traffic.beats())
        group.create_task(traffic.flow(CODER, 7.0, (300, 5200), (40, 220)))
        group.create_task(traffic.flow(CHAT, 3.0, (60, 900), (30, 160)))


async def take(tab: Tab, site: Site, out: Path, seconds: float) -> None:
    """The pictures."""
    await tab.size(1440, 1000)
    await tab.colours("dark")
    await tab.open(f"{site.url}/console/")
    await tab.until(
        "document.querySelectorAll('#requests .row').length > 8 && document.querySelector('#links tbody tr')"
    )
    await asyncio.sleep(seconds)  # of history for the lines
    height = await tab.run("document.documentElement.scrollHeight")
    await tab.size(1440, min(2000, height))
    await shoot(tab, out / "console-dark.png")
    await tab.colours("light")
    await shoot(tab, out / "console-light.png")
    await tab.colours("dark")
    await tab.size(1440, 1000)
    split = "[...document.querySelectorAll('#requests .row')].filter((row) => row.querySelector('i.exposed'))"
    width = "querySelector('i.prefill').offsetWidth"
    await tab.run(f"{split}.sort((a, b) => b.{width} - a.{width})[0].click()")  # the longest prefill
    await tab.until("document.querySelector('#detail tr.chosen')")
    await shoot(tab, out / "console-request.png")
    await tab.run("document.querySelector('#detail').close()")
    await tab.size(390, 844, phone=True, scale=2)
    await shoot(tab, out / "console-phone.png")


async def shoot(tab: Tab, file: Path) -> None:
    """One picture, once what moves has moved."""
    await tab.run("new Promise((resolve) => setTimeout(resolve, 1200))")
    await tab.picture(file)
    print(file)


if __name__ == "__main__":
    asyncio.run(main())
