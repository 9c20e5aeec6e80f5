"""First Finish Search: which sample is the answer, and that the others end."""

import pytest
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.sampling_params import RequestOutputKind, SamplingParams

from joinwise.actors.vllm import first_finish
from joinwise.cluster.errors import InvalidRequestError
from joinwise.cluster.router.terms import Terms


def sample(index, text, reason=None):
    return CompletionOutput(index, text, list(range(len(text))), None, None, finish_reason=reason)


def output(*samples):
    return RequestOutput("r", "prompt", [1, 2], None, list(samples), finished=False)


async def test_the_first_that_is_finished_is_the_answer_and_the_rest_is_given_up():
    ended = []

    async def outputs():
        try:
            yield output(sample(0, "a"), sample(1, "b"))
            yield output(sample(2, "c", "abort"))
            yield output(sample(0, "aa"), sample(1, "bb", "stop"))
            yield output(sample(0, "aaa", "stop"))
        finally:
            ended.append(True)

    (answer,) = [each async for each in first_finish.first(outputs())]
    assert [(each.index, each.text) for each in answer.outputs] == [(0, "bb")]
    assert answer.finished
    assert ended


async def test_a_caller_that_leaves_ends_all_samples():
    ended = []

    async def outputs():
        try:
            yield output(sample(0, "a", "length"))
        finally:
            ended.append(True)

    answers = first_finish.first(outputs())
    await anext(answers)
    await answers.aclose()
    assert ended


def test_what_is_asked_for_is_a_copy():
    given = SamplingParams(temperature=0.5, seed=3, output_kind=RequestOutputKind.DELTA)
    asked = first_finish.several(given, 4)
    assert (asked.n, asked.output_kind, asked.seed) == (4, RequestOutputKind.CUMULATIVE, 3)
    assert (given.n, given.output_kind) == (1, RequestOutputKind.DELTA)


@pytest.mark.parametrize(("params", "why"), [({"n": 2}, "n is 2"), ({"temperature": 0}, "temperature above 0")])
def test_samples_that_would_be_equal_or_answers_that_are_several_are_refused(params, why):
    with pytest.raises(InvalidRequestError, match=why):
        first_finish.several(SamplingParams(**params), 4)


@pytest.mark.parametrize("text", ["0", "17", "-1", "two", "", "1.5", "111"])
def test_a_header_that_is_no_number_of_samples_is_refused(text):
    with pytest.raises(InvalidRequestError, match="x-first-finish"):
        Terms.parse({"x-first-finish": text})


def test_the_header_counts_samples():
    assert Terms.parse({"x-first-finish": "16"}).first_finish == 16
    assert Terms.parse({}).first_finish == 1
