"""The list of all stages. A new stage adds one line to `KINDS`.

Only this module and `fastlm.cli` import every package.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastlm.data.stage import Data
from fastlm.evals.judge.stage import JudgeAnswers
from fastlm.evals.safety.stage import Safety
from fastlm.evals.stage import Eval
from fastlm.export.stage import Export
from fastlm.feedback.gate import Gate
from fastlm.feedback.promotion import Promotion
from fastlm.feedback.simulate import Simulate
from fastlm.feedback.stage import FeedbackBuild
from fastlm.feedback.winrate import WinRate
from fastlm.pipeline.stage import Stage
from fastlm.quant.stage import Quantize
from fastlm.tokenizer.stage import Shards, TrainTokenizer
from fastlm.train.distill import Distill
from fastlm.train.dpo import DPO
from fastlm.train.online_stage import GRPO, PPO
from fastlm.train.pretrain import Pretrain
from fastlm.train.reward import Reward
from fastlm.train.sft import SFT
from fastlm.train.sweep import Sweep

if TYPE_CHECKING:
    from fastlm.pipeline.recipe import Recipe

KINDS: dict[str, type[Stage]] = {
    "data": Data,
    "tokenizer": TrainTokenizer,
    "shards": Shards,
    "pretrain": Pretrain,
    "sft": SFT,
    "distill": Distill,
    "reward": Reward,
    "dpo": DPO,
    "ppo": PPO,
    "grpo": GRPO,
    "sweep": Sweep,
    "eval": Eval,
    "judge": JudgeAnswers,
    "safety": Safety,
    "simulate": Simulate,
    "feedback": FeedbackBuild,
    "winrate": WinRate,
    "gate": Gate,
    "promotion": Promotion,
    "quantize": Quantize,
    "export": Export,
}


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> "Recipe":
    """`fastlm.pipeline.recipe.load_recipe` with all stages."""
    from fastlm.pipeline import recipe

    return recipe.load_recipe(path, overrides, kinds=KINDS)


def parse_recipe(table: Mapping[str, Any]) -> "Recipe":
    """`fastlm.pipeline.recipe.parse_recipe` with all stages."""
    from fastlm.pipeline import recipe

    return recipe.parse_recipe(table, kinds=KINDS)


def run_recipe(path: str | Path, out: str | Path | None = None, **options: Any) -> dict[str, Any]:
    """`fastlm.pipeline.run.run_recipe` with all stages."""
    from fastlm.pipeline import run

    return run.run_recipe(path, out, kinds=KINDS, **options)
