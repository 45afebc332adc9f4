# ruff: noqa: RUF001 (sentences of other scripts)
"""Languages of texts, and the quality rules in languages other than English."""

import random
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastlm.data import language
from fastlm.data.filter import (
    CHARACTERS_PER_WORD,
    RULES,
    TECHNICAL,
    WEB,
    TextStatistics,
    first_failed,
    load_stop_words,
)
from fastlm.data.language import PIECE, PIECES, codes, detector_version, identify, sample
from fastlm.errors import InputError

# one sentence each, written for this test
SENTENCES = {
    "en": "The ship left the harbour early in the morning and sailed north along the coast.",
    "de": "Das Schiff verließ den Hafen früh am Morgen und segelte die Küste entlang nach Norden.",
    "fr": "Le navire a quitté le port tôt le matin et a longé la côte en direction du nord.",
    "es": "El barco salió del puerto por la mañana temprano y navegó hacia el norte por la costa.",
    "pt": "O navio saiu do porto de manhã cedo e não voltou antes do anoitecer daquele dia.",
    "it": "La nave lasciò il porto la mattina presto e navigò verso nord lungo la costa.",
    "nl": "Het schip verliet vroeg in de ochtend de haven en voer langs de kust naar het noorden.",
    "sv": "Fartyget lämnade hamnen tidigt på morgonen och seglade norrut längs kusten.",
    "da": "Skibet forlod havnen tidligt om morgenen og sejlede mod nord langs kysten.",
    "no": "Skipet forlot havnen tidlig om morgenen og seilte nordover langs kysten uten å snu.",
    "pl": "Statek opuścił port wcześnie rano i popłynął na północ wzdłuż wybrzeża.",
    "cs": "Loď opustila přístav brzy ráno a plula podél pobřeží na sever.",
    "hu": "A hajó kora reggel elhagyta a kikötőt, és a part mentén észak felé vitorlázott.",
    "ru": "Корабль покинул гавань рано утром и поплыл на север вдоль берега.",
    "uk": "Корабель залишив гавань рано вранці й поплив на північ уздовж берега.",
    "el": "Το πλοίο έφυγε από το λιμάνι νωρίς το πρωί και έπλευσε βόρεια κατά μήκος της ακτής.",
    "tr": "Gemi sabah erkenden limandan ayrıldı ve kıyı boyunca kuzeye doğru yol aldı.",
    "fi": "Laiva lähti satamasta varhain aamulla ja purjehti rannikkoa pitkin pohjoiseen.",
    "he": "האונייה יצאה מהנמל מוקדם בבוקר והפליגה צפונה לאורך החוף.",
    "ar": "غادرت السفينة الميناء في الصباح الباكر وأبحرت شمالا على طول الساحل.",
    "hi": "जहाज सुबह जल्दी बंदरगाह से निकला और तट के साथ उत्तर की ओर चला गया।",
    "ja": "その船は朝早く港を出て、海岸に沿って北へ向かいました。",
    "zh": "那艘船一大早就离开了港口，沿着海岸向北航行。",
    "ko": "그 배는 아침 일찍 항구를 떠나 해안을 따라 북쪽으로 항해했습니다.",
    "th": "เรือออกจากท่าแต่เช้าตรู่แล้วแล่นขึ้นเหนือไปตามชายฝั่ง",
}
TRADITIONAL = "那艘船一大早就離開了港口，沿著海岸向北航行，直到傍晚才回來。"
# what no text should contain, and every text from the web may
HOSTILE = [
    "", " ", "\0", "\ud800", "a\udfff\ud800b", "\uffff\ufffe\ufdd0", "\U0010ffff", "\x85\x9f",
    "<" * 999, "\u0301" * 999, "\u202e" * 50,
    "&#0;&#xD800;", "ﷺ" * 300, "a" * 1_000_000, "A\n" * 5000,
]  # fmt: skip


@pytest.mark.parametrize("method", ["langid", "cld2"])
def test_both_detectors_return_the_same_codes(method):
    right = {code: identify(text, method=method) for code, text in SENTENCES.items()}
    assert {code: found.code for code, found in right.items()} == {code: code for code in SENTENCES}
    assert identify(TRADITIONAL, method=method).code == "zh"
    assert all(0.5 < probability <= 1 for _, probability in right.values())


@pytest.mark.parametrize("method", ["langid", "cld2"])
@pytest.mark.parametrize(
    "text", ["", " \n", "12:30 +4.5 % -- !?", "\u0663\u0664", "___", "\U0001f600 \u2603"]
)
def test_text_without_letters_has_no_language(text, method):
    assert identify(text, method=method) == ("und", 0.0)


@pytest.mark.parametrize("method", ["langid", "cld2"])
def test_any_text_has_a_code_and_a_probability(method):
    valid = codes(method)
    draw = random.Random(0)
    noise = [
        "".join(chr(draw.randrange(draw.choice([256, 0x3000, 0x110000]))) for _ in range(30))
        for _ in range(500)
    ]  # fmt: skip
    for text in [*HOSTILE, *noise]:
        code, probability = identify(text, method=method)
        assert code in valid and 0 <= probability <= 1
        assert identify(text, method=method) == (code, probability)


def test_pycld2_accepts_every_character_that_is_let_through():
    import pycld2

    for start in range(0, 0x110000, 0x100):
        characters = "".join(map(chr, range(start, start + 0x100)))
        pycld2.detect(language.CLD2_REFUSES.sub(" ", characters), isPlainText=True)
    for refused in "\x00\x7f\ufdd0\U0001ffff":
        with pytest.raises(pycld2.error):
            pycld2.detect(f"some text {refused}", isPlainText=True)


