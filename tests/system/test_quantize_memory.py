"""Memory of layerwise quantization: one decoder layer in float32, however many there are."""

import statistics

from peak import run_script

WIDTH, MLP, LAYERS = 256, 640, (6, 14)  # below 6, the peak is the allocator's
SCRIPT = """
import torch
import fastlm
from peak import growth
from fastlm.model.causal_lm import CausalLM
from fastlm.checkpoint.config import ModelConfig

torch.set_num_threads(1)
ids = torch.randint(512, (4, 512), generator=torch.Generator().manual_seed(0))

def run(layers):
    config = ModelConfig(
        vocab_size=512, hidden_size={width}, intermediate_size={mlp}, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=4, tie_word_embeddings=True,
    )
    model = CausalLM(config, seed=0)
    return growth(lambda: fastlm.quantize(
        model, "w4a16", group_size=128, method="gptq", calibration=ids,
    ))

run(1)  # imports
print(run({layers}))
"""


def test_gptq_of_more_layers_adds_their_weights_alone():
    """A layer is 3 MB in float32, its Hessians 2.1 MB, its hidden states 2 MB: eight more layers
    with any of them kept would add 16 MB or more to the peak. A peak varies by 4 and more, so
    medians of three are compared.
    """
    few, many = (
        statistics.median(
            run_script(SCRIPT.format(width=WIDTH, mlp=MLP, layers=layers))[0] for _ in range(3)
        )
        for layers in LAYERS
    )
    weights = (LAYERS[1] - LAYERS[0]) * (4 * WIDTH**2 + 3 * WIDTH * MLP) * 4.125 / 8 / 2**20
    assert few > 5 and weights < 3
    assert many - few <= weights + 8
