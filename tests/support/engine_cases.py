"""Small models for the tests of the engine, and what is compared of a result."""

from families import CASES, SMALL

from fastlm.checkpoint.config import ModelConfig
from fastlm.model.causal_lm import CausalLM


def model_of(case="llama", **changes):
    options = {**SMALL, "max_position_embeddings": 512, **CASES[case], **changes}
    config = ModelConfig.from_dict({"model_type": case.split("-")[0], **options})
    return CausalLM(config, seed=4, scaled_residual=False).eval()


def told(result):
    return result.tokens, [(t.token, t.logprob, t.top) for t in result.logprobs]
