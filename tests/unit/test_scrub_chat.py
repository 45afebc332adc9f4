"""Personal data in chats: removed data, recall over countries' numbers, and text that stays."""

import re

import phonenumbers
import pytest
from phonenumbers import PhoneNumberFormat, PhoneNumberType

from fastlm.data.scrub_chat import scrub_chat

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
STAYS = (
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
def test_phone_numbers_are_removed(phone):
    for text in (phone, f"Ann ({phone}), thanks", f"It is\n{phone}.\nBye 12", f"“{phone}”"):
        actual, counts = scrub_chat(text)
        assert actual.replace("Bye 12", "").count("<PHONE>") == counts["phone"] == 1, actual
        assert not re.search(r"\d{3}", actual), actual


@pytest.mark.parametrize("text", AFTER_A_WORD)
def test_phone_numbers_after_a_word_are_removed(text):
    actual, counts = scrub_chat(f"Hi, {text} 12")
    assert counts["phone"] == 1 and not re.search(r"\d{3}", actual), actual


@pytest.mark.parametrize("address", EMAILS)
def test_addresses_in_any_script_are_removed(address):
    assert scrub_chat(f"Mail {address}, please.")[0] == "Mail <EMAIL>, please."
    assert scrub_chat(f"<{address}>")[0].strip("<>") == "EMAIL"
    actual, counts = scrub_chat(f"邮箱是{address}。谢谢")
    assert counts["email"] == 1 and "@" not in actual and actual.endswith("。谢谢")


@pytest.mark.parametrize("text", STAYS)
def test_other_text_than_personal_data_stays(text):
    assert scrub_chat(text) == (text, {"email": 0, "phone": 0, "ip": 0})


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
                    left = scrub_chat(before + text)[0]
                    hits.setdefault(name + word, []).append(not re.search(r"\d", left))
    recall = {name: sum(each) / len(each) for name, each in hits.items()}
    assert recall["+"] == recall["+ word"] == 1
    assert recall["0"] > 0.92 and recall["0 word"] > 0.98
    # of places with numbers of five to seven digits, and others that have no 0
    assert recall[""] > 0.53 and recall[" word"] > 0.81
    assert {len(each) for each in hits.values()} == {489, 215, 274}


def test_it_is_scrubbed_once():
    text = "ann@müller.de, 0170 1234567, 80.81.82.83 and host 93.184.216.34"
    actual, counts = scrub_chat(text)
    assert counts == {"email": 1, "phone": 1, "ip": 2}
    assert scrub_chat(actual) == (actual, {"email": 0, "phone": 0, "ip": 0})


@pytest.mark.parametrize(
    "unit", ["12 34 56 78 ", "1 ", "99 ", "a@", "a.", "+1", "(0", "9", "ä@ä.", "用户@例.", "-1"]
)
def test_scrubbing_is_linear_on_hostile_repetition(unit):
    scrub_chat(unit * (4_000 // len(unit)))
