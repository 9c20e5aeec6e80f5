"""An engine: batches of requests in steps, on a virtual clock. What goes into a batch is a subclass' business.

A batch that only decodes runs several steps at once, until its first request ends; whatever arrives meanwhile joins at
the end of the step under way. So an engine costs a few events a request instead of one a token.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Literal, Protocol

from joinwise.cluster.simulate.job import Job
from joinwise.cluster.simulate.profile import Coverage, Kind

Part = Literal["whole", "prefill", "decode"]


class Task:
    """A part of a request at an engine.

    Args:
        replays: steps in which a decode part repeats tokens that were generated elsewhere.

    Attributes:
        part: "prefill" ends with the first token, "decode" begins behind it.
        todo: prompt tokens still to be computed.
        left: tokens still to be generated, those that are repeated included.
        context: tokens in its KV cache.
        chunk: prompt tokens of the step under way.
        skipped: steps for which others were taken instead.
        ran: it was in a batch before.
        computed: its prompt was whole before; what is still to be computed was lost to others.
    """

    __slots__ = ("chunk", "computed", "context", "job", "left", "part", "ran", "skipped", "todo")

    def __init__(self, job: Job, part: Part, replays: int = 0) -> None:
        self.job = job
        self.part = part
        self.todo = 0 if part == "decode" else job.prompt - job.cached
        self.context = job.prompt if part == "decode" else job.cached
        self.left = 1 if part == "prefill" else job.output + (replays - 1) * (part == "decode")
        self.chunk = 0
        self.skipped = 0
        self.ran = False
        self.computed = part == "decode"


class World(Protocol):
    """What an engine tells, and asks, the world around it."""

    coverage: Coverage

    def wake(self, at: float, engine: Engine, version: int) -> None:
        """Call `engine.finish()` then, unless its version has moved on."""

    def first_token(self, job: Job, engine: Engine, now: float) -> None:
        """The prompt is computed."""

    def ended(self, job: Job, engine: Engine, now: float) -> None:
        """The last token is out."""

    def idle(self, engine: Engine, now: float) -> None:
        """The engine has nothing to do."""


class Engine(ABC):
    """One engine on one machine.

    Attributes:
        worker_id, kind, home: its name, its machine, and the pool that it belongs to: prefill, decode or mixed.
        batch: tasks of the step under way.
        begun: when the steps under way began; `steps` of them of `step_s` seconds.
        version: rises whenever the end of the steps under way moves.
        busy_s: seconds in which it computed.
        down: it has died, and computes nothing.
    """

    def __init__(self, worker_id: str, kind: Kind, home: str, world: World) -> None:
        self.worker_id = worker_id
        self.kind = kind
        self.home = home
        self.world = world
        self.batch: list[Task] = []
        self.begun = 0.0
        self.step_s = 0.0
        self.steps = 0
        self.version = 0
        self.busy_s = 0.0
        self.down = False
        self.prompting = False  # the step under way computes prompts
        self._cut = False  # the steps under way end early already

    @abstractmethod
    def submit(self, job: Job, part: Part, now: float) -> None:
        """A request, or a part of it, arrives."""

    @abstractmethod
    def can_take(self, job: Job) -> bool:
        """Whether a prompt's KV cache fits now."""

    @abstractmethod
    def expect(self, job: Job) -> None:
        """Keep room for KV cache that is on its way here."""

    @abstractmethod
    def released(self, job: Job, now: float) -> None:
        """The KV cache of a prompt that was computed here has arrived elsewhere."""

    @abstractmethod
    def _select(self, now: float) -> None:
        """Make up `batch` for the next step."""

    @abstractmethod
    def _plan(self) -> tuple[float, int]:
        """Seconds of a step of `batch`, and how many to run."""

    @abstractmethod
    def _step(self, task: Task) -> bool:
        """Account for the steps that are over; True when the task leaves the batch."""

    @abstractmethod
    def waiting(self) -> bool:
        """Whether requests are here that are not in the batch."""

    @abstractmethod
    def unexpect(self, job: Job) -> None:
        """The KV cache that room was kept for does not come."""

    @abstractmethod
    def _drop(self, job: Job) -> None:
        """Forget a request that is here, and its KV cache."""

    @abstractmethod
    def tasks(self) -> Iterator[Task]:
        """All that is here."""

    def abort(self, job: Job, now: float) -> None:
        """Forget a request that is here; a step that computes others too goes on."""
        self._drop(job)
        if not self.batch:
            self.version += 1
            self.start(now)

    def die(self, now: float) -> dict[Job, int]:
        """Compute nothing from now on. Returns for every request here what it has generated here."""
        done = min(self.steps - 1, int((now - self.begun) // self.step_s)) if self.batch and not self.prompting else 0
        for task in self.batch:
            task.left -= done
        self.down = True
        self.version += 1
        return {
            task.job: max(task.part == "decode", task.job.output - task.left) if task.computed else 0
            for task in self.tasks()
        }

    @abstractmethod
    def clear(self) -> None:
        """Forget all requests, and their KV cache."""

    def finishing(self) -> Iterator[tuple[Job, bool]]:
        """Requests whose first token (False) or last one (True) comes out when the steps under way end."""
        for task in self.batch:
            whole_prompt = task.chunk > 0 and task.chunk == task.todo
            last = task.left == (1 if task.chunk else self.steps) and (not task.chunk or whole_prompt)
            if whole_prompt and not task.computed:
                yield task.job, False
            if last and (task.part != "prefill" or task.job.output == 1):
                yield task.job, True

    def start(self, now: float) -> None:
        """Begin the next steps, if there is anything to do."""
        self._cut = False
        if self.down:
            return
        self._select(now)
        if not self.batch:
            if not self.waiting():
                self.world.idle(self, now)
            return
        self.step_s, self.steps = self._plan()
        self.begun = now
        self._wake()

    def overcommit(self, now: float) -> bool:
        """Nothing would happen any more: let one that is here go on without room. Returns whether one does."""
        return False

    def cut(self, now: float) -> None:
        """End the steps under way with the one that is being computed; one with prompts is only one anyway."""
        if self._cut or self.prompting or self.down:
            return
        self._cut = True
        steps = min(self.steps, int((now - self.begun) // self.step_s) + 1)
        if steps < self.steps:
            self.steps = steps
            self._wake()

    def finish(self, now: float) -> None:
        """The steps under way are over."""
        self.busy_s += self.step_s * self.steps
        stay = []
        for task in self.batch:
            first = task.chunk > 0 and task.chunk == task.todo and not task.computed
            gone = self._step(task)
            job = task.job
            if first:
                task.computed = True
                if job.first < 0:
                    job.first = now
                self.world.first_token(job, self, now)
            if gone:
                if task.part != "prefill" or job.output == 1:
                    job.end = now
                    self.world.ended(job, self, now)
            else:
                stay.append(task)
        self.batch = stay
        self.start(now)

    def _wake(self) -> None:
        self.version += 1
        self.world.wake(self.begun + self.step_s * self.steps, self, self.version)
