"""LoRA (Hu et al. 2021, arXiv:2106.09685): trained low-rank matrices next to frozen linear layers.
QLoRA (Dettmers et al. 2023, arXiv:2305.14314): the same next to 4-bit layers. DoRA (Liu et al.
2024, arXiv:2402.09353): the norms of the adapted weight's rows are trained apart from their
directions.

Rejected: PEFT on fastlm's modules. It supports neither `fastlm.ops.linear` nor `QuantizedLinear`.
"""

import hashlib
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastlm.errors import InputError
from fastlm.model.quantized_modules import QuantizedEmbedding, QuantizedLinear, replace_module
from fastlm.ops.linear import Linear, linear
from fastlm.ops.quantized_weight import QuantizedWeight

if TYPE_CHECKING:
    from fastlm.model.causal_lm import CausalLM

ALL = "all-linear"  # PEFT's word for all linear layers except the head
_HEAD = "lm_head"
MAX_ALPHA = torch.finfo(torch.float32).max  # a larger factor overflows the weights' dtypes


@dataclass(frozen=True)
class LoraConfig:
    """The options of the adapters of a model, under PEFT's names. ``base_digest`` identifies the
    frozen weights; None where `weights_digest` returns None.
    """

    r: int = 16
    lora_alpha: float = 32.0
    lora_dropout: float = 0.0
    use_rslora: bool = False
    use_dora: bool = False
    base_digest: str | None = None

    def __post_init__(self) -> None:
        if self.r < 1:
            raise InputError(f"rank: expected a positive number, got {self.r}")
        if not 0 < self.lora_alpha <= MAX_ALPHA:
            raise InputError(
                f"alpha: expected a positive number up to float32's, got {self.lora_alpha}"
            )
        if not 0 <= self.lora_dropout < 1:
            raise InputError(f"dropout: expected a share in [0, 1), got {self.lora_dropout}")

    @property
    def scaling(self) -> float:
        """alpha / r, or alpha / sqrt(r) (Kalajdzievski 2023, arXiv:2312.03732)."""
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)


