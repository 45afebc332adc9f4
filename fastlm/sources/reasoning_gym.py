"""Prompts from the procedural task generators of the package reasoning-gym, which also score the
answers.

``reasoning-gym:NAME[?KEY=VALUE&...]`` names a generator and the options of its configuration, as
``reasoning-gym:chain_sum?size=2000&seed=1&max_digits=2``. A value is JSON, or else a text. The
defaults are the package's (``size=500``), except for the seed, which is 0. A row is the package's
entry: ``{"question", "answer", "metadata"}``. One version of the package and of Python gives the
same rows for the same source: `fastlm.sources.reasoning_gym_worker` draws them with fixed hashes.

Scores come from version `REVIEWED_VERSION` only, and from the generators in `SCORABLE`. The package
scores the others by ``eval`` or sympy's parser, which would run what a policy or a file wrote.

Nothing is fetched. The package is imported where such a source is read.
"""

import copy
import dataclasses
import difflib
import json
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

from fastlm.errors import InputError, unknown_key

SCHEME = "reasoning-gym"
FORM = f"{SCHEME}:NAME or {SCHEME}:NAME?KEY=VALUE&..."
SOURCE = "source"  # the key of a row that holds its spec
TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
# The scorers of another version have not been reviewed, so no other version is used.
REVIEWED_VERSION = "0.1.25"
MISSING = (
    f"expected the package {SCHEME}, which is not installed"
    f" (pip install {SCHEME}=={REVIEWED_VERSION})"
)
# Generators with a reviewed `score_answer`: in version `REVIEWED_VERSION`, with all that it calls,
# it compares texts or parses them by int, float, Decimal, complex, json.loads, numpy.loadtxt or a
# regular expression. test_reasoning_gym.py repeats the search for calls that evaluate text.
# Excluded are: generators that evaluate text (binary_matrix, bitwise_arithmetic, countdown,
# intermediate_integration, n_queens, number_sorting, polynomial_multiplication, puzzle24,
# simple_integration, spiral_matrix, string_insertion); generators with unbounded time or memory for
# some answers (coin_flip: the Fraction 1e999999999; propositional_logic: two to the number of its
# names; rubiks_cube and rush_hour: the count of a move; tower_of_hanoi: the row's number of disks);
# codeio, which runs programs; composite, which calls any other generator; game_of_life_halting,
# which accepts any answer.
SCORABLE = frozenset(
    """
ab acre advanced_geometry aiw arc_1d arc_agi base_conversion basic_arithmetic bf
binary_alternation boxnet caesar_cipher calendar_arithmetic chain_sum circuit_logic
color_cube_rotation complex_arithmetic count_bits count_primes course_schedule cryptarithm
decimal_arithmetic decimal_chain_sum dice emoji_mystery family_relationships figlet_font
fraction_simplification futoshiki game_of_life gcd graph_color
group_anagrams gsm_symbolic isomorphic_strings jugs kakurasu knight_swap knights_knaves
largest_island lcm leg_counting letter_counting letter_jumble list_functions mahjong_puzzle
manipulate_matrix maze mini_sudoku modulo_grid needle_haystack number_filtering number_format
number_sequence palindrome_generation palindrome_partitioning path_star polynomial_equations
pool_matrix power_function prime_factorization products quantum_lock ransom_note rearc
rectangle_count rotate_matrix rotten_oranges self_reference sentence_reordering shortest_path
simple_equations simple_geometry sokoban spell_backward string_manipulation string_splitting
string_synthesis sudoku survo syllogism time_intervals tsumego word_ladder
word_sequence_reversal word_sorting zebra_puzzles
""".split()
)


def is_reasoning_gym(spec: str) -> bool:
    """Return True if a source names a generator."""
    return spec.startswith(f"{SCHEME}:")


def package_version() -> str:
    """Return the version of reasoning-gym: its rows depend on it. InputError: not installed."""
    try:
        return metadata.version(SCHEME)
    except metadata.PackageNotFoundError:
        raise InputError(MISSING) from None


