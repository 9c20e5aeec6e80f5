"""Keeps a CPU engine alive when a seeded request's prompt is computed in more than one step.

vLLM samples a token for every row of a step and throws it away for those whose prompt is unfinished; it then turns
the row's generator back by an offset, which CPU generators do not have: the engine dies. Here such rows draw from
nobody's generator instead, so that there is nothing to turn back, and the seed's first draw is the first token's.
"""

from typing import Any


def spare_generators(worker: Any) -> None:
    """Wrap the sampling of a worker on CPU; run it in each worker with `collective_rpc`."""
    runner = worker.model_runner
    if runner.device.type != "cpu":
        return
    sample = runner.sample_tokens

    def sample_tokens(grammar_output: Any) -> Any:
        batch = runner.input_batch
        unfinished = runner.discard_request_mask.np[: batch.num_reqs].nonzero()[0]
        spared = {row: batch.generators.pop(row) for row in map(int, unfinished) if row in batch.generators}
        try:
            return sample(grammar_output)
        finally:
            batch.generators.update(spared)

    runner.sample_tokens = sample_tokens
