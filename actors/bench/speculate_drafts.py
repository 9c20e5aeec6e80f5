"""The draft actors of `joinwise bench speculate`, all in one process: the real service, a port for each drafter."""

import asyncio
import threading
import time
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path

import grpc
import numpy as np

from joinwise.actors.bench.speculate_plan import CLUSTER
from joinwise.actors.draft.causal import CausalDrafter, load_model
from joinwise.actors.draft.desk import Desk
from joinwise.actors.draft.drafter import Ask, Drafter
from joinwise.actors.draft.lookup import PromptLookup
from joinwise.actors.draft.service import DraftService
from joinwise.actors.draft.vocabulary import Vocabulary
from joinwise.actors.draft.wire import CHANNEL_OPTIONS, prefix_hash
from joinwise.proto import draft_pb2_grpc

_SLOTS = 8


class Replay:
    """Drafts what was drafted before, by the tokens that it continues: a draft model on a device of its own.

    Args:
        round_trip_s: seconds from a question to its answer, beside those of this machine's loopback.
    """

    name = "replay"
    held = 0

    def __init__(self, round_trip_s: float) -> None:
        self._round_trip_s = round_trip_s
        self.drafts: dict[int, list[int]] = {}

    def begin(self) -> None:
        """Nothing to prepare."""

    def draft(self, asks: Sequence[Ask]) -> list[list[int]]:
        """What was recorded; nothing for other tokens."""
        time.sleep(self._round_trip_s)
        return [self.drafts.get(prefix_hash(ask.tokens), [])[: ask.k] for ask in asks]

    def catch_up(self) -> bool:
        """Nothing is ever put off."""
        return False

    def forget(self, key: Hashable) -> None:
        """Nothing is kept of a sequence."""


class Drafts:
    """The drafters, each behind a port.

    Args:
        folder: of the draft model.
        dtype: of its weights.
        threads: compute threads.
        max_tokens: of a sequence.
        round_trips: of the replaying drafters, by name, seconds.
        device: of the draft model, as torch names it.
    """

    def __init__(
        self,
        folder: Path,
        dtype: str,
        threads: int,
        max_tokens: int,
        round_trips: Mapping[str, float],
        device: str = "cpu",
    ) -> None:
        model = load_model(folder, dtype, device)

        def causal(ahead: bool = False) -> CausalDrafter:
            return CausalDrafter(
                model, slots=_SLOTS, max_tokens=max_tokens, name="causal", threads=threads, ahead=ahead
            )

        self._replays = {name: Replay(seconds) for name, seconds in round_trips.items()}
        drafters: dict[str, Drafter] = {
            "ahead": causal(ahead=True),
            "lookup": PromptLookup(),
            "causal": causal(),
            **self._replays,
        }
        self._recorder = causal()
        self._recorder.begin()
        self._desks = {name: Desk(drafter) for name, drafter in drafters.items()}
        vocabulary = Vocabulary.read("draft", folder)
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        serving = self._serve({name: vocabulary if name in ("causal", "ahead") else None for name in drafters})
        self._addresses = asyncio.run_coroutine_threadsafe(serving, self._loop).result(30)

    def addresses(self) -> dict[str, str]:
        """Of each drafter, by name."""
        return self._addresses

    def record(self, prompt: Sequence[int], answer: Sequence[int], k: int) -> None:
        """Let the draft model draft along an answer, as rounds of `k` would ask it to, for those who replay."""
        text, at = np.array([*prompt, *answer], np.int32), len(prompt) + 1
        while at < len(text) and (drafted := self._drafted(text[:at], k)):
            for replay in self._replays.values():
                replay.drafts[prefix_hash(text[:at])] = drafted
            right = 0
            while right < min(k, len(text) - at) and drafted[right] == text[at + right]:
                right += 1
            at += right + 1
        self._recorder.forget(0)

    def _drafted(self, text: np.ndarray, k: int) -> list[int]:
        """What the draft model makes of a text, however long that takes."""
        while not (drafted := self._recorder.draft([Ask(0, text, k)])[0]) and self._recorder.catch_up():
            pass
        return drafted

    async def _serve(self, vocabularies: Mapping[str, Vocabulary | None]) -> dict[str, str]:
        self._servers: list[grpc.aio.Server] = []
        addresses = {}
        for name, desk in self._desks.items():
            server = grpc.aio.server(options=CHANNEL_OPTIONS)
            service = DraftService(desk, cluster=CLUSTER, drafter=name, vocabulary=vocabularies[name])
            draft_pb2_grpc.add_DraftServiceServicer_to_server(service, server)
            addresses[name] = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
            await server.start()
            self._servers.append(server)
            desk.start()
        return addresses
