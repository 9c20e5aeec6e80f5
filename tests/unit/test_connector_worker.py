"""The worker half: what it reports and when, with a scripted client, and two of them over real sockets."""

import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator

import grpc
import pytest
import torch
from helpers.kv_rig import BLOCK_SIZE, LAYERS, eventually, make_caches
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorTransferResults

from joinwise.actors.kv.blocks import KvBlocks
from joinwise.actors.kv.fetching import Fetch, FetchReport
from joinwise.actors.kv.frames import FrameRefusedError
from joinwise.actors.kv.layout import plan
from joinwise.actors.kv.links import LinkStatus
from joinwise.actors.kv.receiving import FetchSpec, Importer, LandingBudget
from joinwise.actors.vllm.connector.metadata import OpenSend, SendStep, StepMetadata
from joinwise.actors.vllm.connector.worker import KvSettings, WorkerConnector

NOTHING = KVConnectorTransferResults()


class Worker:
    """Drives one worker half in vLLM's order, and keeps count of what it reports."""

    def __init__(self, seed: int, **settings: object) -> None:
        self.caches = make_caches(64, seed)
        self.reports: dict[str, FetchReport] = {}
        self.wakes = 0
        self.connector = WorkerConnector(BLOCK_SIZE, wake=self._wake)
        self.connector.register(self.caches)
        given = KvSettings(**{"frame_bytes": 600, "model_digest": "model", **settings})  # type: ignore[arg-type]
        self.port = self.connector.open(given, {}, "test")
        self.received: Counter[str] = Counter()
        self.failed: set[str] = set()
        self.sent: Counter[str] = Counter()

    def _wake(self) -> None:
        self.wakes += 1

    def step(
        self, metadata: StepMetadata | None = None, finished: set[str] = frozenset(), forward: Callable | None = None
    ) -> KVConnectorTransferResults:
        metadata = metadata or StepMetadata()
        self.connector.preempt(metadata)
        self.connector.begin(metadata)
        if forward is not None or metadata.sends:
            for name in self.caches:
                if forward is not None:
                    forward(name)
                self.connector.layer_done(name)
        self.connector.start_receives(metadata)
        self.connector.end_step()
        results = self.connector.transfer_results(set(finished))
        self.received.update(results.finished_recving)
        self.sent.update(results.finished_sending)
        assert results.failed_recving <= results.finished_recving
        self.failed |= results.failed_recving
        reports = self.connector.take_reports()
        for report in reports.reports if reports else ():
            assert report.request_id not in self.reports, "each is told of once"
            self.reports[report.request_id] = report
        assert results.finished_recving <= set(self.reports), "told of no later than it is reported"
        return results

    def step_until(self, done: Callable[[], bool], what: str) -> None:
        def once() -> bool:
            self.step()
            return done()

        eventually(once, what)

    def assert_idle(self) -> None:
        eventually(lambda: self.connector.status().streams == 0, "streams end")
        status = self.connector.status()
        assert status.entries == []
        assert status.landing_bytes == 0
        assert not self.connector._released
        assert set(self.received.values()) <= {1}, "each request is reported once"
        assert set(self.sent.values()) <= {1}


def _receive(name: str = "r", blocks: tuple[int, ...] = (1, 2), peer: str = "nowhere:1", **more) -> FetchSpec:
    fields = {"first_token": 0, "num_tokens": len(blocks) * BLOCK_SIZE, "timeout_s": 10.0, **more}
    return FetchSpec(request_id=name, transfer_id=f"{name}-t", epoch=1, peers=(peer,), block_ids=blocks, **fields)


def _start(*names: str, **more) -> StepMetadata:
    return StepMetadata(receives=[_receive(name) for name in names], **more)


