"""Select how a model runs decode steps here: as one call into the CPU kernel
(`fastlm.model.cpu_decode`), as one CUDA graph (`fastlm.model.cuda_decode`), or module by module
(`fastlm.model.module_decode`).
"""

from typing import TYPE_CHECKING

import torch

from fastlm.model import cpu_decode, cuda_decode
from fastlm.model.module_decode import ModuleDecodeRunner

if TYPE_CHECKING:
    from fastlm.inference.block_manager import BlockManager
    from fastlm.inference.decode_batch import DecodeRunner
    from fastlm.model.causal_lm import CausalLM


class ModelRunner:
    """Runs steps of ``model`` in its present state; `is_current` returns whether it has changed.

    fallback_reason: why steps do not run as one call into the CPU kernel; None if they do. Only
        that kernel is batch-invariant and supports other dtypes of keys, and prompts and draft
        tokens as rows.
    prefers_prompt_rows: prompts are as fast as rows of steps as through the modules.
    cache_dtype: the default dtype of keys and values.
    """

    def __init__(self, model: "CausalLM"):
        self.model = model
        self._plan = cpu_decode.decode_plan(model)
        self._fingerprint = (
            cpu_decode.model_fingerprint(model) if self._plan is None else self._plan.fingerprint
        )
        self.fallback_reason = cpu_decode.unsupported_reason(model) if self._plan is None else None
        self.prefers_prompt_rows = self._plan is not None and cpu_decode.prefers_prompt_rows(
            self._plan
        )
        self.cache_dtype: torch.dtype = (
            model.dtype if self._plan is None else self._plan.cache_dtype
        )

    def is_current(self) -> bool:
        """Return whether the model has not changed since."""
        if self._plan is not None:
            return self._plan.matches(self.model)
        return cpu_decode.model_fingerprint(self.model) == self._fingerprint

    def decode_runner(self, block_manager: "BlockManager") -> "DecodeRunner":
        """Return the runner of decode steps with keys and values in ``block_manager``."""
        if self._plan is not None:
            return cpu_decode.CpuDecodeRunner(
                self.model,
                self._plan,
                block_manager.data,
                block_manager.scales,
                block_manager.rope_length,
            )
        if cuda_decode.unsupported_reason(self.model) is None:
            return cuda_decode.CudaDecodeRunner(self.model, block_manager.data)
        return ModuleDecodeRunner(self.model, block_manager)
