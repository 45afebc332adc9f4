"""Checks of torch.compile that the tests of every op share."""

from collections.abc import Callable, Sequence

import torch
from torch._dynamo.testing import CompileCounterWithBackend


def assert_compiles_once(
    function: Callable, calls: Sequence[tuple], backend: str = "aot_eager"
) -> None:
    """Check `function` under ``torch.compile(fullgraph=True, dynamic=True)``: for each argument
    tuple it returns the outputs and gradients of the plain call, and it is not compiled again after
    the first.
    """
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=counter)
    count = None
    for arguments in calls:
        results = []
        for f in (function, compiled):
            leaves = [
                a.detach().clone().requires_grad_(a.requires_grad) if torch.is_tensor(a) else a
                for a in arguments
            ]
            out = f(*leaves)
            outs = [out] if torch.is_tensor(out) else out
            if any(t.requires_grad for t in outs):
                torch.stack([t.float().square().sum() for t in outs]).sum().backward()
            gradients = (a.grad for a in leaves if torch.is_tensor(a))
            results.append([*(t.detach() for t in outs), *gradients])
        for plain, fast in zip(*results):
            if plain is not None:
                torch.testing.assert_close(fast, plain)
        # AOT may call its backend twice for one graph; later shapes must not call it again
        count = counter.frame_count if count is None else count
        assert counter.frame_count == count, "compiled again for a new shape"
