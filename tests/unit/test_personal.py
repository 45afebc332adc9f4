"""Personal data: what is found and what stays, by kind; placeholders; recall of chats."""

import re
import sys
import time
from importlib import import_module
from typing import Any, cast

import phonenumbers
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from phonenumbers import PhoneNumberFormat, PhoneNumberType

from fastlm.data.personal import KINDS, Placeholders, Span, find, replace
from fastlm.data.personal.numbers import MODULES, check_library
from fastlm.errors import InputError


def clean(text: str, **options) -> str:
    """Return a text with placeholders without numbers."""
    return re.sub(r"<([A-Z]+)_\d+>", r"<\1>", replace(text, **options)[0])


WEB = [
    ("mail joe.blow+tag@mail.gmail.com now.", "mail <EMAIL> now."),
    ("Joe Blow <joe@blow.org>, (a-b@c.de)", "Joe Blow <EMAIL>, (<EMAIL>)"),
    ("mailto:ann@mail.org?subject=x", "mailto:<EMAIL>?subject=x"),
    ("JSON {'to':'o'neil@mail.org'}", "JSON {'to':'<EMAIL>'}"),
    ("http://93.184.216.34:80/ or host 93.184.216.34.", "http://<IP>:80/ or host <IP>."),
    ("17.7.14.2 - - [10/Oct/2000]", "<IP> - - [10/Oct/2000]"),
    ("130.149.17.21 is it\n17.18.19.20", "<IP> is it\n<IP>"),
    ("DNS 1.1.1.1, 130.149.17.21", "DNS <IP>, <IP>"),
    ("at 2001:4860:4860::8888 today", "at <IP> today"),
    ("at 5b1f:88a1:2d3c:4e5f:6a7b:8c9d:ae0f:1b2c.", "at <IP>."),
    ("+44 20 7946 0958, +1 (212) 555-1234; +33-1-42-68-53-00", "<PHONE>, <PHONE>; <PHONE>"),
    ("+33 1 42 68 53 00, +442079460958, +49 30 123456", "<PHONE>, <PHONE>, <PHONE>"),
    ("(212) 555-1234 or 212-555-1234, 1-800-555-1234.", "<PHONE> or <PHONE>, <PHONE>."),
    ("Tel.: 030 1234567, phone 0171/2345678", "Tel.: <PHONE>, phone <PHONE>"),
    ("fax (030) 123 45-67.", "fax <PHONE>."),
    ("212-555-1234x567, +1-212-555-1234 ext. 89", "<PHONE>, <PHONE>"),
    ("call me at 4155552671 or\nmy number: 555-1234", "call me at <PHONE> or\nmy number: <PHONE>"),
    ("01 2345 678 fax", "<PHONE> fax"),
    ("card 4111 1111 1111 1111, 5555555555554444", "card <CARD>, <CARD>"),
    ("3782-822463-10005; 30569309025904", "<CARD>; <CARD>"),
    ("my card # 4222222222222 is lost", "my card # <CARD> is lost"),
    ("GB82 WEST 1234 5698 7654 32 is", "<IBAN> is"),
    ("DE89370400440532013000, NO93 8601 1117 947", "<IBAN>, <IBAN>"),
    ("AKIAJ2QWERTY7ABCDEFG", "<KEY>"),
    ("token=ghp_16C7e42F292c6912E7710c838347Ae178B4a.", "token=<KEY>."),
    ("sk-proj-abcDEF123ghiJKL456mnoPQR789", "<KEY>"),
    ("AIzaSyD3f5G7h9J1k2L4m6N8p0Q2r4S6t8U0v2W", "<KEY>"),
    ("xoxb-2345678901-abcDEF123ghiJKL456", "<KEY>"),
    ("sk_live_4eC39HqLyjWDarjtT1zdp7dc", "<KEY>"),
    (
        "Bearer eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.dozjgNryP4J3jVmNHl0w5N_XgL0n3I9P",
        "Bearer <KEY>",
    ),
]  # fmt: skip
NATIONAL = [
    "SSN: 536-90-4399", "social security number 536904399", "CPF 390.533.447-05", "131052-308T",
    "RSSMRA85T10A562S", "BOXW310820HNERXN09", "BSN 111222333", "PESEL 44051401359", "X2482300W",
    "756.9217.0769.85", "2 95 10 99 126 111 93", "NHS 943 476 5870", "DNI 54362315K",
]  # fmt: skip
NOT_NATIONAL = [
    "000-12-3456 666-12-3456 123-00-4567", "536904399", "CPF 390.533.447-06", "131052-308U",
    "RSSMRA85T10A562T", "BOXW310820HNERXN08", "BSN 111222334", "PESEL 44051401358", "44051401359",
    "756.9217.0769.84", "NHS 943 476 5871", "DNI 54362315Z", "54362315K", "part-536-90-4399",
]  # fmt: skip
STAYS = [
    "user@example.com someone@sub.example.org x@host.invalid @decorator a @ b",
    "icon@2x.png getty@tty1.service rev@{upstream} user@host",
    "10.0.0.1 192.168.1.254 127.0.0.1 169.254.1.1 203.0.113.5 0.0.0.0 255.255.255.255",
    "version 93.18.216.34, v2.6.32.59, Linux 2.6.32.59, release 10.20.30.40",
    "openssl-1.10.22.33, foo_1.10.22.33, >= 11.22.33.44, ==12.13.14.15",
    "1.2.3.4 Overview", "section 11.12.13.14", "1.2.3.4.5",
    "10.20.0.0/16 128.1.0.0/16 2001:4f8::/64",
    "text\n17.7.14.2. configure\n\n 47.6.4.21 Stream",
    "-2147483648 to +2147483647, 2.147.483.648, 13107328", "OID 1.3.6.1.4.1",
    "Tel: 2147483647, phone 4294967296", "300.400.500.600", "93.184.216.34.56", "093.184.216.034",
    "std::vector a::b dead::beef 12:30:45 fe80::1 2001:db8::1 ::1 20:01:0d:b8:00:00:00:00",
    "2024-01-02T10:11:12+0200, 1999-2003, 2013-05-12 10:11", "RFC 2616, ISBN 978-0-13-110362-7",
    "da39a3ee5e6b4b0d3255bfef95601890afd80709 123e4567-e89b-12d3-a456-426614174000",
    "@@ -1,3 +123/45 @@ +100 lines, +1 2 3 4", "3.14159265358979 100-200-3000 1234567890",
    "555-1234 1445990400000 1700000000 1700000000000000", "9780131103627 9791034304387",
    "tell 12 people, telephone 2 of 3, mobile 5 GHz, fax, phone 2019 2020 2021",
    "4111 1111 1111 1112, 4111111111111112, id=4111111111111111, 0.4111111111111111",
    "0000000000000000 4444444444444444", "GB82 WEST 1234 5698 7654 33", "DE8937040044053201300",
    "XY82WEST12345698765432", "AKIAIOSFODNN7EXAMPLE", "sk-learn-is-a-library-for-learning-python",
    "ghp_xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx task-list-of-many-different-things-2024",
    "-----BEGIN PRIVATE KEY-----\n...\n-----END PRIVATE KEY-----", "eyJhbGciOiJIUzI1NiJ9",
    "-----BEGIN CERTIFICATE-----\n" + "MIIC" * 40 + "\n-----END CERTIFICATE-----",
]  # fmt: skip


