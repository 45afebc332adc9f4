"""`fastlm feedback build`: every step of the funnel drops what it must and counts it; raters far
from the others are left out; the rows are read by the trainings; gates.
"""

import io
import json
import random
from collections import Counter
from types import SimpleNamespace

import pytest
import safety_sets
from rich.console import Console
from typer.testing import CliRunner

from fastlm.cli import app
from fastlm.data.conversations import read_conversations
from fastlm.data.forget_log import response_key
from fastlm.data.preferences import Comparison, UnpairedPreference, read_preferences
from fastlm.data.prompts import read_prompts
from fastlm.errors import InputError
from fastlm.evals.gates import read_gates
from fastlm.evals.safety.sets import TEXTS, SafetySets
from fastlm.evals.task import OpenQuestion
from fastlm.feedback.build import BuildOptions, build
from fastlm.feedback.feedback_items import read_feedback_items
from fastlm.feedback.gate import Gate
from fastlm.feedback.gate_metrics import read_scores, scores_of
from fastlm.feedback.overlap import Overlap
from fastlm.feedback.pairwise import compare_models, win_rate_interval
from fastlm.feedback.rater_weights import estimate_rater_weights
from fastlm.feedback.stage import FeedbackBuild, _digest
from fastlm.inference.requests import Completion
from fastlm.pipeline.funnel import Funnel
from fastlm.serve.feedback_store import Feedback, FeedbackStore, StoredResponse
from fastlm.serve.ratings import Rating
from fastlm.train.dpo import DPO
from fastlm.train.reward import Reward
from fastlm.train.sft import SFT

EVERYTHING = BuildOptions(judge=0.0, test=0.0, max_rater_share=1.0)


def user_message(text):
    return [{"role": "user", "content": text}]


def add_response(store, id, prompt, *answers):
    store.add_response(
        StoredResponse(
            id,
            "tiny",
            user_message(prompt),
            [[{"role": "assistant", "content": a}] for a in answers],
        )
    )


def steps(funnel):
    return {step["step"]: step for step in funnel.steps}


def rows(folder, form, part="train"):
    return [json.loads(x) for x in (folder / part / f"{form}.jsonl").read_text().splitlines()]


@pytest.fixture
def store(tmp_path):
    with FeedbackStore(tmp_path / "feedback.db") as opened:
        yield opened


def test_every_step_drops_what_it_must(store, tmp_path):
    add_response(store, "r1", "What is tea?", "A drink.", "A stone.")
    add_response(store, "r2", "Who may call 212-555-1234 at night?", "Nobody.")
    add_response(
        store, "r3", "How many legs does the common garden spider have, exactly?", "Eight."
    )
    add_response(store, "r4", "Say it again", "Again.\nAgain.\nAgain.\nAgain.")
    add_response(store, "r5", "What is tea?", "A drink.")  # another user, the same answer
    add_response(store, "r6", "Withdrawn?", "Yes.")
    for feedback in (
        Feedback("r1", choice=0, preferred_over=(("r1", 1),), rater="ann"),
        Feedback("r1", choice=0, thumb="down", rater="ann"),
        Feedback("r1", choice=0, thumb="up", rater="ann"),  # after all
        Feedback("r5", choice=0, thumb="up", rater="bob"),
        Feedback("r2", corrected="Ask at the door.", rater="bob"),
        Feedback("r2", thumb="up", rater="cid"),
        Feedback("r5", thumb="up", rater="dan"),
        Feedback("r2", thumb="down", rater="dan"),
        Feedback("r3", thumb="up", rater="ann"),
        Feedback("r4", thumb="up", rater="ann"),
        Feedback("r6", thumb="up", rater="ann"),
        Feedback("r7", thumb="up", rater="ann"),  # nobody consented
        Feedback("r1", comment="Hm", rater="ann"),
        Feedback(None, "talk", thumb="up"),
        Feedback("r1", choice=0, preferred_over=(("r2", 0),), rater="ann"),
    ):
        store.add(feedback)
    questions = Overlap([("garden", "How many legs does the common garden spider have?")])
    done = build(
        [str(tmp_path / "feedback.db")], tmp_path / "out", options=EVERYTHING, questions=questions,
        forgotten={response_key("r6")}, cache=tmp_path,
    )  # fmt: skip
    by_step = steps(done.funnel)
    assert list(by_step) == [
        "gather", "consent", "rows to train on", "scrub", "quality rules", "decontamination",
        "raters", "share of one rater", "duplicates and votes", "train", "judge", "test",
    ]  # fmt: skip
    assert by_step["gather"]["documents"] == 11 and by_step["gather"]["removed"] == {
        "a pick between answers to different prompts": 1,
        "about a conversation, not an answer": 1,
        "neither a thumb, a number, a pick nor a correction": 1,
        "changed later by the same rater": 1,
    }
    assert by_step["consent"]["removed"] == {
        "consent withdrawn": 1, "no consent to store the text": 1,
    }  # fmt: skip
    assert by_step["quality rules"]["removed"] == {"repeated_characters": 1}
    assert by_step["decontamination"]["removed"] == {"a question of garden": 1}
    # ann's and bob's thumbs are about one text, bob's correction and dan's thumb outvote cid's
    assert by_step["duplicates and votes"]["removed"] == {
        "outvoted, or no majority": 1, "duplicate": 2,
    }  # fmt: skip
    assert by_step["train"]["documents"] == 4
    assert Funnel.load(tmp_path / "out").steps == done.funnel.steps  # `fastlm data show` reads it
    pair, fixed = rows(tmp_path / "out", "preferences")
    assert fixed["prompt"][0]["content"] == "Who may call <PHONE_1> at night?"
    assert pair["chosen"][0]["content"] == "A drink." and pair["provenance"]["responses"] == ["r1"]
    assert pair["licence"] == "LicenseRef-user-consent" and pair["model"] == "tiny"


