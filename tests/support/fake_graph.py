"""A stand-in for CUDA graphs where there is no GPU. Each replay calls the recorded operators again,
on the same tensors and with the same numbers: a value that the host chose does not change, as in a
real graph.
"""

import contextlib

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastlm.model import cuda_decode


def tensors(tree):
    return [t for t in tree_leaves(tree) if isinstance(t, torch.Tensor)]


class FakeGraph(TorchDispatchMode):
    """A recorded graph, in the place of ``torch.cuda.CUDAGraph``."""

    def __init__(self):
        super().__init__()
        self.calls, self.replays = [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, out))
        return out

    def replay(self):
        self.replays += 1
        for function, args, kwargs, out in self.calls:
            for old, new in zip(tensors(out), tensors(function(*args, **kwargs)), strict=True):
                if old.data_ptr() != new.data_ptr():  # else written in place, or a view
                    old.copy_(new)

    def forget(self):
        """Overwrite all results: a recording computes nothing."""
        for _, args, kwargs, out in self.calls:
            inputs = {t.untyped_storage().data_ptr() for t in tensors((args, kwargs))}
            for t in tensors(out):
                if t.untyped_storage().data_ptr() not in inputs:
                    t.fill_(torch.nan) if t.is_floating_point() else t.zero_()


class GraphRecorder:
    """A stand-in for ``torch.cuda`` in `cuda_decode`. ``graphs``: the recorded graphs, in order. A
    recording fails with ``error``, if it is set.
    """

    def __init__(self, monkeypatch):
        self.graphs, self.pools, self.error = [], set(), None
        self.current, self.recorded_on = "the user's", None
        ours = cuda_decode.CudaDecodeRunner.__init__

        def recordable(steps, *args):
            ours(steps, *args)
            steps.can_record = True
            self.data = steps.data

        monkeypatch.setattr(cuda_decode.CudaDecodeRunner, "__init__", recordable)
        monkeypatch.setattr(cuda_decode, "_failed", [])
        monkeypatch.setattr(cuda_decode, "_stream", lambda current: "a recording's")
        monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
        monkeypatch.setattr(torch.cuda, "graph", self.record)
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
        monkeypatch.setattr(torch.cuda, "stream", self.stream)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: self.current)

    @contextlib.contextmanager
    def stream(self, stream):  # torch.cuda.stream(stream)
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    @contextlib.contextmanager
    def record(self, graph, pool, *, stream, capture_error_mode):  # torch.cuda.graph(graph, ..)
        assert capture_error_mode == "thread_local"
        data = self.data.clone()
        before, self.current = self.current, stream
        with graph:
            yield
        self.data.copy_(data)
        graph.forget()
        self.recorded_on = self.current
        if self.error:  # torch then leaves its stream current
            raise RuntimeError(self.error)
        self.current = before
        self.graphs.append(graph)
        self.pools.add(pool)
