"""What a draft actor and an engine that asks it count, for `/metrics`."""

from collections.abc import Callable, Iterable

from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from joinwise.actors.draft.asking import AskFigures
from joinwise.actors.draft.desk import DeskFigures


class DeskMetrics(Collector):
    """A draft actor's.

    Args:
        figures: what the desk has done.
        held: sequences for which the drafter keeps something.
        engines: open streams.
    """

    def __init__(self, figures: Callable[[], DeskFigures], held: Callable[[], int], engines: Callable[[], int]) -> None:
        self._figures, self._held, self._engines = figures, held, engines

    def collect(self) -> Iterable[Metric]:
        """prometheus-client's hook."""
        now = self._figures()
        yield GaugeMetricFamily("joinwise:draft_engines", "Engines that are connected", self._engines())
        yield GaugeMetricFamily("joinwise:draft_sequences", "Sequences that engines have begun", now.sequences)
        yield GaugeMetricFamily("joinwise:draft_slots_used", "Sequences that the drafter keeps KV of", self._held())
        yield CounterMetricFamily("joinwise:draft_rounds", "Rounds that were answered", now.rounds)
        yield CounterMetricFamily("joinwise:draft_late_rounds", "Rounds that came to their turn too late", now.late)
        yield CounterMetricFamily("joinwise:draft_unknown", "Sequences that had to be sent again", now.unknown)
        yield CounterMetricFamily("joinwise:draft_tokens", "Ids that were drafted", now.drafted)
        yield CounterMetricFamily("joinwise:draft_busy_seconds", "Time spent on drafting", now.busy_s)


class AskMetrics(Collector):
    """An engine's; `note` brings the figures, which may lie in another process."""

    def __init__(self) -> None:
        self._now = AskFigures()

    def note(self, figures: AskFigures) -> None:
        """Show these from now on."""
        self._now = figures

    def collect(self) -> Iterable[Metric]:
        """prometheus-client's hook."""
        now = self._now
        yield CounterMetricFamily("joinwise:speculation_rounds", "Rounds asked of a draft actor", now.asked)
        yield CounterMetricFamily("joinwise:speculation_missed_rounds", "Rounds without an answer in time", now.missed)
        yield CounterMetricFamily("joinwise:speculation_skipped_steps", "Steps in which nobody was asked", now.skipped)
        yield CounterMetricFamily("joinwise:speculation_drafted_tokens", "Ids that the engine verified", now.drafted)
        yield CounterMetricFamily("joinwise:speculation_looked_up_tokens", "Of those, looked up here", now.looked_up)
        yield CounterMetricFamily("joinwise:speculation_bytes", "Of rounds and their answers", now.bytes)
        yield CounterMetricFamily("joinwise:speculation_waited_seconds", "Time that steps waited", now.waited_s)
        refused = CounterMetricFamily("joinwise:speculation_refused", "Drafts that were not used", labels=["reason"])
        for reason, count in sorted(now.refused.items()):
            refused.add_metric((reason,), count)
        yield refused
