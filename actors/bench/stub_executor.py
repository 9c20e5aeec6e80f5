"""A vLLM executor whose model is never run: the engine around it is real, its tokens cost nothing."""

import time
from concurrent.futures import Future
from typing import Any

from vllm.v1.core.sched.output import GrammarOutput, SchedulerOutput
from vllm.v1.executor.uniproc_executor import UniProcExecutor
from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, ModelRunnerOutput

STEP_S = 0.005
"""What a step lasts: every system in a comparison streams at the same pace."""
_TOKEN = 1000


class StubExecutor(UniProcExecutor):
    """`distributed_executor_backend`: loads the model as ever, and answers each step with a fixed token."""

    def _init_executor(self) -> None:
        super()._init_executor()
        self._prompts: dict[str, int] = {}
        self._output: ModelRunnerOutput | None = None

    def execute_model(self, scheduler_output: SchedulerOutput, non_block: bool = False) -> Any:
        """Take note of the batch; its tokens come from `sample_tokens`."""
        if not scheduler_output.total_num_scheduled_tokens:
            return _done(EMPTY_MODEL_RUNNER_OUTPUT, non_block)
        time.sleep(STEP_S)
        self._output = self._answer(scheduler_output)
        return _done(None, non_block)

    def sample_tokens(self, grammar_output: GrammarOutput | None, non_block: bool = False) -> Any:
        """One token for each request whose prompt is behind it."""
        output, self._output = self._output, None
        return _done(output, non_block)

    def _answer(self, batch: SchedulerOutput) -> ModelRunnerOutput:
        computed: dict[str, int] = {}
        for new in batch.scheduled_new_reqs:
            self._prompts[new.req_id] = len(new.prompt_token_ids or ())
            computed[new.req_id] = new.num_computed_tokens
        cached = batch.scheduled_cached_reqs
        computed.update(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        tokens = [
            [_TOKEN] if done + batch.num_scheduled_tokens[request] >= self._prompts[request] else []
            for request, done in computed.items()
        ]
        for request in batch.finished_req_ids:
            self._prompts.pop(request, None)
        names = list(computed)
        return ModelRunnerOutput(names, {name: index for index, name in enumerate(names)}, tokens)


def _done(result: Any, non_block: bool) -> Any:
    if not non_block:
        return result
    future: Future[Any] = Future()
    future.set_result(result)
    return future
