"""Identify the language of a text, by a model that is inside a package: nothing is downloaded.

``langid`` (py3langid, naive Bayes on byte n-grams, Lui and Baldwin 2012) is the default. ``cld2``
(pycld2, Google's Compact Language Detector 2) is four times as fast and less accurate on little
text. On 1,561 pages of libreoffice-help in 27 languages (bench/corpus/language.py, Zen 4):

=======  ===========  ==============  ================  =====================  =======
         whole pages  200 characters  in English frame  around code of equal   pages/s
                                                        length
=======  ===========  ==============  ================  =====================  =======
langid   1.000        0.999           1.000             0.996                  4,100
cld2     0.996        0.965           0.958             0.693                  16,300
=======  ===========  ==============  ================  =====================  =======

Both read at most `PIECES` pieces of `PIECE` characters, at equal distances. Rejected: the start of
the text, which may be the navigation of a site (with 300 English characters before each page, 500
characters of the start are right for 0.44 of the pages, the pieces for 0.999); its middle, which
may be code (with code of the page's length in the middle, 0.38 even at 1,000 characters, the pieces
0.997). Also rejected, with figures of the same pages: lid.176 (0.963 and 0.949), eldc (0.923),
lingua (0.923 at 220 pages a second), and GlotLID and OpenLID, which no package contains.

Translated documentation is the easy case. On raw web text most detectors reach about 60 % macro-F1
(CommonLID, arXiv 2601.18026).
"""

import re
import threading
from collections.abc import Callable
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any, NamedTuple

from fastlm.errors import InputError, check_type

UNDETERMINED = "und"  # ISO 639-2
# 120 characters a piece cost a quarter more; 40 are fooled more often by text in another language
PIECES, PIECE = 8, 80
PACKAGES = {"langid": "py3langid", "cld2": "pycld2"}  # by method
EXTRA = {"langid": "fastlm", "cld2": "fastlm[data]"}
DIGITS = 4  # of a probability: exp() may differ in the last bit between processors
LETTER = re.compile(r"[^\W\d_]")
# codes of the detectors -> ISO 639-1, where it has the language or its macrolanguage
ISO_639_1 = {
    "iw": "he", "hbo": "he", "jw": "jv", "in": "id", "ji": "yi", "mo": "ro", "nb": "no",
    "fil": "tl", "zh-Hant": "zh", "wuu": "zh", "yue": "zh", "sr-ME": "sr", "arz": "ar", "ary": "ar",
    "ltg": "lv", "uzs": "uz", "fuv": "ff", "gug": "gn", "kik": "ki", "sdh": "ku", "bh": "bho",
}  # fmt: skip
# cld2's codes for text in an unknown language, or in a joke: xx-Latn, zzh (hacker)
NO_LANGUAGE = re.compile(r"un|und|xxx|zxx|tlh|xx-.+|zz.")
# pycld2 refuses control characters, code points that are no characters, and lone surrogates
CLD2_REFUSES = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff"
    + "".join(f"{chr(plane << 16 | 0xFFFE)}{chr(plane << 16 | 0xFFFF)}" for plane in range(1, 17))
    + "]"
)


class Language(NamedTuple):
    """A language and its probability.

    ``code`` is that of ISO 639-1, or of ISO 639-3 where that has none, or "und": undetermined.
    Norwegian Bokmål is "no", Nynorsk "nn"; all written Chinese is "zh".
    """

    code: str
    probability: float


Detector = Callable[[str], Language]


def identify(text: str, *, method: str = "langid") -> Language:
    """Identify the language of ``text``, and return (code, probability).

    The probability is the detector's own, 0 to 1: langid's normalized posterior, and for cld2,
    which has none, the share of the text in that language. Text without a letter has ("und", 0.0).
    Any text is accepted. The model is loaded once per process (0.6 s); threads may share it.

    InputError: not a text, an unknown method, or its package is not installed.
    """
    check_type(text, "text", str, "a text")
    detector = _detector(method)
    pieces = sample(text)
    if LETTER.search(pieces) is None:
        return Language(UNDETERMINED, 0.0)
    return detector(pieces)