class ScriptedClient:
    """Ends each fetch as the test says."""

    def __init__(self) -> None:
        self.gates: dict[str, threading.Event] = {}
        self.endings: dict[str, Callable[[Fetch], None]] = {}
        self.cancelled: set[str] = set()
        self.started: set[str] = set()

    def fetch(self, fetch: Fetch) -> FetchReport:
        name = fetch.spec.request_id
        gate = self.gates.setdefault(name, threading.Event())
        self.started.add(name)
        fetch.attach(lambda: self._cancel(name))
        assert gate.wait(10)
        self.endings.get(name, _complete)(fetch)
        return FetchReport(name, 100, 0.1, 0.0, 0.01)

    def _cancel(self, name: str) -> None:
        self.cancelled.add(name)
        self.endings.setdefault(name, _cancelled)
        self.gates.setdefault(name, threading.Event()).set()

    def end(self, name: str, ending: Callable[[Fetch], None]) -> None:
        self.endings[name] = ending
        self.gates.setdefault(name, threading.Event()).set()

    def link_status(self) -> list[LinkStatus]:
        return []

    def close(self) -> None:
        pass


class _RpcFailure(grpc.RpcError):
    def __init__(self, code: grpc.StatusCode) -> None:
        self._code = code

    def code(self) -> grpc.StatusCode:
        return self._code

    def details(self) -> str:
        return "scripted"


_BLOCKS = KvBlocks(make_caches(4, 1), block_size=BLOCK_SIZE, interior="test", model_digest="model")


def _complete(fetch: Fetch) -> None:
    (whole,) = plan([_BLOCKS.layout], 0, [_BLOCKS.layout]).parts
    importer = Importer(fetch.spec, _BLOCKS, whole, LandingBudget(1))
    fetch.begin([importer])
    importer.complete = True


def _cancelled(fetch: Fetch) -> None:
    raise _RpcFailure(grpc.StatusCode.CANCELLED)


def _unavailable(fetch: Fetch) -> None:
    raise _RpcFailure(grpc.StatusCode.UNAVAILABLE)


def _damaged(fetch: Fetch) -> None:
    raise FrameRefusedError("checksum", "scripted")


def _bug(fetch: Fetch) -> None:
    raise ZeroDivisionError("scripted")


def _cut_short(fetch: Fetch) -> None:
    pass


@pytest.fixture
def worker() -> Iterator[Worker]:
    each = Worker(1)
    each.connector._client = ScriptedClient()
    yield each
    each.assert_idle()
    each.connector.shutdown()


def _client(worker: Worker) -> ScriptedClient:
    assert isinstance(worker.connector._client, ScriptedClient)
    return worker.connector._client


def _over(worker: Worker) -> None:
    eventually(lambda: worker.connector.status().streams == 0, "the fetch is over")


# Receiving: reported exactly once, when both imported and released.


def test_imported_then_released(worker: Worker) -> None:
    assert worker.step(_start("r")) == NOTHING
    _client(worker).end("r", _complete)
    _over(worker)
    assert worker.wakes, "an idle engine steps at once"
    assert worker.step() == NOTHING, "not before it is released"
    assert worker.connector.status().entries == ["fetch of r"]
    assert worker.step(StepMetadata(released={"r"})) == KVConnectorTransferResults(finished_recving={"r"})
    assert worker.step(StepMetadata()) == NOTHING
    assert worker.connector.counters == {"completed": 1}
    assert worker.reports["r"].failure == ""
    assert worker.reports["r"].bytes == 100


def test_released_then_imported(worker: Worker) -> None:
    assert worker.step(_start("r", released={"r"})) == NOTHING
    assert worker.step() == NOTHING, "not before it is imported"
    _client(worker).end("r", _complete)
    _over(worker)
    assert worker.step().finished_recving == {"r"}
    assert not worker.failed


@pytest.mark.parametrize(
    ("ending", "failure", "counted"),
    [
        (_unavailable, "UNAVAILABLE: scripted", "stream_unavailable"),
        (_damaged, "refused (checksum)", "checksum"),
        (_bug, "ZeroDivisionError", "internal"),
        (_cut_short, "the stream ended early", "ended_early"),
    ],
)
@pytest.mark.parametrize("released_first", [False, True])
def test_a_failed_fetch_recomputes_once_released(
    worker: Worker, ending: Callable, failure: str, counted: str, released_first: bool
) -> None:
    worker.step(_start("r", released={"r"} if released_first else set()))
    _client(worker).end("r", ending)
    _over(worker)
    if not released_first:
        assert worker.step() == NOTHING
        results = worker.step(StepMetadata(released={"r"}))
    else:
        results = worker.step()
    assert results == KVConnectorTransferResults(finished_recving={"r"}, failed_recving={"r"})
    assert failure in worker.reports["r"].failure
    assert worker.connector.counters == {"failed": 1, counted: 1}


