"""What becomes of every field of vLLM's `SamplingParams` in a cluster, with the questions that show it.

`FIELDS` names every field: a new vLLM that brings another one fails `test_exactness.py` until the field is here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from helpers.ask import CHAT, TOKENS, Question

STORY = "Once upon a time, in a small village by the sea,"
HELLO = [{"role": "user", "content": "Say hello and tell me your name."}]
EOS = 2
# " a", "the" and the like: tokens that the model likes to say.
COMMON = [253, 260, 282, 284, 28, 30, 665, 436]
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
_TAG = {
    "type": "structural_tag",
    "format": {"type": "tag", "begin": "<n>", "content": {"type": "regex", "pattern": "[0-9]{3}"}, "end": "</n>"},
}

Fate = Literal["equal", "whole", "refused", "internal"]


@dataclass(frozen=True)
class Field:
    """What becomes of one field.

    Attributes:
        fate: `equal`, split over two workers with the answer of one engine; `whole`, run on one worker with that
            answer; `refused` with 400; `internal`, clients cannot set it.
        why: for `internal`, and where it is not obvious.
        questions: that set the field; of `equal` ones those in `unsplit` run on one worker for another reason.
    """

    fate: Fate
    questions: tuple[Question, ...] = ()
    unsplit: tuple[Question, ...] = ()
    why: str = ""


def greedy(name: str, **body: Any) -> Question:
    """A completion at temperature 0."""
    return Question(f"{name}, greedy", {"prompt": STORY, "temperature": 0, "max_tokens": 12, **body})


def seeded(name: str, **body: Any) -> Question:
    """A completion sampled with a seed; its log probabilities are compared, too."""
    return Question(
        f"{name}, seeded",
        {"prompt": STORY, "temperature": 0.9, "seed": 7, "max_tokens": 12, "logprobs": 1, **body},
    )


def chat(name: str, **body: Any) -> Question:
    """A chat sampled with a seed."""
    return Question(f"{name}, chat", {"messages": HELLO, "temperature": 0.9, "seed": 7, "max_tokens": 12, **body}, CHAT)


def tokens(name: str, **params: Any) -> Question:
    """vLLM's endpoint that takes the whole `SamplingParams`."""
    params = {"temperature": 0, "max_tokens": 8, **params}
    return Question(
        f"{name}, tokens", {"token_ids": [6403, 2166, 253, 655, 28], "sampling_params": params, "priority": 0}, TOKENS
    )


def ends(name: str, after: int, **body: Any) -> Question:
    """A completion that wants to end at once, and may not before `after` tokens."""
    return greedy(name, logit_bias={EOS: 100}, min_tokens=after, max_tokens=after + 3, **body)


def schema(body: dict[str, Any]) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "person", "schema": body}}}


def _equal(*questions: Question, unsplit: tuple[Question, ...] = (), why: str = "") -> Field:
    return Field("equal", questions, unsplit, why)


