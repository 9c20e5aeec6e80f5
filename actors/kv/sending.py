"""The sending half of transfers: what of each is computed, and who still reads its blocks.

Two kinds of thread meet here. The engine's stepping thread says which blocks of which layer are
final and when vLLM has finished the request; one thread per open stream reads final blocks and
sends them. vLLM keeps the request's blocks until `SendTable.take_releasable` has named it, so a
reader never sees a block that belongs to somebody else. The one exception is a preempted request:
its transfer is closed *before* its blocks are reused, and a reader checks `closed` *after* copying,
so a copy that may hold foreign bytes is never sent.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

_REMEMBERED = 4096
"""Ended transfers whose reason is still known; a stream that comes too late is told at once."""


class NoSuchTransferError(LookupError):
    """No such transfer to fetch: it never was, is over, or another stream has it."""


class WrongEpochError(ValueError):
    """A stream of another epoch than the transfer's; the transfer is untouched."""


@dataclass(eq=False)
class SendTransfer:
    """One request whose KV a decode worker will fetch.

    `ready[layer]` counts the blocks, from the prompt's first, that are final in that layer.
    `lease_s` is how long blocks that vLLM has finished with wait for a stream, in seconds. Times are
    of the monotonic clock, in seconds.
    """

    transfer_id: str
    request_id: str
    epoch: int
    num_blocks: int
    num_layers: int
    num_tokens: int
    lease_s: float
    block_size: int
    block_ids: list[int] = field(default_factory=list)
    ready: list[int] = field(default_factory=list)
    computed_at: float = 0.0
    ended: bool = False
    """vLLM has finished the request and holds its blocks for us."""
    expires: float = float("inf")
    """When its lease ends; it begins with `ended`, for until then vLLM answers for the request."""
    closed: str = ""
    """Why nothing more will be sent; empty while the transfer is open."""
    moved_at: float = 0.0
    """When a stream of it was begun, or has last sent a frame."""
    claimed: int = 0
    """Streams that have taken it so far."""
    streaming: int = 0
    """Streams that run now."""
    delivered: int = 0
    """Streams that have sent all of their part."""
    changed: threading.Condition = field(default_factory=threading.Condition)

    def __post_init__(self) -> None:
        self.ready = [0] * self.num_layers

    def ready_tokens(self, layer: int) -> int:
        """Tokens that are final in a layer."""
        return min(self.ready[layer] * self.block_size, self.num_tokens)

    @property
    def needed_until(self) -> float:
        """When its lease ends; a stream that moves renews it."""
        if not self.streaming or not self.computed:
            return self.expires
        return max(self.moved_at, self.computed_at) + self.lease_s

    @property
    def computed(self) -> bool:
        """Every block of every layer is final."""
        return min(self.ready) >= self.num_blocks


