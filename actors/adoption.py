"""A launcher that starts where another one has died: it takes over the actors that serve on, as they are.

What of them no longer fits the configuration is then replaced as in any change (`reconcile`). Those that could not be
changed so (another Redis, another model under the same name), or that had not started yet, end first.
"""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass

from joinwise.actors import ray_api
from joinwise.actors.host import STOP_BESIDE_S, Account
from joinwise.cluster.changes import refusals
from joinwise.cluster.config import JoinwiseConfig
from joinwise.cluster.errors import ConfigError

_ASK_S = 30.0
_DEAD_WITHIN_S = 15.0  # Ray notices the end of a driver at once, that of its node later
_POLL_S = 0.5


@dataclass(frozen=True)
class Adopted:
    """An actor that was found at work, and is ours now."""

    actor: ray_api.Actor
    account: Account


async def adopt(config: JoinwiseConfig, redis_url: str, say: Callable[[str], None], *, alone: bool) -> list[Adopted]:
    """Take over what another launcher of the cluster has left behind in this Ray.

    Args:
        config: of the cluster.
        redis_url: of its Redis.
        say: gets one line for every actor.
        alone: that there may be no other launcher; else actors of one that lives are left to it.

    Raises:
        ConfigError: another launcher runs the cluster.
    """
    found = await ray_api.find(ray_api.namespace(config), _ASK_S)
    living = await _living({account.owner for _, account in found})
    if living and alone:
        raise ConfigError(
            f"cluster {config.cluster!r} is run by another launcher in this Ray cluster: stop that one, "
            "or set another `cluster:` name"
        )
    left = [(actor, account) for actor, account in found if account.owner not in living]
    taken = [Adopted(actor, account) for actor, account in left if await actor.take(account.owner)]
    why = _unfit(taken, config, redis_url)
    if why:
        say(f"what another launcher has left behind ends: {why}")
    kept: list[Adopted] = []
    async with asyncio.TaskGroup() as ending:
        for each in taken:
            if each.account.facts is None:
                each.actor.kill()
            elif why:
                label = each.account.label
                ending.create_task(each.actor.stop(label.patience_s + STOP_BESIDE_S, *label.stop))
            else:
                say(f"{each.account.label.what} {each.actor.name} serves already: it is taken over")
                kept.append(each)
    return kept


async def _living(owners: set[str]) -> set[str]:
    """Those that still live after a while."""
    deadline = time.monotonic() + _DEAD_WITHIN_S
    while living := {owner for owner in owners if ray_api.lives(owner)}:
        if time.monotonic() > deadline:
            return living
        await asyncio.sleep(_POLL_S)
    return set()


def _unfit(taken: list[Adopted], config: JoinwiseConfig, redis_url: str) -> str:
    """Why the cluster that was left behind cannot become the configured one; "" when it can."""
    for each in taken:
        account = each.account
        if account.label.redis_url != redis_url:
            return "its Redis was another one"
        if account.config is not None and (found := refusals(account.config, config)):
            return found[0]
    return ""