class LoraLinear(nn.Module):
    """``base_layer(x) + scaling * F.linear(F.linear(dropout(x), lora_A), lora_B)``.

    `base_layer` (Linear or QuantizedLinear) is frozen. `lora_A` (r, in_features) and `lora_B`
    (out_features, r) are used in x's dtype. `enabled` False drops the second summand.

    With DoRA the result without the bias is multiplied by ``magnitude / norm``, (out_features,):
    norm is that of the rows of ``W + scaling B A``, and no gradient flows through it (section 4.3
    of the paper). The parameter `lora_magnitude_offset` is the magnitude minus the norm of W's
    rows. At 0 the layer computes its base's result to the last bit, in bfloat16 too, which would
    round the magnitude itself by up to 0.2 %.
    """

    lora_magnitude_offset: nn.Parameter | None

    def __init__(self, base_layer: nn.Module, lora_A: Tensor, lora_B: Tensor, config: LoraConfig):
        super().__init__()
        self.base_layer = base_layer.requires_grad_(False)
        self.lora_A, self.lora_B = nn.Parameter(lora_A), nn.Parameter(lora_B)
        offset = nn.Parameter(lora_B.new_zeros(len(lora_B))) if config.use_dora else None
        self.register_parameter("lora_magnitude_offset", offset)
        self.scaling, self.dropout, self.enabled = config.scaling, config.lora_dropout, True

    def forward(self, x: Tensor) -> Tensor:
        y = self.base_layer(x)
        if not self.enabled:
            return y
        if self.training and self.dropout:
            x = F.dropout(x, self.dropout)
        low = linear(x, self.lora_A.to(x.dtype)) * self.scaling
        update = linear(low, self.lora_B.to(x.dtype))
        if self.lora_magnitude_offset is None:
            return y + update
        bias: Any = self.base_layer.bias
        product = (y if bias is None else y - bias) + update
        # not y * scale: bfloat16 has more digits of a small scale - 1 than of scale
        return y + update + (self._row_scale() - 1).to(y.dtype) * product

    def _base_weight(self) -> Tensor:
        """Return W in float32."""
        weight: Any = self.base_layer.weight
        if isinstance(weight, QuantizedWeight):
            return weight.dequantize(torch.float32)
        return weight.float()

    def _updated_weight(self, weight: Tensor) -> Tensor:
        """Return W + scaling B A in float32, a constant in the gradient."""
        matrices = self.lora_B.detach().float(), self.lora_A.detach().float()
        return torch.addmm(weight, *matrices, alpha=self.scaling)

    def magnitude(self) -> Tensor:
        """Return DoRA's norms of the adapted weight's rows, (out_features,) float32."""
        assert self.lora_magnitude_offset is not None
        return self._base_weight().norm(dim=1) + self.lora_magnitude_offset.float()

    def set_magnitude(self, values: Tensor) -> None:
        """Set the result of `magnitude`, up to the rounding of the offset."""
        assert self.lora_magnitude_offset is not None
        norm = self._base_weight().norm(dim=1)
        self.lora_magnitude_offset.data.copy_(values.to(norm) - norm)

    def _row_scale(self) -> Tensor:
        """Return magnitude / norm, (out_features,); exactly 1 where B and the offset are 0."""
        assert self.lora_magnitude_offset is not None
        weight = self._base_weight()
        norm = self._updated_weight(weight).norm(dim=1)
        magnitude = weight.norm(dim=1) + self.lora_magnitude_offset.float()
        return magnitude / norm.clamp(min=torch.finfo(norm.dtype).tiny)  # a row may be zero

    @torch.no_grad()
    def merge(self, dtype: torch.dtype) -> Linear:
        """Return one layer that computes the same up to rounding. Its weight is rounded once, to
        the base's dtype, or to `dtype` where the base is quantized.
        """
        base: Any = self.base_layer
        if not isinstance(base.weight, QuantizedWeight):
            dtype = base.weight.dtype
        weight = self._updated_weight(self._base_weight())
        if self.lora_magnitude_offset is not None:
            weight *= self._row_scale()[:, None]
        return _linear(weight.to(dtype), base.bias).train(self.training)

    def extra_repr(self) -> str:
        dora = "" if self.lora_magnitude_offset is None else ", use_dora=True"
        return f"r={self.lora_A.shape[0]}, scaling={self.scaling}, dropout={self.dropout}{dora}"


def add_lora(
    model: "CausalLM",
    rank: int = 16,
    alpha: float = 32.0,
    *,
    targets: str | Sequence[str] = ALL,
    dropout: float = 0.0,
    use_rslora: bool = False,
    use_dora: bool = False,
    seed: int | None = None,
) -> "CausalLM":
    """Freeze the model and replace each target by a `LoraLinear`, in place. Return the model.

    A is kaiming_uniform(a=sqrt(5)), and B is zero, so the model computes the same as before. Both
    are float32, 4 * rank * (in_features + out_features) bytes a layer. For QLoRA, quantize the
    model before or after (``fastlm.quantize(model, "w4a16", embeddings=16, head=16)``).

    Args:
        rank, alpha: the update is ``alpha / rank * B A``, with use_rslora ``alpha / sqrt(rank)``.
        targets: the last parts of module names ("q_proj", "down_proj"), or "all-linear": all linear
            layers except the head.
        dropout: share of the inputs of A that is dropped in training.
        use_dora: also train the norm of each row of the adapted weights (DoRA), 4 * out_features
            more bytes a layer. Each forward computes the norms of the layer's rows again.
        seed: the seed of A; None: torch's generator.

    Raises InputError: a target that no linear layer has, the head or the embedding as a target, a
    model with adapters.
    """
    check_no_adapters(model)
    config = LoraConfig(rank, alpha, dropout, use_rslora, use_dora, weights_digest(model))
    layers = target_layers(model, targets)
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    adapters = {}
    for name, base in layers.items():
        bound = base.in_features**-0.5  # of kaiming_uniform with a=sqrt(5)
        a = torch.empty(rank, base.in_features, device="cpu")
        a.uniform_(-bound, bound, generator=generator)
        adapters[name] = a, torch.zeros(base.out_features, rank, device="cpu")
    return attach_lora(model, adapters, config)