class SendTable:
    """All sending transfers of one worker.

    Args:
        on_idle: called, from any thread, when a transfer may have become releasable.
    """

    def __init__(self, on_idle: Callable[[], None]) -> None:
        self._on_idle = on_idle
        self._opened = threading.Condition()
        self._by_id: dict[str, SendTransfer] = {}
        self._by_request: dict[str, SendTransfer] = {}
        self._over: dict[str, str] = {}
        self._stopping = ""

    def held(self) -> list[str]:
        """Names of the transfers still held, for error messages."""
        with self._opened:
            return [f"send {t.transfer_id} of request {t.request_id}" for t in self._by_request.values()]

    def needed(self, now: float) -> set[str]:
        """Ids of transfers whose KV a peer may still take; a stream that has moved nothing for a lease needs none."""
        with self._opened:
            return {
                transfer.transfer_id
                for transfer in self._by_request.values()
                if not transfer.closed and now <= transfer.needed_until
            }

    # Called by the engine's stepping thread.

    def stop_opening(self, reason: str) -> None:
        """Take no new transfer; those that there are go on, and streams that wait for another are told at once."""
        with self._opened:
            self._stopping = reason
            self._opened.notify_all()

    def open(self, transfer: SendTransfer) -> None:
        """Register a transfer, before its first block is computed.

        One whose id was used before is closed at once, and so is any after `stop_opening`: its request is computed,
        and nothing is sent.
        """
        with self._opened:
            self._by_request[transfer.request_id] = transfer
            if self._stopping:
                transfer.closed = self._stopping
                return
            if transfer.transfer_id in self._by_id or transfer.transfer_id in self._over:
                transfer.closed = "its transfer id was used before"
                return
            self._by_id[transfer.transfer_id] = transfer
            self._opened.notify_all()

    def of_request(self, request_id: str) -> SendTransfer | None:
        """The transfer of a request, if it sends."""
        return self._by_request.get(request_id)

    def advance(self, transfer: SendTransfer, layer: int, ready: int) -> None:
        """Blocks before `ready` are final in `layer`: wake the sender."""
        with transfer.changed:
            transfer.ready[layer] = max(transfer.ready[layer], ready)
            if not transfer.computed_at and transfer.computed:
                transfer.computed_at = time.monotonic()
            transfer.changed.notify_all()

    def close(self, request_id: str, reason: str) -> None:
        """Send nothing more for a request (cancel, preemption)."""
        transfer = self._by_request.get(request_id)
        if transfer is not None:
            self._close(transfer, reason)

    def end(self, request_id: str) -> None:
        """vLLM has finished the request; a transfer whose prompt was not computed is closed."""
        transfer = self._by_request.get(request_id)
        if transfer is None:
            return
        transfer.expires = time.monotonic() + transfer.lease_s
        transfer.ended = True
        if not transfer.computed:
            self._close(transfer, "the request ended before its prompt was computed")

    def take_releasable(self, now: float) -> set[str]:
        """Forget transfers that are over; return the requests whose blocks vLLM may free now."""
        released = set()
        with self._opened:
            for transfer in list(self._by_request.values()):
                if not transfer.closed and not transfer.streaming and now > transfer.expires:
                    transfer.closed = "nobody fetched it within its lease"
                if transfer.closed and transfer.ended and not transfer.streaming:
                    self._forget(transfer)
                    released.add(transfer.request_id)
        return released

    # Called by stream threads.

    def claim(
        self, transfer_id: str, epoch: int, deadline: float, alive: Callable[[], bool], streams: int = 1
    ) -> SendTransfer:
        """Wait for a transfer to be opened and take it for one stream; `release` must follow.

        Args:
            transfer_id: the transfer wanted.
            epoch: the epoch that the caller has for it.
            deadline: monotonic time to give up at.
            alive: says whether the caller still wants it.
            streams: how many streams the receiver's ranks open in all.

        Raises:
            NoSuchTransferError: it did not appear in time, is over, or another stream has it.
            WrongEpochError: it is of another epoch; the stream that it is meant for may still come.
        """
        with self._opened:
            while (transfer := self._by_id.get(transfer_id)) is None:
                if (reason := self._over.get(transfer_id)) is not None:
                    raise NoSuchTransferError(f"transfer {transfer_id} is over: {reason}")
                if self._stopping:
                    raise NoSuchTransferError(f"no open transfer {transfer_id}: {self._stopping}")
                left = deadline - time.monotonic()
                if left <= 0 or not alive():
                    raise NoSuchTransferError(f"no open transfer {transfer_id}")
                self._opened.wait(min(left, 1.0))
            if transfer.epoch != epoch:
                raise WrongEpochError(f"epoch {epoch}, this worker has {transfer.epoch}")
            if transfer.claimed >= streams or transfer.closed:
                raise NoSuchTransferError(
                    f"transfer {transfer_id} is over: {transfer.closed or 'another stream has it'}"
                )
            transfer.claimed += 1
            transfer.streaming += 1
            transfer.moved_at = time.monotonic()
            return transfer

    def wake_claims(self) -> None:
        """Let waiting `claim` calls look at `alive` again."""
        with self._opened:
            self._opened.notify_all()

    def release(self, transfer: SendTransfer, reason: str, *, delivered_of: int = 0) -> None:
        """A stream of a claimed transfer is over, whatever its outcome.

        Args:
            transfer: the transfer.
            reason: the outcome.
            delivered_of: when it went well, the number of streams; the transfer stays open for the others.
        """
        with self._opened:
            transfer.streaming -= 1
            transfer.delivered += bool(delivered_of)
            if transfer.delivered < delivered_of:
                return
        self._close(transfer, reason)

    def _forget(self, transfer: SendTransfer) -> None:
        del self._by_request[transfer.request_id]
        if self._by_id.get(transfer.transfer_id) is not transfer:
            return
        del self._by_id[transfer.transfer_id]
        self._over[transfer.transfer_id] = transfer.closed
        if len(self._over) > _REMEMBERED:
            del self._over[next(iter(self._over))]

    def _close(self, transfer: SendTransfer, reason: str) -> None:
        with transfer.changed:
            transfer.closed = transfer.closed or reason
            transfer.changed.notify_all()
        self._on_idle()
