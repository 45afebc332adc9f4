"""Extract the final answer of a LaTeX solution, and compare two answers.

The rules are those of Minerva (Lewkowycz et al. 2022, arXiv:2206.14858, appendix D.1), plus the
values of plain numbers and fractions. Expressions are not evaluated. Rejected: math-verify, which
parses with sympy. Some answers of models keep that parser busy forever.
"""

import re
from fractions import Fraction

# Two patterns, so that each search is linear in the text's length
_FINAL_ANSWER, _HOPE = (
    re.compile(r"final answer is:?", re.I),
    re.compile(r"I hope it is correct", re.I),
)
_ANSWER_IS = re.compile(r"answer is:?\s*(.*)", re.I)
_INLINE = re.compile(r"\$([^$]+)\$")
# Spaces, sizes and styles do not change the meaning
_LAYOUT = re.compile(
    r"\\(?:left|right|big|Big|bigl|bigr|displaystyle|quad|qquad|limits|dots|ldots)(?![A-Za-z])"
    r"|\\[!,;: ]|[$\"~]|\{,\}"
)
_STYLE = re.compile(r"\\(?:text|mbox|mathrm|mathbf|textbf|textit|boxed|overline)\s*\{([^{}]*)\}")
_ARTICLE = re.compile(r"^(?:an?|the)\s+(?=[A-Za-z0-9\\])")
_NAME = re.compile(
    r"^\\?[A-Za-z]+(?:_\{?\w\}?|\([a-z]\)|\^\{-1\}\([a-z]\))?\s*(?:=|\\in\b)(?=[^=]*$)"
)
_BREAK = re.compile(r"\\\\\s*")
_AND = re.compile(r",?\s*\band\b")
_DEGREES = re.compile(r"\^\{?\\circ\}?|\\%|%|\\degree")
_UNITS = re.compile(
    r"(?<![A-Za-z\\])(?:square|cubic|ways?|integers?|dollars?|cents?|mph|inch(?:es)?|ft|feet|foot"
    r"|hours?|minutes?|seconds?|days?|km|cm|mm|gm|grams?|meters?|miles?|pounds?|units?|points?"
    r"|digits?|degrees?|edges?|meals?|students?|multiples?|tickets?|children)(?:\s*\^\{?[23]\}?)?"
    r"(?![A-Za-z(_^])"
)
_FRAC_VARIANT = re.compile(r"\\(d|t)frac")
_FRAC = re.compile(r"\\frac(?:\{([^{}]*)\}|([0-9a-zA-Z]))\s*(?:\{([^{}]*)\}|([0-9a-zA-Z]))")
_ROOT = re.compile(r"\\sqrt\s*([0-9a-zA-Z])")
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)")
_RATIO = re.compile(r"([-+]?)\\frac\{([-+]?\d+)\}\{(\d+)\}|([-+]?\d+)/(\d+)")
_MAX_CHARACTERS = 1000  # of an answer; the rest is ignored


def boxed(text: str) -> str | None:
    r"""Return the content of the last ``\boxed{...}`` or ``\fbox{...}``; None without one."""
    start = max(text.rfind("\\boxed"), text.rfind("\\fbox"))
    if start < 0:
        return None
    rest = text[start:].partition("box")[2].removeprefix("ed")
    if not rest.startswith("{"):
        return rest.strip().partition("$")[0] or None  # \boxed 2
    depth = 0
    for i, c in enumerate(rest):
        depth += (c == "{") - (c == "}")
        if depth == 0:
            return rest[1:i]
    return None  # the brace is not closed


def final_answer(text: str) -> str:
    """Return the answer of a solution: the one in Minerva's phrase "the final answer is ... I hope
    it is correct", else in the last box, else after "answer is", else the last formula, else ""."""
    phrase = _FINAL_ANSWER.search(text)
    if phrase and (end := _HOPE.search(text, phrase.end())):
        answer = _sentence(text[phrase.end() : end.start()])
        return boxed(answer) or answer
    if (answer := boxed(text)) is not None:
        return answer
    matches = _ANSWER_IS.findall(text) or _INLINE.findall(text)
    return _sentence(matches[-1]) if matches else ""


def _sentence(text: str) -> str:
    return text.strip().removesuffix(".").rstrip()


def normalize_latex(answer: str) -> str:
    """Return the answer without layout, units, articles and a leading "x =".

    Minerva drops everything before the last "=", which makes all equations "... = 0" equal.
    """
    text = _BREAK.sub("\n", answer.strip()[:_MAX_CHARACTERS].strip("$ ").rstrip("."))
    text = _ARTICLE.sub("", _NAME.sub("", text).strip())
    text = _FRAC_VARIANT.sub(
        r"\\frac", _LAYOUT.sub(" ", text.replace(r"\$", "").replace("\n", r"\newline"))
    )
    for _ in range(3):  # styles within styles
        text = _STYLE.sub(r" \1 ", text)
    text = _UNITS.sub("", _DEGREES.sub("", _AND.sub(",", text)))
    text = _FRAC.sub(lambda m: rf"\frac{{{m[1] or m[2]}}}{{{m[3] or m[4]}}}", text)
    text = "".join(_ROOT.sub(r"\\sqrt{\1}", text).split())
    without_commas = text.replace(",", "")
    is_grouped = re.fullmatch(r"[-+]?\d{1,3}(,\d{3})+(\.\d+)?", text)
    return without_commas if is_grouped else text


def is_equivalent(first: str, second: str) -> bool:
    """Return True if two answers are equal as normalized text or as numbers."""
    value = canonical(first)
    return value != "" and value == canonical(second)


def canonical(answer: str) -> Fraction | str:
    """Return the number that the answer is, else its normalized text."""
    text = normalize_latex(answer)
    value = _value(text)
    return text if value is None else value


def _value(text: str) -> Fraction | None:
    if len(text) > 60:
        return None
    if _NUMBER.fullmatch(text):
        return Fraction(text)
    if (match := _RATIO.fullmatch(text)) and int(match[3] or match[5]):
        sign = -1 if match[1] == "-" else 1
        return sign * Fraction(int(match[2] or match[4]), int(match[3] or match[5]))
    return None
