"""An engine with the assumptions of SplitwiseSim (github.com/Mutinifni/splitwise-sim, instance.py).

Prompts go first and whole, at most 2,048 tokens of them in a step unless a single one is longer; a step with prompts
takes a tenth longer when it also decodes. A decode step takes what the table says for so many *tokens*, which its rows
know by prompt size x batch: so 64 sequences cost as much as one prompt of 64 tokens would, and batching is nearly free.
KV memory is taken in whole when a part begins. That is not how engines behave; it is what the published figures assume.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterator

from joinwise.cluster.simulate.engine import Engine, Part, Task, World
from joinwise.cluster.simulate.job import Job
from joinwise.cluster.simulate.profile import Kind

_MAX_BATCH = 512
_MAX_TOKENS = 2048
_MAX_SKIPPED = 4
_BOTH = 1.1


def _urgency(task: Task) -> tuple[int, float]:
    return task.skipped, task.job.at


def _arrival(task: Task) -> float:
    return task.job.at


class SplitwiseEngine(Engine):
    """See the module. `memory` and `kv_tokens` count tokens of KV cache."""

    def __init__(self, worker_id: str, kind: Kind, home: str, world: World) -> None:
        super().__init__(worker_id, kind, home, world)
        self.memory = 0
        self.batch_tokens = 0
        self.pending: list[Task] = []  # by steps skipped, then arrival, as they were when it came
        self.prompts: list[Task] = []
        self.blocked: list[Task] = []
        self.present: list[Task] = []  # what each request here is at, by arrival
        self._next: dict[Job, Task] = {}  # the answer that follows a prompt here
        self._beyond = False  # the first may take memory that there is not

    def submit(self, job: Job, part: Part, now: float) -> None:
        task = Task(job, "decode" if part == "decode" else "prefill")
        insort(self.present, task, key=_arrival)
        self._add(task, now)
        if part == "whole" and job.output > 1:
            answer = self._next[job] = Task(job, "decode")
            self._add(answer, now)

    def _add(self, task: Task, now: float) -> None:
        insort(self.pending, task, key=_urgency)
        if task.todo:
            self.prompts.append(task)
        if not self.batch:
            if self.memory + _memory(task) <= self.kind.kv_tokens:
                self.start(now)
            return
        fits = len(self.batch) < _MAX_BATCH and self.batch_tokens + _tokens(task) <= _MAX_TOKENS
        ousts = 0 < task.todo <= _MAX_TOKENS and not self.prompting
        if fits or ousts:
            self.cut(now)

    def can_take(self, job: Job) -> bool:
        return self.memory + job.kv <= self.kind.kv_tokens

    def expect(self, job: Job) -> None:
        self.memory += job.kv

    def unexpect(self, job: Job) -> None:
        self.memory -= job.kv

    def _drop(self, job: Job) -> None:
        self._next.pop(job, None)
        if any(task.ran for task in self.present if task.job is job):
            self.memory -= job.kv
        for tasks in (self.present, self.pending, self.prompts, self.blocked, self.batch):
            tasks[:] = [task for task in tasks if task.job is not job]

    def clear(self) -> None:
        for tasks in (self.present, self.pending, self.prompts, self.blocked, self.batch):
            tasks.clear()
        self._next.clear()
        self.memory = self.batch_tokens = 0

    def tasks(self) -> Iterator[Task]:
        yield from self.present

    def released(self, job: Job, now: float) -> None:
        self.memory -= job.kv
        if not self.pending:
            return
        if self.batch:
            if len(self.batch) < _MAX_BATCH and self.batch_tokens < _MAX_TOKENS:
                self.cut(now)
        elif self.memory + _memory(self.pending[0]) <= self.kind.kv_tokens:
            self.start(now)

    def waiting(self) -> bool:
        return bool(self.pending)

    def overcommit(self, now: float) -> bool:
        if self.batch or not self.present:
            return False
        self._beyond = True
        self.start(now)
        self._beyond = False
        return bool(self.batch)

    def _select(self, now: float) -> None:
        """Those skipped too often, prompts, those skipped before, the last batch, then the others by arrival."""
        old, memory = self.batch, self.memory
        batch: list[Task] = []
        taken: set[Job] = set()
        tokens = 0

        def full(task: Task) -> bool:
            too_many = bool(batch) and tokens + _tokens(task) > _MAX_TOKENS
            return len(batch) == _MAX_BATCH or too_many

        def take(task: Task) -> bool:
            nonlocal tokens, memory
            if not task.ran:
                if memory + _memory(task) > self.kind.kv_tokens:
                    return False
                memory += _memory(task)
            batch.append(task)
            taken.add(task.job)
            tokens += _tokens(task)
            return True

        for task in self.pending:
            if task.skipped < _MAX_SKIPPED or full(task):
                break
            if task.job not in taken:
                take(task)
        for task in self.prompts:
            if full(task):
                break
            if task.job not in taken and not take(task):
                break
        for task in (*self.blocked, *old):
            if full(task):
                break
            if task.job not in taken:
                take(task)
        if len(batch) < len(self.present):
            for task in self.present:
                if len(batch) == _MAX_BATCH:
                    break
                if task.job not in taken and (full(task) or not take(task)):
                    break
        if not batch:  # who came first has no room: somebody has to go on who can make some
            for task in self.present:
                if not full(task) and task.job not in taken:
                    take(task)
        if not batch and self._beyond:
            memory = -_memory(self.present[0])
            take(self.present[0])
        self.batch_tokens = tokens
        self._exchange(old, batch, now)

    def _exchange(self, old: list[Task], batch: list[Task], now: float) -> None:
        """Move the new ones out of the queues, and those of the last batch that were left out back into them."""
        before, after = set(old), set(batch)
        for task in old:
            if task not in after:
                insort(self.pending, task, key=_urgency)
                self.blocked.append(task)
        for task in batch:
            if task not in before:
                self.pending.remove(task)
                if task.todo:
                    self.prompts.remove(task)
                if task in self.blocked:
                    self.blocked.remove(task)
        if len(batch) < len(self.present):
            for task in self.present:
                if task not in after:
                    task.skipped += 1
        # In the order in which SplitwiseSim appends them: the last batch that stays, then the new ones.
        self.batch = [task for task in old if task in after] + [task for task in batch if task not in before]
        for task in self.batch:
            if not task.ran:
                task.ran = True
                self.memory += _memory(task)
                task.job.kv += _memory(task)
                if task.todo and task.job.began < 0:
                    task.job.began = now

    def _plan(self) -> tuple[float, int]:
        prompts = 0
        for task in self.batch:
            task.chunk = task.todo
            prompts += task.todo > 0
        self.prompting = prompts > 0
        look, tokens = self.world.coverage.look, self.batch_tokens
        if not prompts:
            look("decode tokens", self.kind.tokens, tokens)
            return self.kind.tokens(tokens), min(task.left for task in self.batch)
        look("prompt tokens of a step", self.kind.prefill, tokens)
        seconds = self.kind.prefill(tokens)
        return (seconds if prompts == len(self.batch) else seconds * _BOTH), 1

    def _step(self, task: Task) -> bool:
        if task.chunk:
            task.todo = task.chunk = 0
            task.left = 0
        else:
            task.left -= self.steps
        if task.left:
            return False
        job = task.job
        self.present.remove(task)
        follows = self._next.pop(job, None) if task.part == "prefill" else None
        if follows is not None:
            insort(self.present, follows, key=_arrival)
        elif task.part == "decode" or job.output == 1:
            self.memory -= job.kv
        return True


def _tokens(task: Task) -> int:
    return task.todo or 1


def _memory(task: Task) -> int:
    """Tokens of KV cache that a part takes when it begins."""
    return task.job.prompt + 1 if task.part == "prefill" else task.job.output - 1