def sample(text: str, pieces: int = PIECES, size: int = PIECE) -> str:
    """Return ``pieces`` pieces of ``size`` characters at equal distances, joined by spaces: the
    first at the start, the last at the end. A text of no more characters is returned as it is.
    """
    if len(text) <= pieces * size:
        return text
    last = len(text) - size
    starts = [i * last // (pieces - 1) for i in range(pieces)]
    return " ".join([text[start : start + size] for start in starts])


def codes(method: str = "langid") -> frozenset[str]:
    """Return all codes that `identify` may return by ``method``. InputError as there."""
    _detector(method)
    if method == "langid":
        labels = _load_langid().labels
    else:
        import pycld2

        labels = [_iso_code(code) for _, code in pycld2.LANGUAGES]
    return frozenset({*labels, UNDETERMINED})


def check_method(method: str) -> None:
    """Raise InputError as `identify` would, without loading the model."""
    if method not in PACKAGES or find_spec(PACKAGES[method]) is None:
        _detector(method)


def detector_version(method: str = "langid") -> str:
    """Return the package and its version, for the record of a build: "py3langid 0.4.0".
    InputError as for `identify`.
    """
    _detector(method)
    return f"{PACKAGES[method]} {version(PACKAGES[method])}"


def _iso_code(code: str) -> str:
    return UNDETERMINED if NO_LANGUAGE.fullmatch(code) else ISO_639_1.get(code, code)


_LOADING = threading.Lock()  # the model takes 90 MB: two threads shall not both load it


def _detector(method: str) -> Detector:
    if method not in PACKAGES:
        raise InputError(f"method: expected one of {', '.join(PACKAGES)}; got {method!r:.80}")
    with _LOADING:
        return _load(method)


@cache
def _load(method: str) -> Detector:
    try:
        return _langid_detector() if method == "langid" else _cld2_detector()
    except ModuleNotFoundError:
        raise InputError(
            f"method: expected the package {PACKAGES[method]}, which is not installed"
            f" (pip install '{EXTRA[method]}')"
        ) from None


def _langid_detector() -> Detector:
    identifier = _load_langid()

    def detect(text: str) -> Language:
        code, probability = identifier.classify(text)
        return Language(code, round(min(float(probability), 1.0), DIGITS))

    return detect


@cache
def _load_langid() -> Any:
    """Return py3langid's identifier with ISO 639-1 codes; it adds up the probabilities of labels
    with the same code.

    Its sums are exact, so a text has the same scores on every processor: the model's logarithms
    (float16) are multiples of 2**-9, and the weights are rounded to multiples of 2**-20. Also twice
    as fast, because the table is not converted from float16 for each text.
    """
    import numpy as np
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    class ExactIdentifier(LanguageIdentifier):
        __slots__ = ()

        def _sparse_score(self, visits: dict[int, int], table: Any) -> Any:
            features = np.fromiter(visits.keys(), np.intp, len(visits))
            counts = np.fromiter(visits.values(), np.float64, len(visits))
            weights = np.rint(np.log1p(counts) * 2**20) / 2**20
            return weights @ table[features].astype(np.float64) + self.nb_pc

    model = LanguageIdentifier.from_model_file(MODEL_FILE)
    return ExactIdentifier(
        model.nb_ptc.astype(np.float32), model.nb_pc, [_iso_code(c) for c in model.nb_classes],
        model.tk_nextmove, model.tk_output, norm_probs=True, tk_row=model.tk_row,
    )  # fmt: skip


def _cld2_detector() -> Detector:
    import pycld2

    def detect(text: str) -> Language:
        text = CLD2_REFUSES.sub(" ", text)
        try:
            _, _, languages = pycld2.detect(text, isPlainText=True, bestEffort=True)
        except pycld2.error:  # what else it takes for no UTF-8
            return Language(UNDETERMINED, 0.0)
        _, code, percent, _ = languages[0]
        code = _iso_code(code)
        return Language(code, 0.0 if code == UNDETERMINED else percent / 100)

    return detect
