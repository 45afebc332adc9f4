"""glu as cases."""

from random import Random

import torch
import torch.nn.functional as F

from cases.base import Case, Op, OpCall, Row, Terms, random_shape
from fastlm import ops
from fastlm.ops.glu import ACTIVATIONS as ACTS


def activation(x: torch.Tensor, act: str) -> torch.Tensor:
    if act == "silu":
        return F.silu(x)
    if act == "relu2":
        return F.relu(x).square()
    return F.gelu(x, approximate="tanh" if act == "gelu_tanh" else "none")


def build(case: Case, dtype: torch.dtype) -> OpCall:
    act = case["act"]
    gate, up = (case["spread"] * torch.randn(2, *case["shape"])).to(dtype).unbind(0)

    def function(gate, up):
        return ops.glu(gate, up, act=act)

    def plain(gate, up):
        return activation(gate, act) * up

    def terms(gate, up, *upstream):
        """act is x times a probability, act' has one such term more. Float32's error of a
        probability is absolute, also in the tails, until it is exactly 0 or 1.
        """
        x, up = gate.abs().clamp_max(8), up.abs()
        dy = upstream[0].abs() if upstream else torch.zeros(())
        return {
            "y": Terms(float32=x * up),
            "dgate": Terms(float32=2 * (1 + x) * up * dy),
            "dup": Terms(float32=x * dy),
        }

    return OpCall(function, [gate.clone(), up.clone()], plain, terms)


def draw(r: Random, isa: str) -> Case:
    shape, act, spread = random_shape(r, isa, 1 << 12), r.choice(ACTS), r.choice([0.1, 3.0, 20.0])
    # 60^3 is beyond float16
    return {"shape": shape, "act": act, "spread": min(spread, 3.0) if act == "relu2" else spread}


def case(*shape: int, act: str = "silu", spread: float = 3.0) -> Case:
    return {"shape": list(shape), "act": act, "spread": spread}


OP = Op(
    build,
    draw,
    rows={
        **{f"ragged {act}": Row(case(252, 507, act=act), on=("cpu",)) for act in ACTS},
        **{f"a block and a part, {act}": Row(case(5, 503, act=act)) for act in ACTS},
        **{f"whole vectors, {act}": Row(case(3, 5, 64, act=act), bits=True) for act in ACTS},
        "more than a block": Row(case(1, 2049), on=("triton", "cuda")),
        "one row": Row(case(1, 123, act="gelu"), bits=True),
        "one dimension": Row(case(7, act="gelu_tanh")),
        "a number": Row(case(act="gelu")),
        "no rows": Row(case(0, 8)),
        "no columns": Row(case(3, 0)),
        "tails": Row(case(4, 300, act="gelu", spread=20.0)),
        "split silu": Row(case(301, 257), on=("cpu",), split=True),
        "split gelu": Row(case(301, 257, act="gelu"), on=("cpu",), split=True),
        "split gelu_tanh": Row(case(3, 101, 257, act="gelu_tanh"), on=("cpu",), split=True),
    },
    small={act: case(5, 7, act=act, spread=1.0) for act in ACTS},
    batches={
        "rows": [case(n, 64) for n in (4, 9, 17)],
        "gelu": [case(2, n, 64, act="gelu") for n in (4, 9, 17)],
    },
    forward_only=("cuda",),
)