def test_the_funnel_is_told_in_judgements(store, tmp_path):
    for i in range(30):
        add_response(store, f"r{i}", f"What is number {i}?", f"It is {i}.")
        store.add(Feedback(f"r{i}", thumb="up", rater=f"u{i % 5}"))
    store.add(Feedback("r0", thumb="down", rater="u0"))
    database, out = str(tmp_path / "feedback.db"), tmp_path / "out"
    stage = FeedbackBuild(database=(database,))
    ctx = stage.context(out, cache_dir=tmp_path)
    result = stage.run(ctx)
    console = Console(width=140, record=True, file=io.StringIO())
    console.print(stage.render(result, ctx), markup=False)
    output = console.export_text()
    assert "feedback items" in output and "documents" not in output and "0.00" not in output
    assert "files" not in output and "What was kept of each source" in output
    values = stage.report(ctx, result).values
    assert values["unit"] == "feedback items" and not values["files"]
    assert values["funnel"][0]["why"] == ["1 changed later by the same rater"]


def test_feedback_without_rows_is_named(tmp_path):
    stage = DPO()
    database = tmp_path / "built"
    ctx = stage.context(tmp_path / "out", cache_dir=tmp_path, model="m", feedback=database)
    for empty in (False, True):  # no build has succeeded; a build without preferences
        if empty:
            (database / "train").mkdir(parents=True)
            (database / "train/preferences.jsonl").touch()
        with pytest.raises(InputError) as error:
            stage.with_feedback(ctx)
        assert str(error.value) == f"feedback: expected preferences in {database}/train, got none"
    (database / "train/kto.jsonl").write_text("{}\n")  # thumbs are enough for KTO
    assert DPO(loss_type="kto").with_feedback(ctx).data == (f"{database}/train/kto.jsonl",)