@pytest.mark.parametrize(("text", "expected"), WEB)
def test_personal_data_is_replaced(text, expected):
    assert clean(text) == expected
    actual, counts = replace(text)
    assert {kind: len(re.findall(f"<{kind.upper()}_", actual)) for kind in counts} == counts
    assert replace(actual) == (actual, {})


@pytest.mark.parametrize("text", STAYS)
def test_text_that_resembles_personal_data_stays(text):
    assert replace(text, kinds=KINDS) == (text, {})


@pytest.mark.parametrize("text", NATIONAL)
def test_national_numbers_are_found_with_the_extra(text):
    pytest.importorskip("stdnum")
    (span,) = find(f"({text}).", kinds=["national"])
    assert span.kind == "national" and text.endswith(f"({text})."[span.start : span.end])
    assert find(f"({text}).", kinds=KINDS) == [span]


@pytest.mark.parametrize("text", NOT_NATIONAL)
def test_numbers_that_resemble_national_ones_stay(text):
    pytest.importorskip("stdnum")
    assert find(text, kinds=["national"]) == []


def test_modules_of_national_numbers_exist():
    pytest.importorskip("stdnum")
    for module in MODULES:
        assert import_module(f"stdnum.{module}").is_valid("x") is False


def test_a_missing_library_is_named(monkeypatch):
    check_library.cache_clear()
    monkeypatch.setitem(sys.modules, "stdnum", None)
    with pytest.raises(InputError, match=r"python-stdnum.*fastlm\[data\]"):
        find("536-90-4399", kinds=["national"])
    monkeypatch.undo()
    check_library.cache_clear()