FIELDS: dict[str, Field] = {
    "n": _equal(seeded("n=3", n=3), chat("n=2", n=2), unsplit=(seeded("n=2 of one token", n=2, max_tokens=1),)),
    "presence_penalty": _equal(greedy("presence", presence_penalty=1.5), seeded("presence", presence_penalty=-1.0)),
    "frequency_penalty": _equal(greedy("frequency", frequency_penalty=1.5), seeded("frequency", frequency_penalty=2)),
    "repetition_penalty": _equal(
        greedy("repetition", repetition_penalty=1.3),
        seeded("repetition", repetition_penalty=0.8),
        seeded(
            "all penalties",
            repetition_penalty=1.2,
            presence_penalty=0.7,
            frequency_penalty=0.4,
            top_p=0.9,
            max_tokens=24,
        ),
    ),
    "temperature": _equal(
        greedy("temperature"), seeded("temperature 0.3", temperature=0.3), chat("temperature 1.8", temperature=1.8)
    ),
    "watermarking": _equal(
        seeded("watermarking off", watermarking=False),
        seeded("watermarking on", watermarking=True),
        why="no engine here has a watermark, so vLLM passes over it; both say so alike",
    ),
    "top_p": _equal(seeded("top_p", top_p=0.5), greedy("top_p", top_p=0.5), chat("top_p", top_p=0.9)),
    "top_k": _equal(seeded("top_k", top_k=5), seeded("top_k of one", top_k=1), chat("top_k off", top_k=-1)),
    "min_p": _equal(seeded("min_p", min_p=0.1), chat("min_p", min_p=0.02, temperature=1.5)),
    "seed": _equal(
        seeded("seed 0", seed=0), seeded("largest seed", seed=2**63 - 1), seeded("negative seed", seed=-5), chat("seed")
    ),
    "stop": _equal(
        greedy("stop string", stop=" wise"),
        greedy("stop across tokens", stop=["se old wo", "never said"]),
        seeded("stop", stop=["e"]),
        greedy("stop in the first token", stop=[" there"]),
        chat("stop", stop=[".", "!", "?"], max_tokens=32),
    ),
    "stop_token_ids": _equal(
        greedy("stop token", stop_token_ids=[253]),
        greedy("stop token at once", stop_token_ids=[665]),
        seeded("stop tokens", stop_token_ids=COMMON),
    ),
    "ignore_eos": _equal(
        greedy("ignore_eos", ignore_eos=True, logit_bias={EOS: 100}, max_tokens=4),
        ends("heed eos", 1),
        greedy("eos at once", logit_bias={EOS: 100}),
    ),
    "max_tokens": _equal(
        greedy("two tokens", max_tokens=2),
        seeded("three tokens", max_tokens=3),
        Question("default of completions", {"prompt": STORY, "temperature": 0}),
        unsplit=(greedy("one token", max_tokens=1), seeded("one token", max_tokens=1), chat("one", max_tokens=1)),
    ),
    "min_tokens": _equal(
        *(ends(f"min_tokens={n}", n) for n in (0, 1, 2, 5)),
        seeded("min_tokens", min_tokens=12, stop_token_ids=COMMON),
        seeded("min_tokens and stop", min_tokens=6, stop=["e"]),
    ),
    "logprobs": _equal(
        *(greedy(f"logprobs={n}", logprobs=n) for n in (0, 1, 5)),
        seeded("logprobs", logprobs=20, max_tokens=4),
        chat("logprobs", logprobs=True, top_logprobs=3),
        chat("logprobs only of what is said", logprobs=True),
        seeded("logprobs as ids", logprobs=2, return_tokens_as_token_ids=True),
    ),
    "prompt_logprobs": Field(
        "whole",
        (
            greedy("prompt_logprobs", prompt_logprobs=2),
            seeded("prompt_logprobs of a cached prompt", prompt=STORY * 8, prompt_logprobs=0),
            greedy("echo", echo=True, logprobs=1),
            chat("prompt_logprobs", prompt_logprobs=1),
        ),
        why="the KV that decode imports has no logits",
    ),
    "prompt_logprob_token_ids": Field(
        "refused",
        (tokens("prompt_logprob_token_ids", prompt_logprob_token_ids=[[260, 28]] * 4),),
        why="vLLM's first model runner lacks it; with the second it runs whole",
    ),
    "prompt_logprob_start": Field(
        "refused", (tokens("prompt_logprob_start", prompt_logprob_start=1),), why="needs prompt_logprob_token_ids"
    ),
    "logprob_token_ids": _equal(
        greedy("logprob_token_ids", logprobs=2, logprob_token_ids=[260, 28]),
        seeded("logprob_token_ids", logprobs=3, logprob_token_ids=[665, 436, 253]),
    ),
    "flat_logprobs": _equal(tokens("flat_logprobs", flat_logprobs=True, logprobs=2)),
    "detokenize": _equal(tokens("detokenize off", detokenize=False), tokens("detokenize", detokenize=True)),
    "skip_special_tokens": _equal(
        greedy("special tokens shown", skip_special_tokens=False, ignore_eos=True, logit_bias={EOS: 8}),
        chat("special tokens shown", skip_special_tokens=False, max_tokens=40),
    ),
    "spaces_between_special_tokens": _equal(
        greedy(
            "no spaces between",
            spaces_between_special_tokens=False,
            skip_special_tokens=False,
            ignore_eos=True,
            logit_bias={EOS: 8},
        )
    ),
    "include_stop_str_in_output": _equal(
        greedy("stop kept", stop=[" wise"], include_stop_str_in_output=True),
        greedy("first stop kept", stop=[" there"], include_stop_str_in_output=True),
        ends("eos kept", 2, include_stop_str_in_output=True),
    ),
    "output_kind": _equal(
        greedy("streamed", stream=True, stream_options={"include_usage": True}),
        seeded("streamed", stream=True, stream_options={"include_usage": True, "continuous_usage_stats": True}, n=2),
        chat("streamed", stream=True, logprobs=True, top_logprobs=2),
        why="the front end sets it: whole answers are FINAL_ONLY, streams are DELTA",
    ),
    "stream_interval": _equal(seeded("stream_interval", stream=True, stream_interval=5)),
    "skip_clone": _equal(tokens("skip_clone", skip_clone=True), tokens("cloned", skip_clone=False)),
    "output_text_buffer_length": _equal(
        tokens("output_text_buffer_length", output_text_buffer_length=3), why="used in the gateway only"
    ),
    "_eos_token_id": Field("internal", why="vLLM sets it from the model; its parser passes over what clients send"),
    "_all_stop_token_ids": Field("internal", why="as _eos_token_id"),
    "_watermarking_skipped": Field("internal", why="as _eos_token_id"),
    "_bad_words_token_ids": Field(
        "internal", why="vLLM makes it of bad_words; its parser passes over what clients send"
    ),
    "structured_outputs": _equal(
        greedy("JSON schema", max_tokens=32, **schema(PERSON)),
        seeded("JSON schema", max_tokens=32, **schema(PERSON)),
        chat("JSON schema", max_tokens=32, **schema(PERSON)),
        seeded("JSON object", response_format={"type": "json_object"}, temperature=0.5),
        greedy("regex", structured_outputs={"regex": "(yes|no), [0-9]{3}"}),
        seeded("regex", structured_outputs={"regex": "[a-z]{4,8}-[0-9]{2}"}),
        greedy("choice", structured_outputs={"choice": ["there was a cat", "there was a dog"]}),
        seeded("choice of one token", structured_outputs={"choice": ["yes", "no"]}),
        chat("grammar", structured_outputs={"grammar": 'root ::= "a" ("b" | "c") "d"'}),
        seeded("structural tag", response_format=_TAG),
    ),
    "logit_bias": _equal(
        greedy("logit_bias", logit_bias={260: 4.5, 665: -100}), seeded("logit_bias", logit_bias={"28": 6, "30": -6})
    ),
    "allowed_token_ids": _equal(
        greedy("allowed_token_ids", allowed_token_ids=COMMON), seeded("allowed_token_ids", allowed_token_ids=COMMON)
    ),
    "extra_args": _equal(
        seeded("vllm_xargs", vllm_xargs={"mine": "kept", "numbers": [1, 2]}),
        why="keys of the cluster are refused: see test_reserved_keys_are_refused",
    ),
    "bad_words": _equal(
        greedy("bad_words", bad_words=["wise", "there"]),
        greedy("bad words of many tokens", bad_words=["old woman named"]),
        seeded("bad_words", bad_words=["the", "a", "was a"]),
    ),
    "skip_reading_prefix_cache": Field(
        "whole",
        (tokens("skip_reading_prefix_cache", skip_reading_prefix_cache=True),),
        why="vLLM asks the connector and drops its answer",
    ),
    "thinking_token_budget": Field(
        "refused",
        (greedy("thinking_token_budget", thinking_token_budget=4),),
        why="needs a reasoning parser; with one it runs whole",
    ),
    "repetition_detection": _equal(
        greedy(
            "repetition_detection",
            prompt="la la la la la la la la",
            max_tokens=24,
            repetition_detection={"max_pattern_size": 2, "min_pattern_size": 1, "min_count": 4},
        ),
        greedy(
            "repetition within two tokens",
            logit_bias={260: 100},
            repetition_detection={"max_pattern_size": 1, "min_pattern_size": 1, "min_count": 2},
        ),
    ),
    "routed_experts_prompt_start": Field(
        "whole",
        (greedy("routed_experts_prompt_start", routed_experts_prompt_start=2),),
        why="decode has not routed the prompt",
    ),
    "trace_decode_token_ids": Field("refused", (tokens("trace_decode_token_ids", trace_decode_token_ids=[260, 28]),)),
}
