"""A causal model's forward passes over static slots; on a GPU those of a step of drafting are CUDA graphs.

A step of drafting computes a token or two of a few sequences. For a small model that takes a GPU less time than having
its kernels launched one by one. So such passes are recorded beforehand, for some numbers of rows and some widths of the
cache, and a step replays the smallest that holds it: rows that it lacks are computed for nobody, columns are masked.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from joinwise.actors.draft.slots import SlotCache, Span, packed, unpacked

logger = logging.getLogger(__name__)

_TOKENS = (1, 2)
"""Tokens a row of the passes that are recorded: a round begins with two where all drafts of the last one were right."""
_NARROWEST = 256
"""Columns of the narrowest pass that is recorded; each further one has four times as many."""

Pass = Callable[[], torch.Tensor]
"""Computes from where it always finds its input; returns the likeliest next token of each row, (rows,)."""
Record = Callable[[Pass], Pass]
"""Returns what repeats a pass."""


@dataclass(frozen=True, eq=False)
class _Recorded:
    """A pass of a fixed shape, and where it finds its input."""

    rows: int
    tokens: int
    width: int
    input: torch.Tensor
    repeat: Pass


class SlotForward:
    """Appends tokens to slots and says what is likeliest to follow. Used by one thread at a time.

    Args:
        model: of transformers, in evaluation mode, with full attention in every layer; computes where its weights are.
        slots: sequences that have a place.
        columns: tokens that each place holds.
    """

    def __init__(self, model: Any, slots: int, columns: int) -> None:
        self._model = model
        self._slots, self._columns = slots, columns
        self._device = model.get_input_embeddings().weight.device
        self._cache = SlotCache(slots, columns)
        self._recorded: list[_Recorded] = []

    def warm_up(self) -> None:
        """Allocate the cache and record graphs, on a device that has them; elsewhere nothing is done.

        Raises:
            RuntimeError: the device has no room for it.
        """
        if self._device.type != "cuda":
            return
        self([Span(0, 0, np.zeros(1, np.int32))])
        try:
            self.record(CudaGraphs(self._device))
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            self._recorded = []
            logger.warning("drafts are computed without CUDA graphs, since none could be recorded: %s", error)

    @torch.inference_mode()
    def record(self, record: Record) -> None:
        """Have passes recorded; the largest comes first, so that the others find its memory."""
        rows = sorted({1 << power for power in range(self._slots.bit_length())} | {self._slots})
        widths = [_NARROWEST]
        while widths[-1] < self._columns:
            widths.append(4 * widths[-1])
        for count in reversed(rows):
            for tokens in _TOKENS:
                for width in reversed([min(width, self._columns) for width in widths]):
                    whole = packed([], count, tokens, self._columns).to(self._device)
                    repeat = record(partial(self._compute, whole, width))
                    self._recorded.insert(0, _Recorded(count, tokens, width, whole, repeat))

    @torch.inference_mode()
    def __call__(self, spans: Sequence[Span]) -> list[int]:
        """Append tokens, at least one to each of some different slots, in one batch. Returns what follows each."""
        count, tokens = len(spans), max(len(span.tokens) for span in spans)
        width = max(span.end for span in spans)
        fitting = (
            each for each in self._recorded if each.rows >= count and each.tokens == tokens and each.width >= width
        )
        if (known := next(fitting, None)) is not None:
            known.input.copy_(packed(spans, known.rows, tokens, self._columns))
            found = known.repeat()[:count]
        else:
            whole = packed(spans, count, tokens, self._columns).to(self._device)
            found = self._compute(whole, width, only=spans[0].slot if count == 1 else None)
        drafted: list[int] = found.tolist()
        return drafted

    def _compute(self, whole: torch.Tensor, width: int, only: int | None = None) -> torch.Tensor:
        """A pass over the first `width` columns; `only` is the slot of a batch of one, where it stays the same."""
        self._cache.rows, ids, positions, self._cache.columns = unpacked(whole)
        self._cache.only, self._cache.width = only, width
        seen = torch.arange(width, device=self._device) <= positions[:, None, :, None]
        logits: torch.Tensor = self._model(
            input_ids=ids,
            position_ids=positions,
            attention_mask=seen,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits
        return logits[:, -1].argmax(-1)


class CudaGraphs:
    """Records passes as CUDA graphs. They share their memory: each is read before the next one is replayed."""

    def __init__(self, device: torch.device) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)

    def __call__(self, compute: Pass) -> Pass:
        """See `Record`.

        Raises:
            RuntimeError: the pass does what no graph can hold, such as waiting for the device.
        """
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            compute()  # what libraries allocate at first is not to be recorded
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            found = compute()

        def repeat() -> torch.Tensor:
            graph.replay()
            return found

        return repeat
