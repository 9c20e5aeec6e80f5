"""One simulation as a command asks for it, and the file that it writes."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from joinwise.cluster.config_model import RouterConfig
from joinwise.cluster.errors import ConfigError
from joinwise.cluster.simulate.live_router import LiveRouter
from joinwise.cluster.simulate.models import MODELS
from joinwise.cluster.simulate.outages import Failures
from joinwise.cluster.simulate.policy import POLICIES
from joinwise.cluster.simulate.pools import PoolSpec
from joinwise.cluster.simulate.profile import Profile
from joinwise.cluster.simulate.report import figures, rows
from joinwise.cluster.simulate.scaling import Bounds, Scaling, attainment
from joinwise.cluster.simulate.simulator import Outcome, Simulation
from joinwise.cluster.simulate.trace import Trace
from joinwise.cluster.store.embedded import EmbeddedRedis

#: Policies that ask the real router, by its `split`.
LIVE: Mapping[str, Literal["auto", "always"]] = {"auto": "auto", "always": "always"}


@dataclass(frozen=True)
class Result:
    """A simulation's outcome, with the figures of it.

    Attributes:
        timeline: the pools every few seconds, where some scale.
    """

    outcome: Outcome
    figures: dict[str, float]
    rows: list[dict[str, Any]]
    timeline: list[dict[str, Any]] | None = None


def simulate(
    trace: Trace,
    pools: Sequence[PoolSpec],
    profile: Profile,
    *,
    model: str = "vllm",
    policy: str | None = None,
    seed: int = 0,
    server: EmbeddedRedis | None = None,
    failures: Sequence[Failures] = (),
    bounds: Sequence[Bounds] = (),
    moves: bool = True,
) -> Result:
    """Run a trace through a cluster.

    Args:
        model: "vllm", or "splitwise" for the assumptions of SplitwiseSim.
        policy: one of `POLICIES`, or of `LIVE`; None is the model's own.
        seed: of policies and failures that draw lots.
        server: a Redis for the live router; without one it starts its own.
        failures: machines that die.
        bounds: pools that scale, with a policy of `LIVE` and without failures.
        moves: whether a policy of `LIVE` pulls workers of one pool into another's work.

    Raises:
        ConfigError: an unknown model, policy or kind, requests that no machine could hold, failures of machines that
            are not there, or pools that cannot scale.
        StoreStartError: the live router finds no Redis to start.
    """
    try:
        assumed = MODELS[model]
    except KeyError:
        raise ConfigError(f"unknown model {model!r}; there are {', '.join(MODELS)}") from None
    policy = policy or assumed.policy
    scaling: Scaling | None = None
    if bounds and (failures or policy not in LIVE):
        raise ConfigError(f"pools scale with the policies {' and '.join(LIVE)}, and where no machine dies")
    outages = [outage for each in failures for outage in each.outages(pools, trace.seconds, seed)]
    if policy in POLICIES:
        outcome = Simulation(
            trace, pools, profile, assumed, lambda run: POLICIES[policy](run.engines, seed), outages
        ).run()
    elif policy in LIVE:
        settings = RouterConfig(split=LIVE[policy], moves=moves, max_pending_tokens=1 << 30)
        with ExitStack() as stack:
            if server is None:
                server = EmbeddedRedis.start()
                stack.callback(server.stop)
            redis = server

            def live(run: Simulation) -> LiveRouter:
                router = LiveRouter(run, settings, redis)
                stack.callback(router.close)
                return router

            simulation = Simulation(trace, pools, profile, assumed, live, outages)
            if bounds:
                assert isinstance(simulation.policy, LiveRouter)
                simulation.disruption = scaling = Scaling(simulation, simulation.policy, pools, bounds)
            outcome = simulation.run()
    else:
        raise ConfigError(f"unknown policy {policy!r}; there are {', '.join((*LIVE, *POLICIES))}")
    found = figures(outcome, profile, assumed.tbt_over_all)
    timeline = attainment(outcome.jobs, scaling.notes, profile) if scaling else None
    return Result(outcome, found, rows(outcome, pools), timeline)


def write(
    path: Path, figures: Mapping[str, float], rows: Sequence[Mapping[str, Any]], bench: str = "simulate", **about: Any
) -> None:
    """Write a result file in the form that every command of joinwise shares."""
    try:
        commit = version("joinwise")
    except PackageNotFoundError:
        commit = ""
    cores = {"cores": os.cpu_count(), "affinity": sorted(os.sched_getaffinity(0))}
    machine = {**cores, "python": platform.python_version(), **about}
    result = {"bench": bench, "commit": commit, "machine": machine, "figures": figures, "rows": rows}
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
