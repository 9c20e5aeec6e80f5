"""An engine's stream to its draft actor: made, and made again, in the background; asked without ever waiting long.

One round is in flight at a time. Whoever asks waits for its answer until a deadline; after that nothing is asked until
that answer has come, so that an actor that stalls costs one deadline, not one a step. A stream whose answer does not
come at all is given up.
"""

import logging
import queue
import threading
import time
from collections.abc import Callable

import grpc

from joinwise.actors.draft.wire import CHANNEL_OPTIONS, PROTOCOL_VERSION
from joinwise.actors.tls import Certificates
from joinwise.proto import draft_pb2, draft_pb2_grpc

logger = logging.getLogger(__name__)

_WELCOME_S = 10.0
_STUCK_S = 5.0
_FIRST_PAUSE_S, _LAST_PAUSE_S = 0.1, 10.0


class Session:
    """One open stream. `told` lives and dies with it: what the actor at its other end knows.

    Attributes:
        told: tokens of each sequence that have been sent.
        welcome: what the actor said of itself; None until it did.
    """

    def __init__(self, channel: grpc.Channel, metadata: tuple[tuple[str, str], ...]) -> None:
        self.told: dict[int, int] = {}
        self.welcome: draft_pb2.DraftWelcome | None = None
        self._requests: queue.SimpleQueue[draft_pb2.DraftRequest | None] = queue.SimpleQueue()
        self._changed = threading.Condition()
        self._answer: draft_pb2.DraftAnswer | None = None
        self._in_flight = 0
        self._asked_at = 0.0
        self._next = 1
        self._open = False
        self._call = draft_pb2_grpc.DraftServiceStub(channel).Draft(iter(self._requests.get, None), metadata=metadata)

    @property
    def idle(self) -> bool:
        """Whether a round may be asked: the stream is open, and the round before has been answered."""
        return self._open and not self._in_flight

    @property
    def hidden_size(self) -> int:
        """Numbers in a hidden state of the target that the actor wants; 0 if it wants none."""
        return self.welcome.hidden_size if self.welcome is not None else 0

    @property
    def stuck(self) -> bool:
        """Whether an answer is so late that it will not come."""
        return bool(self._in_flight) and time.monotonic() - self._asked_at > _STUCK_S

    def ask(self, asked: draft_pb2.DraftRound, patience_s: float) -> draft_pb2.DraftAnswer | None:
        """Send a round, which gets its number and patience here, and wait for its answer.

        Args:
            asked: the round.
            patience_s: seconds to wait at most.

        Returns:
            The answer to this very round; None if it has not come in time, or the stream is broken.
        """
        deadline = time.monotonic() + patience_s
        with self._changed:
            if not self.idle:
                return None
            asked.number, asked.patience_us = self._next, int(patience_s * 1e6)
            self._in_flight, self._asked_at = self._next, time.monotonic()
            self._next += 1
            self._answer = None
            self._requests.put(draft_pb2.DraftRequest(round=asked))
            while self._open and self._answer is None:
                left = deadline - time.monotonic()
                if left <= 0 or not self._changed.wait(left):
                    break
            return self._answer

    def run(self, hello: draft_pb2.DraftHello) -> None:
        """Read the stream until it ends, whatever ends it.

        Raises:
            grpc.RpcError: it broke, or was refused.
            ValueError: the other end does not keep to the protocol.
        """
        watch = threading.Timer(_WELCOME_S, self.close)
        watch.daemon = True
        watch.start()
        try:
            self._requests.put(draft_pb2.DraftRequest(hello=hello))
            for message in self._call:
                if self.welcome is not None:
                    self._take(message.answer)
                elif message.WhichOneof("message") != "welcome":
                    raise ValueError("the draft actor did not begin with a welcome")
                elif message.welcome.protocol_version != PROTOCOL_VERSION:
                    raise ValueError(f"the draft actor speaks protocol version {message.welcome.protocol_version}")
                else:
                    watch.cancel()
                    self.welcome = message.welcome
                    self._open = True
        finally:
            watch.cancel()
            self.close()

    def close(self) -> None:
        """End the stream; whoever waits for an answer gets none. May be called from any thread, and again."""
        with self._changed:
            self._open = False
            self._changed.notify_all()
        self._requests.put(None)
        self._call.cancel()

    def _take(self, answer: draft_pb2.DraftAnswer) -> None:
        with self._changed:
            if answer.number != self._in_flight:
                logger.warning("a draft actor answered round %d, not %d", answer.number, self._in_flight)
                return
            self._in_flight = 0
            self._answer = answer
            self._changed.notify_all()


class DraftLink:
    """Keeps a session to whatever draft actor it is pointed at.

    Args:
        hello: introduces this engine.
        channel: opens a channel to an address.
        metadata: shown with the stream: the cluster's token.
    """

    def __init__(
        self,
        hello: draft_pb2.DraftHello,
        channel: Callable[[str], grpc.Channel],
        metadata: tuple[tuple[str, str], ...] = (),
    ) -> None:
        self._hello = hello
        self._channel = channel
        self._metadata = metadata
        self._address = ""
        self._session: Session | None = None
        self._closed = False
        self._moved = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="draft-link", daemon=True)
        self._thread.start()

    @property
    def session(self) -> Session | None:
        """The stream, where there is one that may be asked now. Never waits."""
        session = self._session
        if session is None:
            return None
        if session.stuck:
            session.close()
        return session if session.idle else None

    def point(self, address: str) -> None:
        """Ask another draft actor from now on; none for an empty address."""
        with self._lock:
            if address == self._address:
                return
            self._address = address
            self._moved.set()
            session = self._session
        if session is not None:
            session.close()

    def close(self) -> None:
        """End the stream and the thread."""
        self._closed = True
        self.point("")
        self._moved.set()
        self._thread.join(timeout=10)

    def _run(self) -> None:
        pause_s = _FIRST_PAUSE_S
        while not self._closed:
            with self._lock:
                address = self._address
                self._moved.clear()
            if not address:
                if not self._closed:
                    self._moved.wait()
                continue
            if self._serve(address):
                pause_s = _FIRST_PAUSE_S
            if self._moved.wait(pause_s):
                pause_s = _FIRST_PAUSE_S
            else:
                pause_s = min(2 * pause_s, _LAST_PAUSE_S)

    def _serve(self, address: str) -> bool:
        """Have one session; returns whether it was open."""
        with self._channel(address) as channel:
            session = Session(channel, self._metadata)
            with self._lock:
                if self._address != address:
                    session.close()
                    return False
                self._session = session
            level = logging.DEBUG
            try:
                session.run(self._hello)
                reason = "it ended the stream"
            except grpc.RpcError as error:
                reason = str(getattr(error, "details", lambda: "")() or error)
                if getattr(error, "code", lambda: None)() is grpc.StatusCode.FAILED_PRECONDITION:
                    level = logging.ERROR
            except ValueError as error:
                reason, level = str(error), logging.ERROR
            finally:
                self._session = None
        if not self._moved.is_set():
            level = max(level, logging.WARNING) if session.welcome is not None else level
            logger.log(level, "no drafts from %s: %s", address, reason)
        return session.welcome is not None


def channel_to(certificates: Certificates | None, address: str) -> grpc.Channel:
    """A channel to a draft actor, with the cluster's certificates as they are now; in plain text without any."""
    if certificates is None:
        return grpc.insecure_channel(address, CHANNEL_OPTIONS)
    options = [*CHANNEL_OPTIONS, *certificates.channel_options]
    return grpc.secure_channel(address, certificates.grpc_channel(), options)