def test_rows_that_trainings_read(store, tmp_path):
    for i in range(60):
        add_response(store, f"r{i}", f"What is number {i}?", f"It is {i}.", f"No idea about {i}.")
        store.add(Feedback(f"r{i}", choice=0, preferred_over=((f"r{i}", 1),), rater=f"u{i % 7}"))
        store.add(Feedback(f"r{i}", choice=i % 2, thumb="ud"[i % 2] + ["p", "own"][i % 2],
                          rater=f"u{i % 5}"))  # fmt: skip
        if i % 3 == 0:
            store.add(Feedback(f"r{i}", choice=1, corrected=f"Number {i} it is.", rater="fix"))
    database, out = str(tmp_path / "feedback.db"), tmp_path / "out"
    result = FeedbackBuild(database=(database,))(out)
    sizes = result["rows"]
    assert all(sizes[part]["preferences"] for part in ("train", "judge"))
    assert sizes["test"]["prompts"]
    prompts = {
        part: {p.key() for p in read_prompts([str(out / part / "prompts.jsonl")], cache=tmp_path)}
        for part in sizes
    }
    assert not prompts["train"] & (prompts["judge"] | prompts["test"])
    assert not prompts["judge"] & prompts["test"]
    train = out / "train"
    pairs = list(read_preferences([str(train / "preferences.jsonl")], cache=tmp_path))
    assert len(pairs) == sizes["train"]["preferences"]
    assert all(isinstance(pair, Comparison) for pair in pairs)
    labels = list(read_preferences([str(train / "kto.jsonl")], cache=tmp_path))
    assert {type(x) for x in labels} == {UnpairedPreference} and {x.desirable for x in labels} == {
        True,
        False,
    }
    talks = list(read_conversations([str(train / "sft.jsonl")], cache=tmp_path))
    assert len(talks) == sizes["train"]["sft"]
    # the stages read them: alone, or beside other data
    ctx = SFT(data=("more.jsonl",), data_weights=(2.0,)).context("x", model="m", feedback=out)
    with_rows = SFT(data=("more.jsonl",), data_weights=(2.0,)).with_feedback(ctx)
    assert with_rows.data == ("more.jsonl", str(train / "sft.jsonl"))
    assert with_rows.data_weights == (2.0, 1.0)
    for stage, rows in (
        (SFT(), "conversations"),
        (DPO(), "preferences"),
        (Reward(), "preferences"),
    ):
        with pytest.raises(InputError, match=f"data: expected at least one source of {rows}"):
            stage.with_feedback(stage.context("x", model="m"))
        with pytest.raises(InputError, match=f"data: expected at least one source of {rows}"):
            stage.plan({"model": [{"name": "m"}], "feedback": []})
    ctx = Reward(judge=True).context("x", model="m", feedback=out)
    assert Reward(judge=True).with_feedback(ctx).data == (str(out / "judge/preferences.jsonl"),)
    assert DPO(loss_type="kto").with_feedback(ctx).data == (str(train / "kto.jsonl"),)
    # the same bytes again, and from its rows
    repeated = build([database], tmp_path / "again", options=BuildOptions(), cache=tmp_path)
    for part in sizes:
        for form in sizes[part]:
            name = f"{part}/{form}.jsonl"
            assert (out / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    other = build(
        [str(train / "preferences.jsonl")], tmp_path / "other", options=BuildOptions(),
        cache=tmp_path,
    )  # fmt: skip
    assert other.rows["train"]["preferences"] == repeated.rows["train"]["preferences"]


def test_nothing_to_learn_from(store, tmp_path):
    store.add(Feedback("r1", thumb="up"))
    with pytest.raises(InputError, match="got none; 1 no consent to store the text"):
        build([str(tmp_path / "feedback.db")], tmp_path / "out", options=EVERYTHING, cache=tmp_path)
    add_response(store, "r2", "A question", "An answer")
    store.add(Feedback("r2", thumb="up"))
    with pytest.raises(InputError, match=r"got none; 1 no .*, 1 kept for judge/ \(--judge 0 keeps"):
        build(
            [str(tmp_path / "feedback.db")], tmp_path / "out", cache=tmp_path,
            options=BuildOptions(judge=0.999, test=0.0),
        )  # fmt: skip
    for words in (["x.db"], [str(tmp_path / "feedback.db"), "--judge", "0.9", "--test", "0.2"]):
        done = CliRunner().invoke(app, ["feedback", "build", *words, "--out", str(tmp_path / "o")])
        assert done.exit_code == 2
        assert done.stderr.splitlines()[-1].startswith(("fastlm: x.db:", "fastlm: judge:"))


def draw_votes(draw, raters, items, each):
    """Votes of raters, who are right with their own probability, on items whose truth is drawn."""
    truth = {item: draw.random() < 0.4 for item in range(items)}
    for rater, right in raters.items():
        for item in draw.sample(range(items), each):
            yes = truth[item] if draw.random() < right else not truth[item]
            yield str(item).encode(), rater, yes


def test_malicious_raters_count_less():
    draw = random.Random(1)
    raters = {f"good{i}": 0.9 for i in range(18)} | {"reversed": 0.1, "random": 0.5}
    weights = estimate_rater_weights(draw_votes(draw, raters, 120, 40))
    good = [weights[f"good{i}"] for i in range(18)]
    assert (
        min(rater.weight for rater in good) > 0.8 and min(rater.agreement for rater in good) > 0.75
    )
    assert weights["reversed"].weight == 0 and weights["random"].weight < 0.45
    single = estimate_rater_weights([(b"a", "alone", True), *draw_votes(draw, raters, 40, 20)])[
        "alone"
    ]
    assert single.weight == 1 and single.shared_votes == 0 and single.agreement is None
    # two who contradict each other: nobody knows who is wrong, and the prior bounds what follows
    two = estimate_rater_weights([(bytes([i]), who, who == "a") for i in range(3) for who in "ab"])
    assert two["a"].weight == pytest.approx(two["b"].weight, abs=0.3) and two["a"].weight > 0.3


def test_malicious_raters_do_not_turn_the_rows(tmp_path):
    draw = random.Random(2)
    raters = {f"u{i}": 0.92 for i in range(18)} | {"bad": 0.05, "flood": 0.9}
    picks = []
    for i in range(150):
        answers = [
            [{"role": "assistant", "content": f"{quality} {i}"}] for quality in ("Good", "Poor")
        ]
        for rater in draw.sample(sorted(raters), 4) + ["flood", "bad"] * (i % 2):
            order = (0, 1) if draw.random() < raters[rater] else (1, 0)
            pair = Comparison(
                user_message(f"Question {i}?"), tuple(answers[j] for j in order), (0, 1)
            )
            picks.append(pair.to_row() | {"rater": rater})
    (tmp_path / "picks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in picks))
    options = BuildOptions(judge=0.0, test=0.0, max_rater_share=0.01)
    done = build([str(tmp_path / "picks.jsonl")], tmp_path / "out", options=options, cache=tmp_path)
    by_step = steps(done.funnel)
    assert done.raters["bad"].weight == 0 and done.raters["u0"].weight > 0.8
    assert by_step["raters"]["removed"]["raters who disagree with the others"] > 80
    assert by_step["share of one rater"]["removed"]["beyond the limit of one rater"] > 20
    good = [
        row["chosen"][0]["content"].startswith("Good")
        for row in rows(tmp_path / "out", "preferences")
    ]
    assert len(good) > 130 and sum(good) / len(good) > 0.97
    weights = json.loads((tmp_path / "out" / "raters.json").read_text())
    assert weights["bad"]["weight"] == 0 and weights["bad"]["agreement"] < 0.3


def test_questions_of_evaluations_are_found():
    questions = Overlap([
        ("long", "Which of these animals, if any, has a backbone and lays its eggs in water?"),
        ("short", "What is the capital of France?"),
        ("tiny", "Who are you?"),
    ], 8)  # fmt: skip
    assert questions.find(["Tell me: WHAT is the capital of France"]) == "short"
    assert questions.find(["Please: which of these animals if any has a backbone and lays its"
                           " eggs in the sea?"]) == "long"  # fmt: skip
    assert questions.find(["Who are you?", "Which of these animals has a backbone?"]) is None
    assert Overlap([]).find(["What is the capital of France?"]) is None


def test_questions_are_found_as_by_a_plain_search():
    """Few words, so that questions share runs with texts of all kinds."""
    rng = random.Random(3)
    words = "tree river stone bird".split()

    def runs(text, n):
        words_ = text.split()
        return {tuple(words_[i : i + n]) for i in range(len(words_) - n + 1)}

    texts = [" ".join(rng.choices(words, k=rng.randrange(40))) for _ in range(60)]
    question_texts = []
    for i in range(40):
        ngrams = rng.choice(texts).split()
        at = rng.randrange(max(1, len(ngrams)))
        question_texts.append((f"q{i}", " ".join(ngrams[at : at + rng.randrange(4, 14)])))
    questions, results = Overlap(question_texts, 6), []
    for text in texts:
        names = set()
        for name, question in question_texts:
            length = min(6, len(question.split()))
            ngrams = runs(question, length)
            if length >= 5 and len(ngrams & runs(text, length)) >= 0.5 * len(ngrams):
                names.add(name)
        result = questions.find([text])
        assert result in names if names else result is None
        results.append(result)
    assert None in results and len({*results}) > 5


def test_what_safety_asks_does_not_enter(tmp_path):
    cache = safety_sets.write(tmp_path / "cache")
    answer = {"role": "assistant", "content": "It stands on the quiet street behind our school."}
    sentences = {name: texts(SafetySets(cache))[0] for name, texts in TEXTS.items()}
    sentences["stranger"] = "Where does the road to the old harbour begin?"
    short = {"crows", "realtoxicity"}  # four words in the stand-ins: everybody's
    lines = [
        {"messages": [*user_message(f"Hello! {text} Thanks."), answer], "rater": name}
        for name, text in sentences.items()
    ]
    path = tmp_path / "said.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))

    def removed(*names):
        stage = FeedbackBuild(database=(str(path),), decontaminate=names)
        stage(tmp_path / "out", cache_dir=cache)
        return steps(Funnel.load(tmp_path / "out"))["decontamination"]["removed"]

    # DoNotAnswer's stand-in has HarmBench's texts
    expected = {*TEXTS} - short - {"donotanswer"}
    removed_counts = removed("safety")
    assert {*removed_counts} == {f"a question of {name}" for name in expected}
    assert sum(removed_counts.values()) == len(lines) - len(short) - 1
    assert removed("lookalikes", "quac") == {
        "a question of lookalikes": 1, "a question of quac": 1,
    }  # fmt: skip


def test_more_answers_to_a_prompt_narrow_the_interval_of_wins_by_what_they_add():
    draw = random.Random(4)
    single = [float(draw.random() < 0.6) for _ in range(200)]
    alike = [win for win in single for _ in range(4)]  # three answers more say nothing new
    apart = [float(draw.random() < 0.6) for _ in range(800)]
    single_interval, four = win_rate_interval(single, 1), win_rate_interval(alike, 4)
    assert (single_interval.low, single_interval.high) == pytest.approx(
        (four.low, four.high), abs=1e-3
    )
    width = win_rate_interval(apart, 4).high - win_rate_interval(apart, 4).low
    assert (
        0.45 < width / (single_interval.high - single_interval.low) < 0.65
    )  # half for independent answers
    low = win_rate_interval([1.0] * 40, 4).low  # no more than ten prompts show
    assert (
        0.6 < low <= win_rate_interval([1.0] * 10, 1).low
        and win_rate_interval([0.5] * 8, 4).low < 0.2
    )
    # the true rate is in the interval as often as it says, where prompts differ
    covered = 0
    for _ in range(200):
        wins = [float(draw.random() < rate) for rate in draw.choices((0.2, 1.0), k=100)
                for _ in range(4)]  # fmt: skip
        interval = win_rate_interval(wins, 4)
        covered += interval.low < 0.6 < interval.high
    assert covered > 180


@pytest.mark.parametrize("answers", [1, 3])
def test_a_gate_reads_the_scores_of_one_prompt(tmp_path, answers):
    new, old = ([Completion([1] * (size + i), "a") for i in range(answers)] for size in (6, 5))
    points = [[0.0] * answers, [1.5 + i for i in range(answers)]]
    path = tmp_path / "scores.json"
    path.write_text(json.dumps(compare_models(old, new, points, answers, 0.95)))
    scores = scores_of("winrate", read_scores(path))
    assert scores["winrate.score"]["low"] is scores["winrate.length"]["high"] is None


def test_gates_decide_by_the_ends_of_intervals(tmp_path):
    new = [Completion([1] * 6, f"a{i}") for i in range(100)]
    old = [
        Completion([1] * 5, "b", finish_reason="length" if i % 2 else "stop") for i in range(100)
    ]
    points = [[0.0] * 100, [1.0] * 70 + [0.0] * 10 + [-1.0] * 20]
    result = compare_models(old, new, points, 1, 0.95)
    won = result["scores"]["rate"]
    assert won["value"] == 0.75 and 0.6 < won["low"] < 0.75 < won["high"] < 0.85
    assert result["outcomes"]["wins"] == 70 and result["outcomes"]["ties"] == 10
    assert (
        result["scores"]["length"]["value"] == 1.2 and result["scores"]["distinct"]["value"] == 100
    )
    (tmp_path / "winrate").mkdir()
    (tmp_path / "winrate" / "scores.json").write_text(json.dumps(result))
    bits = {"old": {"bits_per_byte": 1.0}, "new": {"bits_per_byte": 1.02}}
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "scores.json").write_text(json.dumps({"models": bits}))
    assert scores_of("eval", {"models": bits})["eval.bits_per_byte"]["value"] == 1.02
    gates = tmp_path / "gates.toml"
    gates.write_text('[[gate]]\nscore = "winrate.rate"\nmin = 0.5\n[[gate]]\n'
                     'score = "eval.bits_per_byte"\nmax = 1.05\n')  # fmt: skip
    inputs = ["--scores", str(tmp_path / "winrate"), "--scores", str(tmp_path / "eval")]
    words = ["gate", *inputs, "--gates", str(gates), "--out", str(tmp_path / "gate")]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0 and "promoted: all 2 gates passed" in done.stdout
    gates.write_text(gates.read_text().replace("0.5", "0.7"))
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 1 and "winrate.rate: expected at least 0.7" in done.stdout
    decision = json.loads((tmp_path / "gate" / "decision.json").read_text())
    assert not decision["promoted"] and [g["passed"] for g in decision["gates"]] == [False, True]
    copy = tmp_path / "other" / "winrate"
    copy.mkdir(parents=True)
    (copy / "scores.json").write_text(json.dumps(result))
    done = CliRunner().invoke(app, [*words, "--scores", str(copy)])
    assert done.exit_code == 2 and "two called winrate" in done.stderr
    gates.write_text('[[gate]]\nscore = "winrate.rate"\n')
    with pytest.raises(InputError, match="max or min"):
        read_gates(gates)
    with pytest.raises(InputError, match=r"winrate\.x: expected a score of eval"):
        gates.write_text('[[gate]]\nscore = "winrate.x"\nmin = 0\n')
        Gate(gates=str(gates)).plan({"scores": [{"name": "eval"}]})


def test_all_turns_of_a_conversation_are_in_the_same_part(tmp_path):
    """A row of the second turn holds the first prompt and its answer."""
    lines = []
    for i in range(80):
        first = [
            *user_message(f"What is tree {i}?"),
            {"role": "assistant", "content": f"An oak, {i}."},
        ]
        later = [
            *user_message("And why?"),
            {"role": "assistant", "content": f"Because of {i} acorns."},
        ]
        lines += [json.dumps({"messages": m, "rater": f"r{i % 7}"}) for m in (first, first + later)]
    (tmp_path / "said.jsonl").write_text("\n".join(lines))
    build([str(tmp_path / "said.jsonl")], tmp_path / "out", options=BuildOptions(), cache=tmp_path)
    prompts = {
        part: {row["prompt"][0]["content"] for row in rows(tmp_path / "out", "prompts", part)}
        for part in ("train", "judge", "test")
    }
    assert all(prompts.values())
    assert sum(map(len, prompts.values())) == 80  # each opening in one part alone


def test_a_rater_who_says_it_of_many_responses_has_one_vote(tmp_path):
    prompt, answer = user_message("What is tea?"), [{"role": "assistant", "content": "A drink."}]
    labels = [("mallory", False)] * 5 + [("ann", True), ("bob", True)]
    (tmp_path / "said.jsonl").write_text(
        "\n".join(
            json.dumps({"prompt": prompt, "completion": answer, "label": yes, "rater": rater})
            for rater, yes in labels
        )
    )
    build([str(tmp_path / "said.jsonl")], tmp_path / "out", options=EVERYTHING, cache=tmp_path)
    assert [row["label"] for row in rows(tmp_path / "out", "kto")] == [True]


def test_a_score_without_an_interval_fails_its_gate(tmp_path):
    """One question has no standard error: scores.json says null."""
    (tmp_path / "gates.toml").write_text('[[gate]]\nscore = "eval.own.acc"\nmin = 0\n')
    row = {"metric": "acc", "difference": 0.5, "low": None, "high": None, "n": 1}
    table = {"models": {"a": {}, "b": {}}, "tasks": [{"name": "own", "comparisons": [row]}]}
    (gate,) = read_gates(tmp_path / "gates.toml")
    assert "expected an interval" in (gate.failure(scores_of("eval", table)) or "")


def test_what_a_number_means_is_part_of_what_is_read(tmp_path):
    path = tmp_path / "feedback.db"
    digests = set()
    for better in ("higher", "lower"):
        path.unlink(missing_ok=True)
        with FeedbackStore(path) as opened:
            add_response(opened, "r1", "What is tea?", "A drink.")
            opened.declare_ratings([Rating("stars", "number", better, high=5.0)])
        digests.add(_digest(str(path)))
    assert len(digests) == 2


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"provenance": {"responses": 5}}, "provenance.responses: expected an array, got 5"),
        ({"provenance": {"responses": [5]}}, r"provenance.responses\[0\]: expected a string"),
        ({"provenance": {"conversations": {}}}, "provenance.conversations: expected an array"),
        ({"provenance": {"talks": []}}, "provenance.talks: expected no such field"),
        ({"provenance": 7}, "provenance: expected an object, got 7"),
        ({"rater": ["ann"]}, "rater: expected a string"),
        ({"rater": "\ud800"}, "rater: expected valid Unicode"),
        ({"model": 7}, "model: expected a string"),
        ({"licence": {}}, "licence: expected a string"),
    ],
)
def test_exports_of_strangers(tmp_path, row, message):
    file = tmp_path / "rows.jsonl"
    talk = [*user_message("Hi"), {"role": "assistant", "content": "Hello"}]
    shapes = (
        {"messages": talk},
        {"prompt": user_message("Hi"), "completion": "Hello", "label": True},
    )
    for shape in shapes:
        file.write_text(json.dumps(shape) + "\n" + json.dumps({**shape, **row}) + "\n")
        with pytest.raises(InputError, match=rf"rows\.jsonl, line 2: {message}") as raised:
            read_feedback_items([str(file)], tmp_path, Counter())
        assert "\n" not in str(raised.value)


