"""Run the whole feedback loop on this machine: users, feedback, training, gates, promotion.

    python bench/serve/feedback_loop.py --conversations 4000      training data of round 0
    fastlm run bench/serve/feedback_loop_base.toml -o runs/feedback_loop/base
                                                           that model, once (a minute)
    python bench/serve/feedback_loop.py --seed 3 --trusting --plot docs/feedback_loop.png
                                                           three rounds, each without and with
                                                           malicious users, and all trusted

One `fastlm serve` runs all the time. In each round it answers the simulated users of `fastlm
feedback simulate`, who ask the questions of synthetic_users.py and post to /v1/feedback. Then
`fastlm run recipes/improve.toml --until winrate` builds rows from the database and trains the model
of round 0 again on all feedback so far. `fastlm gate` decides by feedback_loop_gates.toml whether
the new model may replace the one that serves; if so, `fastlm promote` with the admin key puts it in
the server. Some feedback comes a round late, some has no consent to store the text, some consent is
withdrawn. Then the server answers prompts that no user asked, and the hidden preference, which the
rest of the loop never sees, says which answers it accepts.

`--malicious 0 0.1`: the shares of users who say the opposite or anything; one loop per share.
`--trusting` runs the last loop again with every rater trusted, to show the effect of the weights. A
loop with a complete rounds.json does not run again, so that several processes may run one each. A
loop that was interrupted needs another --out, or its folder has to be deleted.
"""

import argparse
import json
import os
import random
import secrets
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bench_path  # noqa: F401
import httpx
import synthetic_users as users
import torch
from harness import ROOT, machine, save

from fastlm.data.prompts import Prompt
from fastlm.evals.model_answers import generate_answers
from fastlm.evals.suite import model_id
from fastlm.feedback.gate import Gate
from fastlm.feedback.gate_metrics import difference
from fastlm.feedback.local_server import run_local_server
from fastlm.feedback.pairwise import win_rate_interval
from fastlm.feedback.simulated_users import AnsweredQuestion, SimulatedUser, simulate_users
from fastlm.feedback.stage import FeedbackBuild
from fastlm.serve.feedback_store import FeedbackStore
from fastlm.stages import run_recipe
from fastlm.stats.intervals import wilson

GATES = Path(__file__).parent / "feedback_loop_gates.toml"
SAMPLING = {"max_tokens": 80, "temperature": 0.9}
CLIENTS = 8
NUM_GENERATIONS = 4  # answers per prompt for the gates
MODEL_NAME = "tiny"
LATE, NO_CONSENT, WITHDRAWN = 0.1, 0.1, 0.03
NOISE = 0.1  # error rate of the users
THUMB_THRESHOLD = 3.5  # points of an answer that gets a thumb up: one small fault is accepted
# For the tiny model; a larger one needs lower learning rates
TRAINING = (
    "feedback.test=0.4", "feedback.judge=0.25", "sft.lr=5e-4", "sft.epochs=1", "sft.batch_size=4",
    "sft.gradient_accumulation_steps=1", "dpo.lr=3e-4", "dpo.epochs=1", "dpo.batch_size=8",
    "dpo.gradient_accumulation_steps=1",
    "dpo.beta=0.1", "dpo.sft_weight=0.2", "winrate.max_new_tokens=80", "winrate.temperature=0.9",
    f"winrate.num_generations={NUM_GENERATIONS}", "winrate.limit=400", "sft.sample_at=[]",
    "dpo.sample_at=[]", "sft.validations=1", "dpo.validations=1", "eval.stride=128",
    *(f"{judge}.{option}" for judge in ("judge", "judge-2", "judge-3")
      for option in ("lr=1e-3", "epochs=3", "gradient_accumulation_steps=1", "validations=0")),
)  # fmt: skip


@dataclass(frozen=True)
class Server:
    """A `fastlm serve` process, its client and its admin key."""

    url: str
    client: httpx.Client
    admin_key: str

    def promote(self, model: Path) -> None:
        """Promote ``model`` with `fastlm promote`."""
        command = [sys.executable, "-m", "fastlm", "promote", str(model), "--server", self.url]
        process = subprocess.run(
            command, env=os.environ | {"FASTLM_API_KEY": self.admin_key}, capture_output=True,
            text=True, cwd=ROOT,
        )  # fmt: skip
        if process.returncode:
            raise SystemExit(f"fastlm promote {model}: {process.stderr.strip()}")


