"""Types of grades."""

from typing import Literal

# "pass": pass or fail. "pair": which of two answers is better
Scale = Literal["pass", "1-5", "1-10", "pair"]
Grade = str | int