def attach_lora(
    model: "CausalLM", adapters: dict[str, tuple[Tensor, Tensor]], config: LoraConfig
) -> "CausalLM":
    """Freeze the model and replace each named linear layer by a `LoraLinear` with these A and B."""
    model.requires_grad_(False)
    for name, (a, b) in adapters.items():
        base = model.get_submodule(name)
        new = LoraLinear(base, a.to(model.device), b.to(model.device), config)
        replace_module(model, name, new.train(base.training))
    model.lora = config
    return model


def check_no_adapters(model: nn.Module) -> None:
    """Raise InputError if the model has adapters."""
    if lora_layers(model):
        raise InputError("model: expected a model without adapters, got one with adapters")


def linear_layers(model: nn.Module) -> dict[str, Any]:
    """Return all linear layers that may have an adapter, by module name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | QuantizedLinear) and name != _HEAD
    }


def target_layers(model: nn.Module, targets: str | Sequence[str]) -> dict[str, Any]:
    """Return the linear layers that `targets` of `add_lora` names, by module name."""
    linears = linear_layers(model)
    names = (targets,) if isinstance(targets, str) else tuple(targets)
    if names == (ALL,):
        return linears
    kinds = sorted({name.rpartition(".")[2] for name in linears})
    for target in names:
        if not any(matches(name, target) for name in linears):
            raise InputError(
                f"targets: expected {ALL} or some of {', '.join(kinds)}, got {target!r:.60}"
            )
    if not names:
        raise InputError(f"targets: expected {ALL} or some of {', '.join(kinds)}, got none")
    return {n: m for n, m in linears.items() if any(matches(n, target) for target in names)}


def matches(name: str, target: str) -> bool:
    """Return whether ``target`` matches the name of this module."""
    return name == target or name.endswith(f".{target}")


def lora_layers(model: nn.Module) -> dict[str, LoraLinear]:
    """Return the adapted layers by module name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, LoraLinear)}


def merge_lora(model: "CausalLM") -> "CausalLM":
    """Add each adapter to its layer (`LoraLinear.merge`), in place. Return the model, which is a
    plain CausalLM without frozen parameters. Quantized weights of a model with adapters are
    dequantized to the model's dtype. A model without adapters is returned as it is.
    """
    adapters, dtype = lora_layers(model), model.dtype
    for name, module in adapters.items():
        replace_module(model, name, module.merge(dtype))
    if adapters:
        for name, module in list(model.named_modules()):
            if isinstance(module, QuantizedLinear | QuantizedEmbedding):
                weight = module.weight.dequantize(dtype)
                if isinstance(module, QuantizedLinear):
                    new = _linear(weight, module.bias)
                else:
                    new = nn.Embedding.from_pretrained(weight, freeze=False)
                replace_module(model, name, new.train(module.training))
        model.requires_grad_(True)
        model.lora = None
    return model


def _linear(weight: Tensor, bias: nn.Parameter | None) -> Linear:
    with torch.device("meta"):
        new = Linear(weight.shape[1], weight.shape[0], bias=False)
    new.weight = nn.Parameter(weight)
    new.register_parameter("bias", bias)
    return new


@contextmanager
def without_adapter(model: nn.Module) -> Iterator[None]:
    """Return a context in which the model computes the result of its frozen base: the reference
    model of DPO or PPO, without a second model in memory.
    """
    adapters = lora_layers(model).values()
    previous = [module.enabled for module in adapters]
    for module in adapters:
        module.enabled = False
    try:
        yield
    finally:
        for module, enabled in zip(adapters, previous):
            module.enabled = enabled


def weights_digest(model: nn.Module) -> str | None:
    """Return a hash of float32 or bfloat16 weights, by their values in bfloat16, so that both
    dtypes have the same one. None: there are weights of other dtypes.
    """
    if any(isinstance(m, QuantizedLinear) for m in model.modules()):
        return None
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if parameter.dtype not in (torch.float32, torch.bfloat16):
            return None
        digest.update(name.encode())
        rounded = parameter.detach().to("cpu", torch.bfloat16).contiguous()
        digest.update(rounded.view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]
