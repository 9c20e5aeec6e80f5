"""The proposer as vLLM loads it (`method="custom_class"`): every step it asks a draft actor what may come next.

vLLM builds it from its own configuration in each rank of an engine; `open_links` tells it afterwards whom to ask, and
only the rank whose drafts count asks. Until then, and whenever there is no answer in time, nothing is proposed and the
step is an ordinary one. Whatever fails in here costs proposals, never the engine.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from vllm.config import VllmConfig
from vllm.v1.executor import Executor

from joinwise.actors.auth import bearer
from joinwise.actors.draft.asking import Asker, AskFigures
from joinwise.actors.draft.length import LengthChooser
from joinwise.actors.draft.link import DraftLink, channel_to
from joinwise.actors.draft.vocabulary import Vocabulary
from joinwise.actors.draft.wire import PROTOCOL_VERSION
from joinwise.actors.tls import peers
from joinwise.actors.vllm.hidden_tap import HiddenTap
from joinwise.actors.vllm.rejection import mend_rejection
from joinwise.cluster.config_model import PeerTlsConfig
from joinwise.proto import draft_pb2

logger = logging.getLogger(__name__)

PATH = f"{__name__}.RemoteProposer"


@dataclass(frozen=True)
class DraftSettings:
    """How an engine asks.

    Attributes:
        cluster, worker_id: who it is.
        vocabulary: what its token ids mean.
        deadline_s: seconds that a step waits for drafts at most; None waits for as long as two steps take.
        adaptive: choose how many drafts to have by what they cost and bring.
        lookup: draft from a sequence's own text where it repeats itself, and ask for the others.
        recall: tokens of the latest answers to draft from as well.
        token: shown to draft actors; empty for none.
        tls: the cluster's certificates; None for plain text.
    """

    cluster: str
    worker_id: str
    vocabulary: Vocabulary
    deadline_s: float | None
    adaptive: bool = True
    lookup: bool = False
    recall: int = 0
    token: str = ""
    tls: PeerTlsConfig | None = None


class RemoteProposer:
    """vLLM's proposer interface."""

    def __init__(self, vllm_config: VllmConfig) -> None:
        assert vllm_config.speculative_config is not None
        mend_rejection()
        self._k = int(vllm_config.speculative_config.num_speculative_tokens)
        self._ids = vllm_config.model_config.get_vocab_size()
        self._max_tokens = vllm_config.model_config.max_model_len
        self._link: DraftLink | None = None
        self._asker: Asker | None = None
        self._tap = HiddenTap()
        self._hidden_wanted = False

    def load_model(self, target: Any, *_: Any, **__: Any) -> None:
        """vLLM offers the target here. Some draft actors want its hidden states."""
        if hasattr(target, "compute_logits"):
            self._tap.watch_model(target)

    def open(self, settings: DraftSettings, samplers: tuple[Any, Any] | None = None) -> None:
        """Begin to ask, as soon as `point` says whom; `samplers` are the runner's, the plain one and the rejecting."""
        if samplers is not None:
            self._tap.watch_samplers(*samplers)
        hello = draft_pb2.DraftHello(
            protocol_version=PROTOCOL_VERSION,
            cluster=settings.cluster,
            worker_id=settings.worker_id,
            vocabulary=settings.vocabulary.message(),
        )
        channel = partial(channel_to, peers(settings.tls))
        self._asker = Asker(
            vocabulary=self._ids,
            max_tokens=self._max_tokens,
            patience_s=settings.deadline_s,
            lookup=settings.lookup,
            recall=settings.recall,
            lengths=LengthChooser(self._k) if settings.adaptive else None,
        )
        self._link = DraftLink(hello, channel, bearer(settings.token))

    def point(self, address: str) -> None:
        """Ask this draft actor; nobody for an empty address."""
        if self._link is not None:
            self._link.point(address)

    @property
    def connected(self) -> bool:
        """Whether there is somebody who may be asked now."""
        return self._link is not None and self._link.session is not None

    def close(self) -> None:
        """Ask nobody any more."""
        link, self._link = self._link, None
        if link is not None:
            link.close()

    @property
    def figures(self) -> AskFigures | None:
        """What asking has brought; None on a rank that does not ask."""
        return self._asker.figures if self._asker is not None else None

    def propose(
        self,
        sampled_token_ids: Sequence[Sequence[int]],
        num_tokens_no_spec: np.ndarray,
        token_ids_cpu: np.ndarray,
        slot_mappings: Any = None,
    ) -> list[list[int]]:
        """Called by vLLM after each step, on the stepping thread; waits for no longer than `deadline_s`.

        Args:
            sampled_token_ids: ids that each row of the batch gained in the step; none for a row that only prefilled.
            num_tokens_no_spec: tokens of each row, those included; shape (rows or more,).
            token_ids_cpu: the tokens; shape (rows or more, longest sequence).
            slot_mappings: not used.

        Returns:
            Drafts of each row.
        """
        proposals: list[list[int]] = [[] for _ in sampled_token_ids]
        link, asker = self._link, self._asker
        if link is None or asker is None:
            return proposals
        try:
            rows = {
                row: token_ids_cpu[row, : int(num_tokens_no_spec[row])]
                for row, sampled in enumerate(sampled_token_ids)
                if sampled
            }
            session = link.session
            if session is not None:
                self._hidden_wanted = bool(session.hidden_size)
            hidden = self._tap.of_rows(sampled_token_ids) if self._hidden_wanted else None
            alone = all(sampled_token_ids)
            for row, drafted in asker.drafts(session, rows, self._k, alone=alone, hidden=hidden).items():
                proposals[row] = drafted
        except Exception:
            logger.exception("no drafts are asked for any more")
            self._link = None
        return proposals


