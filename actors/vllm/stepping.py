"""An engine that is stepped by hand and timed: plain vLLM in this process, nothing of a cluster around it.

Import it only after the environment of `cpu.environment` is set: OpenMP reads it once.
"""

import time
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any

from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.engine.llm_engine import LLMEngine

from joinwise.cluster.errors import ConfigError

_ENDLESS = 1 << 16  # tokens; who asks stops before


class SteppedEngine:
    """One engine. Prefix caching is off, and a step is over before the next one is scheduled.

    Args:
        model: local folder.
        arguments: vLLM's engine arguments by name.

    Attributes:
        max_model_len, max_tokens: of a request, and of a step.
        layers: with a KV cache.
        kv_bytes, kv_tokens: bytes of KV cache of a token, and tokens that fit.

    Raises:
        ConfigError: an argument that vLLM does not know, or a value that it refuses.
    """

    def __init__(self, model: Path, arguments: dict[str, Any]) -> None:
        ours = {"enable_prefix_caching": False, "async_scheduling": False, "disable_log_stats": True}
        try:
            self._engine = LLMEngine.from_engine_args(EngineArgs(model=str(model), **{**arguments, **ours}))
        except (TypeError, ValueError) as error:
            raise ConfigError(f"vLLM refuses the engine arguments: {error}") from error
        config = self._engine.vllm_config
        cache = self._engine.engine_core.engine_core.scheduler.kv_cache_config
        specs = [(group.kv_cache_spec, len(group.layer_names)) for group in cache.kv_cache_groups]
        self.max_model_len = config.model_config.max_model_len
        self.max_tokens = config.scheduler_config.max_num_batched_tokens
        self.layers = sum(layers for _, layers in specs)
        self.kv_bytes = sum(layers * spec.page_size_bytes // spec.block_size for spec, layers in specs)
        self.kv_tokens = cache.num_blocks * config.cache_config.block_size
        self._vocabulary = config.model_config.get_vocab_size()
        self._numbers = count()

    def prefill(self, tokens: int) -> float:
        """Compute one prompt; returns seconds."""
        self._add(tokens)
        begin = time.perf_counter()
        outputs = self._engine.step()
        seconds = time.perf_counter() - begin
        assert len(outputs) == 1, "a prompt of a step's size is computed in one"
        self._drop([outputs[0].request_id])
        return seconds

    def decode(self, batches: Sequence[int], context: int, steps: int) -> Iterator[tuple[int, float]]:
        """Decode so many steps with each of some numbers of sequences, in falling order; yields (batch, seconds).

        Args:
            context: tokens of each sequence when the first of these steps begins, about: they grow meanwhile.
        """
        for _ in range(max(batches)):
            self._add(context)
        running: set[str] = set()
        while len(running) < max(batches):
            running |= {output.request_id for output in self._engine.step()}
        for batch in sorted(batches, reverse=True):
            self._drop([running.pop() for _ in range(len(running) - batch)])
            for _ in range(steps):
                begin = time.perf_counter()
                outputs = self._engine.step()
                seconds = time.perf_counter() - begin
                assert len(outputs) == batch, "nothing ends by itself"
                yield batch, seconds
        self._drop(list(running))

    def close(self) -> None:
        """Give its memory back."""
        self._engine.engine_core.shutdown()

    def _add(self, tokens: int) -> None:
        number = next(self._numbers)
        prompt = {"prompt_token_ids": [(number + place * 7) % self._vocabulary for place in range(tokens)]}
        params = SamplingParams(temperature=0.0, max_tokens=_ENDLESS, ignore_eos=True, detokenize=False)
        self._engine.add_request(f"profile-{number}", prompt, params)

    def _drop(self, names: list[str]) -> None:
        self._engine.abort_request(names)
