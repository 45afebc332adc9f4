"""How one step of a model runs here: as one call into the CPU kernel (`fastlm.model.cpu_steps`), as
one CUDA graph (`fastlm.model.cuda_steps`), or module by module (`fastlm.model.paged_call`).
"""

from typing import TYPE_CHECKING

import torch

from fastlm.model import cpu_steps, cuda_steps
from fastlm.model.paged_call import ModuleSteps

if TYPE_CHECKING:
    from fastlm.inference.block_manager import BlockManager
    from fastlm.inference.decode_batch import Decoder
    from fastlm.model.causal_lm import CausalLM


class Runner:
    """Runs steps of ``model`` as it is now; `is_current` tells whether it has changed since.

    ``reason``: why steps do not run as one call into the CPU kernel, None if they do. Only those
    give a row the same bits whatever other rows there are, and take keys of other dtypes, prompts
    and drafts as rows. ``takes_prompts``: prompts are as fast as rows of steps as through the
    modules. ``cache_dtype``: of keys and values by default.
    """

    def __init__(self, model: "CausalLM"):
        self.model = model
        self._plan = cpu_steps.plan_of(model)
        self._state = cpu_steps.state_of(model) if self._plan is None else self._plan.state
        self.reason = cpu_steps.why_not(model) if self._plan is None else None
        self.takes_prompts = self._plan is not None and cpu_steps.takes_prompts(self._plan)
        self.cache_dtype: torch.dtype = (
            model.dtype if self._plan is None else self._plan.cache_dtype
        )

    def is_current(self) -> bool:
        if self._plan is not None:
            return self._plan.follows(self.model)
        return cpu_steps.state_of(self.model) == self._state

    def decoder(self, pages: "BlockManager") -> "Decoder":
        """Return what runs steps whose keys and values are in ``pages``."""
        if self._plan is not None:
            return cpu_steps.PagedSteps(
                self.model, self._plan, pages.data, pages.scales, pages.rope_length
            )
        if cuda_steps.why_not(self.model) is None:
            return cuda_steps.PagedSteps(self.model, pages.data)
        return ModuleSteps(self.model, pages)