def test_bad_arguments_are_named():
    with pytest.raises(InputError, match=r"kinds: expected names among .*, got 'name'"):
        find("", kinds=["name"])
    with pytest.raises(InputError, match=r"regions: .*, got 'Germany'"):
        find("", regions=["Germany"])


def test_spans_have_position_kind_and_normal_form():
    text = "Ann@Mail.org, (212) 555-1234, IBAN DE89 3704 0044 0532 0130 00"
    assert find(text) == [
        Span(0, 12, "email", "ann@mail.org"),
        Span(14, 28, "phone", "+12125551234"),
        Span(35, 62, "iban", "DE89370400440532013000"),
    ]
    assert find(text, kinds=["phone"]) == find(text)[1:2]
    assert find(text, kinds=[]) == []


def test_one_value_has_one_number():
    text = "a@b.org c@d.org A@B.org +1 212 555 1234 (212) 555-1234 +49 (0)170 1234567 +491701234567"
    assert replace(text) == (
        "<EMAIL_1> <EMAIL_2> <EMAIL_1> <PHONE_1> <PHONE_1> <PHONE_2> <PHONE_2>",
        {"email": 3, "phone": 4},
    )


def test_texts_share_numbers_and_old_placeholders_keep_theirs():
    numbers = Placeholders()
    assert replace("<EMAIL_3> and a@b.org", placeholders=numbers)[0] == "<EMAIL_3> and <EMAIL_4>"
    assert replace("a@b.org, c@d.org", placeholders=numbers)[0] == "<EMAIL_4>, <EMAIL_5>"
    first, second = numbers.copy(), numbers.copy()
    assert replace("x@y.org, c@d.org", placeholders=first)[0] == "<EMAIL_6>, <EMAIL_5>"
    assert replace("z@y.org, a@b.org", placeholders=second)[0] == "<EMAIL_6>, <EMAIL_4>"
    assert replace("a@b.org")[0] == "<EMAIL_1>"


def test_regions_decide_on_numbers_without_country_code_and_word():
    text = "0170 1234567 or 212-555-1234"
    assert clean(text) == "0170 1234567 or <PHONE>"
    assert clean(text, regions=["DE"]) == "<PHONE> or 212-555-1234"
    assert clean(text, regions=None) == "<PHONE> or <PHONE>"
    assert clean(text, regions=[]) == text


def test_private_keys_are_replaced_whole_or_cut():
    body = "\n".join("MIIEvQIBADANBgkqhkiG9w0BAQEFAASCBKcwggSjAgEAAoIBAQC7" for _ in range(5))
    key = f"-----BEGIN RSA PRIVATE KEY-----\n{body}\n-----END RSA PRIVATE KEY-----"
    assert clean(f"a\n{key}\nb {key}") == "a\n<KEY>\nb <KEY>"
    cut = key.partition("\n-----END")[0]
    assert clean(f"{cut}\nAnd text.\n{cut}") == "<KEY>\nAnd text.\n<KEY>"
    assert clean(f"{key} {key}", kinds=["email"]) == f"{key} {key}"


