"""The whole circle on this machine: users, feedback, training, gates, promotion, and again.

    python bench/serve/circle.py --conversations 4000            what the model of round 0 learns
    fastlm run bench/serve/circle_base.toml -o runs/circle/base  that model, once (a minute)
    python bench/serve/circle.py --seed 3 --trusting --plot docs/circle.png
                                                           three rounds, each without and with
                                                           malicious users, and all trusted

One `fastlm serve` runs all the time. In each round it answers the simulated users of `fastlm
feedback simulate`, who ask what users.py says and post to /v1/feedback; `fastlm run
recipes/improve.toml --until winrate` builds rows from the database and trains the model of round 0
again on all feedback so far; `fastlm gate` decides by circle_gates.toml whether it may replace the
one that serves; if so, `fastlm promote` with the admin key puts it in the server. Some feedback
comes a round late, some without consent to keep the text, some consent is withdrawn. Then the
server answers prompts that no user asked, and the hidden preference, which nothing else sees, says
which answers it accepts.

`--malicious 0 0.1`: the share of users who say the opposite or anything; one circle per share.
`--trusting` adds the last circle again with every rater trusted, to show what the weights do. A
circle whose rounds.json is complete is not run again, so that several processes may run one each;
one that was interrupted is started again in another --out, or after its folder is deleted.
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
import torch
import users
from harness import ROOT, machine, save

from fastlm.data.prompts import Prompt
from fastlm.evals.suite import model_id
from fastlm.feedback.gate import Gate
from fastlm.feedback.gate_metrics import difference
from fastlm.feedback.local_server import run_local_server
from fastlm.feedback.pairwise import generate_answers, win_rate_interval
from fastlm.feedback.simulated_users import AnsweredQuestion, SimulatedUser, simulate_users
from fastlm.feedback.stage import FeedbackBuild
from fastlm.serve.feedback_store import FeedbackStore
from fastlm.stages import run_recipe
from fastlm.stats.intervals import wilson

GATES = Path(__file__).parent / "circle_gates.toml"
SAMPLING = {"max_tokens": 80, "temperature": 0.9}
CLIENTS = 8
ANSWERS = 4  # to a prompt, where gates count answers
NAME = "tiny"  # of the model, for its clients
LATE, NO_CONSENT, WITHDRAWN = 0.1, 0.1, 0.03
NOISE = 0.1  # how often a user errs
LIKED = 3.5  # points from which an answer deserves a thumb up: one small fault is forgiven
# Of the tiny model; a larger one wants smaller rates
TRAINING = (
    "feedback.test=0.4", "feedback.judge=0.25", "sft.lr=5e-4", "sft.epochs=1", "sft.batch_size=4",
    "sft.gradient_accumulation_steps=1", "dpo.lr=3e-4", "dpo.epochs=1", "dpo.batch_size=8",
    "dpo.gradient_accumulation_steps=1",
    "dpo.beta=0.1", "dpo.sft_weight=0.2", "winrate.max_new_tokens=80", "winrate.temperature=0.9",
    f"winrate.num_generations={ANSWERS}", "winrate.limit=400", "sft.sample_at=[]",
    "dpo.sample_at=[]", "sft.validations=1", "dpo.validations=1", "eval.stride=128",
    *(f"{judge}.{option}" for judge in ("judge", "judge-2", "judge-3")
      for option in ("lr=1e-3", "epochs=3", "gradient_accumulation_steps=1", "validations=0")),
)  # fmt: skip


@dataclass(frozen=True)
class Server:
    """A `fastlm serve` in a process of its own, its client and the keys that it takes."""

    url: str
    client: httpx.Client
    admin_key: str

    def promote(self, model: Path) -> None:
        """Let ``model`` answer from now on, by `fastlm promote`."""
        words = [sys.executable, "-m", "fastlm", "promote", str(model), "--server", self.url]
        done = subprocess.run(
            words, env=os.environ | {"FASTLM_API_KEY": self.admin_key}, capture_output=True,
            text=True, cwd=ROOT,
        )  # fmt: skip
        if done.returncode:
            raise SystemExit(f"fastlm promote {model}: {done.stderr.strip()}")


@contextmanager
def served(model: Path, models: Path, database: Path, log: Path) -> Iterator[Server]:
    """Context: `fastlm serve` of ``model``, which may be replaced by those below ``models``."""
    admin_key = secrets.token_hex(16)
    options = ("--models-dir", str(models))
    with run_local_server(
        model, database, log, 1, *options, name=NAME, admin_key=admin_key
    ) as server:
        url = f"http://127.0.0.1:{server.port}"
        headers = {"Authorization": f"Bearer {server.key}"}
        with httpx.Client(base_url=url, timeout=120, trust_env=False, headers=headers) as client:
            yield Server(url, client, admin_key)


def ask_all(
    client: httpx.Client, asked: Sequence[users.Ask], n: int, seed: int
) -> list[tuple[str, list[str]]]:
    """Return the response's id and its ``n`` answers, per question."""

    def one(i: int) -> tuple[str, list[str]]:
        body = {
            "model": NAME, "messages": messages(asked[i]), "n": n, "seed": seed + i, **SAMPLING,
        }  # fmt: skip
        told = client.post("/v1/chat/completions", json=body).raise_for_status().json()
        texts = [choice["message"]["content"] or "" for choice in told["choices"]]
        return told["id"], texts

    with ThreadPoolExecutor(CLIENTS) as pool:
        return list(pool.map(one, range(len(asked))))


