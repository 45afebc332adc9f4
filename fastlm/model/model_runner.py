"""How one step of a model runs here: as one call into the CPU kernel (`fastlm.model.cpu_decode`),
as one CUDA graph (`fastlm.model.cuda_decode`), or module by module (`fastlm.model.module_decode`).
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
    """Runs steps of ``model`` as it is now; `is_current` tells whether it has changed since.

    ``fallback_reason``: why steps do not run as one call into the CPU kernel, None if they do. Only
    those give a row the same bits whatever other rows there are, and take keys of other dtypes,
    prompts and drafts as rows. ``prefers_prompt_rows``: prompts are as fast as rows of steps as
    through the modules. ``cache_dtype``: of keys and values by default.
    """

    def __init__(self, model: "CausalLM"):
        self.model = model
        self._plan = cpu_decode.decode_plan(model)
        self._state = (
            cpu_decode.model_fingerprint(model) if self._plan is None else self._plan.state
        )
        self.fallback_reason = cpu_decode.unsupported_reason(model) if self._plan is None else None
        self.prefers_prompt_rows = self._plan is not None and cpu_decode.prefers_prompt_rows(
            self._plan
        )
        self.cache_dtype: torch.dtype = (
            model.dtype if self._plan is None else self._plan.cache_dtype
        )

    def is_current(self) -> bool:
        if self._plan is not None:
            return self._plan.follows(self.model)
        return cpu_decode.model_fingerprint(self.model) == self._state

    def decode_runner(self, pages: "BlockManager") -> "DecodeRunner":
        """Return what runs steps whose keys and values are in ``pages``."""
        if self._plan is not None:
            return cpu_decode.CpuDecodeRunner(
                self.model, self._plan, pages.data, pages.scales, pages.rope_length
            )
        if cuda_decode.unsupported_reason(self.model) is None:
            return cuda_decode.CudaDecodeRunner(self.model, pages.data)
        return ModuleDecodeRunner(self.model, pages)
