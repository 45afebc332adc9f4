"""The server of the page of ``fastlm label``."""

from collections.abc import Sequence
from dataclasses import dataclass

from fastlm.evals.judge.label_store import LabelStore
from fastlm.serve import label_api
from fastlm.serve.http_server import HttpServer
from fastlm.serve.metrics import RequestMetrics
from fastlm.serve.options import ListenOptions
from fastlm.serve.uvicorn_server import listen, run_server

MAX_CONNECTIONS = 256  # a browser opens up to 6
DRAIN = 5.0  # seconds; a label is stored within milliseconds


@dataclass
class LabelServer(HttpServer):
    """Serves a page on which raters label the items of a store."""

    store: LabelStore

    def __post_init__(self) -> None:
        super().__post_init__()
        self.app = self.create_app(
            label_api.routes(self, self.store), pages={"/": "label.html"}, posts=label_api.PATHS,
            gets={}, metrics=RequestMetrics(),
        )  # fmt: skip

    def close_stores(self) -> None:
        self.store.close()


def run(store: LabelStore, options: ListenOptions, keys: Sequence[str] = ()) -> None:
    """Serve until SIGTERM or Ctrl-C. InputError: the port is in use."""
    with listen(options.host, options.port) as listening:
        server = LabelServer(store, keys=keys, hosts=options.host_names())
        run_server(server, listening, max_connections=MAX_CONNECTIONS, drain=DRAIN)