def speculation(k: int) -> dict[str, Any]:
    """vLLM's `speculative_config` of an engine that asks for up to `k` drafts a sequence and step.

    The schedule by batch size says nothing new, but with it vLLM does not pad the first step after a KV import, or
    after a prefix hit up to the last token, with drafts of -1, from which the CPU's rejection sampler draws garbage.
    """
    return {
        "method": "custom_class",
        "model": PATH,
        "num_speculative_tokens": k,
        "num_speculative_tokens_per_batch_size": [(1, 1, k)],  # vLLM takes the last entry for all larger batches
    }


# What the process that steps an engine asks of the proposer, wherever that runs: see `connector.ports`.


def open_links(executor: Executor, settings: DraftSettings) -> None:
    """Let the rank whose drafts count ask."""
    executor.collective_rpc(_open, args=(settings,))


def point_links(executor: Executor, address: str) -> None:
    """Say whom to ask."""
    executor.collective_rpc(_call, args=("point", address))


def close_links(executor: Executor) -> None:
    """Ask nobody any more."""
    executor.collective_rpc(_call, args=("close",))


def asked(executor: Executor) -> AskFigures:
    """What asking has brought."""
    return next((each for each in executor.collective_rpc(_figures) if each is not None), AskFigures())


def _proposer(worker: Any) -> RemoteProposer | None:
    return getattr(worker.model_runner, "drafter", None)


def _open(worker: Any, settings: DraftSettings) -> None:
    parallel = worker.vllm_config.parallel_config
    ranks = parallel.tensor_parallel_size * parallel.prefill_context_parallel_size
    proposer = _proposer(worker)
    # The first rank of the last pipeline stage: the executor hears no other.
    if proposer is not None and worker.rank == parallel.world_size - ranks:
        runner = worker.model_runner
        samplers = getattr(runner, "sampler", None), getattr(runner, "rejection_sampler", None)
        proposer.open(settings, samplers if None not in samplers else None)


def _call(worker: Any, method: str, *arguments: Any) -> None:
    proposer = _proposer(worker)
    if proposer is not None:
        getattr(proposer, method)(*arguments)


def _figures(worker: Any) -> AskFigures | None:
    proposer = _proposer(worker)
    return proposer.figures if proposer is not None else None
