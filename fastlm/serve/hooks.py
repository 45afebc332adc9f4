"""Protocols of components that the server calls without importing them: the monitor
(`fastlm.serve.monitor`) and the experiment with a second model (`fastlm.serve.canary`)."""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from prometheus_client.core import Metric

    from fastlm.serve.completion_response import ChatCompletionResponse
    from fastlm.serve.models import ModelLease, ServedModel, ServedModels
    from fastlm.serve.protocol.completion import GenerationRequest
    from fastlm.serve.ratings import Rating


class RequestObserver(Protocol):
    """Follows one request. ``response``: set once the engine has the request. ``end``: called with
    the status when the response has ended; 499 means that the client went away."""

    response: "ChatCompletionResponse | None"

    def end(self, status: int) -> None: ...


class ServerMonitor(Protocol):
    """Measures responses.

    ``ratings``: the numbers that people may give. ``observe``: follow a request; ``lengths`` are
    the tokens of its prompts. ``dashboard``: return the data of the page /dashboard, or raise
    ApiError. ``collect``: yield metrics for Prometheus.
    """

    @property
    def ratings(self) -> "Sequence[Rating]": ...
    def start(self) -> None: ...
    def close(self) -> None: ...
    def observe(
        self, request: "GenerationRequest", model: str, id: str, lengths: Sequence[int]
    ) -> RequestObserver: ...
    async def dashboard(self, query: Mapping[str, str]) -> dict[str, Any]: ...
    def collect(self) -> "Iterable[Metric]": ...


class ModelExperiment(Protocol):
    """Lets a second model, ``served_model``, answer some of the requests to the public name.

    ``lease``: choose the model for a request. ``watch``: a task that runs as long as the server.
    """

    @property
    def served_model(self) -> "ServedModel": ...
    def lease(
        self,
        models: "ServedModels",
        served_model: "ServedModel",
        request: "GenerationRequest",
        client: str,
    ) -> "ModelLease": ...
    async def watch(self) -> None: ...
