"""vLLM's request series of several front ends in one process.

vLLM makes its `vllm:*` series as if it were alone: a front end that is built throws those of the one before out of the
registry. Here each front end's are taken aside when it has been built, and shown together; the label `model_name`
tells them apart.
"""

from collections.abc import Iterable, Sequence

from prometheus_client import CollectorRegistry, Metric
from prometheus_client.registry import Collector
from vllm.parser.metrics import init_parser_metrics


class ModelSeries(Collector):
    """What front ends have registered, each family once.

    Args:
        registry: where vLLM registers, and where all of it is shown in the end.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry
        self._taken: list[Collector] = []
        self._shown = False

    def take(self) -> None:
        """Take aside what the front end that has just been built has registered."""
        for collector in list(self._registry._collector_to_names):
            if str(getattr(collector, "_name", "")).startswith("vllm:"):
                self._registry.unregister(collector)
                self._taken.append(collector)

    def show(self, models: Sequence[str], *, tools: bool) -> None:
        """Show all of it; nothing else may be built from now on.

        Args:
            models: served names.
            tools: a tool parser is set. vLLM counts calls of it under the name of the model that came last; they are
                of all models.
        """
        self._registry.register(self)
        self._shown = True
        if tools:
            init_parser_metrics(model_name=",".join(models))

    def close(self) -> None:
        """Show nothing any more."""
        if self._shown:
            self._registry.unregister(self)
            self._shown = False

    def collect(self) -> Iterable[Metric]:
        """See prometheus_client."""
        families: dict[str, Metric] = {}
        for collector in self._taken:
            for family in collector.collect():
                known = families.setdefault(family.name, family)
                if known is not family:
                    known.samples += family.samples
        return families.values()
