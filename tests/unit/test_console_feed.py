"""One reader for all pages, and pages that are bounded."""

from __future__ import annotations

import asyncio
import json
from contextlib import ExitStack
from typing import Any

import pytest

from joinwise.actors.gateway import console_feed
from joinwise.actors.gateway.console_feed import Feed, Page, Sources
from joinwise.actors.gateway.ledgers import Ledgers
from joinwise.cluster.errors import OverloadedError, StoreUnavailableError
from joinwise.cluster.router.pulse import Pulse
from joinwise.cluster.router.why import Decision


class World:
    """Sources that count how often they are asked, and fail when told to."""

    def __init__(self, pages: int = 100) -> None:
        self.looks = 0
        self.looked = asyncio.Condition()
        self.failure: Exception | None = None
        self.decided: list[Decision] = []
        sources = Sources(
            pulse=self._pulse,
            links=self._links,
            decisions=self._decisions,
            acceptance=self._links,
            ledgers=Ledgers(None),
        )
        self.feed = Feed(sources, {"cluster": "c"}, every_s=0.001, pages=pages)

    async def _pulse(self) -> Pulse:
        async with self.looked:
            self.looks += 1
            self.looked.notify_all()
        if self.failure is not None:
            raise self.failure
        return Pulse(now_ms=0, workers=(), leases=self.looks, waiting=0, span_s=10, verdicts={}, links={})

    async def _links(self) -> list[Any]:
        return []

    async def _decisions(self, most: int) -> list[Decision]:
        return self.decided[-most:]

    async def more_looks(self, number: int = 3) -> None:
        async with self.looked:
            wanted = self.looks + number
            await self.looked.wait_for(lambda: self.looks >= wanted)


def read(frames: bytes) -> list[tuple[str, Any]]:
    """Events with their data."""
    parts = [event.split("\n") for event in frames.decode().split("\n\n")[:-1]]
    return [(first.removeprefix("event: "), json.loads(second.removeprefix("data: "))) for first, second in parts]


async def until(page: Page, name: str) -> Any:
    """The data of the next event of a name."""
    while True:
        frames = await page.next()
        assert frames is not None
        for event, data in read(frames):
            if event == name:
                return data


def decision(number: int) -> Decision:
    return Decision(f"r{number}", number, "split", ("p", "d"), 1.0, ())


async def test_however_many_pages_are_open_one_reads() -> None:
    world = World()
    await asyncio.sleep(0.02)
    assert world.looks == 0  # nobody looks at a page, nobody looks at Redis
    with ExitStack() as stack:
        pages = [stack.enter_context(world.feed.page()) for _ in range(100)]
        seen = await asyncio.gather(*(until(page, "pulse") for page in pages))
        assert {each["leases"] for each in seen} == {1}  # all of them the same look
        assert world.looks < 20
    looks = world.looks
    await asyncio.sleep(0.02)
    assert world.looks <= looks + 1  # the one that had begun
    with world.feed.page() as again:  # and it begins again
        assert read(await again.next() or b"")[0] == ("hello", {"cluster": "c"})
        await until(again, "pulse")


async def test_a_frame_is_made_once_for_all() -> None:
    world = World()
    with world.feed.page() as one, world.feed.page() as two:
        await world.more_looks()
        assert [frame is other for frame, other in zip(one._frames, two._frames, strict=False)].count(True) >= 2


async def test_a_later_page_begins_with_what_the_others_know() -> None:
    world = World()
    world.decided = [decision(number) for number in range(3)]
    with world.feed.page() as one:
        assert [each["request_id"] for each in await until(one, "decisions")] == ["r0", "r1", "r2"]
        world.decided.append(decision(3))
        assert [each["request_id"] for each in await until(one, "decisions")] == ["r3"]  # only what is new
        with world.feed.page() as two:
            events = dict(read(await two.next() or b""))
        assert [each["request_id"] for each in events["decisions"]] == ["r0", "r1", "r2", "r3"]
        assert set(events) == {"hello", "pulse", "links", "acceptance", "decisions"}


async def test_a_page_that_falls_behind_is_let_go_and_the_others_go_on() -> None:
    world = World()
    with world.feed.page() as slow, world.feed.page() as good:
        for _ in range(console_feed._BEHIND + 5):
            await until(good, "pulse")
        assert await slow.next() is None
        assert not slow._frames  # nothing is held for it
        assert await until(good, "pulse")


async def test_pages_are_bounded() -> None:
    world = World(pages=2)
    with world.feed.page(), world.feed.page():
        with pytest.raises(OverloadedError) as refused, world.feed.page():
            pass
        assert refused.value.retry_after_s
    with world.feed.page():
        assert world.feed.open_pages == 1


@pytest.mark.parametrize(
    ("failure", "told"),
    [(StoreUnavailableError("Redis does not answer"), "Redis does not answer"), (KeyError("secret"), "see its log")],
)
async def test_what_fails_is_told_and_tried_again(failure: Exception, told: str) -> None:
    world = World()
    with world.feed.page() as page:
        await until(page, "pulse")
        world.failure = failure
        message = (await until(page, "trouble"))["message"]
        assert told in message and "secret" not in message
        world.failure = None
        assert await until(page, "pulse")


async def test_a_closed_feed_lets_all_go() -> None:
    world = World()
    with world.feed.page() as page:
        await until(page, "pulse")
        world.feed.close()
        assert await page.next() is None
        with pytest.raises(OverloadedError), world.feed.page():
            pass


async def test_many_pages_come_and_go_at_once() -> None:
    world = World(pages=20)
    refused = 0

    async def visit(number: int) -> None:
        nonlocal refused
        try:
            with world.feed.page() as page:
                for _ in range(number % 4):
                    await until(page, "pulse")
        except OverloadedError:
            refused += 1

    await asyncio.gather(*(visit(number) for number in range(100)))
    assert refused and world.feed.open_pages == 0
    assert world.feed._reader is None
