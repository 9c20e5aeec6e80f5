"""The target of `joinwise bench speculate`: one engine, stepped by hand, whose proposers take turns.

Import it only after the environment of `cpu.environment` is set: OpenMP reads it once.
"""

import time
from collections.abc import Sequence
from copy import deepcopy
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.llm_engine import LLMEngine

from joinwise.actors.bench.speculate_plan import CLUSTER, Answers
from joinwise.actors.draft.asking import AskFigures
from joinwise.actors.draft.vocabulary import Vocabulary
from joinwise.actors.vllm import build  # noqa: F401 - registers what engine arguments may name
from joinwise.actors.vllm.proposer import DraftSettings, RemoteProposer, speculation


class Target:
    """One engine, with the prefixes of its prompts kept.

    Args:
        folder: of the model.
        engine: vLLM's engine arguments by name.
        most: drafts a sequence and step; 0 for an engine without speculation.
    """

    def __init__(self, folder: Path, engine: dict[str, Any], most: int) -> None:
        ours: dict[str, Any] = {"async_scheduling": False, "disable_log_stats": True, "enable_prefix_caching": True}
        if most:
            ours["speculative_config"] = speculation(most)
        self._engine = LLMEngine.from_engine_args(EngineArgs(model=str(folder), **engine, **ours))
        self._numbers = count()
        self._proposers: dict[str, RemoteProposer] = {}
        self._vocabulary = Vocabulary.read("target", folder)
        if most:
            self.side("", 0, "", False, 0.0)  # whoever asked last must not hear of other prompts beforehand

    def prompts(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text as a user's turn."""
        tokenizer: Any = self._engine.get_tokenizer()
        turns = ([{"role": "user", "content": text}] for text in texts)
        return [
            list(tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=False)) for turn in turns
        ]

    def side(self, name: str, k: int, address: str, adaptive: bool, patience_s: float, recall: int = 0) -> None:
        """Have a proposer that asks for up to `k` drafts there, and nobody for an empty address.

        `recall` is how many tokens of its answers it keeps to draft from.

        Raises:
            RuntimeError: it cannot ask within a minute.
        """
        model = self._engine.vllm_config.model_config
        config: Any = SimpleNamespace(
            speculative_config=SimpleNamespace(num_speculative_tokens=k), model_config=model
        )  # all that it reads: proposers of one engine differ in how much they ask for
        self._proposers[name] = proposer = RemoteProposer(config)
        if address:
            settings = DraftSettings(
                CLUSTER, f"target-{name}", self._vocabulary, patience_s, adaptive, lookup=adaptive, recall=recall
            )
            proposer.open(settings)
            proposer.point(address)
            deadline = time.monotonic() + 60
            while not proposer.connected:
                if time.monotonic() > deadline:
                    raise RuntimeError(f"the draft actor of {name!r} does not welcome the engine")
                time.sleep(0.02)

    def answer(self, side: str, prompts: Sequence[Sequence[int]], max_tokens: int) -> Answers:
        """Answer prompts greedily, all at once, with a side's proposer; with an empty name nobody is asked."""
        proposer = self._proposers.get(side)
        if proposer is not None:
            self._engine.engine_core.engine_core.model_executor.collective_rpc(_install, args=(proposer,))
        asked = (proposer.figures if proposer is not None else None) or AskFigures()
        before = deepcopy(asked)
        params = SamplingParams(
            temperature=0.0, max_tokens=max_tokens, detokenize=False, output_kind=RequestOutputKind.DELTA
        )
        answers = Answers([[] for _ in prompts])
        places: dict[str, int] = {}
        for place, prompt in enumerate(prompts):
            name = f"bench-{next(self._numbers)}"
            self._engine.add_request(name, {"prompt_token_ids": list(prompt)}, params)
            places[name] = place
        drafted = 0
        while self._engine.has_unfinished_requests():
            computes = not all(answers.token_ids)
            waited, handed = asked.waited_s, asked.drafted
            begin = time.perf_counter()
            outputs = self._engine.step()
            seconds = time.perf_counter() - begin
            waited = asked.waited_s - waited
            if computes:
                answers.prefill_s += seconds - waited
                answers.decode_s += waited
            else:
                answers.decode_s += seconds
                answers.row_steps += len(outputs)
                answers.steps.append((len(outputs) + drafted, seconds - waited))
            drafted = asked.drafted - handed
            for output in outputs:
                answers.token_ids[places[output.request_id]] += output.outputs[0].token_ids
        answers.asked = difference(asked, before)
        return answers

    def close(self) -> None:
        """Ask nobody any more."""
        for proposer in self._proposers.values():
            proposer.close()


def difference(now: AskFigures, before: AskFigures) -> AskFigures:
    """What has been counted in between."""
    return AskFigures(**{name: value - getattr(before, name) for name, value in vars(now).items()})


def _install(worker: Any, proposer: RemoteProposer) -> None:
    worker.model_runner.drafter = proposer
