"""Everything that can go wrong between two KV endpoints, injected where each transport's bytes are made and used.

A `World` is the ranks of a sender and of a receiver that differ in some way, on one transport. `play` runs one
round in it: a few requests at once, one of which meets a `Fault`, and asserts all that must hold afterwards.
"""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import grpc
import numpy as np
import torch
from helpers.kv_interiors import cpu_amx, cpu_vec
from helpers.kv_rig import Fetch, Receiver, Sender, eventually

from joinwise.actors.kv.blocks import KvBlocks
from joinwise.actors.kv.fetching import Fetch as KvFetch
from joinwise.actors.kv.frames import FLAG_END, FrameRefusedError, parse, seal
from joinwise.actors.kv.lanes.lane import LaneClosedError
from joinwise.actors.kv.layout import WHOLE, LayerGeometry, LayoutMismatchError
from joinwise.actors.kv.producing import Frame, FrameProducer, Wanted
from joinwise.actors.kv.receiving import Importer
from joinwise.actors.kv.sending import SendTransfer

HEADS, HEAD_DIM, NUM_LAYERS, NUM_BLOCKS = 2, 16, 3, 48
STALL_S = 0.3
PATIENCE_S = 15.0
TYPED = (grpc.RpcError, LaneClosedError, FrameRefusedError, LayoutMismatchError, TimeoutError, ConnectionError)
"""What a fetch may raise; see `KvClient.fetch`."""
SENTINEL = 12288.0
"""Exact in bfloat16 too."""


class Fault(NamedTuple):
    """What happens, and when; phases of a stream: before_claim, waiting (for its prefill), first, middle, last, end.

    `first`, `middle` and `last` are frames with a payload, `end` is when all of those have gone and the last frame,
    which has none, has not.
    """

    name: str
    phase: str


_STREAM = ("first", "middle", "last", "end")
_ALL = ("before_claim", "waiting", *_STREAM)
_BYTES = ("flip", "truncate", "drop", "duplicate")
_FORGED = ("old_epoch_frame", "other_request_frame")
_LANE_ONLY = ("sender_socket", "receiver_socket")
FAULTS = (
    Fault("none", "-"),
    *(Fault(name, phase) for name in _BYTES for phase in _STREAM),
    *(Fault("reorder", phase) for phase in ("first", "middle")),
    *(Fault(name, phase) for name in _FORGED for phase in _STREAM),
    *(Fault(name, phase) for name in ("receiver_pauses", "receiver_stalls") for phase in _STREAM),
    *(Fault(name, phase) for name in ("sender_pauses", "sender_stalls") for phase in ("waiting", *_STREAM)),
    *(Fault("receiver_cancels", phase) for phase in _ALL),
    *(Fault(name, phase) for name in ("preempted", "cancelled") for phase in _ALL),
    *(Fault("restart", phase) for phase in ("idle", "waiting", "middle", "end")),
    *(Fault(name, phase) for name in _LANE_ONLY for phase in ("first", "middle", "last")),
    *(Fault(name, "before_claim") for name in ("old_epoch", "other_request", "other_model", "other_blocks")),
    *(Fault(name, "-") for name in ("frame_above_budget", "request_above_budget")),
)
_MUST_FAIL = {"flip", "drop", "reorder", *_FORGED, "sender_stalls", "sender_socket"}
_LATE = (("sender_stalls", "waiting"), ("sender_stalls", "first"))
_BUDGETS = {"frame_above_budget": 100, "request_above_budget": 6000}


# Workers that differ.


@dataclass(frozen=True)
class Rank:
    """One rank of a worker."""

    block_size: int = 16
    interior: str = "vec"
    first_head: int = 0
    heads: int = HEADS
    dtype: torch.dtype = torch.float32

    def layout(self) -> dict[str, Any]:
        """What a `Sender`, a `Receiver` or `KvBlocks` is made with."""
        inside = {"vec": cpu_vec, "amx": cpu_amx}[self.interior](self.heads, self.block_size, HEAD_DIM)
        names = [f"layers.{index}" for index in range(NUM_LAYERS)]
        geometry = LayerGeometry(self.heads, self.first_head, HEADS, 2, HEAD_DIM, inside)
        return {
            "layers": dict.fromkeys(names, (self.heads, 2, self.block_size, HEAD_DIM)),
            "block_size": self.block_size,
            "interior": self.interior,
            "geometry": dict.fromkeys(names, geometry),
            "dtype": self.dtype,
        }


