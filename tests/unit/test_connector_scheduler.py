"""The scheduler half: which state reports what, with fakes of the few fields of vLLM that it reads."""

from types import SimpleNamespace

import pytest
from vllm.v1.outputs import KVConnectorOutput

from joinwise.actors.kv.fetching import FetchReport
from joinwise.actors.kv.receiving import FetchSpec
from joinwise.actors.vllm.connector.metadata import OpenSend, SendStep, StepMetadata, StepReports
from joinwise.actors.vllm.connector.scheduler import SchedulerConnector
from joinwise.actors.vllm.handoff import Handoff

BLOCK = 4


class Scheduler:
    """Drives the connector in vLLM's order."""

    def __init__(self, ranks: int = 1) -> None:
        self.connector = SchedulerConnector(BLOCK, ranks=ranks)

    def add(self, name: str, half: str | None, prompt: int) -> SimpleNamespace:
        handoff = Handoff(half, f"{name}-transfer", 7, "peer:1", 9.0) if half else None
        request = SimpleNamespace(
            request_id=name,
            num_prompt_tokens=prompt,
            kv_transfer_params=handoff.to_params() if handoff else None,
        )
        self.connector.on_new_request(request)
        return request

    def allocate(self, request: SimpleNamespace, blocks: list[int], hit: int = 0) -> None:
        external, asynchronous = self.connector.matched_tokens(request, hit)
        assert asynchronous == (external > 0)
        self.connector.after_alloc(request, _blocks(blocks), external)

    def step(self, *, new=(), cached=(), preempted=()) -> StepMetadata:
        """One step: `new` and `cached` are (request, new blocks, computed before, scheduled now)."""
        new, cached = list(new), list(cached)
        output = SimpleNamespace(
            preempted_req_ids={each.request_id for each in preempted} or None,
            scheduled_new_reqs=[
                SimpleNamespace(req_id=request.request_id, block_ids=(blocks,), num_computed_tokens=computed)
                for request, blocks, computed, _ in new
            ],
            scheduled_cached_reqs=SimpleNamespace(
                req_ids=[request.request_id for request, *_ in cached],
                new_block_ids=[(blocks,) if blocks else None for _, blocks, _, _ in cached],
                num_computed_tokens=[computed for _, _, computed, _ in cached],
                is_context_phase={
                    request.request_id: computed < request.num_prompt_tokens for request, _, computed, _ in cached
                }.__getitem__,
            ),
            num_scheduled_tokens={request.request_id: count for request, _, _, count in [*new, *cached]},
        )
        metadata = self.connector.build_metadata(output)
        assert self.connector.prompt_tokens == sum(
            count for request, _, computed, count in [*new, *cached] if computed < request.num_prompt_tokens
        )
        return metadata

    def report(self, *, received=(), sent=()) -> None:
        names = [{each.request_id for each in group} or None for group in (received, sent)]
        self.connector.on_worker_output(KVConnectorOutput(finished_recving=names[0], finished_sending=names[1]))

    def assert_idle(self) -> None:
        assert self.connector.entries() == []
        assert self.step() == StepMetadata()


def _blocks(ids: list[int]) -> SimpleNamespace:
    return SimpleNamespace(get_block_ids=lambda: (list(ids),))


@pytest.fixture
def scheduler() -> Scheduler:
    return Scheduler()