@pytest.mark.parametrize("released", [False, True])
def test_an_abort_is_reported_at_once_and_never_as_failed(worker: Worker, released: bool) -> None:
    worker.step(_start("r", released={"r"} if released else set()))
    eventually(lambda: "r" in _client(worker).started, "the fetch runs")
    results = worker.step(StepMetadata(stop_receives={"r"}))
    assert results == KVConnectorTransferResults(finished_recving={"r"})
    _over(worker)
    assert _client(worker).cancelled == {"r"}
    assert worker.step() == NOTHING
    assert worker.connector.counters == {"failed": 1}, "no frame was refused, no stream has failed"
    assert worker.reports["r"].failure == "the request was aborted"


def test_an_abort_does_not_wait_for_a_fetch_that_cannot_be_cancelled_yet(worker: Worker) -> None:
    """Its thread hangs in a handshake with a dead host: the fence alone makes the blocks free."""
    stuck = threading.Event()
    fetches: list[Fetch] = []

    def hang(fetch: Fetch) -> FetchReport:
        fetches.append(fetch)
        assert stuck.wait(10)
        raise _RpcFailure(grpc.StatusCode.DEADLINE_EXCEEDED)

    worker.connector._client.fetch = hang
    worker.step(_start("r"))
    eventually(lambda: bool(fetches), "the fetch runs")
    assert worker.step(StepMetadata(stop_receives={"r"})).finished_recving == {"r"}
    with pytest.raises(FrameRefusedError, match="fenced"):
        fetches[0].begin([])
    assert worker.connector.status().streams == 1, "its thread is still counted"
    stuck.set()


def test_an_abort_after_completion_before_the_report(worker: Worker) -> None:
    worker.step(_start("r"))
    _client(worker).end("r", _complete)
    _over(worker)
    assert worker.step(StepMetadata(stop_receives={"r"})) == KVConnectorTransferResults(finished_recving={"r"})
    assert worker.step() == NOTHING


def test_an_abort_in_the_step_that_starts_the_fetch(worker: Worker) -> None:
    assert worker.step(_start("r", stop_receives={"r"})).finished_recving == {"r"}
    _over(worker)
    assert worker.reports["r"].failure == "the request was aborted"


def test_an_abort_after_the_report_is_nothing(worker: Worker) -> None:
    worker.step(_start("r", released={"r"}))
    _client(worker).end("r", _complete)
    _over(worker)
    assert worker.step().finished_recving == {"r"}
    assert worker.step(StepMetadata(stop_receives={"r"}, fail_receives={"r"})) == NOTHING


def test_a_sender_that_failed_recomputes_at_once(worker: Worker) -> None:
    worker.step(_start("r"))
    eventually(lambda: "r" in _client(worker).started, "the fetch runs")
    results = worker.step(StepMetadata(fail_receives={"r"}, released={"r"}))
    assert results == KVConnectorTransferResults(finished_recving={"r"}, failed_recving={"r"})
    _over(worker)
    assert worker.reports["r"].failure == "the sender has failed"
    assert worker.connector.counters == {"failed": 1}


def test_a_sender_that_failed_after_all_had_landed_is_not_recomputed(worker: Worker) -> None:
    worker.step(_start("r"))
    _client(worker).end("r", _complete)
    _over(worker)
    results = worker.step(StepMetadata(fail_receives={"r"}, released={"r"}))
    assert results == KVConnectorTransferResults(finished_recving={"r"})
    assert worker.connector.counters == {"completed": 1}


def test_a_failed_sender_and_an_abort_together_are_an_abort(worker: Worker) -> None:
    worker.step(_start("r"))
    results = worker.step(StepMetadata(fail_receives={"r"}, stop_receives={"r"}, released={"r"}))
    assert results == KVConnectorTransferResults(finished_recving={"r"})
    _over(worker)


