"""fastlm is imported inside a mode or a transform: it works there and after it.

Each case needs a process in which nothing of fastlm's ops is imported: forks of one that has
imported torch.
"""

import json
import subprocess
import sys

import pytest
from test_structure import modules

SCRIPT = """
import importlib, json, os, sys
import torch, torch.export, fastlm
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

q, logits, target = torch.randn(1, 2, 3, 8), torch.randn(4, 9), torch.arange(4)

def real_calls():
    leaves = [t.clone().requires_grad_() for t in (q, logits)]
    loss = fastlm.ops.attention(leaves[0], leaves[0], leaves[0]).square().sum()
    loss = loss + fastlm.ops.cross_entropy(leaves[1], target)
    loss.backward()
    out = torch.nn.functional.scaled_dot_product_attention(q, q, q)
    torch.testing.assert_close(fastlm.ops.attention(q, q, q), out)
    torch.testing.assert_close(loss, out.square().sum()
                               + torch.nn.functional.cross_entropy(logits, target))
    assert all(t.grad is not None and t.grad.isfinite().all() for t in leaves)

def fake():
    with FakeTensorMode():
        fastlm.ops

def export():
    class Attention(torch.nn.Module):
        def forward(self, q):
            return fastlm.ops.attention(q, q, q)
    torch.export.export(Attention(), (q,))

def func_grad():
    assert torch.func.grad(lambda q: fastlm.ops.attention(q, q, q).sum())(q).shape == q.shape
    torch.func.grad(lambda x: fastlm.ops.cross_entropy(x, target))(logits)

def inference_mode():
    with torch.inference_mode():
        fastlm.ops.attention(q, q, q)
        fastlm.ops.cross_entropy(logits, target)

def every_module():
    made = []
    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            made.append(f"{name}: {func}")
            return func(*args, **(kwargs or {}))
    with Watch():
        for name in MODULES:
            importlib.import_module(name)
    assert not made, made

found = {}
for case in (fake, export, func_grad, inference_mode, every_module):
    inside, outside = os.pipe()
    if (child := os.fork()) == 0:
        status = 1
        try:
            case()
            real_calls()
            status = 0
        except BaseException as error:
            os.write(outside, f"{type(error).__name__}: {error}".encode()[:2000])
        os._exit(status)
    os.close(outside)
    said = os.fdopen(inside, "rb").read().decode()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    found[case.__name__] = said if code >= 0 else f"signal {-code}"
print(json.dumps(found))
"""
# the packages that run on tensors; not the command, and not TRL, which creates tensors at import
PACKAGES = "ops reference cpu cuda kernels hf compat model quant decode checkpoint train".split()
MODULES = [
    name
    for name in sorted(modules())
    if name.count(".") < 2 or name.split(".")[1] in PACKAGES
    if name not in ("fastlm.__main__", "fastlm.cli", "fastlm.compat.trl")
]


@pytest.fixture(scope="module")
def errors():
    done = subprocess.run(
        [sys.executable, "-P", "-W", "ignore", "-c", f"MODULES = {MODULES}\n{SCRIPT}"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert len(MODULES) > 150
    return json.loads(done.stdout)


@pytest.mark.parametrize("case", ["fake", "export", "func_grad", "inference_mode", "every_module"])
def test_first_use(errors, case):
    assert errors[case] == ""
