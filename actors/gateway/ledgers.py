"""Builds a request's ledger while it runs, and keeps the last few for whoever asks.

Times are taken on the gateway's monotonic clock; what only a worker can know (bytes and seconds on
the wire) comes in its transfer report.
"""

import itertools
import statistics
import time
from collections import OrderedDict

from fastapi import APIRouter
from fastapi.responses import Response
from prometheus_client import CollectorRegistry, Counter, Histogram
from vllm.v1.engine import EngineCoreOutput

from joinwise.actors.gateway.convert import bare_request_id
from joinwise.actors.gateway.tracing import Root, Traces
from joinwise.cluster.ledger import RequestLedger
from joinwise.cluster.router.router import Assignment
from joinwise.proto import engine_pb2

_KEPT = 2048


class LedgerBuilder:
    """One request's ledger in the making.

    Args:
        request_id: vLLM's id of the request.
        call_id: the front door's id of the call; the samples of n > 1 share it.
        model: the model asked for.
        created: monotonic time at which the request was rendered.
        routed_s: seconds that routing took.
        prompt_tokens: tokens of the prompt.
        trace: its trace, where requests are traced.
    """

    def __init__(
        self,
        *,
        request_id: str,
        call_id: str,
        model: str,
        created: float,
        routed_s: float,
        prompt_tokens: int,
        trace: Root | None = None,
    ) -> None:
        self.request_id = request_id
        self.call_id = call_id
        self.model = model
        self.recomputed = False
        self.trace = trace
        self._created = created
        self._routed_s = routed_s
        self._prompt_tokens = prompt_tokens
        self._cached_tokens = 0
        self._assignment: Assignment | None = None
        self._attempt = 0
        self._report: engine_pb2.TransferReport | None = None
        self._token_times: list[float] = []
        self._output_tokens = 0
        self._replayed = 0
        self._replayed_step_s = 0.0
        self._draft_rounds = self._draft_tokens = self._accepted_drafts = 0
        self._scheduled: float | None = None
        self._finished = created
        self._reason = ""

    def assigned(self, assignment: Assignment, attempt: int) -> None:
        """The request goes to these workers."""
        self._assignment = assignment
        self._attempt = attempt

    def transferred(self, report: engine_pb2.TransferReport) -> None:
        """The decode worker has reported its import."""
        self._report = report
        self.recomputed = self.recomputed or report.recomputed

    def replayed(self, tokens: int, step_s: float) -> None:
        """The decode part has repeated tokens; `step_s` is how long its step took, where that is known."""
        self._replayed += tokens
        self._replayed_step_s += step_s if tokens else 0.0

    def produced(self, output: EngineCoreOutput, now: float) -> None:
        """New output for the client."""
        if output.prefill_stats is not None and not self._token_times:
            self._cached_tokens = output.prefill_stats.num_cached_tokens
        for event in output.events or ():
            if event.type == 2 and self._scheduled is None:  # SCHEDULED
                self._scheduled = event.timestamp
        if (drafts := output.spec_decode_metrics) is not None:
            self._draft_rounds += sum(drafts.histogram)
            self._draft_tokens += drafts.num_draft_tokens
            self._accepted_drafts += sum(right * rounds for right, rounds in enumerate(drafts.histogram))
        if output.new_token_ids:
            self._token_times.append(now)
            self._output_tokens += len(output.new_token_ids)

    def finish(self, reason: str, now: float) -> None:
        """The request has ended."""
        self._reason = reason
        self._finished = now

    def build(self) -> RequestLedger:
        """The ledger as it stands."""
        times = self._token_times
        gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
        later_gaps = gaps[1:] or gaps
        assignment, report = self._assignment, self._report
        first = times[0] if times else self._finished
        scheduled = min(max(self._scheduled or self._created + self._routed_s, self._created), first)
        prefill = assignment.prefill if assignment is not None else None
        return RequestLedger(
            request_id=self.request_id,
            model=self.model,
            arrived=time.time() - (time.monotonic() - self._created),
            assignment_reason=assignment.reason if assignment is not None else "",
            prefill_worker=prefill.worker_id if prefill is not None else None,
            decode_worker=assignment.decode.worker_id if assignment is not None else None,
            transport=report.transport if report is not None and not report.failure else None,
            attempt=self._attempt,
            queued_s=max(0.0, scheduled - self._created - self._routed_s),
            routed_s=self._routed_s,
            prefill_s=first - scheduled,
            wire_bytes=report.bytes if report is not None else 0,
            wire_seconds_hidden=max(0.0, report.wire_seconds - report.exposed_seconds) if report is not None else 0.0,
            wire_seconds_exposed=report.exposed_seconds if report is not None else 0.0,
            import_s=report.import_seconds if report is not None else 0.0,
            ttft_s=first - self._created,
            token_gap_median_s=statistics.median(later_gaps) if later_gaps else 0.0,
            token_gap_max_s=max(gaps, default=0.0),
            second_token_gap_s=gaps[0] if gaps else 0.0,
            replayed_steps=self._replayed,
            replayed_step_s=self._replayed_step_s,
            recomputed=self.recomputed,
            prompt_tokens=self._prompt_tokens,
            cached_tokens=self._cached_tokens,
            output_tokens=self._output_tokens,
            draft_rounds=self._draft_rounds,
            draft_tokens=self._draft_tokens,
            accepted_drafts=self._accepted_drafts,
            finish_reason=self._reason,
            total_s=self._finished - self._created,
        )