@dataclass(frozen=True)
class Pairing:
    """A sender and a receiver; `bound` is the most that an element may differ by."""

    sends: tuple[Rank, ...] = (Rank(),)
    receives: tuple[Rank, ...] = (Rank(),)
    codec: str = "none"
    bound: float = 0.0


_HALVES = (Rank(heads=1), Rank(first_head=1, heads=1))
_BF16 = (Rank(dtype=torch.bfloat16),)
PAIRINGS = {
    "equal": Pairing(),
    "block size": Pairing(receives=(Rank(32),)),
    "interior": Pairing(sends=(Rank(32),), receives=(Rank(16, "amx"),)),
    "two to one": Pairing(sends=_HALVES),
    "one to two": Pairing(receives=_HALVES),
    "int8": Pairing(codec="int8", bound=0.03),
    "lossless": Pairing(_BF16, _BF16, codec="lossless"),
}


class World:
    """All ranks of a sender and a receiver, running; one round at a time.

    Args:
        pairing: key of `PAIRINGS`.
        transport: of the receiver.
        landing_bytes: its landing budget.
    """

    def __init__(self, pairing: str, transport: str, landing_bytes: int = 1 << 20) -> None:
        self.pairing, self.transport = PAIRINGS[pairing], transport
        self.lock = threading.Lock()
        self._mismatched: dict[str, Receiver] = {}
        self.senders = [self._sender(rank) for rank in self.pairing.sends]
        self.receivers = [
            Receiver(
                NUM_BLOCKS,
                transport=transport,
                landing_bytes=landing_bytes,
                codec=self.pairing.codec,
                **rank.layout(),
            )
            for rank in self.pairing.receives
        ]
        for index, receiver in enumerate(self.receivers):
            receiver.client.set_ranks(index, [each.blocks.layout for each in self.receivers])

    def _sender(self, rank: Rank, bind: str = "127.0.0.1:0") -> Sender:
        sender = Sender(
            NUM_BLOCKS,
            frame_bytes=2000,
            bind=bind,
            claim_timeout_s=PATIENCE_S,
            kinds=(self.transport,),
            **rank.layout(),
        )
        FaultyProducer(sender)
        return sender

    @property
    def peers(self) -> str:
        """Addresses of all ranks of the sender."""
        return ",".join(sender.server.address for sender in self.senders)

    def mismatched(self, name: str) -> Receiver:
        """A receiver whose layout cannot meet the sender's."""
        if name not in self._mismatched:
            layout = self.pairing.receives[0].layout()
            if name == "other_model":
                layout["model_digest"] = "another"
            else:
                layout |= {"geometry": None, "block_size": 8 * layout["block_size"]}
            self._mismatched[name] = Receiver(NUM_BLOCKS, transport=self.transport, **layout)
        return self._mismatched[name]

    def restart(self) -> None:
        """End all ranks of the sender, and start them again at their addresses."""
        for index, (sender, rank) in enumerate(zip(self.senders, self.pairing.sends, strict=True)):
            sender.stop()
            self.senders[index] = self._sender(rank, sender.server.address)
        for receiver in self.receivers:
            for sender in self.senders:
                eventually(lambda: _reaches(receiver, sender.server.address), "it is found again")  # noqa: B023

    def assert_idle(self) -> None:
        """Nothing is held at either end: transfers, streams, landing bytes, lanes."""
        for sender in self.senders:
            sender.assert_idle()
            entries = sender.lanes._table._entries
            eventually(lambda: not any(e.claimed for e in list(entries.values())), "lanes are given back")  # noqa: B023
        for receiver in (*self.receivers, *self._mismatched.values()):
            assert receiver.budget.used == 0
            assert not receiver.lanes._leased
            eventually(lambda: not receiver.client._ending, "calls end")  # noqa: B023

    def stop(self) -> None:
        """End everything."""
        for each in (*self.receivers, *self._mismatched.values(), *self.senders):
            each.stop()


def _reaches(receiver: Receiver, peer: str) -> bool:
    try:
        return bool(receiver.client._ask_layout(peer, 1.0).instance)
    except grpc.RpcError:
        return False