@pytest.mark.parametrize("seed", range(30))
def test_abort_races_completion(worker: Worker, seed: int) -> None:
    """Many at once end, are released, fail and are aborted in any order; each is reported once."""
    dice = random.Random(seed)
    names = [f"r{index}" for index in range(12)]
    endings = [_complete, _complete, _unavailable, _damaged, _cut_short]
    client = _client(worker)

    def network() -> None:
        for name in dice_network.sample(names, len(names)):
            time.sleep(dice_network.random() * 0.001)
            client.end(name, dice_network.choice(endings))

    dice_network = random.Random(seed + 1000)
    worker.step(_start(*names))
    wire = threading.Thread(target=network)
    wire.start()
    aborted: set[str] = set()
    waiting = set(names)
    while waiting:
        metadata = StepMetadata()
        for name in dice.sample(sorted(waiting), min(2, len(waiting))):
            kind = dice.choice(("release", "release", "fail", "abort", "nothing"))
            if worker.received[name] or kind == "nothing":
                continue
            if kind == "abort":
                metadata.stop_receives.add(name)
                aborted.add(name)
            else:
                metadata.released.add(name)
                if kind == "fail":
                    metadata.fail_receives.add(name)
            waiting.discard(name)
        worker.step(metadata)
    wire.join()
    worker.step_until(lambda: len(worker.received) == len(names), "all are reported")
    eventually(lambda: worker.connector.status().streams == 0, "all fetches are over")
    worker.step()
    assert set(worker.reports) == set(names)
    assert not worker.failed & aborted
    for name in set(names) - aborted:
        assert (name in worker.failed) == bool(worker.reports[name].failure)
    counters = worker.connector.counters
    assert counters["completed"] + counters["failed"] == len(names)


# Two workers over real sockets.


@pytest.fixture
def pair() -> Iterator[tuple[Worker, Worker]]:
    prefill, decode = Worker(1), Worker(2)
    yield prefill, decode
    decode.assert_idle()
    prefill.assert_idle()
    decode.connector.shutdown()
    prefill.connector.shutdown()


def _write(worker: Worker, blocks: list[int], value: float) -> Callable[[str], None]:
    def forward(layer: str) -> None:
        worker.caches[layer][blocks] = value

    return forward


def _landed(worker: Worker) -> list[int]:
    """Tokens of request "r" that have landed, by layer."""
    importers = worker.connector._receives["r"].fetch.importers
    return list(importers[0].landed.values()) if importers else []


def _open(name: str, tokens: int) -> list[OpenSend]:
    return [OpenSend(name, f"{name}-t", 1, tokens)]


def test_a_chunked_prefill_reaches_the_other_worker(pair: tuple[Worker, Worker]) -> None:
    prefill, decode = pair
    tokens = 3 * BLOCK_SIZE - 1
    decode.step(
        StepMetadata(
            receives=[_receive(blocks=(7, 8, 9), peer=prefill.port.address, num_tokens=tokens)],
            released={"r"},
        )
    )
    first = StepMetadata(open_sends=_open("r", tokens), sends=[SendStep("r", (3, 4), 6)])
    prefill.step(first, forward=_write(prefill, [3, 4], 1.5))
    eventually(lambda: _landed(decode) == [BLOCK_SIZE] * 4, "one full block lands")
    assert decode.step() == NOTHING
    prefill.step(StepMetadata(sends=[SendStep("r", (3, 4, 11), tokens)]), forward=_write(prefill, [4, 11], 2.5))
    decode.step_until(lambda: decode.received["r"] == 1, "all has landed")
    assert not decode.failed
    for cache in decode.caches.values():
        assert (cache[7] == 1.5).all()
        assert (cache[8:10] == 2.5).all()
    assert not prefill.sent, "vLLM has not finished it"
    prefill.step(finished={"r"})
    prefill.step_until(lambda: prefill.sent["r"] == 1, "the blocks are given back")
    report = decode.reports["r"]
    assert report.bytes == 3 * sum(prefill.connector.blocks.block_bytes)
    assert report.wire_seconds > 0
    assert report.failure == ""


