"""What one stream has received so far; the part that both clients share.

Owns the sequence check, the events for the final result, and the ledger. A stream is complete when its `usage` event
has come; one that ends earlier without an error is broken.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from joinwise.cluster.client.failures import SequenceGapError
from joinwise.cluster.client.types import Event, Generation, Started, Usage
from joinwise.cluster.client.wire import Collector, read_event
from joinwise.proto import inference_pb2 as pb

LEDGER_TRAILER = "joinwise-ledger-bin"


class Progress:
    """The state of one stream.

    Args:
        request: what was asked; its id is None until the gateway tells its own, unless the caller has chosen it.
    """

    def __init__(self, request: pb.GenerateRequest) -> None:
        self.request_id = request.request_id or None
        self._request = request
        self.ledger: Mapping[str, Any] | None = None
        self._collector = Collector()
        self._next = 0
        self._complete = False

    def take(self, response: pb.GenerateResponse) -> Event | None:
        """The event of the next response; None for a kind that is not known here.

        Raises:
            SequenceGapError: events are missing, repeated or out of order.
        """
        if response.sequence != self._next:
            message = f"event {response.sequence} came where event {self._next} was due"
            raise SequenceGapError(message, request_id=self.request_id)
        self._next += 1
        event = read_event(response)
        if event is None:
            return None
        if isinstance(event, Started):
            self.request_id = event.request_id
        elif isinstance(event, Usage):
            self._complete = True
        self._collector.add(event)
        return event

    @property
    def begun(self) -> bool:
        """Whether anything of the answer has come."""
        return self._next > 0

    def again(self) -> pb.GenerateRequest | None:
        """What to ask of another gateway, so that it goes on where this stream has broken; None where none can.

        Of several choices nobody knows how far each had come when their tokens were drawn.
        """
        if not self._next:
            return self._request
        if self._request.sampling.n > 1:
            return None
        request = pb.GenerateRequest()
        request.CopyFrom(self._request)
        request.request_id = self.request_id or ""
        token_ids, characters, finished = self._collector.received(0)
        request.resume.CopyFrom(
            pb.Resume(next_sequence=self._next, token_ids=token_ids, characters=characters, finished=finished)
        )
        return request

    def take_trailer(self, trailer: Mapping[str, Any]) -> None:
        """Keep the ledger, if the trailing metadata has one that can be read."""
        raw = trailer.get(LEDGER_TRAILER)
        if isinstance(raw, bytes):
            try:
                ledger = json.loads(raw)
            except ValueError:
                return
            self.ledger = ledger if isinstance(ledger, dict) else None

    def check_complete(self) -> None:
        """To be called at the end of the stream.

        Raises:
            SequenceGapError: the last event has not come.
        """
        if not self._complete:
            message = f"the stream ended after {self._next} events, before its last one"
            raise SequenceGapError(message, request_id=self.request_id)

    def result(self) -> Generation:
        """Everything received, joined."""
        return self._collector.result(self.ledger)