# Where faults are injected.


@dataclass
class Plan:
    """One fault of one request, and what came of it."""

    fault: Fault
    dice: random.Random
    act: Callable[[], None] = lambda: None
    release: threading.Event = field(default_factory=threading.Event)
    reached: threading.Event = field(default_factory=threading.Event)
    acting: threading.Lock = field(default_factory=threading.Lock)
    _taken: threading.Lock = field(default_factory=threading.Lock)

    def take(self) -> bool:
        """True once: the first stream that comes meets the fault."""
        return self._taken.acquire(blocking=False)

    def fire(self) -> None:
        """It happens now."""
        with self.acting:
            self.reached.set()
            self.act()


class FaultyProducer:
    """A sender's producer of frames, which does what its plans say; all transports send what it gives.

    Args:
        sender: gets it.
    """

    def __init__(self, sender: Sender) -> None:
        self._real: FrameProducer = sender.server._producer
        self._local = threading.local()
        self.plans: dict[str, Plan] = {}
        sender.server._producer = self  # type: ignore[assignment]
        claim = sender.lanes.claim

        def claim_and_tell(lane_id: int, timeout_s: float) -> Any:
            self._local.lane = lane = claim(lane_id, timeout_s)
            return lane

        sender.lanes.claim = claim_and_tell  # type: ignore[method-assign]

    def frames(
        self, transfer: SendTransfer, wanted: Wanted, alive: Callable[[], bool], *load: Callable
    ) -> Generator[Frame, None, int]:
        """See `FrameProducer.frames`."""
        frames = self._real.frames(transfer, wanted, alive, *load)
        plan = self.plans.get(transfer.transfer_id)
        self._local.mine = mine = plan is not None and plan.take()
        if plan is None or not mine:
            return (yield from frames)
        return (yield from self._tampered(frames, plan, transfer, wanted))

    def end(self, transfer: SendTransfer, sequence: int) -> bytes:
        """See `FrameProducer.end`."""
        raw = self._real.end(transfer, sequence)
        plan = self.plans.get(transfer.transfer_id)
        if plan is None or plan.fault.phase != "end" or not self._local.mine:
            return raw
        return b"".join(b"".join((head, *payload)) for head, payload in self._meet(plan, raw, []))

    def _tampered(
        self, frames: Generator[Frame, None, int], plan: Plan, transfer: SendTransfer, wanted: Wanted
    ) -> Generator[Frame, None, int]:
        size = transfer.block_size
        end = transfer.num_blocks * size if wanted.encoding == WHOLE else transfer.num_tokens
        total = len(wanted.layers) * (end - wanted.first_token)
        share, sent, sequence, held = plan.dice.random() / 2, 0, 0, []
        for raw, payload in frames:
            first, sent = not sent, sent + parse(raw).header.num_tokens
            last = sent == total
            middle = not first and not last and sent / total >= share
            now = {"first": first, "middle": middle, "last": last}.get(plan.fault.phase, False)
            sequence += 1
            if now and not plan.reached.is_set():
                if plan.fault.name == "reorder":
                    plan.fire()
                    held = [(raw, payload)]
                else:
                    yield from self._meet(plan, raw, payload)
                continue
            yield raw, payload
            yield from held
            held = []
        return sequence

    def _meet(self, plan: Plan, raw: bytes, payload: list[memoryview]) -> Iterator[Frame]:
        """What is sent instead of one frame."""
        name, dice = plan.fault.name, plan.dice
        if name.startswith("receiver_") and name != "receiver_cancels":
            yield raw, payload  # it fires over there
            return
        plan.fire()
        whole = bytearray(b"".join((raw, *payload)))
        if name == "drop":
            return
        if name == "flip":
            whole[dice.randrange(len(whole))] ^= 1 << dice.randrange(8)
            yield _cut(whole)
        elif name == "truncate":
            yield _cut(whole[: -dice.randint(1, len(whole) if dice.random() < 0.3 else 16)])
        elif name == "duplicate":
            yield raw, payload
            yield raw, payload
        elif name in _FORGED:
            header = parse(raw).header
            change = {"epoch": header.epoch - 1} if name == "old_epoch_frame" else {"tag": header.tag ^ 1}
            yield seal(replace(header, **change), payload), payload
        elif name == "sender_socket":
            lane = self._local.lane
            lane.wire.send([bytes(whole[: dice.randrange(1, len(whole))])])
            lane.interrupt()
            yield raw, payload
        else:
            yield raw, payload


