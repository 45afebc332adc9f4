"""Small models for the tests of the engine, and what is compared of a result."""

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


def drawn(model, request):
    """What a request draws by definition: token by token, from forwards without a cache."""
    tokens, sampling = list(request.prompt), request.sampling
    generators = make_generators(request.seed, 1)
    for _ in range(request.max_new_tokens):
        with torch.no_grad():
            logits = model(torch.tensor([tokens])).logits[:, -1].float()
        for token in set(tokens):
            own = logits[0, token]
            penalty = sampling.repetition_penalty
            logits[0, token] = own / penalty if own > 0 else own * penalty
        for token, count in Counter(tokens[len(request.prompt) :]).items():
            logits[0, token] -= count * sampling.frequency_penalty
        tokens += sampling.choose(logits, generators).tolist()
    return tokens[len(request.prompt) :]


def told(result):
    return result.token_ids, [(t.token, t.logprob, t.top) for t in result.logprobs]