@contextmanager
def run_server(model: Path, models: Path, database: Path, log: Path) -> Iterator[Server]:
    """Context: `fastlm serve` of ``model``, which models below ``models`` may replace."""
    admin_key = secrets.token_hex(16)
    options = ("--models-dir", str(models))
    with run_local_server(
        model, database, log, 1, *options, name=MODEL_NAME, admin_key=admin_key
    ) as server:
        url = f"http://127.0.0.1:{server.port}"
        headers = {"Authorization": f"Bearer {server.key}"}
        with httpx.Client(base_url=url, timeout=120, trust_env=False, headers=headers) as client:
            yield Server(url, client, admin_key)


def ask_all(
    client: httpx.Client, questions: Sequence[users.Question], n: int, seed: int
) -> list[tuple[str, list[str]]]:
    """Return per question the response's id and its ``n`` answers."""

    def ask(i: int) -> tuple[str, list[str]]:
        body = {
            "model": MODEL_NAME, "messages": messages(questions[i]), "n": n, "seed": seed + i,
            **SAMPLING,
        }  # fmt: skip
        response = client.post("/v1/chat/completions", json=body).raise_for_status().json()
        texts = [choice["message"]["content"] or "" for choice in response["choices"]]
        return response["id"], texts

    with ThreadPoolExecutor(CLIENTS) as pool:
        return list(pool.map(ask, range(len(questions))))


def messages(question: users.Question) -> list[dict[str, str]]:
    return [{"role": "user", "content": question.text}]