def _cut(frame: bytearray) -> Frame:
    return bytes(frame[:64]), [memoryview(bytes(frame[64:]))] if len(frame) > 64 else []


class FaultyFetch(KvFetch):
    """A fetch whose first stream does what a plan says when it gets a frame."""

    plan: Plan | None = None

    def begin(self, importers: Sequence[Importer]) -> None:
        """See `Fetch.begin`."""
        plan = self.plan
        if plan is not None and plan.fault.name in ("receiver_pauses", "receiver_stalls", "receiver_socket"):
            self._rig(importers[0], plan)
        super().begin(importers)

    @staticmethod
    def _rig(importer: Importer, plan: Plan) -> None:
        accept, receive = importer.accept, importer.receive
        total = len(importer.landed) * (importer._end - importer.spec.first_token)
        landed = 0

        def meet(raw: bytes) -> None:
            nonlocal landed
            header = parse(raw[:64]).header
            first, landed = not landed, landed + header.num_tokens
            end, last = bool(header.flags & FLAG_END), landed == total
            middle = not (first or last or end)
            now = {"first": first, "middle": middle, "last": last and not end, "end": end}[plan.fault.phase]
            if now and plan.take():
                plan.fire()
                if plan.fault.name != "receiver_socket":
                    plan.release.wait(1.4 * STALL_S if plan.fault.name == "receiver_stalls" else 0.03)
                elif importer._interrupt is not None:
                    importer._interrupt()

        def met_accept(frame: bytes) -> int:
            meet(frame)
            return accept(frame)

        def met_receive(raw: bytes, read: Callable[[Sequence[memoryview]], None], *, direct: bool) -> int:
            meet(raw)
            return receive(raw, read, direct=direct)

        importer.accept, importer.receive = met_accept, met_receive  # type: ignore[method-assign]


# A round.