def messages(asked: users.Ask) -> list[dict[str, str]]:
    return [{"role": "user", "content": asked.text}]


class Round:
    """What users say in one round, as bodies of /v1/feedback."""

    def __init__(self, client: httpx.Client, people: Sequence[SimulatedUser], seed: int):
        self.client, self.people = client, people
        self.draw = random.Random(f"round/{seed}")
        self.seed = seed
        self.now: list[dict[str, Any]] = []
        self.late: list[dict[str, Any]] = []
        self.ids: list[str] = []  # whose text is kept
        self.asked: set[str] = set()

    def run(self, prompts: int, reviews: int) -> None:
        """Every user asks ``prompts`` questions, and judges ``reviews`` answers of others."""
        owners = [user for user in self.people for _ in range(prompts)]
        asked = [users.ask(self.draw) for _ in owners]
        self.asked = {question.text for question in asked}
        answered = ask_all(self.client, asked, 2, self.seed * 1_000_000)
        kept = []
        for user, question, (id, texts) in zip(owners, asked, answered, strict=True):
            consent = self.draw.random() >= NO_CONSENT and all(text.strip() for text in texts)
            answers = AnsweredQuestion(
                id, texts, [users.points(question, text) for text in texts], None
            )
            written = users.correction(question, user)
            bodies = [said.body for said in user.give_feedback(answers, LIKED, written)]
            late = user.draw.random() < LATE
            if consent and bodies:
                talk = {"consent": True, "messages": messages(question), "choices": texts}
                bodies[0]["conversation"] = talk
                if not late:
                    self.ids.append(id)
                    kept.append((user, answers))
            (self.late if late else self.now).extend(bodies)
        shared = self.draw.sample(kept, min(len(kept), max(1, len(self.people) * reviews // 6)))
        for user in self.people:
            others = [answers for owner, answers in shared if owner is not user]
            for answers in self.draw.sample(others, min(len(others), reviews)):
                self.now += [said.body for said in user.give_feedback(answers, LIKED)]


def measure(
    client: httpx.Client, count: int, seed: int, heard: Collection[str] = ()
) -> dict[str, Any]:
    """Return what the hidden preference says of answers to ``count`` different prompts of the
    users' kind that are not in ``heard``, and how many unheard requests for harm are refused."""
    draw = random.Random(f"fresh/{seed}")
    drawn = (users.ask(draw, harmful=0) for _ in range(100 * count))
    fresh = {one.text: one for one in drawn if one.text not in heard}
    asked = [*fresh.values()][:count]
    texts = [t for _, (t,) in ask_all(client, asked, 1, 10**9 + seed * 1_000_000)]
    harmful = harm(heard)
    refused = [t for _, (t,) in ask_all(client, harmful, 1, 2 * 10**9 + seed * 1_000_000)]
    faults = [users.faults(a, t) for a, t in zip(asked, texts, strict=True)]
    return {
        "accepted": rate([users.accepted(a, t) for a, t in zip(asked, texts, strict=True)]),
        "points": sum(map(users.points, asked, texts)) / len(asked),
        "words": sum(len(text.split()) for text in texts) / len(asked),
        **{name: rate([name not in found for found in faults]) for name in users.WANTED},
        "refused_harmful": rate([users.refuses(text) for text in refused]),
        "refused_harmless": rate([users.refuses(text) for text in texts]),
        "different": len({*texts}) / len(asked),
    }


def rate(hits: Sequence[bool]) -> dict[str, float]:
    found = wilson(sum(hits), len(hits))
    return {"value": sum(hits) / len(hits), "low": found.low, "high": found.high, "n": len(hits)}


def harm(heard: Collection[str] = ()) -> list[users.Ask]:
    """The requests for harm that are not in ``heard``."""
    return [one for one in users.harmful() if one.text not in heard]


def measure_harm(model: Path, out: Path, heard: Collection[str]) -> dict[str, float]:
    """Write ``out``/scores.json for `fastlm gate`: the share of answers to unheard requests for
    harm that are refusals."""
    prompts = [Prompt(messages(one), {}) for one in harm(heard)]
    texts = generate_answers(
        model,
        prompts,
        num_generations=ANSWERS,
        max_new_tokens=80,
        temperature=SAMPLING["temperature"],
    )
    refuses = [float(users.refuses(one.text)) for one in texts]
    found = win_rate_interval(refuses, ANSWERS)
    refused = {
        "value": sum(refuses) / len(refuses), "low": found.low, "high": found.high,
        "n": len(prompts),
    }  # fmt: skip
    out.mkdir()
    told = {"scores": {"refused": refused}, "ids": [{"name": model.name, "id": model_id(model)}]}
    (out / "scores.json").write_text(json.dumps(told))
    return refused


def post(client: httpx.Client, bodies: Sequence[dict[str, Any]]) -> None:
    """Send feedback; users send at the same time, and each of them in order."""
    own: dict[str, list[dict[str, Any]]] = {}
    for body in bodies:
        own.setdefault(body["rater"], []).append(body)

    def send(said: Sequence[dict[str, Any]]) -> None:
        for body in said:
            client.post("/v1/feedback", json=body).raise_for_status()

    with ThreadPoolExecutor(CLIENTS) as pool:
        list(pool.map(send, own.values()))


def hidden_wins(path: Path) -> dict[str, float]:
    """Return how often the hidden preference prefers the new answers of winrate/answers.jsonl."""
    rows = hidden_points(path)
    wins = [1.0 if better > 0 else 0.5 if better == 0 else 0.0 for _, better in rows]
    prompts = {row["prompt"][-1]["content"] for row, _ in rows}
    found = win_rate_interval(wins, len(wins) // len(prompts))
    return {"value": sum(wins) / len(wins), "low": found.low, "high": found.high}


def judge_right(path: Path) -> dict[str, float] | None:
    """Return how often the judges prefer, of two answers of winrate/answers.jsonl that differ for
    the hidden preference, the one that it prefers; None where none differ."""
    right = [
        (row["score_new"] - row["score_old"]) * better > 0
        for row, better in hidden_points(path)
        if better
    ]
    return rate(right) if right else None


def hidden_points(path: Path) -> list[tuple[dict[str, Any], float]]:
    """The rows of winrate/answers.jsonl, each with the hidden points of its new answer less those
    of its old one."""
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    asked = [asked_of(row["prompt"][-1]["content"]) for row in rows]
    return [
        (row, users.points(one, row["new"]) - users.points(one, row["old"]))
        for row, one in zip(rows, asked, strict=True)
    ]


def left_out(path: Path) -> list[str]:
    """Return the raters of raters.json whose rows were left out."""
    least = FeedbackBuild().min_rater_weight
    return [name for name, one in json.loads(path.read_text()).items() if one["weight"] < least]


def asked_of(text: str) -> users.Ask:
    topic = next((t for t in sorted(users.TOPICS, key=len, reverse=True) if f" {t}" in text), "")
    word = next(w for w in users.WORDS if f" {w}" in text.partition("word")[2] + text[-20:])
    return users.Ask(text, topic, word)


def circle(
    out: Path, base: Path, malicious: float, options: argparse.Namespace, *, trusting: bool = False
) -> list[dict[str, Any]]:
    """Run the rounds; return a row per round, the first of the model before them. "rise": of the
    share accepted, above the round before, with its interval."""
    if out.exists():
        raise SystemExit(f"{out}: expected a new folder, it has a circle that was interrupted")
    out.mkdir(parents=True)
    weights = ["feedback.min_rater_weight=0.0"] if trusting else []
    raters = simulate_users(options.users, malicious, NOISE, options.seed)
    database, talk, rows = out / "feedback.db", out / "talk.txt", []
    unheard = users.conversations(random.Random(f"talk/{options.seed}"), 100)
    talk.write_text("\n".join(m["content"] for row in unheard for m in row["messages"]))
    model, late = base / "sft", []
    heard: set[str] = set()  # all that users asked so far
    with served(model, out, database, out / "serve.log") as server:
        for number in range(options.rounds + 1):
            began = time.monotonic()
            seed = options.seed * 1000 + number
            measured = measure(server.client, options.fresh, seed, heard)
            rise = {"rise": difference(measured["accepted"], rows[-1]["accepted"])} if rows else {}
            row: dict[str, Any] = {
                "round": number, "model": answering(server.client), **measured, **rise
            }  # fmt: skip
            rows.append(row)
            print(json.dumps(row), flush=True)
            if number == options.rounds:
                break
            said = Round(server.client, raters, seed)
            said.run(options.prompts, options.reviews)
            post(server.client, [*late, *said.now])
            late, heard = said.late, heard | said.asked
            with FeedbackStore(database) as store:
                gone = said.draw.sample(said.ids, round(WITHDRAWN * len(said.ids)))
                for id in gone:
                    store.forget(id)
            new = out / f"round-{number + 1}"
            sets = [f"seed={options.seed}", *weights, *options.sets]
            told = improve(new, model, base / "sft", database, talk, heard, sets)
            said_by = Counter(
                kind for body in said.now for kind in ("thumb", "corrected", "preferred_over")
                if kind in body
            )  # fmt: skip
            row |= {"said": dict(said_by), "late": len(late), "withdrawn": len(gone), **told}
            if told["promoted"]:
                model = new / "dpo"
                server.promote(model)
            row["seconds"] = time.monotonic() - began
    (out / "rounds.json").write_text(json.dumps(rows, indent=1))
    return rows


def answering(client: httpx.Client) -> str:
    """The name of the model that answers: NAME@ and a hash of its files."""
    body = {"model": NAME, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1}
    return client.post("/v1/chat/completions", json=body).raise_for_status().json()["model"]


def improve(
    out: Path,
    model: Path,
    base: Path,
    database: Path,
    talk: Path,
    heard: Collection[str],
    more: Sequence[str],
) -> dict[str, Any]:
    """Train ``base`` on all feedback so far by the recipe, and compare with ``model``, which serves
    now, by the gates; return what they decided, and the figures of the new model."""
    sets = [
        f'feedback.database=["{database}"]', f'inputs.old="{model}"', f'inputs.start="{base}"',
        f'eval.data="{talk}"',
        "feedback.decontaminate=[]",  # no evaluation asks in this language
        *TRAINING, *more,
    ]  # fmt: skip
    results = run_recipe(
        ROOT / "recipes" / "improve.toml", out, overrides=sets, until="winrate",
        command=" ".join(["fastlm run recipes/improve.toml", *(f"--set '{s}'" for s in sets)]),
    )["stages"]  # fmt: skip
    refused = measure_harm(out / "dpo", out / "harm", heard)
    decision = Gate(gates=str(GATES))(
        out / "decision", scores=[out / "winrate", out / "eval", out / "harm"]
    )
    bits = [m["bits_per_byte"] for m in results["eval"]["models"].values()]
    return {
        "promoted": decision["promoted"],
        "why": [g["reason"] for g in decision["gates"] if not g["passed"]],
        "rows": results["feedback"]["rows"], "raters": results["feedback"]["raters"],
        "left_out": left_out(out / "feedback" / "raters.json"),
        "winrate": results["winrate"]["scores"]["rate"],
        "length": results["winrate"]["scores"]["length"],
        "score": results["winrate"]["scores"]["score"],
        "hidden_winrate": hidden_wins(out / "winrate" / "answers.jsonl"),
        "judge_accuracy": results["winrate"]["scores"].get("judge"),
        "judge_right": judge_right(out / "winrate" / "answers.jsonl"),
        "refused": refused, "bits_old": bits[0], "bits_new": bits[1],
    }  # fmt: skip


HELD: tuple[tuple[Any, str, str, Callable[[dict[str, Any]], float]], ...] = (
    ("-", "o", "refuses harm, %", lambda row: 100 * row["refused_harmful"]["value"]),
    ("--", "^", "on the topic, %", lambda row: 100 * row["topic"]["value"]),
    (":", "s", "different answers, %", lambda row: 100 * row["different"]),
    ("-.", "D", "words of an answer", lambda row: row["words"]),
)


def plot(circles: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Left what users want, right what shall not change; a hollow point is of a model whose
    successor the gates refused."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    figure = Figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    colors = ("#2f6fde", "#d9822b", "#8a4fbf")
    for i, (color, (name, rows)) in enumerate(zip(colors, circles.items(), strict=False)):
        x = [row["round"] + 0.05 * i for row in rows]
        y = [100 * row["accepted"]["value"] for row in rows]
        low, high = ([100 * row["accepted"][end] for row in rows] for end in ("low", "high"))
        error = [[a - b for a, b in zip(y, low)], [b - a for a, b in zip(y, high)]]
        left.errorbar(x, y, yerr=error, color=color, capsize=3, label=name)
        for before, at, value in zip([{}, *rows], x, y, strict=False):
            kept = before.get("promoted", True)
            left.plot(at, value, "o", color=color, markerfacecolor=color if kept else "white")
        for line, mark, _, told in HELD:
            right.plot(x, [told(row) for row in rows], line, marker=mark, color=color, markersize=4)
    left.set_title("fresh answers that users would accept, %", fontsize=10)
    right.set_title("what shall hold (colours as on the left)", fontsize=10)
    right.legend(
        [Line2D([], [], linestyle=line, marker=mark, color="grey") for line, mark, *_ in HELD],
        [label for _, _, label, _ in HELD], frameon=False, fontsize=9, loc="center",
    )  # fmt: skip
    left.legend(frameon=False, fontsize=9, loc="upper left")
    for axes in (left, right):
        axes.set_ylim(0, 105)
        axes.set_xlabel("round")
        axes.set_xticks(range(max(len(rows) for rows in circles.values())))
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/circle"))
    parser.add_argument("--base", type=Path, help="run of circle_base.toml; default OUT/base")
    parser.add_argument("--malicious", type=float, nargs="+", default=[0.0, 0.1])
    parser.add_argument("--trusting", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--users", type=int, default=30)
    parser.add_argument("--prompts", type=int, default=20, help="per user and round")
    parser.add_argument("--reviews", type=int, default=16, help="answers of others, per user")
    parser.add_argument("--fresh", type=int, default=400, help="prompts that measure a round")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--conversations", type=int, help="only write so many for the base, and end"
    )
    parser.add_argument("--set", dest="sets", action="append", default=[], help="as of fastlm run")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument(
        "--threads", type=int, default=1, help="this small model is not faster on 2"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # its server ends, too
    options.out.mkdir(parents=True, exist_ok=True)
    if options.conversations:
        rows = [*users.conversations(random.Random(options.seed), options.conversations)]
        path = options.out / "conversations.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        text = "\n".join(m["content"] for row in rows for m in row["messages"])
        (options.out / "talk.txt").write_text(text)  # of which the tokenizer learns the words
        return
    base = (options.base or options.out / "base").resolve()
    circles: dict[str, list[dict[str, Any]]] = {}
    expected = [(bad, False) for bad in options.malicious]
    expected += [(options.malicious[-1], True)] * options.trusting
    for bad, trusting in expected:
        name = f"{100 * bad:.0f} % malicious users" + ", all trusted" * trusting
        folder = options.out / (f"malicious-{bad:g}" + "-trusted" * trusting)
        done = folder / "rounds.json"
        circles[name] = json.loads(done.read_text()) if done.exists() else []
        if len(circles[name]) <= options.rounds:
            circles[name] = circle(folder.resolve(), base, bad, options, trusting=trusting)
    if options.plot:
        plot(circles, options.plot)
    told = {
        "circles": circles, "seed": options.seed, "command": shlex.join(["python", *sys.argv]),
        "load": os.getloadavg(), "machine": machine(),
    }  # fmt: skip
    print(json.dumps(told))
    save(options.json, told)


if __name__ == "__main__":
    main()
