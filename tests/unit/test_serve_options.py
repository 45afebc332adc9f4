"""The options of `fastlm serve`, and those that it passes to the engine."""

import inspect
from pathlib import Path

from fastlm.inference.engine import Engine
from fastlm.serve.options import ENGINE_OPTIONS, ServeOptions


def test_the_engine_gets_the_options_of_the_server():
    options = ServeOptions(
        Path("model"), num_blocks=40, max_num_seqs=3, kv_cache_dtype="int8"
    ).engine()
    assert options["num_blocks"] == 40 and options["max_num_seqs"] == 3
    assert str(options["kv_cache_dtype"]) == "torch.int8"
    assert options.keys() == set(ENGINE_OPTIONS) <= inspect.signature(Engine).parameters.keys()