def _loading(scheduler: Scheduler, prompt: int = 10) -> SimpleNamespace:
    request = scheduler.add("d", "recv", prompt)
    scheduler.allocate(request, list(range(-(-prompt // BLOCK))))
    scheduler.step()
    return request


# Receiving.


def test_an_ordinary_request_has_no_part_in_it(scheduler: Scheduler) -> None:
    request = scheduler.add("x", None, 10)
    assert scheduler.connector.matched_tokens(request, 0) == (0, False)
    scheduler.connector.after_alloc(request, _blocks([1, 2, 3]), 0)
    metadata = scheduler.step(new=[(request, [1, 2, 3], 0, 10)])
    assert metadata == StepMetadata()
    assert not scheduler.connector.release("x", recompute=False)
    assert not scheduler.connector.request_finished(request)
    scheduler.assert_idle()


@pytest.mark.parametrize(
    ("prompt", "hit", "first", "ids"),
    [
        (10, 0, 0, (20, 21, 22)),
        (10, 4, 1, (21, 22)),
        (10, 8, 2, (22,)),
        (8, 4, 1, (21,)),
        (12, 8, 2, (22,)),
        (1, 0, 0, (20,)),
    ],
)
def test_only_the_tail_behind_the_prefix_hit_is_fetched(
    scheduler: Scheduler, prompt: int, hit: int, first: int, ids: tuple[int, ...]
) -> None:
    request = scheduler.add("d", "recv", prompt)
    assert scheduler.connector.matched_tokens(request, hit) == (prompt - hit, True)
    # vLLM has also allocated a block beyond the prompt.
    scheduler.connector.after_alloc(request, _blocks([20, 21, 22, 23, 24]), prompt - hit)
    metadata = scheduler.step()
    assert metadata.receives == [FetchSpec("d", "d-transfer", 7, ("peer:1",), first * BLOCK, ids, prompt, 9.0)]
    assert not metadata.released
    scheduler.connector.request_finished(request)


def test_asking_has_no_side_effect_and_allocation_decides(scheduler: Scheduler) -> None:
    request = scheduler.add("d", "recv", 10)
    for hit in (8, 4, 0, 4):
        assert scheduler.connector.matched_tokens(request, hit) == (10 - hit, True)
    assert scheduler.step().receives == []
    scheduler.allocate(request, [1, 2, 3], hit=4)
    assert [each.first_token for each in scheduler.step().receives] == [BLOCK]
    scheduler.connector.after_alloc(request, _blocks([1, 2, 3]), 0)  # vLLM's second call, after the load
    assert scheduler.step().receives == []
    scheduler.connector.request_finished(request)


def test_no_external_tokens_is_no_transfer(scheduler: Scheduler) -> None:
    request = scheduler.add("d", "recv", 10)
    scheduler.connector.after_alloc(request, _blocks([1, 2, 3]), 0)
    scheduler.connector.release("d", recompute=False)
    assert scheduler.step() == StepMetadata()
    scheduler.connector.request_finished(request)
    scheduler.assert_idle()


@pytest.mark.parametrize("when", ["before", "same step", "after"])
def test_release_reaches_the_worker_once(scheduler: Scheduler, when: str) -> None:
    request = scheduler.add("d", "recv", 10)
    if when == "before":
        assert scheduler.connector.release("d", recompute=False)
        assert scheduler.step().released == set(), "the worker knows nothing of it yet"
    scheduler.allocate(request, [1, 2, 3])
    if when == "same step":
        assert scheduler.connector.release("d", recompute=False)
    if when == "after":
        assert scheduler.step().released == set()
        assert scheduler.connector.release("d", recompute=False)
    metadata = scheduler.step()
    assert metadata.released == {"d"}
    assert not metadata.fail_receives
    assert len(metadata.receives) == (when != "after")
    assert scheduler.step().released == set()
    scheduler.report(received=[request])
    assert scheduler.connector.matched_tokens(request, 0) == (0, False)
    assert not scheduler.connector.request_finished(request)
    scheduler.assert_idle()


def _import(scheduler: Scheduler, *failures: str) -> None:
    """A report of each rank."""
    reports = [FetchReport("d", failure=failure) for failure in failures]
    scheduler.connector.on_worker_output(KVConnectorOutput(kv_connector_worker_meta=StepReports(reports)))


def test_who_is_released_after_the_import_goes_on_in_the_very_next_step(scheduler: Scheduler) -> None:
    request = _loading(scheduler)
    _import(scheduler, "")
    assert scheduler.connector.take_ready() == set(), "not before it is released"
    scheduler.connector.release("d", recompute=False)
    assert scheduler.connector.take_ready() == {"d"}
    assert scheduler.connector.take_ready() == set()
    assert scheduler.step().released == {"d"}, "so that the worker half forgets it"
    assert scheduler.connector.entries() == ["receive d (over)", "import of d"]
    output = KVConnectorOutput(finished_recving={"d", "other"})
    scheduler.connector.on_worker_output(output)
    assert output.finished_recving == {"other"}, "vLLM knows of it"
    assert not scheduler.connector.request_finished(request)
    scheduler.assert_idle()


def test_who_is_aborted_between_its_release_and_the_step_is_fenced(scheduler: Scheduler) -> None:
    request = _loading(scheduler)
    _import(scheduler, "")
    scheduler.connector.release("d", recompute=False)
    scheduler.connector.request_finished(request)
    assert scheduler.connector.take_ready() == set()
    assert scheduler.step().stop_receives == {"d"}
    output = KVConnectorOutput(finished_recving={"d"})
    scheduler.connector.on_worker_output(output)
    assert output.finished_recving == {"d"}, "vLLM frees its blocks by this"
    scheduler.assert_idle()


def test_who_is_aborted_after_that_step_is_fenced_no_more(scheduler: Scheduler) -> None:
    request = _loading(scheduler)
    _import(scheduler, "")
    scheduler.connector.release("d", recompute=False)
    scheduler.connector.take_ready()
    assert not scheduler.connector.request_finished(request)
    metadata = scheduler.step()
    assert (metadata.released, metadata.stop_receives) == ({"d"}, set())
    scheduler.report(received=[request])
    scheduler.assert_idle()


@pytest.mark.parametrize("failures", [["lost"], ["", "lost"], [""]])
def test_only_a_whole_import_is_ready(failures: list[str]) -> None:
    scheduler = Scheduler(ranks=2)
    request = _loading(scheduler)
    _import(scheduler, *failures)
    scheduler.connector.release("d", recompute=False)
    assert scheduler.connector.take_ready() == set()
    assert scheduler.step().released == {"d"}
    _import(scheduler, *[""] * (2 - len(failures)))
    scheduler.report(received=[request])
    scheduler.connector.request_finished(request)
    scheduler.assert_idle()


def test_a_sender_that_fails_after_the_import_is_told_to_the_worker(scheduler: Scheduler) -> None:
    _loading(scheduler)
    _import(scheduler, "")
    scheduler.connector.release("d", recompute=True)
    assert scheduler.connector.take_ready() == set()
    metadata = scheduler.step()
    assert metadata.fail_receives == metadata.released == {"d"}


def test_a_release_that_comes_too_late_does_nothing(scheduler: Scheduler) -> None:
    request = _loading(scheduler)
    scheduler.connector.release("d", recompute=False)
    scheduler.step()
    scheduler.report(received=[request])
    scheduler.connector.release("d", recompute=True)
    assert scheduler.step() == StepMetadata()
    scheduler.connector.request_finished(request)
    assert not scheduler.connector.release("d", recompute=False)
    scheduler.assert_idle()


def test_a_sender_that_fails_while_loading_stops_the_fetch(scheduler: Scheduler) -> None:
    request = _loading(scheduler)
    assert scheduler.connector.release("d", recompute=True)
    metadata = scheduler.step()
    assert metadata.fail_receives == {"d"}
    assert metadata.released == {"d"}
    scheduler.report(received=[request])  # together with failed_recving, which vLLM handles
    assert scheduler.connector.matched_tokens(request, 0) == (0, False), "it computes its own prompt"
    scheduler.connector.after_alloc(request, _blocks([1, 2, 3]), 0)
    assert scheduler.step() == StepMetadata()
    scheduler.connector.request_finished(request)
    scheduler.assert_idle()


def test_a_sender_that_fails_before_allocation_is_never_asked(scheduler: Scheduler) -> None:
    request = scheduler.add("d", "recv", 10)
    scheduler.connector.release("d", recompute=True)
    assert scheduler.connector.matched_tokens(request, 0) == (0, False)
    scheduler.connector.after_alloc(request, _blocks([1, 2, 3]), 0)
    assert scheduler.step() == StepMetadata()
    assert not scheduler.connector.request_finished(request)
    scheduler.assert_idle()


def test_aborted_before_allocation_is_never_reported(scheduler: Scheduler) -> None:
    request = scheduler.add("d", "recv", 10)
    scheduler.connector.matched_tokens(request, 0)
    assert not scheduler.connector.request_finished(request)
    scheduler.assert_idle()


@pytest.mark.parametrize("released", [False, True])
@pytest.mark.parametrize("same_step", [False, True])
def test_aborted_while_loading_is_fenced_once(scheduler: Scheduler, released: bool, same_step: bool) -> None:
    request = scheduler.add("d", "recv", 10)
    scheduler.allocate(request, [1, 2, 3])
    if not same_step:
        scheduler.step()
    if released:
        scheduler.connector.release("d", recompute=False)
    assert not scheduler.connector.request_finished(request), "vLLM keeps the blocks of a loading request by itself"
    metadata = scheduler.step()
    assert metadata.stop_receives == {"d"}
    assert len(metadata.receives) == same_step
    scheduler.report(received=[request])
    assert not scheduler.connector.release("d", recompute=True)
    scheduler.assert_idle()


def test_aborted_after_its_report_is_nothing(scheduler: Scheduler) -> None:
    request = _loading(scheduler)
    scheduler.connector.release("d", recompute=False)
    scheduler.step()
    scheduler.report(received=[request])
    assert not scheduler.connector.request_finished(request)
    scheduler.assert_idle()


def test_a_preempted_receiver_computes_its_own_prompt(scheduler: Scheduler) -> None:
    request = _loading(scheduler)
    scheduler.connector.release("d", recompute=False)
    scheduler.step()
    scheduler.report(received=[request])
    scheduler.step(cached=[(request, [9], 10, 1)])
    assert scheduler.step(preempted=[request]).preempted == {"d"}
    assert scheduler.connector.matched_tokens(request, 4) == (0, False)
    scheduler.connector.after_alloc(request, _blocks([4, 5, 6]), 0)
    metadata = scheduler.step(cached=[(request, [4, 5, 6], 0, 11)])
    assert not metadata.receives
    assert not metadata.sends
    assert not scheduler.connector.request_finished(request)
    scheduler.assert_idle()


# Sending.


def test_chunks_advance_a_sender_up_to_its_prompt(scheduler: Scheduler) -> None:
    request = scheduler.add("p", "send", 10)
    metadata = scheduler.step(new=[(request, [5, 6], 4, 4)])
    assert metadata.open_sends == [OpenSend("p", "p-transfer", 7, 10)]
    assert metadata.sends == [SendStep("p", (5, 6), 8)]
    metadata = scheduler.step(cached=[(request, [9], 8, 1)])
    assert metadata.open_sends == []
    assert metadata.sends == [SendStep("p", (5, 6, 9), 9)]
    metadata = scheduler.step(cached=[(request, [], 9, 1)])
    assert metadata.sends == [SendStep("p", (5, 6, 9), 10)]
    metadata = scheduler.step(cached=[(request, [], 10, 1)])
    assert metadata.sends == [SendStep("p", (5, 6, 9), 10)], "what is decoded is not sent"
    assert scheduler.connector.request_finished(request), "vLLM keeps the blocks"
    assert scheduler.connector.entries() == ["held p"]
    scheduler.report(sent=[request])
    scheduler.assert_idle()


def test_a_sender_that_never_ran_is_held_until_the_worker_has_forgotten_it(scheduler: Scheduler) -> None:
    request = scheduler.add("p", "send", 10)
    assert scheduler.connector.request_finished(request)
    scheduler.connector.cancel_send("p")
    metadata = scheduler.step()
    assert len(metadata.open_sends) == 1
    assert list(metadata.close_sends) == ["p"]
    scheduler.report(sent=[request])
    scheduler.assert_idle()


@pytest.mark.parametrize("finished", [False, True])
def test_a_cancelled_sender_is_closed(scheduler: Scheduler, finished: bool) -> None:
    request = scheduler.add("p", "send", 10)
    scheduler.step(new=[(request, [5, 6, 7], 0, 10)])
    if finished:
        assert scheduler.connector.request_finished(request)
    scheduler.connector.cancel_send("p")
    assert list(scheduler.step().close_sends) == ["p"]
    if not finished:
        assert scheduler.connector.request_finished(request)
    scheduler.report(sent=[request])
    scheduler.connector.cancel_send("p")
    scheduler.assert_idle()


def test_a_preempted_sender_is_closed_and_never_advanced_again(scheduler: Scheduler) -> None:
    request = scheduler.add("p", "send", 10)
    scheduler.step(new=[(request, [5, 6], 0, 8)])
    metadata = scheduler.step(preempted=[request])
    assert metadata.preempted == {"p"}
    assert metadata.close_sends == {"p": "preempted"}
    for resumed in ({"new": [(request, [1, 2, 3], 0, 10)]}, {"cached": [(request, [1, 2, 3], 0, 10)]}):
        assert scheduler.step(**resumed).sends == [], "resumed: its blocks are others"
    assert scheduler.connector.request_finished(request), "until the worker's last stream has gone"
    scheduler.report(sent=[request])
    scheduler.assert_idle()


def test_preempted_and_resumed_in_one_step(scheduler: Scheduler) -> None:
    request = scheduler.add("p", "send", 10)
    scheduler.step(new=[(request, [5, 6], 0, 8)])
    metadata = scheduler.step(preempted=[request], cached=[(request, [1, 2, 3], 0, 10)])
    assert metadata.close_sends == {"p": "preempted"}
    assert metadata.sends == []
    assert scheduler.connector.request_finished(request)
    scheduler.report(sent=[request])
    scheduler.assert_idle()


def test_both_halves_beside_each_other(scheduler: Scheduler) -> None:
    sends, receives = scheduler.add("p", "send", 6), scheduler.add("d", "recv", 6)
    scheduler.allocate(receives, [1, 2])
    metadata = scheduler.step(new=[(sends, [3, 4], 0, 6)])
    assert [each.request_id for each in metadata.sends] == ["p"]
    assert [each.request_id for each in metadata.receives] == ["d"]
    scheduler.connector.cancel_send("d")
    assert not scheduler.connector.release("p", recompute=False)
    assert scheduler.step() == StepMetadata()
    assert scheduler.connector.request_finished(sends)
    assert not scheduler.connector.request_finished(receives)
    assert scheduler.step().stop_receives == {"d"}
    scheduler.report(sent=[sends], received=[receives])
    scheduler.assert_idle()


def test_a_receiver_that_appended_to_the_prompt_fetches_what_the_sender_has(scheduler: Scheduler) -> None:
    handoff = Handoff("recv", "t", 7, "peer:1", 9.0, num_tokens=8)
    for hit, offered, blocks in ((0, 8, (10, 11)), (4, 4, (11,))):
        request = SimpleNamespace(request_id="d", num_prompt_tokens=9, kv_transfer_params=handoff.to_params())
        scheduler.connector.on_new_request(request)  # type: ignore[arg-type]
        assert scheduler.connector.matched_tokens(request, hit) == (offered, True)  # type: ignore[arg-type]
        scheduler.allocate(request, [10, 11, 12], hit)
        (spec,) = scheduler.step().receives
        assert (spec.first_token, spec.num_tokens, spec.block_ids) == (hit, 8, blocks)
        scheduler.connector.request_finished(request)  # type: ignore[arg-type]
        scheduler.step()
    request = SimpleNamespace(request_id="d", num_prompt_tokens=9, kv_transfer_params=handoff.to_params())
    scheduler.connector.on_new_request(request)  # type: ignore[arg-type]
    scheduler.allocate(request, [10, 11, 12], 8)  # all of it is in the cache already
    assert not scheduler.step().receives
    scheduler.connector.request_finished(request)  # type: ignore[arg-type]
    scheduler.assert_idle()
