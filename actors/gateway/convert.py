"""Turns a gRPC `GenerateRequest` into the request that vLLM's own HTTP front end would have parsed.

Owns nothing. Whatever vLLM validates is left to vLLM, so that both front ends refuse the same things with the same
words; checked here is only what cannot be said in its request models (no prompt, JSON that does not parse).
"""

from __future__ import annotations

import json
import re
import uuid
from typing import Any

from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest

from joinwise.cluster.errors import InvalidRequestError
from joinwise.proto import inference_pb2 as pb

_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")
# What vLLM makes of a client's id: a chat completion, a prompt of a completion, a completion.
_ENGINE_ID = re.compile(r"chatcmpl-(.+)|cmpl-(.+)-\d+|cmpl-(.+)", re.DOTALL)
# Fields of SamplingOptions that both of vLLM's request models call by the same name.
_SAME_NAME = (
    "max_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "n",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "ignore_eos",
    "min_tokens",
    "skip_special_tokens",
    "include_stop_str_in_output",
)


def request_id_of(request: pb.GenerateRequest) -> str:
    """The client's id of this request, or a fresh one.

    Raises:
        InvalidRequestError: the id is longer than 128 characters or has some that are not printable ASCII.
    """
    if not request.request_id:
        return uuid.uuid4().hex
    if not _REQUEST_ID.fullmatch(request.request_id):
        raise InvalidRequestError("request_id must be 1 to 128 printable ASCII characters without spaces")
    return request.request_id


def bare_request_id(engine_id: str) -> str:
    """The client's id in an id that vLLM made of it: `chatcmpl-<id>` and `cmpl-<id>-0` give `<id>`."""
    match = _ENGINE_ID.fullmatch(engine_id)
    return next(part for part in match.groups() if part is not None) if match else engine_id


def to_vllm(request: pb.GenerateRequest, request_id: str) -> ChatCompletionRequest | CompletionRequest:
    """Build vLLM's streaming request.

    Raises:
        InvalidRequestError: the prompt is missing or empty, or a field does not parse.
        pydantic.ValidationError, vllm.exceptions.VLLMValidationError: vLLM refuses a value.
    """
    kind = request.WhichOneof("input")
    data = _common(request, request_id)
    if kind == "messages":
        return ChatCompletionRequest.model_validate(data | _chat(request))
    if kind is None:
        raise InvalidRequestError("no prompt: set text, messages or token_ids")
    for field in ("tools", "tool_choice", "chat_template_kwargs"):
        if getattr(request, field):
            raise InvalidRequestError(f"{field} needs messages: a plain prompt has no chat template")
    if kind == "text" and not request.text:
        raise InvalidRequestError("the prompt is empty: text must have at least one character")
    if kind == "token_ids" and not request.token_ids.ids:
        raise InvalidRequestError("the prompt is empty: token_ids must have at least one id")
    data["prompt"] = request.text if kind == "text" else list(request.token_ids.ids)
    if request.sampling.HasField("logprobs"):
        data["logprobs"] = request.sampling.logprobs
    return CompletionRequest.model_validate(data)


def _common(request: pb.GenerateRequest, request_id: str) -> dict[str, Any]:
    sampling = request.sampling
    data: dict[str, Any] = {
        "model": request.model or None,
        "request_id": request_id,
        "priority": request.priority,
        "stream": True,
        "stream_options": {"include_usage": True},
        "return_token_ids": True,
    }
    if request.session_id:
        data["session_id"] = request.session_id
    data |= {name: getattr(sampling, name) for name in _SAME_NAME if sampling.HasField(name)}
    if sampling.stop:
        data["stop"] = list(sampling.stop)
    if sampling.stop_token_ids:
        data["stop_token_ids"] = list(sampling.stop_token_ids)
    if sampling.logit_bias:
        data["logit_bias"] = {str(k): v for k, v in sampling.logit_bias.items()}
    if request.HasField("response_format"):
        data |= _format(request.response_format)
    return data


def _chat(request: pb.GenerateRequest) -> dict[str, Any]:
    if not request.messages.messages:
        raise InvalidRequestError("the prompt is empty: messages must have at least one message")
    data: dict[str, Any] = {"messages": [_message(i, m) for i, m in enumerate(request.messages.messages)]}
    if request.sampling.HasField("logprobs"):
        data |= {"logprobs": True, "top_logprobs": request.sampling.logprobs}
    if request.tools:
        data["tools"] = [_tool(i, t) for i, t in enumerate(request.tools)]
    if request.tool_choice in ("none", "auto", "required"):
        data["tool_choice"] = request.tool_choice
    elif request.tool_choice:
        data["tool_choice"] = {"type": "function", "function": {"name": request.tool_choice}}
    if request.chat_template_kwargs:
        data["chat_template_kwargs"] = _json_object("chat_template_kwargs", request.chat_template_kwargs)
    return data


def _message(position: int, message: pb.Message) -> dict[str, Any]:
    if not message.role:
        raise InvalidRequestError(f"messages[{position}] has no role")
    data: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.name:
        data["name"] = message.name
    if message.tool_call_id:
        data["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        data["tool_calls"] = [
            {"id": c.id, "type": "function", "function": {"name": c.name, "arguments": c.arguments}}
            for c in message.tool_calls
        ]
        data["content"] = message.content or None
    return data


def _tool(position: int, tool: pb.Tool) -> dict[str, Any]:
    if not tool.name:
        raise InvalidRequestError(f"tools[{position}] has no name")
    function: dict[str, Any] = {"name": tool.name}
    if tool.description:
        function["description"] = tool.description
    if tool.parameters:
        function["parameters"] = _json_object(f"tools[{position}].parameters", tool.parameters)
    return {"type": "function", "function": function}


def _format(response_format: pb.ResponseFormat) -> dict[str, Any]:
    kind = response_format.WhichOneof("format")
    if kind == "json_object":
        return {"response_format": {"type": "json_object"}} if response_format.json_object else {}
    if kind == "json_schema":
        schema = _json_object("response_format.json_schema", response_format.json_schema)
        return {"response_format": {"type": "json_schema", "json_schema": {"name": "response", "schema": schema}}}
    if kind == "choice":
        return {"structured_outputs": {"choice": list(response_format.choice.choices)}}
    if kind in ("regex", "grammar"):
        return {"structured_outputs": {kind: getattr(response_format, kind)}}
    raise InvalidRequestError("response_format is empty: set json_object, json_schema, regex, choice or grammar")


def _json_object(name: str, text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise InvalidRequestError(f"{name} is not JSON: {e}") from None
    if not isinstance(value, dict):
        raise InvalidRequestError(f"{name} must be a JSON object, not {type(value).__name__}")
    return value
