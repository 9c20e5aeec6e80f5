"""First Finish Search: several answers are made at once, and the first that is finished is the answer.

Of reasoning models' answers the shorter ones are right more often (Agarwal et al., 2025, arXiv 2505.18149). The samples
share one prefill and one decode worker; the others are aborted as soon as one has ended.
"""

from collections.abc import AsyncGenerator

from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams

from joinwise.cluster.errors import InvalidRequestError
from joinwise.cluster.router.terms import FIRST_FINISH_HEADER

_FINISHED = ("stop", "length")


def several(params: SamplingParams, samples: int) -> SamplingParams:
    """What to ask of vLLM for so many samples; with a seed each has its own, as those of `n` have.

    Raises:
        InvalidRequestError: the samples would be equal, or several answers are asked for.
    """
    if params.n != 1:
        raise InvalidRequestError(f"{FIRST_FINISH_HEADER} gives one answer, and n is {params.n}: leave one of them out")
    if params.temperature == 0:
        raise InvalidRequestError(f"{FIRST_FINISH_HEADER} needs a temperature above 0: greedy samples are all equal")
    asked = params.clone()
    asked.n, asked.output_kind = samples, RequestOutputKind.CUMULATIVE
    return asked


async def first(outputs: AsyncGenerator[RequestOutput, None]) -> AsyncGenerator[RequestOutput, None]:
    """The first finished sample whole, as the only one, in one piece for a stream too; then the rest is given up."""
    try:
        async for output in outputs:
            for sample in output.outputs:
                if sample.finish_reason in _FINISHED:
                    sample.index = 0
                    output.outputs, output.finished = [sample], True
                    yield output
                    return
    finally:
        await outputs.aclose()