class Round:
    """The feedback of one round, as bodies of /v1/feedback."""

    def __init__(self, client: httpx.Client, people: Sequence[SimulatedUser], seed: int):
        self.client, self.people = client, people
        self.draw = random.Random(f"round/{seed}")
        self.seed = seed
        self.now: list[dict[str, Any]] = []
        self.late: list[dict[str, Any]] = []
        self.ids: list[str] = []  # responses with consent
        self.questions: set[str] = set()

    def run(self, prompts: int, reviews: int) -> None:
        """Let every user ask ``prompts`` questions, and judge ``reviews`` answers of others."""
        askers = [user for user in self.people for _ in range(prompts)]
        questions = [users.draw_question(self.draw) for _ in askers]
        self.questions = {question.text for question in questions}
        responses = ask_all(self.client, questions, 2, self.seed * 1_000_000)
        with_consent = []
        for user, question, (id, texts) in zip(askers, questions, responses, strict=True):
            consent = self.draw.random() >= NO_CONSENT and all(text.strip() for text in texts)
            answers = AnsweredQuestion(
                id, texts, [users.points(question, text) for text in texts], None
            )
            correction = users.correction(question, user)
            feedback = user.give_feedback(answers, THUMB_THRESHOLD, correction)
            bodies = [item.body for item in feedback]
            late = user.draw.random() < LATE
            if consent and bodies:
                conversation = {"consent": True, "messages": messages(question), "choices": texts}
                bodies[0]["conversation"] = conversation
                if not late:
                    self.ids.append(id)
                    with_consent.append((user, answers))
            (self.late if late else self.now).extend(bodies)
        count = min(len(with_consent), max(1, len(self.people) * reviews // 6))
        shared = self.draw.sample(with_consent, count)
        for user in self.people:
            others = [answers for asker, answers in shared if asker is not user]
            for answers in self.draw.sample(others, min(len(others), reviews)):
                self.now += [item.body for item in user.give_feedback(answers, THUMB_THRESHOLD)]


def measure(
    client: httpx.Client, count: int, seed: int, past_questions: Collection[str] = ()
) -> dict[str, Any]:
    """Return the hidden preference's judgement of answers to ``count`` different prompts of the
    users' kind that are not in ``past_questions``, and the rate of refused harmful requests that
    are not in it."""
    draw = random.Random(f"fresh/{seed}")
    candidates = (users.draw_question(draw, harmful=0) for _ in range(100 * count))
    fresh = {q.text: q for q in candidates if q.text not in past_questions}
    questions = [*fresh.values()][:count]
    texts = [t for _, (t,) in ask_all(client, questions, 1, 10**9 + seed * 1_000_000)]
    harmful = harmful_questions(past_questions)
    harmful_texts = [t for _, (t,) in ask_all(client, harmful, 1, 2 * 10**9 + seed * 1_000_000)]
    faults = [users.faults(q, t) for q, t in zip(questions, texts, strict=True)]
    return {
        "accepted": rate([users.is_accepted(q, t) for q, t in zip(questions, texts, strict=True)]),
        "points": sum(map(users.points, questions, texts)) / len(questions),
        "words": sum(len(text.split()) for text in texts) / len(questions),
        **{name: rate([name not in missing for missing in faults]) for name in users.PROPERTIES},
        "refused_harmful": rate([users.is_refusal(text) for text in harmful_texts]),
        "refused_harmless": rate([users.is_refusal(text) for text in texts]),
        "different": len({*texts}) / len(questions),
    }


def rate(hits: Sequence[bool]) -> dict[str, float]:
    interval = wilson(sum(hits), len(hits))
    value = sum(hits) / len(hits)
    return {"value": value, "low": interval.low, "high": interval.high, "n": len(hits)}


def harmful_questions(past_questions: Collection[str] = ()) -> list[users.Question]:
    """Return the harmful requests that are not in ``past_questions``."""
    return [
        question for question in users.harmful_questions() if question.text not in past_questions
    ]


def measure_harm(model: Path, out: Path, past_questions: Collection[str]) -> dict[str, float]:
    """Write ``out``/scores.json for `fastlm gate`: the share of refusals among answers to harmful
    requests that are not in ``past_questions``."""
    prompts = [Prompt(messages(question), {}) for question in harmful_questions(past_questions)]
    completions = generate_answers(
        model,
        prompts,
        num_generations=NUM_GENERATIONS,
        max_new_tokens=80,
        temperature=SAMPLING["temperature"],
    )
    refusals = [float(users.is_refusal(c.text)) for c in completions]
    interval = win_rate_interval(refusals, NUM_GENERATIONS)
    refused = {
        "value": sum(refusals) / len(refusals), "low": interval.low, "high": interval.high,
        "n": len(prompts),
    }  # fmt: skip
    out.mkdir()
    scores = {"scores": {"refused": refused}, "ids": [{"name": model.name, "id": model_id(model)}]}
    (out / "scores.json").write_text(json.dumps(scores))
    return refused


def post(client: httpx.Client, bodies: Sequence[dict[str, Any]]) -> None:
    """Send feedback; users send concurrently, and each of them in order."""
    by_rater: dict[str, list[dict[str, Any]]] = {}
    for body in bodies:
        by_rater.setdefault(body["rater"], []).append(body)

    def send(bodies: Sequence[dict[str, Any]]) -> None:
        for body in bodies:
            client.post("/v1/feedback", json=body).raise_for_status()

    with ThreadPoolExecutor(CLIENTS) as pool:
        list(pool.map(send, by_rater.values()))


def hidden_wins(path: Path) -> dict[str, float]:
    """Return how often the hidden preference prefers the new answers of winrate/answers.jsonl."""
    rows = hidden_points(path)
    wins = [1.0 if better > 0 else 0.5 if better == 0 else 0.0 for _, better in rows]
    prompts = {row["prompt"][-1]["content"] for row, _ in rows}
    interval = win_rate_interval(wins, len(wins) // len(prompts))
    return {"value": sum(wins) / len(wins), "low": interval.low, "high": interval.high}


def hidden_accuracy(path: Path) -> dict[str, float] | None:
    """Return how often the judges agree with the hidden preference on the pairs of
    winrate/answers.jsonl that differ for it; None if none differ."""
    right = [
        (row["score_new"] - row["score_old"]) * better > 0
        for row, better in hidden_points(path)
        if better
    ]
    return rate(right) if right else None


def hidden_points(path: Path) -> list[tuple[dict[str, Any], float]]:
    """Return the rows of winrate/answers.jsonl, each with the hidden points of its new answer less
    those of its old one."""
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    questions = [parse_question(row["prompt"][-1]["content"]) for row in rows]
    return [
        (row, users.points(question, row["new"]) - users.points(question, row["old"]))
        for row, question in zip(rows, questions, strict=True)
    ]


def excluded_raters(path: Path) -> list[str]:
    """Return the raters of raters.json that were excluded."""
    min_weight = FeedbackBuild().min_rater_weight
    raters = json.loads(path.read_text())
    return [name for name, rater in raters.items() if rater["weight"] < min_weight]


def parse_question(text: str) -> users.Question:
    """Return the question of a text."""
    topic = next((t for t in sorted(users.TOPICS, key=len, reverse=True) if f" {t}" in text), "")
    word = next(w for w in users.WORDS if f" {w}" in text.partition("word")[2] + text[-20:])
    return users.Question(text, topic, word)


def run_loop(
    out: Path, base: Path, malicious: float, options: argparse.Namespace, *, trusting: bool = False
) -> list[dict[str, Any]]:
    """Run the rounds; return a row per round, the first for the model before them. "rise": the
    change of the accepted share since the previous round, with its interval."""
    if out.exists():
        raise SystemExit(f"{out}: expected a new folder, got one with an interrupted loop")
    out.mkdir(parents=True)
    weights = ["feedback.min_rater_weight=0.0"] if trusting else []
    raters = simulate_users(options.users, malicious, NOISE, options.seed)
    database, heldout, rows = out / "feedback.db", out / "talk.txt", []
    conversations = users.conversations(random.Random(f"talk/{options.seed}"), 100)
    heldout.write_text("\n".join(m["content"] for row in conversations for m in row["messages"]))
    model, late = base / "sft", []
    past_questions: set[str] = set()  # all questions of users so far
    with run_server(model, out, database, out / "serve.log") as server:
        for number in range(options.rounds + 1):
            began = time.monotonic()
            seed = options.seed * 1000 + number
            metrics = measure(server.client, options.fresh, seed, past_questions)
            rise = {"rise": difference(metrics["accepted"], rows[-1]["accepted"])} if rows else {}
            row: dict[str, Any] = {
                "round": number, "model": serving_model(server.client), **metrics, **rise
            }  # fmt: skip
            rows.append(row)
            print(json.dumps(row), flush=True)
            if number == options.rounds:
                break
            round_ = Round(server.client, raters, seed)
            round_.run(options.prompts, options.reviews)
            post(server.client, [*late, *round_.now])
            late, past_questions = round_.late, past_questions | round_.questions
            with FeedbackStore(database) as store:
                withdrawn = round_.draw.sample(round_.ids, round(WITHDRAWN * len(round_.ids)))
                for id in withdrawn:
                    store.forget(id)
            new = out / f"round-{number + 1}"
            sets = [f"seed={options.seed}", *weights, *options.sets]
            result = improve(new, model, base / "sft", database, heldout, past_questions, sets)
            counts = Counter(
                kind for body in round_.now for kind in ("thumb", "corrected", "preferred_over")
                if kind in body
            )  # fmt: skip
            row |= {
                "feedback_counts": dict(counts), "late": len(late), "withdrawn": len(withdrawn),
                **result,
            }  # fmt: skip
            if result["promoted"]:
                model = new / "dpo"
                server.promote(model)
            row["seconds"] = time.monotonic() - began
    (out / "rounds.json").write_text(json.dumps(rows, indent=1))
    return rows


def serving_model(client: httpx.Client) -> str:
    """Return the name of the model that answers: MODEL_NAME@ and a hash of its files."""
    body = {
        "model": MODEL_NAME,
        "messages": [{"role": "user", "content": "Hello"}],
        "max_tokens": 1,
    }
    return client.post("/v1/chat/completions", json=body).raise_for_status().json()["model"]


def improve(
    out: Path,
    model: Path,
    base: Path,
    database: Path,
    heldout: Path,
    past_questions: Collection[str],
    more_sets: Sequence[str],
) -> dict[str, Any]:
    """Train ``base`` on all feedback so far by the recipe, and compare it with ``model``, which
    serves now, by the gates; return their decision, and the metrics of the new model."""
    sets = [
        f'feedback.database=["{database}"]', f'inputs.old="{model}"', f'inputs.start="{base}"',
        f'eval.data="{heldout}"',
        "feedback.decontaminate=[]",  # no evaluation uses this language
        *TRAINING, *more_sets,
    ]  # fmt: skip
    results = run_recipe(
        ROOT / "recipes" / "improve.toml", out, overrides=sets, until="winrate",
        command=" ".join(["fastlm run recipes/improve.toml", *(f"--set '{s}'" for s in sets)]),
    )["stages"]  # fmt: skip
    refused = measure_harm(out / "dpo", out / "harm", past_questions)
    decision = Gate(gates=str(GATES))(
        out / "decision", scores=[out / "winrate", out / "eval", out / "harm"]
    )
    bits = [m["bits_per_byte"] for m in results["eval"]["models"].values()]
    return {
        "promoted": decision["promoted"],
        "reasons": [g["reason"] for g in decision["gates"] if not g["passed"]],
        "rows": results["feedback"]["rows"], "raters": results["feedback"]["raters"],
        "excluded_raters": excluded_raters(out / "feedback" / "raters.json"),
        "winrate": results["winrate"]["scores"]["rate"],
        "length": results["winrate"]["scores"]["length"],
        "score": results["winrate"]["scores"]["score"],
        "hidden_winrate": hidden_wins(out / "winrate" / "answers.jsonl"),
        "judge_accuracy": results["winrate"]["scores"].get("judge"),
        "hidden_judge_accuracy": hidden_accuracy(out / "winrate" / "answers.jsonl"),
        "refused": refused, "bits_old": bits[0], "bits_new": bits[1],
    }  # fmt: skip


GATED_METRICS: tuple[tuple[Any, str, str, Callable[[dict[str, Any]], float]], ...] = (
    ("-", "o", "refuses harmful requests, %", lambda row: 100 * row["refused_harmful"]["value"]),
    ("--", "^", "on the topic, %", lambda row: 100 * row["topic"]["value"]),
    (":", "s", "different answers, %", lambda row: 100 * row["different"]),
    ("-.", "D", "words per answer", lambda row: row["words"]),
)


def plot(loops: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Plot the acceptance rate on the left and the gated metrics on the right; a hollow point is of
    a model that the gates rejected."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    figure = Figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    colors = ("#2f6fde", "#d9822b", "#8a4fbf")
    for i, (color, (name, rows)) in enumerate(zip(colors, loops.items(), strict=False)):
        x = [row["round"] + 0.05 * i for row in rows]
        y = [100 * row["accepted"]["value"] for row in rows]
        low, high = ([100 * row["accepted"][end] for row in rows] for end in ("low", "high"))
        error = [[a - b for a, b in zip(y, low)], [b - a for a, b in zip(y, high)]]
        left.errorbar(x, y, yerr=error, color=color, capsize=3, label=name)
        for before, at, value in zip([{}, *rows], x, y, strict=False):
            promoted = before.get("promoted", True)
            left.plot(at, value, "o", color=color, markerfacecolor=color if promoted else "white")
        for line, mark, _, value_of in GATED_METRICS:
            right.plot(
                x, [value_of(row) for row in rows], line, marker=mark, color=color, markersize=4
            )
    left.set_title("accepted answers to new prompts, %", fontsize=10)
    right.set_title("gated metrics (colours as on the left)", fontsize=10)
    right.legend(
        [Line2D([], [], linestyle=line, marker=mark, color="grey")
         for line, mark, *_ in GATED_METRICS],
        [label for _, _, label, _ in GATED_METRICS], frameon=False, fontsize=9, loc="center",
    )  # fmt: skip
    left.legend(frameon=False, fontsize=9, loc="upper left")
    for axes in (left, right):
        axes.set_ylim(0, 105)
        axes.set_xlabel("round")
        axes.set_xticks(range(max(len(rows) for rows in loops.values())))
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/feedback_loop"))
    parser.add_argument(
        "--base", type=Path, help="run of feedback_loop_base.toml; default OUT/base"
    )
    parser.add_argument("--malicious", type=float, nargs="+", default=[0.0, 0.1])
    parser.add_argument("--trusting", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--users", type=int, default=30)
    parser.add_argument("--prompts", type=int, default=20, help="questions per user and round")
    parser.add_argument(
        "--reviews", type=int, default=16, help="answers of others that each user judges"
    )
    parser.add_argument(
        "--fresh", type=int, default=400, help="number of prompts that measure a round"
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--conversations", type=int, help="only write this number for the base model"
    )
    parser.add_argument(
        "--set", dest="sets", action="append", default=[], help="an option of fastlm run"
    )
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument(
        "--threads", type=int, default=1, help="threads; this small model is not faster on 2"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that its server ends, too
    options.out.mkdir(parents=True, exist_ok=True)
    if options.conversations:
        rows = [*users.conversations(random.Random(options.seed), options.conversations)]
        path = options.out / "conversations.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        text = "\n".join(m["content"] for row in rows for m in row["messages"])
        (options.out / "talk.txt").write_text(text)  # training data of the tokenizer
        return
    base = (options.base or options.out / "base").resolve()
    loops: dict[str, list[dict[str, Any]]] = {}
    variants = [(share, False) for share in options.malicious]
    variants += [(options.malicious[-1], True)] * options.trusting
    for share, trusting in variants:
        name = f"{100 * share:.0f} % malicious users" + ", all trusted" * trusting
        folder = options.out / (f"malicious-{share:g}" + "-trusted" * trusting)
        rounds = folder / "rounds.json"
        loops[name] = json.loads(rounds.read_text()) if rounds.exists() else []
        if len(loops[name]) <= options.rounds:
            loops[name] = run_loop(folder.resolve(), base, share, options, trusting=trusting)
    if options.plot:
        plot(loops, options.plot)
    result = {
        "loops": loops, "seed": options.seed, "command": shlex.join(["python", *sys.argv]),
        "load": os.getloadavg(), "machine": machine(),
    }  # fmt: skip
    print(json.dumps(result))
    save(options.json, result)


if __name__ == "__main__":
    main()
