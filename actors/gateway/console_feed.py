"""What the pages of `/console` are told: one reader of the cluster, however many pages are open, and none without one.

Every frame is made once and shared. A page holds a few frames at most; one that falls further behind is let go, so that
neither memory nor the reader ever waits for a slow client.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import Context
from dataclasses import asdict, dataclass
from typing import Any

from joinwise.actors.gateway.acceptance import Acceptance
from joinwise.actors.gateway.ledgers import Ledgers
from joinwise.cluster.client.types import KvLinkStatus
from joinwise.cluster.errors import JoinwiseError, OverloadedError
from joinwise.cluster.router.pulse import Pulse
from joinwise.cluster.router.registry import WorkerState
from joinwise.cluster.router.why import Decision

logger = logging.getLogger(__name__)

_ASK_EVERY_S = 3.0  # each worker is asked
_DECISIONS = 40
_REQUESTS = 60
_WORKERS = 240
_HAND_OFFS = 120
_BEHIND = 64  # frames


@dataclass(frozen=True)
class Sources:
    """Where a feed looks; what these raise is told to the pages.

    Attributes:
        pulse: workers, queue and rates, as `joinwise top` shows them.
        links: how KV crosses between workers, as `joinwise status` shows it; asks each of them.
        decisions: the last so many, oldest first, as `joinwise explain` shows them.
        acceptance: of drafts, by worker; asks each that speculates.
        ledgers: of this gateway's requests.
    """

    pulse: Callable[[], Awaitable[Pulse]]
    links: Callable[[], Awaitable[Sequence[KvLinkStatus]]]
    decisions: Callable[[int], Awaitable[Sequence[Decision]]]
    acceptance: Callable[[], Awaitable[Sequence[Acceptance]]]
    ledgers: Ledgers


class Page:
    """One open page's frames."""

    def __init__(self) -> None:
        self._frames: deque[bytes] = deque()
        self._news = asyncio.Event()
        self._let_go = False

    def put(self, frame: bytes) -> None:
        """Add a frame, or let the page go where it has too many."""
        if len(self._frames) >= _BEHIND:
            self.let_go()
        if not self._let_go:
            self._frames.append(frame)
            self._news.set()

    def let_go(self) -> None:
        """Nothing more comes."""
        self._let_go = True
        self._frames.clear()
        self._news.set()

    async def next(self) -> bytes | None:
        """All frames that are there, once there is one; None when the page was let go."""
        await self._news.wait()
        if self._let_go:
            return None
        self._news.clear()
        frames = b"".join(self._frames)
        self._frames.clear()
        return frames


