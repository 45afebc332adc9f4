"""The ops: autograd, ``torch.compile(fullgraph=True)``, CPU and GPU.

One file an op; see each function's docstring.
"""

import torch  # noqa: F401  (before _cpu: its OpenMP then resolves to torch's)

from fastlm.ops.rms_norm import rms_norm

__all__ = ["rms_norm"]
