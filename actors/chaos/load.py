"""Steady load of greedy requests whose answers are known, and the verdict on each.

Requests go over gRPC and over HTTP in turn, streamed. One that ends with an error which says "again" is asked again,
as clients do; what has come until then must be the beginning of the right answer all the same.
"""

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

import httpx

from joinwise.cluster.client import AsyncClient
from joinwise.cluster.client.failures import SequenceGapError, UnreachableError
from joinwise.cluster.client.types import Delta
from joinwise.cluster.errors import ERRORS, InternalError, JoinwiseError

#: Errors after which a client may ask again.
AGAIN = frozenset({"overloaded", "no_worker", "store_unavailable", "worker_lost", "unreachable", "cannot_resume"})
#: Tokens of an answer, at least and at most.
ANSWERS = (24, 96)
_OF_STATUS = {429: "overloaded", 502: "worker_lost", 503: "no_worker"}
_ASK_AGAIN_S = 0.5
_ANSWER_S = 5.0
_SHIFTED = 3  # equal tokens in a row elsewhere in the right answer: positions were lost or repeated


@dataclass(frozen=True)
class Question:
    """A greedy request: prompt's token ids, and tokens to generate."""

    prompt: tuple[int, ...]
    max_tokens: int


def questions(count: int, seed: int = 0, answers: tuple[int, int] = ANSWERS) -> list[Question]:
    """Prompts of 10 to 400 random tokens, with answers of so many at least and at most."""
    rng = random.Random(seed)  # noqa: S311 - reproducible, not secret
    lengths = [round(10 * 40 ** rng.random()) for _ in range(count)]
    return [
        Question(tuple(rng.randrange(1000, 40_000) for _ in range(length)), rng.randint(*answers)) for length in lengths
    ]


@dataclass
class Outcome:
    """What became of one request.

    Attributes:
        begun, ended: `time.monotonic()`.
        errors: when it met an error, and its code: those after which it was asked again, and one that ended it.
        right: the whole right answer came in the end.
        wrong: tokens came that are not the right ones.
        torn: streams of it with repeated, missing or surplus positions, or that ended without a word.
    """

    number: int
    begun: float
    ended: float = 0.0
    errors: list[tuple[float, str]] = field(default_factory=list)
    right: bool = False
    wrong: bool = False
    torn: int = 0
    received: int = 0

    @property
    def lost(self) -> bool:
        """Never answered."""
        return not self.right and not self.wrong and not self.torn


def verdict(got: Sequence[int], expected: Sequence[int], *, whole: bool) -> str:
    """How a stream's tokens differ from the right ones.

    Args:
        got: what has come.
        expected: the whole right answer.
        whole: the stream says that this is all.

    Returns:
        "" for none, "torn" for positions that were repeated or left out, "wrong" for other tokens.
    """
    at = next((i for i, (a, b) in enumerate(zip(got, expected, strict=False)) if a != b), min(len(got), len(expected)))
    rest = tuple(got[at : at + _SHIFTED])
    if not rest:
        return "torn" if whole and at < len(expected) else ""
    if at == len(expected):
        return "torn"
    places = range(len(expected) - len(rest) + 1)
    found = any(tuple(expected[i : i + len(rest)]) == rest for i in places if i != at)
    return "torn" if found else "wrong"