def test_codes_of_one_language_are_added_up():
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    model = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    for text in (*SENTENCES.values(), TRADITIONAL, "na og det", "你好"):
        expected: dict[str, float] = {}
        for code, probability in model.rank(text):
            code = language.ISO_639_1.get(code, code)
            expected[code] = expected.get(code, 0.0) + probability
        best = max(expected, key=lambda code: expected[code])
        # 1e-3: the library adds in float32
        assert identify(text) == (best, pytest.approx(expected[best], abs=1e-3))
    assert {"nb", "iw", "jw", "wuu", "yue", "zxx", "un", "zh-Hant"} & (
        codes() | codes("cld2")
    ) == set()
    assert {"no", "nn", "he", "jv", "zh", "und", "en"} <= codes() & codes("cld2")


def test_scores_do_not_depend_on_the_order_of_the_sum():
    identifier = language._load_langid()
    text = " ".join(SENTENCES.values()).encode()
    visits = {f: n for f, n in enumerate(text)}  # any features with any counts
    shuffled = list(visits.items())
    random.Random(1).shuffle(shuffled)
    forward = identifier._sparse_score(visits, identifier.nb_ptc)
    assert (forward == identifier._sparse_score(dict(shuffled), identifier.nb_ptc)).all()


def test_the_sample_is_taken_from_all_parts_of_a_text():
    short = "x" * (PIECES * PIECE)
    assert sample(short) == short
    text = "".join(chr(0x4E00 + i % 20000) for i in range(7777))
    pieces = sample(text).split(" ")
    assert len(pieces) == PIECES and {len(piece) for piece in pieces} == {PIECE}
    assert text.startswith(pieces[0]) and text.endswith(pieces[-1])
    assert [text.index(piece) for piece in pieces] == [i * (7777 - PIECE) // 7 for i in range(8)]
    assert len(sample("y" * 10**6)) <= 1000
    # a page in a foreign frame
    page = f"{SENTENCES['en']} " * 5 + f"{SENTENCES['hu']} " * 50
    assert identify(page).code == "hu"


def test_threads_share_one_model():
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(identify, [*SENTENCES.values()] * 20))
    assert [code for code, _ in found] == [*SENTENCES] * 20
    assert language._load.cache_info().misses <= 2


def test_an_unknown_method_and_a_missing_package_are_refused(monkeypatch):
    with pytest.raises(InputError, match="method: expected one of langid, cld2; got 'fasttext'"):
        identify("text", method="fasttext")
    monkeypatch.setitem(sys.modules, "pycld2", None)
    language._load.cache_clear()
    with pytest.raises(
        InputError, match=r"pycld2, which is not installed \(pip install 'fastlm\[data"
    ):
        identify("text", method="cld2")
    assert identify(SENTENCES["de"]).code == "de"


def test_the_version_names_the_package():
    assert detector_version().startswith("py3langid 0.")
    assert detector_version("cld2").startswith("pycld2 0.")


# quality rules


def paragraph(language: str) -> str:
    """Return a text of over 50 words with common words of a language."""
    words = sorted(load_stop_words().get(language, {"lorem"}))
    return " ".join(f"{word} paragraph{i}" for i, word in enumerate(words * 10))


@pytest.mark.parametrize("code", [*load_stop_words()])
def test_each_list_holds_for_its_language_only(code):
    words = load_stop_words()[code]
    assert 8 <= len(words) <= 24 and all(word == word.lower() for word in words)
    assert code in codes() | codes("cld2")
    assert first_failed(paragraph(code), ["stop_words"], language=code) is None
    assert first_failed("nonsense gibberish " * 40, ["stop_words"], language=code) == "stop_words"


def test_stop_words_are_required_only_where_there_is_a_list():
    german = f"{SENTENCES['de']} " * 10
    assert first_failed(german) == first_failed(german, language="en") == "stop_words"
    assert first_failed(german, language="de") is None
    for code in ("und", "sw", "zh", "qqq"):
        assert first_failed(german, language=code) is None


@pytest.mark.parametrize("code", [*CHARACTERS_PER_WORD])
def test_words_without_spaces_are_counted_by_letters(code):
    letter = {
        "zh": "港",
        "ja": "の",
        "th": "\u0e2d",
        "lo": "\u0ea5",
        "km": "\u1781",
        "my": "\u1019",
    }
    letter = letter.get(code, "\u0f40")
    per_word = CHARACTERS_PER_WORD[code]
    enough = letter * int(50 * per_word)
    for rule in ("word_count", "mean_word_length"):
        assert not RULES[rule](TextStatistics(enough))  # one word of English
    assert first_failed(enough, language=code) is None
    assert first_failed(enough[:-1], language=code) == "word_count"
    assert first_failed("1 !" * 500, ["word_count"], language=code) is None  # by its spaces
    assert TextStatistics(enough + "。！ " * 20, code).word_count == 50
    assert first_failed(letter * int(100_002 * per_word), language=code) == "word_count"


def test_japanese_prose_passes_the_web_rules():
    draw = random.Random(2)
    lines = [
        "".join(draw.choices(SENTENCES["ja"][:-1], k=30)) + "。" + SENTENCES["ja"]
        for _ in range(20)
    ]
    assert first_failed("\n".join(lines), WEB, language="ja") is None
    assert first_failed("\n".join(lines), WEB) is not None


@given(st.text(max_size=300), st.sampled_from(["zh", "th", "ko", "und", "de"]))
@settings(deadline=None, max_examples=100)
def test_rules_decide_on_any_text_in_any_language(text, code):
    assert first_failed(text, TECHNICAL, language=code) in {None, *TECHNICAL}


def test_only_text_has_a_language():
    with pytest.raises(InputError, match="text: expected a text, got NoneType"):
        identify(cast(Any, None))
