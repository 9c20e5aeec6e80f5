"""`ClusterLLM`: vLLM's `AsyncLLM` over `ClusterCore`, with a ticket for every call of `generate`."""

import copy
from collections.abc import AsyncGenerator, Callable, Collection
from contextvars import ContextVar
from typing import Any, NoReturn, cast

from vllm.config import VllmConfig
from vllm.outputs import RequestOutput
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.core_client import EngineCoreClient
from vllm.v1.executor import Executor

from joinwise.actors.gateway.failures import note_error
from joinwise.actors.gateway.tickets import Ticket, TicketOffice, active_ticket, call_resumes, call_terms, call_tickets
from joinwise.actors.vllm import first_finish, split
from joinwise.actors.vllm.core_client import ClusterCore
from joinwise.actors.vllm.handoff import set_replay
from joinwise.actors.vllm.kv_events import BlockNames
from joinwise.cluster.errors import InvalidRequestError, JoinwiseError, NotSupportedError
from joinwise.cluster.router.ask import MAX_HOLDERS
from joinwise.cluster.router.prefix_index import PrefixIndex


def cluster_llm(
    config: VllmConfig,
    core: ClusterCore,
    office: TicketOffice,
    prefixes: PrefixIndex | None = None,
    blocks: BlockNames | None = None,
) -> "ClusterLLM":
    """Build the front end over our core, in place of the client that vLLM would make.

    Must be called on the event loop that will serve; nothing else may build an `AsyncLLM` meanwhile. With `prefixes`
    and `blocks` requests are routed to where their prefix is.
    """
    original = EngineCoreClient.make_async_mp_client
    EngineCoreClient.make_async_mp_client = staticmethod(lambda *args, **kwargs: core)  # type: ignore[assignment]
    try:
        llm = ClusterLLM(config, Executor.get_class(config), log_stats=True, log_requests=False)
    finally:
        EngineCoreClient.make_async_mp_client = staticmethod(original)  # type: ignore[method-assign]
    llm.office, llm.prefixes, llm.blocks = office, prefixes, blocks
    llm.input_processor.process_inputs = _once(llm.input_processor.process_inputs)  # type: ignore[method-assign]
    return llm


#: The request that was processed for its ticket, until vLLM asks for it.
_checked: ContextVar[EngineCoreRequest | None] = ContextVar("joinwise_checked_request", default=None)

#: What `process_inputs` takes of what `generate` is given. vLLM knows the other two, priority and trace, only later.
_OF_INPUTS = ("arrival_time", "tokenization_kwargs", "data_parallel_rank", "session_id", "kv_hints", "lora_request")


def _once(process: Callable[..., EngineCoreRequest]) -> Callable[..., EngineCoreRequest]:
    """vLLM's `process_inputs`, which takes what was processed for the ticket, if this request was."""

    def taken(request_id: str, *args: Any, **kwargs: Any) -> EngineCoreRequest:
        checked = _checked.get()
        if checked is None or checked.request_id != request_id:
            return process(request_id, *args, **kwargs)
        _checked.set(None)
        checked.priority, checked.trace_headers = kwargs["priority"], kwargs["trace_headers"]
        return checked

    return taken


