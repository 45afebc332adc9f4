"""fastlm.reference: a file for every op. A name of both a file and a function is the function."""

import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

from fastlm import ops, reference

NO_DEFINITION = {
    "__init__": "exports the ops",
    "quantize_weight": "plain PyTorch itself: no kernel to compare with",
    "quantized_weight": "a class, no op",
    "wrong_type": "the messages for arguments of a wrong type",
}


def files(package) -> set[str]:
    return {path.stem for path in Path(package.__file__).parent.glob("*.py")}


BOTH = sorted(files(reference) & set(reference.__all__))


def test_every_op_has_a_definition_in_a_file_of_its_name():
    assert set(NO_DEFINITION) <= files(ops)
    assert files(ops) - set(NO_DEFINITION) <= files(reference)


def test_some_files_are_functions():  # else the test below checks nothing
    assert {"adamw", "rope"} <= set(BOTH)


@pytest.mark.parametrize("name", BOTH)
def test_the_attribute_is_the_function(name):
    module = importlib.import_module(f"fastlm.reference.{name}")
    assert inspect.ismodule(module)
    assert inspect.isfunction(getattr(reference, name))
    assert getattr(reference, name) is getattr(module, name)


ORDERS = [
    "from fastlm import reference",
    "import fastlm.reference.{name}; from fastlm import reference",
    "from fastlm.reference.{name} import {name}; from fastlm import reference",
    "from fastlm import reference; import fastlm.reference.{name}",
    "from fastlm import reference; from fastlm.reference.{name} import {name}",
    "import fastlm.ops; import fastlm.reference.{name}; from fastlm import reference",
]


def test_the_attribute_is_the_function_in_every_order_of_imports():
    """Each order runs in a process without fastlm, forked from one that has imported torch."""
    code = f"""
import inspect, os, torch
for name in {BOTH!r}:
    for order in {ORDERS!r}:
        if (child := os.fork()) == 0:
            exec(order.format(name=name))
            os._exit(0 if inspect.isfunction(getattr(reference, name)) else 1)
        assert os.waitpid(child, 0)[1] == 0, order.format(name=name)
"""
    subprocess.run([sys.executable, "-P", "-c", code], check=True)