class Request:
    """One prompt from all ranks of the sender to all of the receiver."""

    def __init__(self, world: World, name: str, dice: random.Random, free: tuple[list[list[int]], list[list[int]]]):
        self.world, self.name = world, name
        self.epoch = dice.randint(2, 1 << 40)
        step = max(rank.block_size for rank in (*world.pairing.sends, *world.pairing.receives))
        self.tokens = dice.randint(20, 80)
        # A tail begins at a block of both ends: a multiple of the larger, as all sizes are.
        self.skip = dice.choice([0, 0, *range(0, self.tokens - 1, step)])
        self.chunks = sorted(dice.choices(range(1, 6), k=dice.randint(0, 2)))
        self.sources = [_take(free[0][i], self.tokens, r.block_size) for i, r in enumerate(world.pairing.sends)]
        self.targets = [_take(free[1][i], self.tokens - self.skip, r.block_size) for i, r in enumerate(self.receives)]
        self.senders = list(world.senders)
        self.transfers: list[SendTransfer] = []
        self.fetches: list[Fetch] = []
        self.fenced: list[bool] = []
        self.computed = [0] * len(self.senders)
        generator = torch.Generator().manual_seed(dice.getrandbits(40))
        self.content = [
            {
                key: torch.randn(len(ids), *cache.shape[1:], generator=generator).to(cache.dtype)
                for key, cache in sender.caches.items()
            }
            for sender, ids in zip(self.senders, self.sources, strict=True)
        ]

    @property
    def receives(self) -> tuple[Rank, ...]:
        """Ranks of the receiver."""
        return self.world.pairing.receives

    def open(self) -> None:
        """VLLM's scheduler has let it in, at the sender."""
        self.transfers = [
            sender.open(self.name, ids, epoch=self.epoch, num_tokens=self.tokens, lease_s=0.0)
            for sender, ids in zip(self.senders, self.sources, strict=True)
        ]

    def fetch(self, plan: Plan | None = None, *, patience: bool = True, **changes: Any) -> None:
        """Begin to fetch it; `changes` make that wrong."""
        limit = PATIENCE_S if patience else STALL_S
        start = STALL_S if plan is not None and plan.fault in _LATE else PATIENCE_S
        for receiver, rank, ids in zip(self.world.receivers, self.receives, self.targets, strict=True):
            arguments = {
                "epoch": self.epoch,
                "num_tokens": self.tokens,
                "timeout_s": limit,
                "start_s": start,
                **changes,
            }
            name = arguments.pop("name", self.name)
            with _faulty_fetches(plan):
                self.fetches.append(
                    receiver.fetch(name, ids, self.world.peers, first_block=self.skip // rank.block_size, **arguments)
                )

    def compute(self) -> None:
        """The prefill, chunk by chunk."""
        for chunk in (*self.chunks, None):
            for index, (sender, transfer) in enumerate(zip(self.senders, self.transfers, strict=True)):
                until = min(chunk or transfer.num_blocks, transfer.num_blocks)
                begin, self.computed[index] = self.computed[index], until
                for layer, (key, cache) in enumerate(sender.caches.items()):
                    if not transfer.closed:  # a preempted request's blocks are somebody else's
                        cache[transfer.block_ids[begin:until]] = self.content[index][key][begin:until]
                    sender.table.advance(transfer, layer, until)

    def close(self, reason: str) -> None:
        """The sender's engine takes it back, and gives its blocks to somebody else."""
        for sender, transfer in zip(self.senders, self.transfers, strict=True):
            sender.table.close(transfer.request_id, reason)
            for cache in sender.caches.values():
                cache[transfer.block_ids] = SENTINEL

    def cancel(self) -> None:
        """The receiver's engine takes it back, and gives its blocks to somebody else."""
        # The fault may be met before every rank has asked.
        eventually(lambda: len(self.fetches) == len(self.receives), "every rank has asked")
        self.fenced = []
        for fetch, receiver, ids in zip(self.fetches, self.world.receivers, self.targets, strict=True):
            fetch.fetch.stop()
            self.fenced.append(not fetch.fetch.complete)
            if self.fenced[-1]:
                for cache in receiver.caches.values():
                    cache[ids] = SENTINEL

    def finish(self) -> None:
        """VLLM has finished it at the sender."""
        for sender, transfer in zip(self.senders, self.transfers, strict=True):
            sender.finish(transfer)

    def assert_landed(self, index: int) -> None:
        """One rank of the receiver has it, byte for byte or within the codec's bound."""
        receiver, rank = self.world.receivers[index], self.receives[index]
        for key_index in range(NUM_LAYERS):
            for head in range(rank.first_head, rank.first_head + rank.heads):
                here = self._packed(receiver.blocks, key_index, self.targets[index], 0, head)
                assert np.array_equal(here, expected := self._expected(key_index, head)) or (
                    np.abs(here - expected).max() <= self.world.pairing.bound
                ), f"{self.name}: layer {key_index} head {head} is wrong"

    def _expected(self, layer: int, head: int) -> np.ndarray:
        for content, rank, sender in zip(self.content, self.world.pairing.sends, self.senders, strict=True):
            if rank.first_head <= head < rank.first_head + rank.heads:
                arguments = {k: v for k, v in rank.layout().items() if k not in ("layers", "dtype")}
                blocks = KvBlocks(content, model_digest=sender.blocks.layout.model_digest, **arguments)
                return self._packed(blocks, layer, range(len(next(iter(content.values())))), self.skip, head)
        raise AssertionError(f"no rank has head {head}")

    def _packed(self, blocks: KvBlocks, layer: int, ids: Sequence[int], first: int, head: int) -> np.ndarray:
        size = blocks.block_size
        packed = blocks.pack(
            layer, ids[first // size :], first % size, self.tokens - self.skip, range(head, head + 1), torch.float32
        )
        return np.frombuffer(packed, np.float32)


def _take(free: list[int], tokens: int, block_size: int) -> list[int]:
    count = -(-tokens // block_size)
    taken = free[:count]
    del free[:count]
    return taken


_making = threading.Lock()


@contextmanager
def _faulty_fetches(plan: Plan | None) -> Iterator[None]:
    """Fetches made meanwhile are faulty ones."""
    from helpers import kv_rig

    with _making:
        kv_rig.KvFetch = type("PlannedFetch", (FaultyFetch,), {"plan": plan})  # type: ignore[misc]
        try:
            yield
        finally:
            kv_rig.KvFetch = KvFetch  # type: ignore[misc]


def play(world: World, name: str, fault: Fault, dice: random.Random) -> Counter[str]:
    """One round, from its first request to an idle world.

    Args:
        world: nobody else uses it meanwhile.
        name: not used before.
        fault: what the first request meets.
        dice: everything else.

    Returns:
        How many fetches came to which end; "not reached" where everything was over before the fault could be.
    """
    free = tuple(
        [dice.sample(range(NUM_BLOCKS), NUM_BLOCKS) for _ in ends] for ends in (world.senders, world.receivers)
    )
    requests = [Request(world, f"{name}.{index}", dice, free) for index in range(dice.randint(1, 3))]  # type: ignore[arg-type]
    if fault.name == "other_request" and len(requests) == 1:
        requests.append(Request(world, f"{name}.1", dice, free))  # type: ignore[arg-type]
    before = [{key: cache.clone() for key, cache in receiver.caches.items()} for receiver in world.receivers]
    failed_before = _failed(world)
    plan = Plan(fault, dice)
    victim, *others = requests
    Scenario(world, victim, others, plan).run()
    reached = plan.reached.is_set()
    with plan.acting:  # it has happened in full
        pass
    ends = Counter[str]({} if reached else {"not reached": 1})
    begun = 0
    for request in requests:
        for index, fetch in enumerate(request.fetches):
            error = fetch.join(PATIENCE_S + 5)
            assert error is None or isinstance(error, TYPED), repr(error)
            ends["good" if error is None else _kind(error)] += 1
            begun += error is not None and bool(fetch.fetch.importers)
            rank = index % len(world.receivers)
            if error is None:
                assert fetch.fetch.complete
                request.assert_landed(rank)
            elif request.fenced and request.fenced[rank]:
                for cache in world.receivers[rank].caches.values():
                    assert (cache[request.targets[rank]] == SENTINEL).all(), "written behind the fence"
    if reached:
        _assert_ends(fault, victim, others)
    assert _failed(world) - failed_before >= begun, "failures are counted"
    for rank, (receiver, caches) in enumerate(zip(world.receivers, before, strict=True)):
        targets = [block for request in requests for block in request.targets[rank]]
        for key, cache in receiver.caches.items():
            caches[key][targets] = cache[targets]
            same = torch.equal(cache.view(torch.uint8), caches[key].view(torch.uint8))  # what is damaged may be NaN
            assert same, f"{key}: blocks of nobody have changed"
    world.assert_idle()
    for request in requests:
        for sender in request.senders:
            sender.server._producer.plans.clear()  # type: ignore[attr-defined]
            sender.assert_idle()
    return ends


def _failed(world: World) -> float:
    return sum(link.counts["failed"] for receiver in world.receivers for link in receiver.client.links.values())


def _kind(error: Exception) -> str:
    if isinstance(error, FrameRefusedError):
        return error.reason
    return error.code().name if isinstance(error, grpc.RpcError) else type(error).__name__


def _assert_ends(fault: Fault, victim: Request, others: Sequence[Request]) -> None:
    """Who must have failed has, and nobody else."""
    errors = [fetch.error for fetch in victim.fetches]
    if fault.name in _MUST_FAIL:
        assert any(errors), f"{fault} was not noticed"
    if fault.name in ("none", "receiver_pauses", "sender_pauses", *_BUDGETS) or fault == ("restart", "idle"):
        assert not any(errors), errors
    if fault.name not in ("restart", "other_request"):
        bystanders = [fetch.error for request in others for fetch in request.fetches]
        assert not any(bystanders), f"{fault} has harmed another request: {bystanders}"


@dataclass
class Scenario:
    """Who does what when."""

    world: World
    victim: Request
    others: list[Request]
    plan: Plan

    def run(self) -> None:
        """Until every fetch is on its way to its end."""
        name, phase = self.plan.fault
        self._arm()
        for other in self.others:
            other.open()
        if name == "restart":
            self._restart()
            return
        for other in self.others:
            other.fetch()
        computing = threading.Thread(target=lambda: [each.compute() for each in self.others])
        computing.start()
        if phase == "before_claim":
            self._before_claim()
        else:
            self._streamed()
        self._end_of_stalls()
        computing.join()
        for request in (self.victim, *self.others):
            for fetch in request.fetches:
                fetch.join(PATIENCE_S + 5)
            request.finish()

    def _arm(self) -> None:
        name, victim = self.plan.fault.name, self.victim
        waits = {"sender_pauses": 0.03, "sender_stalls": PATIENCE_S, "restart": PATIENCE_S}
        if name in waits:
            self.plan.act = lambda: self.plan.release.wait(waits[name])
        elif name in ("preempted", "cancelled"):
            self.plan.act = lambda: victim.close(name)
        elif name == "receiver_cancels":
            self.plan.act = victim.cancel
        if name in ("none", *_BUDGETS):
            self.plan.reached.set()
        if not name.startswith("receiver_") or name == "receiver_cancels":
            # On one rank only: the others go on.
            sender = self.plan.dice.choice(self.victim.senders)
            sender.server._producer.plans[victim.name] = self.plan  # type: ignore[attr-defined]

    def _streamed(self) -> None:
        name, phase = self.plan.fault
        victim = self.victim
        hasty = name.endswith("_stalls") or name in ("drop", "truncate", "flip")
        early = self.plan.dice.random() < 0.5
        if early:
            victim.fetch(self.plan, patience=not hasty)
        victim.open()
        if phase == "waiting":
            if not early:
                victim.fetch(self.plan, patience=not hasty)
            eventually(lambda: all(each.streaming for each in victim.transfers), "streams wait")
            if name == "sender_stalls":
                self.plan.reached.set()
                return
            self.plan.fire()
            victim.compute()
            return
        victim.compute()
        if not early:
            victim.fetch(self.plan, patience=not hasty)

    def _before_claim(self) -> None:
        name, victim = self.plan.fault.name, self.victim
        if name == "receiver_cancels":
            victim.fetch(self.plan)
            asked = [fetch.fetch for fetch in victim.fetches]
            eventually(lambda: all(each.importers and each._streams for each in asked), "it has been asked for")
            self.plan.fire()
            victim.open()
            victim.compute()
            return
        victim.open()
        if name in ("preempted", "cancelled"):
            self.plan.fire()
            victim.fetch(self.plan)
            return
        self.plan.reached.set()
        if name == "old_epoch":
            victim.fetch(epoch=victim.epoch - 1)
        elif name == "other_request":
            tokens = victim.tokens + (victim.tokens == self.others[0].tokens)
            victim.fetch(name=self.others[0].name, epoch=self.others[0].epoch, num_tokens=tokens)
        else:
            receiver = self.world.mismatched(name)
            wrong = receiver.fetch(victim.name, victim.targets[0], self.world.peers, epoch=victim.epoch)
            assert isinstance(wrong.fail(), TYPED)
            receiver.assert_cache()
        for fetch in victim.fetches:
            assert isinstance(fetch.fail(), TYPED)
        victim.fetches.clear()
        victim.compute()
        victim.fetch()  # the one that is meant still gets it

    def _restart(self) -> None:
        phase, victim = self.plan.fault.phase, self.victim
        everybody = [victim, *self.others]
        victim.open()
        if phase == "idle":
            old = list(self.world.senders)
            self.world.restart()
            self.plan.reached.set()
            for request in everybody:
                for sender, transfer in zip(old, request.transfers, strict=True):
                    sender.table.close(transfer.request_id, "restart")
                    sender.finish(transfer)
                request.senders = list(self.world.senders)
                request.open()
                request.compute()
                request.fetch()
        else:
            for request in everybody:
                request.fetch(self.plan if request is victim else None)
            if phase == "waiting":
                eventually(lambda: all(each.streaming for each in victim.transfers), "streams wait")
                self.plan.reached.set()
            else:
                for request in everybody:
                    request.compute()
                assert self.plan.reached.wait(PATIENCE_S)
            self.plan.release.set()
            self.world.restart()
        for request in everybody:
            for fetch in request.fetches:
                fetch.join(PATIENCE_S + 5)
            request.finish()

    def _end_of_stalls(self) -> None:
        """What stalls goes on once the other end has given up."""
        if self.plan.fault.name == "sender_stalls":
            for fetch in self.victim.fetches:
                fetch.join(PATIENCE_S + 5)
            self.plan.release.set()
            if self.plan.fault.phase == "waiting":
                self.victim.compute()
