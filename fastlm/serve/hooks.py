"""What the server calls at each request, for packages that it does not import: a monitor that
measures answers (`fastlm.serve.monitor`), an experiment with a second model
(`fastlm.serve.canary`)."""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from prometheus_client.core import Metric

    from fastlm.serve.completion_response import ChatCompletionResponse
    from fastlm.serve.models import ModelLease, Models, Served
    from fastlm.serve.protocol.completion import GenerationRequest
    from fastlm.serve.ratings import Rating


class RequestObserver(Protocol):
    """Follows one request. ``response``: set once the engine has the request. ``end``: called with
    the status when the response has ended; 499 means that the client went away."""

    response: "ChatCompletionResponse | None"

    def end(self, status: int) -> None: ...


class ServerMonitor(Protocol):
    """Measures answers. ``ratings``: the numbers that people may give. ``observe``: a request whose
    prompts have so many ``lengths`` tokens. ``dashboard``: what the page /dashboard shows, or an
    ApiError. ``collect``: what Prometheus scrapes."""

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
    """Lets a second model, ``served``, answer some of the requests to the public name. ``lease``:
    chooses the model for a request that named another. ``watch``: runs while the server does."""

    @property
    def served(self) -> "Served": ...
    def lease(
        self, models: "Models", served: "Served", request: "GenerationRequest", client: str
    ) -> "ModelLease": ...
    async def watch(self) -> None: ...
