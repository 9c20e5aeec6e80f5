"""The models that one gateway serves, by the names that clients ask for."""

from collections.abc import Mapping

from fastapi import FastAPI
from vllm.entrypoints.serve.engine.protocol import ModelCard

from joinwise.cluster.errors import InvalidRequestError


class Models:
    """Finds the front end that a name means.

    Args:
        fronts: by served name, vLLM's application of each model with vLLM's own `state`; at least one.
    """

    def __init__(self, fronts: Mapping[str, FastAPI]) -> None:
        self._fronts = dict(fronts)

    @property
    def first(self) -> FastAPI:
        """The one that answers what is not about a model."""
        return next(iter(self._fronts.values()))

    def choose(self, name: str | None) -> FastAPI:
        """The front end of a model, or of the model that an adapter belongs to.

        A name that nobody has is the first one's to refuse, in vLLM's own words.

        Raises:
            InvalidRequestError: no name, where there are several models.
        """
        if len(self._fronts) == 1:
            return self.first
        if not name:
            raise InvalidRequestError(f"which model? This cluster serves several: set 'model' to one of {self._names}")
        return self._fronts.get(name) or self._with_adapter(name) or self.first

    def holding(self, response_id: str) -> FastAPI:
        """The front end that has stored a response of /v1/responses; the first, if none has."""
        for front in self._fronts.values():
            if response_id in front.state.openai_serving_responses.response_store:
                return front
        return self.first

    async def cards(self) -> list[ModelCard]:
        """What `/v1/models` lists: each model, with its adapters after it."""
        return [
            card
            for front in self._fronts.values()
            for card in (await front.state.openai_serving_models.show_available_models()).data
        ]

    @property
    def _names(self) -> str:
        return ", ".join(self._fronts)

    def _with_adapter(self, name: str) -> FastAPI | None:
        for front in self._fronts.values():
            if name in front.state.openai_serving_models.lora_requests:
                return front
        return None