class ClusterLLM(AsyncLLM):
    """An `EngineClient` whose requests are checked and routed before they are streamed."""

    office: TicketOffice
    prefixes: PrefixIndex | None = None
    blocks: BlockNames | None = None
    holders: Collection[str] | None = None
    """Workers of this model, where the index knows those of others too: equal tokens have equal names everywhere."""

    strangers: frozenset[str] = frozenset()
    """Workers that may not be taken, though the registry has them under this model's name."""

    def generate(  # type: ignore[override]  # vLLM's is an async generator; ours begins when it is called
        self, prompt: Any, sampling_params: SamplingParams, request_id: str, **kwargs: Any
    ) -> AsyncGenerator[RequestOutput, None]:
        """Check the request at once and prepare its ticket; run when iterated.

        Raises:
            InvalidRequestError: what the cluster does not serve, or what only it may set.
            vllm.exceptions.VLLMValidationError: what vLLM's own checks refuse.
        """
        try:
            if (samples := call_terms.get().first_finish) > 1:
                sampling_params = first_finish.several(sampling_params, samples)
            ticket, checked = self._ticket(prompt, sampling_params, request_id, kwargs)
        except JoinwiseError as error:
            raise note_error(error) from None
        tickets = call_tickets.get()
        if tickets is not None:
            tickets.append(ticket)
        kwargs["priority"] = ticket.demand.terms.priority
        outputs = self._run(ticket, checked, super().generate(prompt, sampling_params, request_id, **kwargs))
        return outputs if samples == 1 else first_finish.first(outputs)

    async def _run(
        self, ticket: Ticket, checked: EngineCoreRequest, outputs: AsyncGenerator[RequestOutput, None]
    ) -> AsyncGenerator[RequestOutput, None]:
        try:
            await ticket.admit()
            tokens = active_ticket.set(ticket), _checked.set(checked)
            try:
                first = await anext(outputs)  # the request is added to the core in here
            finally:
                active_ticket.reset(tokens[0])
                _checked.reset(tokens[1])
            yield first
            async for output in outputs:
                yield output
        finally:
            await outputs.aclose()
            await ticket.settle()

    def _ticket(
        self, prompt: Any, params: SamplingParams, request_id: str, given: dict[str, Any]
    ) -> tuple[Ticket, EngineCoreRequest]:
        if not isinstance(prompt, dict) or prompt.get("type") not in ("token", "embeds"):
            kind = prompt.get("type", "unknown") if isinstance(prompt, dict) else type(prompt).__name__
            raise InvalidRequestError(f"{kind} input is not supported: send text", request_id=request_id)
        split.refuse_reserved(params)
        resumes = call_resumes.get()
        if resumes is not None:
            params = self._resuming(params, resumes)
        lora = given.get("lora_request")
        # vLLM validates lazily, after a streaming response has begun; validate now, and on a copy.
        more = {name: given[name] for name in _OF_INPUTS if name in given}
        checked = self.input_processor.process_inputs(
            request_id, cast(Any, prompt), params, supported_tasks=("generate",), **more
        )
        checked_params = checked.sampling_params
        assert checked_params is not None
        held = None
        if self.prefixes and self.blocks is not None and checked.prompt_token_ids and checked.prompt_embeds is None:
            names = self.blocks.of(checked.prompt_token_ids, lora=lora, cache_salt=checked.cache_salt)
            held = self.prefixes.held(names, self.blocks.block_size, MAX_HOLDERS, self.holders)
        ticket = self.office.ticket(
            request_id=request_id,
            prompt_tokens=len(checked.prompt_token_ids or ()) or 1,
            max_new_tokens=checked_params.max_tokens or 1,
            samples=params.n,
            whole=resumes is not None
            or bool(split.whole_reason(checked_params, has_embeds=checked.prompt_embeds is not None)),
            adapter=lora.lora_name if lora is not None else None,
            needs=split.needs_of(checked_params, has_embeds=checked.prompt_embeds is not None),
            priority=int(given.get("priority") or 0),
            held=held,
            exclude=self.strangers,
        )
        return ticket, checked

    def _resuming(self, params: SamplingParams, tokens: tuple[int, ...]) -> SamplingParams:
        """Parameters with which an engine begins by repeating these tokens; `needs_of` sees that they are special."""
        vocabulary = self.model_config.get_vocab_size()
        if any(token >= vocabulary for token in tokens):
            raise InvalidRequestError(f"resume: a token id is not below {vocabulary}, the size of the vocabulary")
        if len(tokens) > self.model_config.max_model_len:
            raise InvalidRequestError(f"resume: {len(tokens)} tokens are more than the model takes")
        if params.n != 1:
            raise InvalidRequestError("resume: only a request for one choice can be resumed")
        params = copy.copy(params)
        set_replay(params, list(tokens))
        return params


#: Calls of vLLM's `EngineClient` that mean one engine: a cluster answers 501.
_OF_ONE_ENGINE = (
    "checkpoint_prepare",
    "checkpoint_restore",
    "collective_rpc",
    "compute_weight_checksums",
    "finish_weight_update",
    "handle_fault",
    "init_weight_transfer_engine",
    "is_sleeping",
    "pause_generation",
    "release_kv_cache_memory",
    "reset_encoder_cache",
    "reset_mm_cache",
    "resume_generation",
    "scale_elastic_ep",
    "shutdown_weight_transfer_engine",
    "sleep",
    "start_draft_weight_update",
    "start_profile",
    "start_weight_update",
    "stop_profile",
    "update_weight_version",
    "update_weights",
    "wake_up",
)


def _refusing(name: str) -> Any:
    async def refuse(self: ClusterLLM, *args: Any, **kwargs: Any) -> NoReturn:
        raise note_error(NotSupportedError(f"{name} is for a single engine: a cluster does not support it"))

    return refuse


for _name in _OF_ONE_ENGINE:
    assert hasattr(AsyncLLM, _name), f"vLLM has renamed {_name}"
    setattr(ClusterLLM, _name, _refusing(_name))
