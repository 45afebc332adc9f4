"""MMLU (Hendrycks et al. 2021, arXiv:2009.03300): 14,042 questions of 57 subjects.

Templates are those of lm-evaluation-harness' ``mmlu`` (letters, formats ``mc_``) and
``mmlu_continuation`` (the answers' words, formats ``rc_``). The examples are the subject's dev
split, in its order. Subjects and the four fields have their own scores.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastlm.evals.sets.arrow import Row, label_of, read_split, text_of
from fastlm.evals.sets.olmes import SOURCE, parse_rows
from fastlm.evals.task import MultipleChoice, TaskSpec

HOME = "hails/mmlu_no_train"
LETTERS = "ABCD"
FIELDS = {
    "STEM": """
        abstract_algebra anatomy astronomy college_biology college_chemistry
        college_computer_science college_mathematics college_physics computer_security
        conceptual_physics electrical_engineering elementary_mathematics high_school_biology
        high_school_chemistry high_school_computer_science high_school_mathematics
        high_school_physics high_school_statistics machine_learning
    """,
    "humanities": """
        formal_logic high_school_european_history high_school_us_history
        high_school_world_history international_law jurisprudence logical_fallacies moral_disputes
        moral_scenarios philosophy prehistory professional_law world_religions
    """,
    "social sciences": """
        econometrics high_school_geography high_school_government_and_politics
        high_school_macroeconomics high_school_microeconomics high_school_psychology
        human_sexuality professional_psychology public_relations security_studies sociology
        us_foreign_policy
    """,
    "other": """
        business_ethics clinical_knowledge college_medicine global_facts human_aging management
        marketing medical_genetics miscellaneous nutrition professional_accounting
        professional_medicine virology
    """,
}
FIELD_OF = {subject: field for field, names in FIELDS.items() for subject in names.split()}


def _format_question(row: Row, letters: bool) -> tuple[str, list[str], int]:
    """Return a question's text, the continuation of each choice, and the right index."""
    question, choices = text_of(row, "question").strip(), row["choices"]
    if len(choices) != len(LETTERS):
        raise ValueError(f"choices: expected {len(LETTERS)}, got {len(choices)}")
    gold = label_of(row, len(LETTERS), "answer")
    if not letters:
        return f"Question: {question}\nAnswer:", [f" {c}" for c in choices], gold
    choice_lines = "".join(f"{letter}. {c}\n" for letter, c in zip(LETTERS, choices))
    return f"{question}\n{choice_lines}Answer:", [f" {letter}" for letter in LETTERS], gold


def subject_questions(
    subject: str, examples: Sequence[Row], rows: Sequence[Row], letters: bool
) -> list[MultipleChoice]:
    """Return the questions of a subject, each after its examples."""
    kind = "multiple choice questions" if letters else "questions"
    words = subject.replace("_", " ")
    begin = f"The following are {kind} (with answers) about {words}.\n\n"
    for text, answers, gold in parse_rows(
        f"{subject} dev, row", examples, lambda r: _format_question(r, letters)
    ):
        begin += f"{text}{answers[gold]}\n\n"

    questions = []
    items = parse_rows(f"{subject} test, row", rows, lambda r: _format_question(r, letters))
    for number, (text, answers, gold) in enumerate(items):
        requests = tuple((begin + text, answer) for answer in answers)
        questions.append(MultipleChoice(f"{subject}/{number}", requests, gold, part=subject))
    return questions


def _read(format: str, cache: Path) -> dict[str, Any]:
    letters, shots = format.startswith("mc"), int(format[3])
    questions = []
    for subject in FIELD_OF:
        examples = read_split(f"{HOME}/{subject}", "dev", cache)[:shots]
        rows = read_split(f"{HOME}/{subject}", "test", cache)
        questions += subject_questions(subject, examples, rows, letters)
    return {
        "questions": questions, "format": f"lm-eval:{format}", "group_of_part": FIELD_OF,
        "normalisation": "none" if letters else "characters",
    }  # fmt: skip


FORMATS = ("rc_5shot", "mc_5shot", "rc_0shot", "mc_0shot")
SETS = {"mmlu": TaskSpec("facts", "MIT", FORMATS, SOURCE, _read)}