def test_questions_of_a_question_set_are_found(tmp_path, monkeypatch):
    question = "Where does the road to the old harbour begin?"
    task = SimpleNamespace(questions=[OpenQuestion("0", f"Question: {question}", {}, " Here.")])
    monkeypatch.setattr("fastlm.evals.registry.load_task", lambda name, cache: task)
    answer = {"role": "assistant", "content": "It stands on the quiet street behind our school."}
    texts = (question, "Which of the lamps in the garden burns the longest?")
    lines = [{"messages": [*user_message(text), answer], "rater": text[:5]} for text in texts]
    path = tmp_path / "said.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    FeedbackBuild(database=(str(path),), decontaminate=("arc_easy",))(tmp_path / "out")
    removed = steps(Funnel.load(tmp_path / "out"))["decontamination"]["removed"]
    assert removed == {"a question of arc_easy": 1}


def test_a_key_is_not_many_raters(tmp_path):
    """A client chooses the names of its raters: 30 names of one key are limited as that key."""
    rows = []
    for i in range(300):
        answers = [[{"role": "assistant", "content": f"{name} {i}"}] for name in ("A", "B")]
        pair = Comparison(user_message(f"Question {i}?"), tuple(answers), (0, 1))
        key = "abcdefghijkl" if i % 3 else f"{'abcdefghijk'}{'ponm'[i % 4]}"
        rows.append(pair.to_row() | {"rater": f"{key}:u{i % 30}"})
    (tmp_path / "picks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = BuildOptions(judge=0.0, test=0.0, max_rater_share=0.05)
    done = build([str(tmp_path / "picks.jsonl")], tmp_path / "out", options=options, cache=tmp_path)
    removed = steps(done.funnel)["share of one rater"]["removed"]
    assert removed == {"beyond the limit of one API key": 200 - 2 * 300 // 5}