class Ledgers:
    """The last ledgers of a gateway, and the histograms and traces made of them."""

    def __init__(self, registry: CollectorRegistry | None, traces: Traces | None = None) -> None:
        self._traces = traces
        self.added = 0
        """How many there have been."""
        self._kept: OrderedDict[str, RequestLedger] = OrderedDict()
        self._calls: OrderedDict[str, list[RequestLedger]] = OrderedDict()
        seconds = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
        self._histograms = {
            name: Histogram(f"joinwise:{name}_seconds", text, buckets=seconds, registry=registry)
            for name, text in (
                ("queued", "From rendered to scheduled, less routing"),
                ("routed", "Spent in the router"),
                ("prefill", "From scheduled to the first token"),
                ("ttft", "From rendered to the first token"),
                ("wire_hidden", "KV on the wire while prefill still ran"),
                ("wire_exposed", "KV on the wire after prefill had ended"),
                ("import", "Copying KV into blocks"),
                ("second_token_gap", "From the first token to the second"),
                ("token_gap_median", "Median gap of later tokens"),
                ("total", "From rendered to the last token"),
            )
        }
        self._bytes = Counter("joinwise:kv_bytes", "KV bytes received for requests", registry=registry)
        self._requests = Counter("joinwise:requests", "Requests ended", ["finish_reason", "split"], registry=registry)
        self._recomputed = Counter("joinwise:recomputed_requests", "Requests computed again", registry=registry)

    def add(self, request_id: str, builder: LedgerBuilder) -> None:
        """Keep a finished request's ledger."""
        ledger = builder.build()
        self.added += 1
        self._kept[request_id] = ledger
        self._calls.setdefault(bare_request_id(builder.call_id), []).append(ledger)
        for kept in (self._kept, self._calls):
            while len(kept) > _KEPT:
                kept.popitem(last=False)
        values = {
            "queued": ledger.queued_s,
            "routed": ledger.routed_s,
            "prefill": ledger.prefill_s,
            "ttft": ledger.ttft_s,
            "total": ledger.total_s,
            "second_token_gap": ledger.second_token_gap_s,
            "token_gap_median": ledger.token_gap_median_s,
        }
        if ledger.wire_bytes:
            values["wire_hidden"] = ledger.wire_seconds_hidden
            values["wire_exposed"] = ledger.wire_seconds_exposed
            values["import"] = ledger.import_s
            self._bytes.inc(ledger.wire_bytes)
        for name, value in values.items():
            self._histograms[name].observe(value)
        self._requests.labels(ledger.finish_reason, str(ledger.prefill_worker is not None).lower()).inc()
        if ledger.recomputed:
            self._recomputed.inc()
        if self._traces is not None and builder.trace is not None:
            self._traces.end(builder.trace, ledger)

    def get(self, request_id: str) -> RequestLedger | None:
        """The ledger of a request that has ended lately."""
        return self._kept.get(request_id)

    def latest(self, most: int) -> list[RequestLedger]:
        """The last ledgers, oldest first."""
        return [*itertools.islice(reversed(self._kept.values()), most)][::-1]

    def routes(self) -> APIRouter:
        """The path of the HTTP interface that gives all that are kept, oldest first, a line each."""
        router = APIRouter()
        router.add_api_route("/ledgers", self.answer, methods=["GET"], include_in_schema=False)
        return router

    async def answer(self) -> Response:
        """JSON lines, as `joinwise trace export` and `joinwise plan --from-live` read them."""
        lines = "".join(f"{each.to_json()}\n" for each in self.latest(_KEPT))
        return Response(lines, media_type="application/jsonl")

    def of_call(self, call_id: str) -> list[RequestLedger]:
        """The ledgers of a client's call that has ended lately, one per sample."""
        return self._calls.get(call_id, [])