def test_a_prefix_hit_that_this_very_step_computes_is_not_sent_before_it(pair: tuple[Worker, Worker]) -> None:
    """VLLM shares a block as soon as it is scheduled: two equal prompts in one step, one computes for both."""
    prefill, decode = pair
    peer = prefill.port.address
    receives = [_receive("a", (1, 2), peer=peer), _receive("b", (3, 4), peer=peer)]
    decode.step(StepMetadata(receives=receives, released={"a", "b"}))
    eventually(lambda: prefill.connector.server.open_streams == 2, "both receivers wait")
    sends = [SendStep("a", (10, 11), 8), SendStep("b", (10, 12), 8)]

    def forward(layer: str) -> None:
        time.sleep(0.02)  # what is sent too early, is sent now
        for cache_layer, value in ((layer, 3.0),):
            prefill.caches[cache_layer][10:13] = value

    prefill.step(StepMetadata(open_sends=_open("a", 8) + _open("b", 8), sends=sends), forward=forward)
    decode.step_until(lambda: sum(decode.received.values()) == 2, "both have landed")
    assert not decode.failed
    for cache in decode.caches.values():
        assert (cache[1:5] == 3.0).all()
    prefill.step(finished={"a", "b"})
    prefill.step_until(lambda: sum(prefill.sent.values()) == 2, "the blocks are given back")


def test_a_preempted_sender_fails_its_receiver(pair: tuple[Worker, Worker]) -> None:
    prefill, decode = pair
    decode.step(StepMetadata(receives=[_receive(peer=prefill.port.address)], released={"r"}))
    prefill.step(StepMetadata(open_sends=_open("r", 8), sends=[SendStep("r", (3, 4), 4)]))
    prefill.step(StepMetadata(preempted={"r"}, close_sends={"r": "preempted"}), forward=_write(prefill, [3, 4], 9.0))
    decode.step_until(lambda: decode.received["r"] == 1, "it is reported")
    assert decode.failed == {"r"}
    assert "preempted" in decode.reports["r"].failure
    for cache in decode.caches.values():
        assert not (cache[[1, 2]] == 9.0).any(), "nothing of the blocks' next owner was sent"
    assert not prefill.sent
    prefill.step(finished={"r"})
    prefill.step_until(lambda: prefill.sent["r"] == 1, "reported once it has finished")


def test_a_cancelled_sender_gives_its_blocks_back(pair: tuple[Worker, Worker]) -> None:
    prefill, _ = pair
    prefill.step(StepMetadata(open_sends=_open("r", 8), sends=[SendStep("r", (3, 4), 8)]))
    assert prefill.step(finished={"r"}) == NOTHING, "it waits for its receiver"
    results = prefill.step(StepMetadata(close_sends={"r": "cancelled by the gateway"}))
    assert results.finished_sending == {"r"}


def test_a_sender_that_was_aborted_before_it_ran(pair: tuple[Worker, Worker]) -> None:
    prefill, _ = pair
    assert prefill.step(StepMetadata(open_sends=_open("r", 8)), finished={"r"}).finished_sending == {"r"}


def test_an_abort_mid_way_frees_both_ends(pair: tuple[Worker, Worker]) -> None:
    prefill, decode = pair
    decode.step(StepMetadata(receives=[_receive(peer=prefill.port.address)]))
    prefill.step(StepMetadata(open_sends=_open("r", 8), sends=[SendStep("r", (3, 4), 4)]))
    eventually(lambda: _landed(decode) == [BLOCK_SIZE] * 4, "half has landed")
    assert decode.step(StepMetadata(stop_receives={"r"})).finished_recving == {"r"}
    for cache in decode.caches.values():
        cache[:] = 0
    prefill.step(StepMetadata(sends=[SendStep("r", (3, 4), 8)]), forward=_write(prefill, [3, 4], 5.0))
    prefill.step(finished={"r"})
    prefill.step_until(lambda: prefill.sent["r"] == 1, "the blocks are given back")
    assert all((cache == 0).all() for cache in decode.caches.values())


def test_nobody_fetches_it(worker: Worker) -> None:
    late = Worker(3, lease_s=0.1)
    late.step(StepMetadata(open_sends=_open("r", 8), sends=[SendStep("r", (3, 4), 8)]))
    late.step(finished={"r"})
    assert late.connector.status().entries == ["send r-t of request r"]
    late.step_until(lambda: late.sent["r"] == 1, "its lease ends")
    late.assert_idle()
    late.connector.shutdown()