def reasoning_gym_rows(spec: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of a generator. InputError: an unknown generator or option, a value that the
    generator refuses, the package is missing.
    """
    name, options = _parse_spec(spec)
    _create_generator(spec)  # refuses what is wrong before a process starts
    request = {"path": sys.path, "name": name, "options": options}
    command = [sys.executable, "-P", str(Path(__file__).with_name("reasoning_gym_worker.py"))]
    env = {**os.environ, "PYTHONHASHSEED": "0"}
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env)
    assert child.stdin is not None and child.stdout is not None
    try:
        child.stdin.write(json.dumps(request).encode() + b"\n")
        child.stdin.flush()
        while (entry := pickle.load(child.stdout)) is not None:  # our own process wrote it
            if isinstance(entry, str):
                raise _options_error(spec, entry)
            yield {**entry, SOURCE: spec}
    except (EOFError, BrokenPipeError, pickle.UnpicklingError):
        raise InputError(
            f"source {spec}: the process that draws its rows ended with {child.wait()}"
        ) from None
    finally:
        child.kill()
        child.communicate()


def check_scorable(spec: str) -> None:
    """Raise InputError unless the answers of a source can be scored without running them: its
    generator is not in `SCORABLE`, or the version is not `REVIEWED_VERSION`.
    """
    name = spec.removeprefix(f"{SCHEME}:").partition("?")[0]
    if (got := package_version()) != REVIEWED_VERSION:
        raise InputError(
            f"reward_function: expected {SCHEME} {REVIEWED_VERSION}, whose scores were reviewed, "
            "got "
            f"version {got}"
        )
    if name not in SCORABLE:
        raise InputError(
            f"reward_function: expected a generator of which {SCHEME} scores answers without "
            "evaluating "
            "text,"
            f" or another reward, got {name!r:.80}"
        )


def check_reasoning_gym_row(row: Mapping[str, Any]) -> None:
    """Raise InputError unless the row is one of reasoning-gym's that its generator can score."""
    spec = _row_spec(row)
    scorer = _load_scorer(spec)
    try:
        scorer.score_answer(str(row["answer"]), _copy_entry(row))
    except Exception as error:
        raise InputError(
            f"row: expected one that {spec:.80} can score, got {_error_text(error)}"
        ) from None


def score_reasoning_gym(answer: str, row: Mapping[str, Any]) -> float:
    """Return the generator's score of an answer, mostly 0 to 1; 0 if the answer breaks the scorer.
    The text of the last ``<answer>`` tag counts, or without one the full text.

    InputError: see `check_scorable`.
    """
    tagged = TAGGED.findall(answer)
    text = (tagged[-1] if tagged else answer).strip()
    scorer = _load_scorer(_row_spec(row))
    try:
        return float(scorer.score_answer(text, _copy_entry(row)))
    except Exception:  # such as "x" as the factor of a number
        return 0.0


def _copy_entry(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of the entry, since knight_swap writes into it."""
    return copy.deepcopy({key: value for key, value in row.items() if key != SOURCE})


def _row_spec(row: Mapping[str, Any]) -> str:
    if is_reasoning_gym(str(row.get(SOURCE))):
        return row[SOURCE]
    entry = row.get("metadata")  # of an entry from a file: the default configuration
    name = entry.get("source_dataset") if isinstance(entry, Mapping) else None
    if not isinstance(name, str):
        raise InputError(f"row: expected one of a {SCHEME}: source, got one without its generator")
    return f"{SCHEME}:{name}"


@lru_cache(maxsize=64)
def _load_scorer(spec: str) -> Any:
    check_scorable(spec)
    return _create_generator(spec)


@lru_cache(maxsize=64)
def _create_generator(spec: str) -> Any:
    """Create the data set of a spec: it has a length, rows by index, and ``score_answer``."""
    name, options = _parse_spec(spec)
    from reasoning_gym.factory import create_dataset

    try:
        return create_dataset(name, **options)
    except Exception as error:
        raise _options_error(spec, _error_text(error)) from None


def _parse_spec(spec: str) -> tuple[str, dict[str, Any]]:
    """Parse a spec to the name of a generator and its options."""
    try:
        from reasoning_gym.factory import DATASETS
    except ModuleNotFoundError as error:
        if not str(error.name).startswith("reasoning_gym"):
            raise InputError(f"source {spec}: {SCHEME} lacks the package {error.name}") from None
        raise InputError(f"source {spec}: {MISSING}") from None

    name, _, query = spec.removeprefix(f"{SCHEME}:").partition("?")
    if name not in DATASETS:
        near = difflib.get_close_matches(name[:80], DATASETS, n=1, cutoff=0.0)[0]
        raise InputError(f"source {spec}: expected a generator such as {near}, got {name!r:.80}")
    field_names = {f.name for f in dataclasses.fields(DATASETS[name][1])}
    options: dict[str, Any] = {"seed": 0} if "seed" in field_names else {}
    for part in query.split("&") if query else ():
        key, equals, text = part.partition("=")
        if not equals:
            raise InputError(f"source {spec}: expected {FORM}, got {part!r:.60}")
        if key not in field_names:
            raise InputError(unknown_key(f"source {spec}: {key}", key, field_names))
        try:
            options[key] = json.loads(text)
        except ValueError:
            options[key] = text
    if type(seed := options.get("seed", 0)) is not int:  # null would draw one
        raise InputError(f"source {spec}: seed: expected an integer, got {seed!r:.60}")
    return name, options


def _error_text(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _options_error(spec: str, message: str) -> InputError:
    """Return the error for options that the package refuses by any exception."""
    return InputError(
        f"source {spec}: expected options that the generator accepts, got {message:.200}"
    )
