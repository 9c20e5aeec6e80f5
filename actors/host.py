"""What runs inside a Ray actor's process: the hosted object, and who looks after it. Calls nothing of Ray.

An actor in somebody else's Ray may outlive its launcher: it serves on, another launcher that starts in the same
namespace takes it over as it is, and only if none comes it ends by itself. Whoever is not its owner can neither stop it
nor ask how it is.
"""

import asyncio
import contextlib
import gc
import importlib
import logging
import os
import time
from dataclasses import dataclass
from typing import Any

from joinwise.actors import logs
from joinwise.actors.phases import Phases
from joinwise.cluster.config import JoinwiseConfig
from joinwise.cluster.errors import JoinwiseError

logger = logging.getLogger(__name__)

#: Seconds that a stop may take beside those for which what runs may go on.
STOP_BESIDE_S = 20.0
_LOOK_S = 5.0


@dataclass(frozen=True)
class Label:
    """What a launcher that has not started an actor must know to look after it.

    Attributes:
        slot: that it fills.
        number: of those that have filled the slot, from 1.
        build: digest of all that it is made of.
        what: it is, in lines that people read.
        patience_s: seconds for which what runs on it may go on when it leaves.
        stop: arguments of its `stop`.
        redis_url: of the Redis that it is registered in.
    """

    slot: str
    number: int
    build: str
    what: str
    patience_s: float
    stop: tuple[float, ...]
    redis_url: str


@dataclass(frozen=True)
class Account:
    """What an actor says of itself to a launcher that finds it.

    Attributes:
        owner: who looks after it, or did.
        facts: what its start has returned; None while it starts.
        config: that it was started with.
    """

    label: Label
    owner: str
    facts: dict[str, str] | None
    config: JoinwiseConfig | None


@dataclass(frozen=True)
class Keep:
    """That an actor outlives its owner, and for how long.

    Attributes:
        owner: who looks after it.
        alone_s: seconds without a word of its owner after which it ends.
    """

    label: Label
    owner: str
    alone_s: float


class Host:
    """Runs inside the actor's process, on its event loop.

    The environment is set here and not as Ray's runtime environment, so that a worker process that Ray has started
    ahead can be used; nothing that reads it (torch, OpenMP, vLLM) is imported before `start`.

    Args:
        target: `module:function` that gets the arguments and returns what is hosted.
        keep: None for an actor that ends with its launcher.
    """

    def __init__(
        self,
        name: str,
        target: str,
        arguments: tuple[Any, ...],
        environment: dict[str, str],
        log_level: str,
        keep: Keep | None = None,
    ) -> None:
        os.environ.update(environment)
        self._name = name
        self._log_level = log_level
        self._target = target
        self._arguments = arguments
        self._hosted: Any = None
        self._facts: dict[str, str] | None = None
        self._keep = keep
        self._owner = keep.owner if keep is not None else ""
        self._heard = time.monotonic()
        self._alone_s = keep.alone_s if keep is not None else 0.0
        self._alone: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        return self._name  # in front of each of its lines in the log

    async def start(self) -> tuple[Any, dict[str, float]]:
        """Import and start what is hosted; returns what that says, and the seconds of each phase."""
        for config in self._arguments:
            if isinstance(config, JoinwiseConfig):
                logs.setup(config, self._log_level)
        module, _, function = self._target.partition(":")
        phases = Phases()
        # A million objects come, and stay. Looking through them again and again took a quarter of the imports' time.
        gc.disable()
        try:
            self._hosted = getattr(importlib.import_module(module), function)(*self._arguments)
            phases.done("imports")
            self._facts = await self._hosted.start()
        except JoinwiseError:
            raise
        except Exception:
            logger.exception("%s could not start", self._name)
            raise
        finally:
            gc.enable()
        gc.freeze()
        self._heard = time.monotonic()
        if self._keep is not None:
            self._alone = asyncio.create_task(self._end_alone(self._keep))
        return self._facts, phases.seconds | self._hosted.phases.seconds

    async def stop(self, owner: str, *arguments: Any) -> bool:
        """Stop what is hosted; nothing, and False, for one who is not the owner."""
        if owner != self._owner:
            return False
        self._heard = time.monotonic()
        if self._hosted is not None:
            await self._hosted.stop(*arguments)
        return True

    async def call(self, method: str, arguments: tuple[Any, ...]) -> Any:
        """Call a method of what is hosted."""
        return await getattr(self._hosted, method)(*arguments)

    async def failure(self, owner: str) -> str | None:
        """Why it is sick, "" while it is well; None for one who is not the owner (any more)."""
        if owner != self._owner:
            return None
        self._heard = time.monotonic()
        return str(self._hosted.failure()) if self._hosted is not None else "it has not started"

    async def account(self) -> Account | None:
        """What another launcher must know; None of an actor that ends with its own."""
        if self._keep is None:
            return None
        config = next((each for each in self._arguments if isinstance(each, JoinwiseConfig)), None)
        return Account(self._keep.label, self._owner, self._facts, config)

    async def take(self, before: str, owner: str) -> bool:
        """Change the owner; False if it is not the one that is thought."""
        if self._keep is None or before != self._owner:
            return False
        self._owner, self._heard, self._alone_s = owner, time.monotonic(), self._keep.alone_s
        logger.info("%s is looked after by another launcher now", self._name)
        return True

    async def dismiss(self, owner: str) -> None:
        """The cluster ends: should its launcher be killed in the middle of that, nobody need wait for another."""
        if self._keep is not None and owner == self._owner:
            self._alone_s = min(self._alone_s, 2 * self._keep.label.patience_s + STOP_BESIDE_S)

    async def _end_alone(self, keep: Keep) -> None:
        while True:
            rest = self._heard + self._alone_s - time.monotonic()
            if rest <= 0:
                break
            await asyncio.sleep(min(rest, _LOOK_S))  # what it waits for may come earlier now
        logger.error("no launcher has asked for %.0f s: %s ends", self._alone_s, self._name)
        with contextlib.suppress(Exception):
            async with asyncio.timeout(keep.label.patience_s + STOP_BESIDE_S):
                await self._hosted.stop(*keep.label.stop)
        self._exit()

    def _exit(self) -> None:
        os._exit(0)  # Ray sees a worker that has ended; nobody restarts it