def test_what_was_opened_before_it_drains_is_still_sent(pair: tuple[Worker, Worker]) -> None:
    prefill, decode = pair
    prefill.step(StepMetadata(open_sends=_open("r", 8), sends=[SendStep("r", (3, 4), 8)], stopping=True))
    assert prefill.connector.needed() == {"r-t"}
    prefill.step(StepMetadata(open_sends=_open("late", 4), sends=[SendStep("late", (5,), 4)], stopping=True))
    decode.step(
        StepMetadata(receives=[_receive(peer=prefill.port.address), _receive("late", (7,), prefill.port.address)])
    )
    decode.step(StepMetadata(released={"r", "late"}))
    decode.step_until(lambda: set(decode.received) == {"r", "late"}, "both are reported")
    assert decode.failed == {"late"}
    assert "this worker is stopping" in decode.reports["late"].failure
    prefill.step(finished={"r", "late"})
    prefill.step_until(lambda: prefill.sent.keys() == {"r", "late"}, "the blocks are given back")
    assert prefill.connector.needed() == set()


@pytest.mark.parametrize("seed", range(3))
def test_many_requests_with_aborts_and_preemptions(pair: tuple[Worker, Worker], seed: int) -> None:
    """Random lives of 24 requests on two workers; what is reported good is byte for byte good."""
    prefill, decode = pair
    dice = random.Random(seed)
    there, here = dice.sample(range(64), 64), dice.sample(range(64), 64)
    peer = prefill.port.address
    lives = {}
    for index in range(24):
        count = dice.randint(1, 2)
        ids, there = there[:count], there[count:]
        targets, here = here[:count], here[count:]
        lives[f"r{index}"] = (ids, targets, dice.choice(("good", "good", "abort", "preempt", "cancel")))
    to_open, to_receive = list(lives), dice.sample(list(lives), len(lives))
    computing: dict[str, int] = {}
    aborted: set[str] = set()
    while to_open or to_receive or computing:
        metadata = StepMetadata()
        for name in [to_receive.pop() for _ in range(min(len(to_receive), dice.randint(0, 4)))]:
            metadata.receives.append(_receive(name, tuple(lives[name][1]), peer=peer))
            metadata.released.add(name)
        for name in lives:
            active = name in decode.connector._receives and not decode.received[name]
            if lives[name][2] == "abort" and active and name not in aborted and dice.random() < 0.3:
                metadata.stop_receives.add(name)
                aborted.add(name)
        decode.step(metadata)
        metadata = StepMetadata()
        for name in [to_open.pop() for _ in range(min(len(to_open), dice.randint(0, 4)))]:
            metadata.open_sends += _open(name, len(lives[name][0]) * BLOCK_SIZE)
            computing[name] = 0
        ended = set()
        written: list[int] = []
        for name in dice.sample(sorted(computing), min(3, len(computing))):
            ids, _, fate = lives[name]
            if fate in ("preempt", "cancel") and dice.random() < 0.3:
                metadata.close_sends[name] = fate
                if fate == "preempt":
                    metadata.preempted.add(name)
                    written += ids  # somebody else's by now
                ended.add(name)
                continue
            before, computing[name] = computing[name], computing[name] + 1
            metadata.sends.append(SendStep(name, tuple(ids), computing[name] * BLOCK_SIZE))
            written += ids[before : computing[name]]
            if computing[name] == len(ids):
                ended.add(name)
        prefill.step(metadata, forward=lambda layer: _scribble(prefill, layer, written))  # noqa: B023
        for name in ended:
            del computing[name]
        prefill.step(finished=ended)
    # A stream that was aborted before it had its transfer leaves it open: the gateway ends both parts.
    prefill.step(StepMetadata(close_sends=dict.fromkeys(aborted, "cancelled by the gateway")))
    decode.step_until(lambda: len(decode.received) == len(lives), "all are reported")
    prefill.step_until(lambda: len(prefill.sent) == len(lives), "all blocks are given back")
    good = set(lives) - decode.failed - aborted
    assert good >= {name for name, life in lives.items() if life[2] == "good"}
    for name in good:
        ids, targets, _ = lives[name]
        for layer in LAYERS:
            assert torch.equal(decode.caches[layer][targets], prefill.caches[layer][ids]), name
    bad = {life[2] for name, life in lives.items() if name not in good}
    assert bad <= {"abort", "preempt", "cancel"}


def _scribble(worker: Worker, layer: str, blocks: list[int]) -> None:
    for block in blocks:
        worker.caches[layer][block] = torch.randn(worker.caches[layer][block].shape)