class Feed:
    """Looks at the cluster for all pages of one gateway.

    Args:
        sources: where to look.
        hello: what a page is told first.
        every_s: seconds between two looks.
        pages: the most that may be open.
    """

    def __init__(self, sources: Sources, hello: Mapping[str, Any], *, every_s: float, pages: int) -> None:
        self.sources = sources
        self._hello = _frame("hello", hello)
        self._every_s = every_s
        self._most = pages
        self._pages: set[Page] = set()
        self._reader: asyncio.Task[None] | None = None
        self._forget()

    @property
    def open_pages(self) -> int:
        """Pages that are open now."""
        return len(self._pages)

    @contextmanager
    def page(self) -> Iterator[Page]:
        """A page, for as long as it is open; it begins with what the others know already.

        Raises:
            OverloadedError: as many are open as may be, or the feed is closed.
        """
        if len(self._pages) >= self._most:
            raise OverloadedError(f"{len(self._pages)} consoles are open, the most for one gateway", retry_after_s=5.0)
        page = Page()
        for frame in (self._hello, *self._state.values()):
            page.put(frame)
        for name, kept in (("decisions", self._decisions), ("requests", self._requests)):
            if kept:
                page.put(_frame_of(name, kept))
        self._pages.add(page)
        if self._reader is None:  # it outlives the call that begins it, and takes nothing of its context along
            self._reader = asyncio.get_running_loop().create_task(self._read(), context=Context())
        try:
            yield page
        finally:
            self._pages.discard(page)
            if not self._pages and self._reader is not None:
                self._reader.cancel()
                self._reader = None
                self._forget()

    def close(self) -> None:
        """Let all pages go, and open no more."""
        self._most = 0
        for page in self._pages:
            page.let_go()

    # Inside.

    def _forget(self) -> None:
        self._state: dict[str, bytes] = {}
        self._decisions: deque[str] = deque(maxlen=_DECISIONS)
        self._requests: deque[str] = deque(maxlen=_REQUESTS)
        self._decided: set[tuple[str, int, str]] = set()
        self._ended = max(0, self.sources.ledgers.added - _REQUESTS)

    async def _read(self) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(self._repeat(self._look, self._every_s))
            group.create_task(self._repeat(self._ask_workers, max(_ASK_EVERY_S, self._every_s)))

    async def _repeat(self, look: Callable[[], Awaitable[None]], every_s: float) -> None:
        while True:
            try:
                await look()
            except JoinwiseError as error:
                self._tell(_frame("trouble", {"message": str(error)}))
            except Exception:
                logger.exception("the console cannot look at the cluster")
                self._tell(_frame("trouble", {"message": "the gateway cannot look at the cluster: see its log"}))
            await asyncio.sleep(every_s)

    async def _look(self) -> None:
        self._tell_state("pulse", _pulse(await self.sources.pulse()))
        decisions = {
            (each.request_id, each.at_ms, each.verdict): each for each in await self.sources.decisions(_DECISIONS)
        }
        fresh = [json.dumps(each.to_dict()) for key, each in decisions.items() if key not in self._decided]
        self._decided = set(decisions)
        self._tell_list("decisions", self._decisions, fresh)
        ledgers = self.sources.ledgers
        ended, self._ended = min(_REQUESTS, ledgers.added - self._ended), ledgers.added
        self._tell_list("requests", self._requests, [each.to_json() for each in ledgers.latest(ended)])

    async def _ask_workers(self) -> None:
        self._tell_state("links", [asdict(each) for each in await self.sources.links()])
        self._tell_state("acceptance", [asdict(each) for each in await self.sources.acceptance()])

    def _tell_state(self, name: str, data: Any) -> None:
        frame = self._state[name] = _frame(name, data)
        self._tell(frame)

    def _tell_list(self, name: str, kept: deque[str], fresh: Sequence[str]) -> None:
        kept.extend(fresh)
        if fresh:
            self._tell(_frame_of(name, fresh))

    def _tell(self, frame: bytes) -> None:
        for page in self._pages:
            page.put(frame)


def _frame(event: str, data: Any) -> bytes:
    """A server-sent event; JSON has no line breaks of its own."""
    return f"event: {event}\ndata: {json.dumps(data, separators=(',', ':'))}\n\n".encode()


def _frame_of(event: str, items: Iterable[str]) -> bytes:
    """The same, of a list whose items are JSON already."""
    return f"event: {event}\ndata: [{','.join(items)}]\n\n".encode()


def _pulse(pulse: Pulse) -> dict[str, Any]:
    """A moment, with the most loaded workers where there are very many."""
    most_loaded = sorted(pulse.workers, key=lambda each: -each.pending_tokens)[:_WORKERS]
    hand_offs = sorted(pulse.links.items(), key=lambda item: -item[1])[:_HAND_OFFS]
    return {
        "now_ms": pulse.now_ms,
        "leases": pulse.leases,
        "waiting": pulse.waiting,
        "assigned_per_s": pulse.assigned_per_s,
        "refused_per_s": pulse.refused_per_s,
        "verdicts": {verdict: count / pulse.span_s for verdict, count in pulse.verdicts.items()},
        "hand_offs": [[prefill, decode, count / pulse.span_s] for (prefill, decode), count in hand_offs],
        "pools": [asdict(pool) for pool in pulse.pools],
        "workers": [
            _worker(each, pulse.now_ms)
            for each in sorted(most_loaded, key=lambda each: (each.info.pool, each.info.worker_id))
        ],
        "more_workers": len(pulse.workers) - len(most_loaded),
    }


def _worker(state: WorkerState, now_ms: int) -> dict[str, Any]:
    info, load = state.info, state.load
    return {
        "id": info.worker_id,
        "pool": info.pool,
        "model": info.model,
        "role": info.role,
        "adapters": sorted(info.adapters),
        "address": info.engine_address,
        "max_num_seqs": info.max_num_seqs,
        "pending_prefill": state.pending_prefill,
        "pending_decode": state.pending_decode,
        "pending_new": state.pending_new,
        "sequences": state.sequences,
        "capacity": state.capacity,
        "age_ms": max(0, now_ms - state.beat_ms),
        **asdict(load),
    }
