"""Small models for the tests of the engine, and the parts of a result that tests compare."""

from collections import Counter

import torch
from families import CASES, SMALL

from fastlm.checkpoint.config import ModelConfig
from fastlm.inference.sampling import make_generators
from fastlm.model.causal_lm import CausalLM


def model_of(case="llama", **changes):
    options = {**SMALL, "max_position_embeddings": 512, **CASES[case], **changes}
    config = ModelConfig.from_dict({"model_type": case.split("-")[0], **options})
    return CausalLM(config, seed=4, scaled_residual=False).eval()


def complete_by_definition(model, request):
    """Sample a request's tokens by definition: one by one, from forwards without a cache."""
    tokens, sampling = list(request.prompt), request.sampling
    generators = make_generators(request.seed, 1)
    for _ in range(request.max_new_tokens):
        with torch.no_grad():
            logits = model(torch.tensor([tokens])).logits[:, -1].float()
        for token in set(tokens):
            logit = logits[0, token]
            penalty = sampling.repetition_penalty
            logits[0, token] = logit / penalty if logit > 0 else logit * penalty
        for token, count in Counter(tokens[len(request.prompt) :]).items():
            logits[0, token] -= count * sampling.frequency_penalty
        tokens += sampling.sample(logits, generators).tolist()
    return tokens[len(request.prompt) :]


def tokens_and_logprobs(result):
    return result.token_ids, [(t.token, t.logprob, t.top) for t in result.logprobs]
