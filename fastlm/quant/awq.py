"""AWQ's scales (Lin et al. 2023, arXiv:2306.00978). The columns of features that are large in
activations are multiplied by a factor before they are rounded. The source of the features (a norm,
or the rows of the linear layer before) is divided by it. The decoder layer computes the same
function.

Factors are powers of the features' root mean square. Each group of layers that share their input
gets the power of `POWERS` with the smallest output error after rounding to nearest.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fastlm.model.layers import DecoderLayer, RMSNorm
from fastlm.ops import quantize_weight
from fastlm.quant.step_result import get_weight, output_error
from fastlm.quant.targets import Scheme

# 0 leaves the features unchanged. The paper tries 20 powers up to 1; the largest in SmolLM2's first
# six layers is 0.45.
POWERS = (0.0, 0.15, 0.3, 0.45, 0.6)


@dataclass(frozen=True)
class Fold:
    """Features that can be scaled. `source`: the norm, or the linear layer (its last rows), that
    produces them. `consumers`: the linear layers with these inputs. `repeats`: how many of a
    consumer's features share one of the source's (query heads per key/value head).
    """

    source: str
    consumers: tuple[str, ...]
    repeats: int = 1


def find_folds(layer: DecoderLayer, names: Mapping[str, object]) -> list[Fold]:
    """Return the features that can be scaled if the linear layers `names` of a decoder layer are
    quantized: all consumers must be among them, and the source, if it is a linear layer.
    """
    attention, mlp = layer.self_attn, layer.mlp
    is_fused = "qkv_proj" in attention._modules
    qkv = ("qkv_proj",) if is_fused else ("q_proj", "k_proj", "v_proj")
    wide = ("gate_up_proj",) if "gate_up_proj" in mlp._modules else ("gate_proj", "up_proj")
    into = tuple(f"self_attn.{name}" for name in qkv)
    up = tuple(f"mlp.{name}" for name in wide)
    repeats = attention.q_width // attention.kv_width
    candidates = [Fold(into[-1], ("self_attn.o_proj",), repeats), Fold(up[-1], ("mlp.down_proj",))]
    for norm, consumers in ((layer.norms[0], into), (layer.norms[2], up)):
        if norm:
            candidates.append(Fold(norm, consumers))
    norms = layer.norms
    return [
        fold for fold in candidates
        if all(consumer in names for consumer in fold.consumers)
        and (fold.source in names or fold.source in norms)
    ]  # fmt: skip


@torch.no_grad()
def scale_features(
    layer: DecoderLayer,
    schemes: Mapping[str, Scheme],
    sums: dict[str, Tensor],
    dtypes: Mapping[str, torch.dtype],
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Scale the features of a float32 decoder layer, in place.

    Args:
        layer: its function does not change, except for float32's rounding.
        schemes: name of a linear layer -> how it will be quantized.
        sums: name -> (K, K), the sum of ``x x^T`` over its inputs x; rescaled in place.
        dtypes: name of a parameter -> its stored dtype. The factors of a norm are those of its
            rounded weight, so the rounding adds no error.

    Returns source -> power, and the changed parameters that are not quantized: name -> value, in
    their dtype.
    """
    powers: dict[str, float] = {}
    changed: dict[str, Tensor] = {}
    for fold in find_folds(layer, schemes):
        powers[fold.source], factors = _best_power(layer, fold, schemes, sums)
        if not powers[fold.source]:
            continue
        source = layer.get_submodule(fold.source)
        if isinstance(source, RMSNorm):
            name = f"{fold.source}.weight"
            plain = source.weight + source.offset  # Gemma's is stored minus one
            stored = (plain / factors - source.offset).to(dtypes[name])
            scaled = stored.float() + source.offset
            factors = torch.where(scaled == 0, 1.0, plain / scaled)
            source.weight.copy_(stored)
            changed[name] = stored
        else:
            rows = slice(-len(factors), None)  # v of a fused qkv, up of a fused gate and up
            weight, bias = get_weight(layer, fold.source), source.bias
            if bias is not None:
                assert isinstance(bias, Tensor)
                name = f"{fold.source}.bias"
                plain, stored = bias[rows].clone(), bias.clone()
                stored[rows] /= factors
                changed[name] = stored = stored.to(dtypes[name])
                bias.copy_(stored)
            weight[rows] /= factors[:, None]
        wide = _repeat(factors, fold.repeats, layer.self_attn.head_dim)
        for name in fold.consumers:
            get_weight(layer, name).mul_(wide)
            sums[name] = sums[name] / wide / wide[:, None]
    return powers, changed


def _repeat(factors: Tensor, repeats: int, width: int) -> Tensor:
    """Repeat the factors of key/value features for the query heads that read them."""
    if repeats == 1:
        return factors
    return factors.view(-1, 1, width).expand(-1, repeats, -1).flatten()


def _best_power(
    layer: DecoderLayer, fold: Fold, schemes: Mapping[str, Scheme], sums: Mapping[str, Tensor]
) -> tuple[float, Tensor]:
    """Return the best power and its factors, one for each of the source's features."""
    squares = sums[fold.consumers[0]].diagonal()
    width = layer.self_attn.head_dim
    if fold.repeats > 1:
        squares = squares.view(-1, fold.repeats, width).mean(1).flatten()
    size = squares.clamp(min=1e-8 * float(squares.mean()) + 1e-30).sqrt()
    size = size / size.log().mean().exp()
    best, min_error = (0.0, torch.ones_like(size)), torch.inf
    for power in POWERS:
        factors = size**power
        wide = _repeat(factors, fold.repeats, width)
        error = 0.0
        for name in fold.consumers:
            scaled, moments = get_weight(layer, name) * wide, sums[name] / wide / wide[:, None]
            q = quantize_weight(scaled, **vars(schemes[name]), importance=moments.diagonal())
            error += output_error(scaled, q, moments)
        if error < min_error:
            best, min_error = (power, factors), error
    return best
