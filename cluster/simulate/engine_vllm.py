"""An engine that schedules as vLLM's V1 scheduler does: running requests first, then waiting ones, prompts in chunks.

A step computes at most `max_tokens` tokens. Decoding requests take one each, what is left goes to prompts, in the order
of arrival and chunk by chunk (Sarathi-Serve, arXiv 2403.02310). KV memory grows a token a step; when none is left the
request that came last loses its cache and is computed anew. A step costs what its prompt tokens cost and, for those
that decode, what a measured batch of that size costs beyond a single one, with the context's part by its slope. A
request that was split repeats the first token in a step of its own where its answer is made, as the cluster has it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from joinwise.cluster.simulate.engine import Engine, Part, Task, World
from joinwise.cluster.simulate.job import Job
from joinwise.cluster.simulate.profile import Kind


class VllmEngine(Engine):
    """See the module.

    Args:
        max_tokens: of a step (vLLM's max_num_batched_tokens).
        max_seqs: in a batch (vLLM's max_num_seqs).
    """

    def __init__(
        self, worker_id: str, kind: Kind, home: str, world: World, max_tokens: int = 2048, max_seqs: int = 256
    ) -> None:
        super().__init__(worker_id, kind, home, world)
        self.max_tokens = max_tokens
        self.max_seqs = max_seqs
        self.queue: deque[Task] = deque()
        self.ready: deque[Task] = deque()  # their KV cache has arrived; they must not wait for those that need room
        self.memory = 0  # tokens of KV cache in use, or kept for those that are expected
        self._least_step = kind.batch(1)
        self._base = kind.batch_context * kind.context_s

    def submit(self, job: Job, part: Part, now: float) -> None:
        task = Task(job, part, replays=1)
        task.ran = part == "decode"  # its memory is kept since `expect`
        (self.ready if task.ran else self.queue).append(task)
        if not self.batch:
            self.start(now)
        elif len(self.batch) < self.max_seqs:
            self.cut(now)

    def can_take(self, job: Job) -> bool:
        return self.memory + job.prompt < self.kind.kv_tokens or not self.memory

    def expect(self, job: Job) -> None:
        self.memory += job.prompt

    def unexpect(self, job: Job) -> None:
        self.memory -= job.prompt

    def _drop(self, job: Job) -> None:
        for tasks in (self.batch, self.queue, self.ready):
            for task in tasks:
                if task.job is job:
                    tasks.remove(task)
                    self.memory -= task.context + task.todo if task.ran else 0
                    return

    def tasks(self) -> Iterator[Task]:
        yield from self.batch
        yield from self.ready
        yield from self.queue

    def clear(self) -> None:
        self.batch = []
        self.queue.clear()
        self.ready.clear()
        self.memory = 0

    def released(self, job: Job, now: float) -> None:
        self.memory -= job.prompt
        if self.waiting():
            (self.cut if self.batch else self.start)(now)

    def waiting(self) -> bool:
        return bool(self.ready or self.queue)

    def _select(self, now: float) -> None:
        self._make_room()
        budget = self.max_tokens
        for task in self.batch:
            task.chunk = min(task.todo, budget)
            budget -= task.chunk or 1
        while (queue := self.ready or self.queue) and budget > 0 and len(self.batch) < self.max_seqs:
            task = queue[0]
            if not task.ran:
                needed = task.todo + task.context
                if self.memory and self.memory + needed + len(self.batch) > self.kind.kv_tokens:
                    break
                self.memory += needed
                task.ran = True
                if task.job.began < 0:
                    task.job.began = now
            queue.popleft()
            task.chunk = min(task.todo, budget)
            budget -= task.chunk or 1
            self.batch.append(task)

    def _make_room(self) -> None:
        """Take their KV cache from those that came last until the others can go on for a step."""
        while len(self.batch) > 1 and self.memory + len(self.batch) > self.kind.kv_tokens:
            task = self.batch.pop()
            task.job.preempted += 1
            self.memory -= task.context + task.todo
            task.todo, task.context, task.ran = task.context + task.todo, 0, False
            self.queue.appendleft(task)

    def _plan(self) -> tuple[float, int]:
        chunks = context = decoding = sending = 0
        steps = 1 << 30
        for task in self.batch:
            if task.todo:
                chunks += task.chunk
                sending += task.part == "prefill"
            else:
                decoding += 1
                context += task.context
                steps = min(steps, task.left)
        self.prompting = chunks > 0
        look, kind = self.world.coverage.look, self.kind
        if self.prompting:
            look("prompt tokens of a step", kind.prefill, chunks + decoding)
            seconds = kind.prefill(chunks + decoding) + (sending > 0) * kind.send_s
            if decoding:
                look("sequences in a batch", kind.batch, decoding)
                seconds += max(0.0, self._decode_s(decoding, context) - self._least_step)
            return seconds, 1
        look("sequences in a batch", kind.batch, decoding)
        steps = max(1, min(steps, (kind.kv_tokens - self.memory) // decoding))
        return self._decode_s(decoding, context + decoding * (steps - 1) / 2), steps

    def _decode_s(self, sequences: int, context: float) -> float:
        seconds = self.kind.batch(sequences) + context * self.kind.context_s - sequences * self._base
        return max(self.kind.least_s, seconds)

    def _step(self, task: Task) -> bool:
        if task.todo:
            task.todo -= task.chunk
            task.context += task.chunk
            if task.todo:
                return False
            task.chunk = 0
            task.left -= 1
        else:
            task.left -= self.steps
            task.context += self.steps
            self.memory += self.steps
        if task.left:
            return False
        if task.part != "prefill" or task.job.output == 1:
            self.memory -= task.context
        return True
