"""The README's Python is run as it stands."""

import re
from pathlib import Path

import pytest
import torch

README = Path(__file__).parent.parent / "README.md"


def test_ten_lines_of_python():
    section = README.read_text("utf-8").split("## Ten lines of Python", 1)[1]
    block = re.findall(r"^```python\n(.*?)^```", section, re.DOTALL | re.M)[0]
    torch.manual_seed(0)
    names: dict = {}
    exec(compile(block, str(README), "exec"), names)

    torch.manual_seed(0)  # the block draws first what is drawn here
    x = torch.randn(4096, 512, dtype=torch.bfloat16)
    head = torch.randn(32768, 512, dtype=torch.bfloat16)
    target = torch.randint(0, 32768, (4096,))
    total = 0.0
    for rows, wanted in zip(x.float().split(512), target.split(512)):
        logits = rows @ head.float().T
        lse = logits.logsumexp(1)
        picked = logits.gather(1, wanted[:, None])[:, 0]
        total += (lse - picked + 1e-4 * lse**2).sum().item()
    # exact products of bfloat16, summed in float32: as close as the order of the sums
    assert names["loss"].item() == pytest.approx(total / 4096, rel=1e-4)
    # Adam's first step is lr wherever there is a gradient, for the head in the rows of targets;
    # below 0.1 bfloat16 shows a step of 1e-3
    rows = target.unique()
    for before, after in ((x, names["x"]), (head[rows], names["head"][rows])):
        assert torch.isfinite(after).all()
        small = before.abs() < 0.1
        assert (after != before)[small].float().mean() > 0.9