PIECES = st.sampled_from(
    """0170 1234567|+49 170 1234567|212-555-1234|a@b.org|<EMAIL_1>|<PHONE_2>|4111 1111 1111 1111| |,
|.|-|(|)|+|/|:|0|12|345|6789|phone |card |fax|x12|2001:db9::1|9.9.9.9|GB82 WEST 1234 5698 7654 32
|536-90-4399|>|<|@|=|é|电话|٠١٢""".replace("\n", "").split("|")
)


@settings(max_examples=400, deadline=None)
@given(st.lists(PIECES, max_size=14).map("".join))
def test_any_text_is_replaced_once_by_sorted_spans(text):
    spans = find(text, regions=None)
    ends = [0, *(span.end for span in spans)]
    assert all(end <= span.start < span.end <= len(text) for end, span in zip(ends, spans))
    actual, _ = replace(text, regions=None)
    assert replace(actual, regions=None) == (actual, {})


@pytest.mark.parametrize("regions", [("US",), None])
@pytest.mark.parametrize(
    "unit",
    [
        *"a|a.|1|1.|1-|+1 |2001:|a@|(212) |tel 1|@a.|<<EMAIL>>|99 |sk-|\u0661 ".split("|"),
        *"((1|12 34 56 78 |A1|AB12 |GB82|4111 |0170 1234567 |eyJ|eyJa.eyJ|5::|+1".split("|"),
        *("ä@ä.", "用户@例."),
        "-----BEGIN PRIVATE KEY-----",
        "-----BEGIN PRIVATE KEY-----\nMIICeAIBADANBgkq\n",
    ],
)
def test_hostile_repetition_takes_linear_time(unit, regions):
    def seconds(size: int) -> float:
        text = unit * (size // len(unit))
        start = time.process_time()
        find(text, regions=regions)
        return time.process_time() - start

    seconds(1_000)  # the first call compiles patterns
    assert seconds(100_000) < 2  # 0.5 s at most alone; a quadratic scan takes minutes


# Chats: numbers of all countries
PHONES = (
    """
0170 1234567|06 12 34 56 78|06.12.34.56.78|06-12-34-56-78|020 7946 0958|(020) 7946 0958
415.555.2671|415 555 2671|(212) 555-1234|212-555-1234|1-800-555-1234|+1 (212) 555-1234
+49 (0)170 123 45 67|+49 170 1234567|+4915123456789|0049 170 1234567|0043 664 1234567
+44 20 7946 0958 42|+442079460958 12|+442079460958123456|030/1234567|030/123 45-67|(0)30 123456
089 / 12 34 56 78|01701234567|0612345678|00441632960960|07700 900123|0412 345 678|079 123 45 67
612 34 56 78|912 345 678|98765 43210|138 1234 5678|(11) 91234-5678|090-1234-5678|010-1234-5678
8 (912) 345-67-89|+7 912 345-67-89|+91-9876543210|+86 138 1234 5678|+5511912345678
\u0660\u0661\u0667\u0660\u0661\u0662\u0663\u0664\u0665\u0666\u0667|+\u0669\u0666\u0666 50 123 4567
""".replace("\n", "|")
    .strip("|")
    .split("|")
)
AFTER_A_WORD = (
    """
my number is 4155552671|call me at 555-1234|Tel: 4155552671|手机号码是138-1234-5678
电话13812345678谢谢|mein Handy: 1701234567|mon portable 612345678|тел. 9123456789
""".replace("\n", "|")
    .strip("|")
    .split("|")
)
EMAILS = (
    """
ann@mail.org|ann@müller.de|jörg@müller.de|иван@почта.рф|ann@例え.jp|用户@例子.中国|ann+a@b.co.uk
ann@xn--mller-kva.de|o'neil@mail.org|अजय@डाटा.भारत|ann@почта.xn--p1ai|ann_b@mail.org
""".replace("\n", "|")
    .strip("|")
    .split("|")
)
CHAT_STAYS = (
    """
9 * (1003885) + 150 (99150) = 2|4600 - 1286 + 4983 - 3622 + 6644|3600000000000 + 62426244000
2345678901 * 3 is 7037036703|pi is 3.14159265358979|0.0496130162728|1,234,567.89|$415555.26
on 12.03.2024 and 2024-01-15|01/02/2024 10:30|1914-1918, 1939-1945|1000 2000 3000 4000|1 2 3 4 5 6 7
ISBN 978-3-16-148410-0|version 2.6.32.5|order 4155552671|unix time 1700000000|id=4155552671
https://example.org/4155552671|#0123456789|abc0123456789|0123456789abcdef
12:30:45|51.5074, -0.1278
name@2x.png|ann@example.org|user@host.service|@ann|a @ b|the 1990 2000 2010 2020 classes
10% of 5000000
24 000 000 people|192.168.10.1|x = 6122345678
""".replace("\n", "|")
    .strip("|")
    .split("|")
)


@pytest.mark.parametrize("phone", PHONES)
def test_phone_numbers_in_chats_are_removed(phone):
    for text in (phone, f"Ann ({phone}), thanks", f"It is\n{phone}.\nBye 12", f"“{phone}”"):
        actual = clean(text, regions=None)
        assert actual.count("<PHONE>") == 1, actual
        assert not re.search(r"\d{3}", actual), actual


@pytest.mark.parametrize("text", AFTER_A_WORD)
def test_phone_numbers_after_a_word_are_removed(text):
    for regions in (None, []):
        actual = clean(f"Hi, {text} 12", regions=regions)
        assert actual.count("<PHONE>") == 1 and not re.search(r"\d{3}", actual), actual


@pytest.mark.parametrize("address", EMAILS)
def test_addresses_in_any_script_are_removed(address):
    assert clean(f"Mail {address}, please.") == "Mail <EMAIL>, please."
    assert clean(f"<{address}>") == "<EMAIL>"
    actual = clean(f"邮箱是{address}。谢谢")
    assert actual.count("<EMAIL>") == 1 and "@" not in actual and actual.endswith("。谢谢")


@pytest.mark.parametrize("text", CHAT_STAYS)
def test_other_text_in_chats_stays(text):
    assert replace(text, regions=None) == (text, {})


def test_recall_over_the_numbers_of_all_countries():
    """Google's example of a mobile and of a fixed number of each of 245 regions, as it is written
    at home and abroad.
    """
    hits: dict[str, list[bool]] = {}
    for region in sorted(phonenumbers.SUPPORTED_REGIONS):
        for kind in (PhoneNumberType.MOBILE, PhoneNumberType.FIXED_LINE):
            number = phonenumbers.example_number_for_type(region, kind)
            if number is None:
                continue
            for form in (PhoneNumberFormat.INTERNATIONAL, PhoneNumberFormat.NATIONAL):
                text = phonenumbers.format_number(number, form)
                zero = "0" if text.lstrip("(").startswith("0") else ""
                name = "+" if text.startswith("+") else zero
                for before, word in (("I am Ann, ", ""), ("My phone number is ", " word")):
                    left = clean(before + text, regions=None)
                    hits.setdefault(name + word, []).append(not re.search(r"\d", left))
    recall = {name: sum(each) / len(each) for name, each in hits.items()}
    assert recall["+"] == recall["+ word"] == 1
    assert recall["0"] > 0.92 and recall["0 word"] > 0.99
    # of places with numbers of five to seven digits, and others that have no 0
    assert recall[""] > 0.53 and recall[" word"] > 0.88
    assert {len(each) for each in hits.values()} == {489, 215, 274}


def test_only_text_has_personal_data():
    with pytest.raises(InputError, match="text: expected a text, got bytes"):
        find(cast(Any, b"a@example.org"))


@pytest.mark.parametrize(
    "text",
    ["+9223372036854775807", "from 0 to +18446744073709551615", "+9223372036854775808",
     "+99912345678901234567", "+340282366920938463463374607431768211455"],
)  # fmt: skip
def test_a_sign_before_more_than_15_digits_is_no_telephone(text):
    """E.164 has at most 15. SQLite's documents have the bounds of 64-bit integers."""
    assert not find(text)
    assert find("call +442079460958") and find("Tel. +442079460958123456")
    find("+" + "1" * 5000)  # more digits than int() takes
