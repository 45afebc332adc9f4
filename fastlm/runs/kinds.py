"""All stages: kind -> class. A new stage adds one line here."""

from fastlm.checkpoint.stage import Export
from fastlm.data.stage import Data, Shards
from fastlm.evals.safety.stage import Safety
from fastlm.evals.stage import Eval
from fastlm.loop.gate import Gate
from fastlm.loop.promotion import Promotion
from fastlm.loop.simulate import Simulate
from fastlm.loop.stage import Feedback
from fastlm.loop.winrate import WinRate
from fastlm.quant.stage import Quantize
from fastlm.runs.stage import Stage
from fastlm.tokenizer.stage import TrainTokenizer
from fastlm.train.distill import Distill
from fastlm.train.dpo import Dpo
from fastlm.train.grpo import Grpo
from fastlm.train.ppo import Ppo
from fastlm.train.pretrain import Pretrain
from fastlm.train.reward import Reward
from fastlm.train.sft import Sft

KINDS: dict[str, type[Stage]] = {
    "data": Data,
    "tokenizer": TrainTokenizer,
    "shards": Shards,
    "pretrain": Pretrain,
    "sft": Sft,
    "distill": Distill,
    "reward": Reward,
    "dpo": Dpo,
    "ppo": Ppo,
    "grpo": Grpo,
    "eval": Eval,
    "safety": Safety,
    "simulate": Simulate,
    "feedback": Feedback,
    "winrate": WinRate,
    "gate": Gate,
    "promotion": Promotion,
    "quantize": Quantize,
    "export": Export,
}