class Load:
    """Requests at a steady rate.

    Args:
        http: a client of the gateway's HTTP port.
        grpc: a client of its gRPC port; None asks everything over HTTP.
        model: to ask for.
        expected: the right answers, in the order of the questions.
        rate: requests a second.
        at_once: of them, at most.
        patience_s: seconds after which one that has no answer is lost.
    """

    def __init__(
        self,
        http: httpx.AsyncClient,
        grpc: AsyncClient | None,
        model: str,
        asked: Sequence[Question],
        expected: Sequence[Sequence[int]],
        *,
        rate: float = 2.0,
        at_once: int = 6,
        patience_s: float = 240.0,
    ) -> None:
        self._http, self._grpc, self._model = http, grpc, model
        self._asked, self._expected = asked, expected
        self._rate, self._at_once, self._patience_s = rate, at_once, patience_s
        self._streaming: dict[int, int] = {}
        self._asking: dict[int, asyncio.Task[None]] = {}
        self._group = asyncio.TaskGroup()
        self._flows = asyncio.Event()
        self.outcomes: list[Outcome] = []

    @property
    def midway(self) -> int:
        """Streams of which some tokens have come, and not all."""
        return sum(count > 0 for count in self._streaming.values())

    async def wait_midway(self) -> None:
        """Wait until there is one."""
        await self._flows.wait()

    async def wait_reached(self, timeout_s: float) -> bool:
        """Wait until the clients that ask reach the gateway again; False if they do not in time."""
        deadline = time.monotonic() + timeout_s
        while self._grpc is not None:
            try:
                await self._grpc.status(timeout=_ANSWER_S)
                return True
            except JoinwiseError:
                if time.monotonic() > deadline:
                    return False
                await asyncio.sleep(_ASK_AGAIN_S)
        return True

    async def see_through(self, timeout_s: float) -> tuple[int, int]:
        """Wait until the requests whose streams are midway now have ended.

        Returns:
            How many they are, and how many of them were answered right without an error from now on.
        """
        midway = {number: len(self.outcomes[number].errors) for number, count in self._streaming.items() if count}
        if midway:
            await asyncio.wait([self._asking[number] for number in midway], timeout=timeout_s)
        ended = {number: self.outcomes[number] for number in midway}
        return len(midway), sum(each.right and len(each.errors) == midway[number] for number, each in ended.items())

    async def run(self, least: int, over: asyncio.Event) -> None:
        """Ask until `least` requests have been begun and `over` is set; returns when all have ended."""
        room = asyncio.Semaphore(self._at_once)
        async with self._group:
            while len(self._asking) < least or not over.is_set():
                await room.acquire()
                self._begin().add_done_callback(lambda _: room.release())
                await asyncio.sleep(1 / self._rate)

    def burst(self, count: int) -> None:
        """Ask so many more at once; to be called while it runs."""
        for _ in range(count):
            self._begin()

    def _begin(self) -> asyncio.Task[None]:
        number = len(self._asking)
        asking = self._asking[number] = self._group.create_task(self._one(number))
        return asking

    async def _one(self, number: int) -> None:
        outcome = Outcome(number, time.monotonic())
        self.outcomes.append(outcome)
        index = number % len(self._asked)
        expected = self._expected[index]
        while True:
            got: list[int] = []
            whole = False
            try:
                async with asyncio.timeout(self._patience_s):
                    async for tokens in self._stream(number, self._asked[index]):
                        got += tokens
                        self._streaming[number] = len(got)
                        self._tell()
                whole = True
            except JoinwiseError as error:
                outcome.errors.append((time.monotonic(), error.code))
                outcome.torn += isinstance(error, SequenceGapError)
            except TimeoutError:
                outcome.errors.append((time.monotonic(), "no_end"))
            finally:
                self._streaming.pop(number, None)
                self._tell()
            said = verdict(got, expected, whole=whole)
            outcome.received += len(got)
            outcome.wrong |= said == "wrong"
            outcome.torn += said == "torn"
            outcome.right = whole and not said
            outcome.ended = time.monotonic()
            late = outcome.ended - outcome.begun > self._patience_s
            if whole or late or outcome.errors[-1][1] not in AGAIN:
                return
            await asyncio.sleep(_ASK_AGAIN_S)

    def _tell(self) -> None:
        if self.midway:
            self._flows.set()
        else:
            self._flows.clear()

    async def _stream(self, number: int, question: Question) -> AsyncIterator[Sequence[int]]:
        if self._grpc is None or number % 2 == 0:
            async for tokens in stream_http(self._http, self._model, question):
                yield tokens
            return
        async with self._grpc.generate(
            token_ids=question.prompt,
            stream=True,
            timeout=self._patience_s,
            model=self._model,
            temperature=0.0,
            ignore_eos=True,
            max_tokens=question.max_tokens,
        ) as stream:
            async for event in stream:
                if isinstance(event, Delta):
                    yield event.token_ids


async def stream_http(client: httpx.AsyncClient, model: str, question: Question) -> AsyncIterator[list[int]]:
    """Tokens of a completion as they come.

    Raises:
        JoinwiseError: it ends with an error, of that error's kind; "unreachable" where the connection breaks.
        SequenceGapError: it ends without a word: neither its end nor an error has come.
    """
    body = {
        "model": model,
        "prompt": list(question.prompt),
        "max_tokens": question.max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "return_token_ids": True,
    }
    try:
        async with client.stream("POST", "/v1/completions", json=body) as answer:
            if answer.status_code != 200:
                raise _error(answer.status_code, (await answer.aread()).decode(errors="replace"))
            async for line in answer.aiter_lines():
                if line == "data: [DONE]":
                    return
                if line.startswith("data: "):
                    chunk = json.loads(line.removeprefix("data: "))
                    if "error" in chunk:
                        raise _error(int(chunk["error"].get("code") or 500), str(chunk["error"]))
                    for choice in chunk["choices"]:
                        yield choice.get("token_ids") or []
    except httpx.TransportError as error:
        raise UnreachableError(repr(error)) from error
    raise SequenceGapError("the stream ended without a word")


def _error(status: int, text: str) -> JoinwiseError:
    code = _OF_STATUS.get(status)
    return ERRORS[code](text) if code else InternalError(f"{status}: {text}")
