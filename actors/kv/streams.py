"""One stream of a fetch, from its first frame to its last: received on gRPC or on a lane, and accounted for."""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc

from joinwise.actors.kv.fetching import FetchReport
from joinwise.actors.kv.frames import FrameRefusedError, parse
from joinwise.actors.kv.lanes.lane import LaneClosedError, ReceiveLane
from joinwise.actors.kv.layout import CODECS, PLAIN, WHOLE
from joinwise.actors.kv.links import Link
from joinwise.actors.kv.receiving import Importer
from joinwise.proto import kv_pb2

_LAST_WORD_S = 1.0
"""How long the reason for a broken lane may take to arrive on the control stream."""


@dataclass
class Stream:
    """One rank's part of a fetch."""

    link: Link
    importer: Importer
    request: kv_pb2.FetchRequest
    lane_address: str
    report: FetchReport = field(init=False)

    def __post_init__(self) -> None:
        self.report = FetchReport(self.importer.spec.request_id)

    def account(self, transport: str, seconds: float, refused: str) -> None:
        """It is over: say so in its report and on its link.

        Args:
            transport: by which it came.
            seconds: how long it took, the wait for its prefill included.
            refused: the reason for which a frame was refused; empty where none was.
        """
        report, importer = self.report, self.importer
        report.transport = transport
        report.import_seconds = importer.copying_s
        counts = {
            "bytes": report.bytes,
            "streams": 1,
            "failed": not importer.complete,
            "seconds": seconds,
            "wire_seconds": report.wire_seconds,
            "exposed_seconds": importer.exposed_us / 1e6,
        }
        if refused and refused != "fenced":  # that one is no fault of the frame
            counts[f"refused_{refused}"] = 1
        codec = CODECS.get(importer.plan.encoding, "none")
        self.link.add(transport, codec, **counts)
        if codec == "lossless" and importer.complete:
            self.link.compressed(report.bytes, importer.plain_bytes)


def receive(stream: Stream, call: Any, progress: Callable[[], None]) -> None:
    """Import what comes on the control stream itself, which is cancelled afterwards.

    Args:
        stream: what to import.
        call: gRPC's call, an iterator of raw frames.
        progress: called for each frame.

    Raises:
        grpc.RpcError: the call failed.
        FrameRefusedError: a frame must not be used.
    """
    first = 0.0
    arrivals = Arrivals(stream.link, stream.importer.plan.encoding)
    try:
        for frame in call:
            progress()
            first = first or time.monotonic()
            stream.report.bytes += stream.importer.accept(frame)
            arrivals.note(frame)
            stream.report.wire_seconds = time.monotonic() - first
            if stream.importer.complete:
                break
    finally:
        call.cancel()


def receive_on_lane(stream: Stream, call: Any, lane: ReceiveLane, progress: Callable[[], None]) -> None:
    """Import what comes on a lane; the call, cancelled unless all went well, says how the sender has ended.

    Args:
        stream: what to import.
        call: gRPC's call.
        lane: where its frames come.
        progress: called for each frame.

    Raises:
        grpc.RpcError: the call failed.
        LaneClosedError: the lane broke, and the sender did not say why.
        FrameRefusedError: a frame must not be used.
    """
    importer, link, first = stream.importer, stream.link, 0.0
    failed = threading.Event()

    def over() -> None:
        # A refusal, or the sender's death: whoever waits for bytes on the lane must hear of it. A good
        # end may be known before its frames are read.
        if call.code() is not grpc.StatusCode.OK:
            failed.set()
            lane.interrupt()

    def read(views: Sequence[memoryview]) -> int:
        begin = time.monotonic()
        try:
            checksum = lane.receive(views)
        except ValueError as error:
            raise FrameRefusedError("truncated", str(error)) from error
        link.measure(sum(map(len, views)), time.monotonic() - begin)
        return checksum

    if not call.add_callback(over):
        over()
    try:
        while not importer.complete:
            raw = lane.receive_header()
            progress()
            first = first or time.monotonic()
            stream.report.bytes += importer.receive(raw, read, direct=lane.kind != "nccl")
            stream.report.wire_seconds = time.monotonic() - first
    except LaneClosedError:
        if failed.wait(_LAST_WORD_S):
            for _ in call:  # raises what the sender said
                pass
        call.cancel()
        raise
    except BaseException:
        call.cancel()
        raise


class Arrivals:
    """Measures a wire by the frames of one gRPC stream, which come in one piece.

    Only a frame that goes on where the one before has ended was ready to be sent when that one was; others may have
    waited for their prefill. Coded ones tell nothing: what took long may have been the coding.
    """

    def __init__(self, link: Link, encoding: int) -> None:
        self._link = link
        self._uncoded = encoding in (PLAIN, WHOLE)
        self._next = (-1, -1)
        self._at = 0.0

    def note(self, frame: bytes) -> None:
        """A frame has arrived, and has been found good."""
        if not self._uncoded:
            return
        now, header = time.monotonic(), parse(frame).header
        if self._next == (header.layer, header.first_token):
            self._link.measure(len(frame), now - self._at)
        self._next, self._at = (header.layer, header.first_token + header.num_tokens), now
