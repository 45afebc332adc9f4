"""The stage `Simulate`: simulated users of a served model, before real ones come."""

from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING, Annotated, Any

from fastlm.data.conversations import FORMATS
from fastlm.errors import InputError
from fastlm.feedback.gate_metrics import percent
from fastlm.files import make_folder
from fastlm.pipeline.stage import (
    InputSpec,
    Positional,
    ReportSection,
    Stage,
    StageContext,
    at_least_one,
)
from fastlm.sources.input_digest import InputDigest

if TYPE_CHECKING:
    from fastlm.data.prompts import Prompt
    from fastlm.feedback.local_server import Reply, Served

DATABASE, LOG = "simulated.db", "serve.log"
ANSWERS = 2  # to each question


@dataclass(frozen=True)
class Simulate(Stage):
    """Serve a model, and let simulated users ask it and judge two answers to each question.

    Their preference is a reward model's (RLAIF, Lee et al. 2023, arXiv:2309.00267), with errors,
    over the way that real feedback takes: `fastlm serve`, HTTP, a feedback database. No person has
    said any of it. A question that the data has several times is asked once, and the first one's
    answer is what is written as a correction.
    """

    kind = "simulate"
    command = ("feedback", "simulate")
    version = 2
    inputs = {
        "model": InputSpec(
            ("quantized", "model"), "Model to serve: as for `fastlm serve`", flag="m"
        ),
        "reward_model": InputSpec(("reward",), "Its scores are what the users prefer"),
    }  # fmt: skip
    outputs = {"feedback_db": DATABASE}
    sources_in = ("data",)
    result = {
        "questions": int, "requests": int, "errors": int, "seconds_p50": float,
        "seconds_p99": float, "tokens": int, "tokens_per_second": float, "kinds": dict[str, int],
        "consented": int, "liked": dict[str, float], "score": float, "agreement": float | None,
        "users": dict[str, int], "reward_model": str,
    }  # fmt: skip
    notes = f"""The database is OUT/{DATABASE}: `fastlm feedback build OUT/{DATABASE} -o rows`.
The same command starts again from nothing."""

    data: Annotated[
        tuple[str, ...],
        Positional("What users ask, as for ppo; answers in it are what they write as corrections"),
    ] = ()
    limit: Annotated[int, "Questions, drawn at random"] = 200
    users: Annotated[int, "Users, who take turns to ask"] = 12
    reviews: Annotated[int, "Other users who judge the same two answers"] = 2
    noise: Annotated[float, "How often a user errs"] = 0.1
    malicious: Annotated[float, "Share of the users who say the opposite, or anything"] = 0.0
    consent: Annotated[float, "Share of the questions whose text may be kept"] = 0.9
    liked: Annotated[float, "Score from which an answer deserves a thumb up"] = 0.0
    clients: Annotated[int, "Requests at the same time"] = 8
    max_new_tokens: Annotated[int, "Most tokens per answer"] = 64
    temperature: Annotated[float, "Of sampling"] = 1.0
    seed: Annotated[int, "Seed of the answers and of the users"] = 0

    def check(self) -> None:
        at_least_one(self, "limit", "clients", "max_new_tokens")
        if not self.data:
            raise InputError("data: expected questions, got none")
        if self.users < 2:
            raise InputError(f"users: expected 2 or more, got {self.users}")
        if self.reviews < 0:
            raise InputError(f"reviews: expected 0 or more, got {self.reviews}")
        for name in ("noise", "malicious", "consent"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name}: expected a share, 0 to 1, got {getattr(self, name)}")
        if not self.temperature > 0:
            raise InputError(
                f"temperature: expected above 0, so that two answers differ, got {self.temperature}"
            )

    def digest_inputs(self, input_digest: InputDigest) -> Any:
        return input_digest.hash_sources(self.data, FORMATS)

    def run(self, ctx: StageContext) -> dict[str, Any]:
        import time

        import numpy as np
        import torch

        from fastlm.feedback.local_server import serving
        from fastlm.feedback.pairwise import judged
        from fastlm.feedback.simulated_users import Question, simulate_feedback, simulate_users
        from fastlm.serve.feedback_store import FeedbackStore
        from fastlm.stats.intervals import wilson

        prompts = self._prompts(ctx)
        make_folder(ctx.out)
        for end in ("", "-wal", "-shm"):  # of a start that was cut off
            (ctx.out / f"{DATABASE}{end}").unlink(missing_ok=True)
        database, log = ctx.out / DATABASE, ctx.out / LOG
        with serving(ctx.path("model"), database, log, torch.get_num_threads()) as served:
            began = time.perf_counter()
            replies = self._ask(served, prompts, ctx)
            seconds = time.perf_counter() - began
            whole = [i for i, reply in enumerate(replies) if reply.status == 200]
            if not whole:
                raise InputError(f"model: expected answers, got none: {_why(replies[0])}")
            texts = [
                [choice["message"]["content"] or "" for choice in replies[i].body["choices"]]
                for i in whole
            ]
            rewards, answers = [ctx.path("reward_model")], [text for pair in texts for text in pair]
            (scored,) = judged(rewards, [prompts[i] for i in whole], [answers], ctx.warning)
            points = [scored[i : i + ANSWERS] for i in range(0, len(scored), ANSWERS)]
            asked = [
                Question(replies[i].body["id"], pair, two, _reference(prompts[i]))
                for i, pair, two in zip(whole, texts, points, strict=True)
            ]
            users = simulate_users(self.users, self.malicious, self.noise, self.seed)
            said = simulate_feedback(
                asked, users, reviews=self.reviews, liked=self.liked, seed=self.seed
            )
            posted = [
                served.post("/v1/feedback", one.body)
                for one in ctx.track(said, "giving feedback", unit="requests")
            ]
        with FeedbackStore(database):  # its log of writes ends in it: readers leave it as it is
            pass
        failed = [reply for reply in (*replies, *posted) if reply.status != 200]
        if failed:
            ctx.warning(f"{len(failed):,} requests failed, the first one: {_why(failed[0])}")
        took = [replies[i].seconds for i in whole]
        tokens = sum(replies[i].body["usage"]["completion_tokens"] for i in whole)
        thumbs = [one.body["thumb"] == "up" for one in said if one.kind == "thumb"]
        total = max(1, len(thumbs))
        liked = wilson(sum(thumbs), total)
        agrees = [one.agrees for one in said if one.agrees is not None]
        return {
            "questions": len(prompts), "requests": len(replies) + len(posted),
            "errors": len(failed), "seconds_p50": float(np.quantile(took, 0.5)),
            "seconds_p99": float(np.quantile(took, 0.99)), "tokens": tokens,
            "tokens_per_second": tokens / seconds,
            "kinds": dict(sorted(Counter(one.kind for one in said).items())),
            "consented": sum(self._consents(prompts[i]) for i in whole),
            "liked": {
                "value": sum(thumbs) / total, "low": liked.low, "high": liked.high,
                "n": len(thumbs),
            },
            "score": float(np.mean(points)),
            "agreement": sum(agrees) / len(agrees) if agrees else None,
            "users": dict(Counter(user.kind for user in users)),
            "reward_model": ctx.inputs["reward_model"][0].name,
        }  # fmt: skip

    def _prompts(self, ctx: StageContext) -> "list[Prompt]":
        from fastlm.data.prompts import read_prompts

        found: dict[str, Prompt] = {}
        for one in read_prompts(self.data, cache=ctx.cache_dir):
            found.setdefault(one.key(), one)
        if not found:
            raise InputError(f"data: expected questions, got none in {', '.join(self.data)}")
        # not `hash_fraction`: its first prompts are those that trainings hold out
        return sorted(found.values(), key=lambda one: self._number("order", one))[: self.limit]

    def _number(self, what: str, prompt: "Prompt") -> int:
        """A number below 2^48 that the seed and the prompt decide."""
        text = f"{self.seed}/{what}/{prompt.key()}".encode("utf-8", "replace")
        return int.from_bytes(blake2b(text, digest_size=6).digest(), "big")

    def _consents(self, prompt: "Prompt") -> bool:
        return self._number("consent", prompt) < self.consent * 2**48

    def _ask(
        self, served: "Served", prompts: "Sequence[Prompt]", ctx: StageContext
    ) -> "list[Reply]":
        from fastlm.feedback.local_server import NAME

        def one(prompt: "Prompt") -> "Reply":
            body: dict[str, Any] = {
                "model": NAME, "messages": prompt.messages, "n": ANSWERS,
                "seed": self._number("seed", prompt),
                "max_tokens": self.max_new_tokens, "temperature": self.temperature,
                "store": self._consents(prompt),
            }  # fmt: skip
            if prompt.tools is not None:
                body["tools"] = prompt.tools
            return served.post("/v1/chat/completions", body)

        with ThreadPoolExecutor(self.clients) as pool:
            return list(ctx.track(pool.map(one, prompts), "asking", len(prompts), unit="questions"))

    def summary(self, result: Mapping[str, Any], ctx: StageContext) -> str:
        kinds = ", ".join(f"{n:,} {kind}s" for kind, n in result["kinds"].items())
        return (
            f"{ctx.out / DATABASE}: {result['questions']:,} questions, {result['errors']:,} errors;"
            f" simulated users gave {kinds}, and liked {percent(result['liked'])}"
        )

    def report(self, ctx: StageContext, result: Mapping[str, Any]) -> ReportSection:
        kinds = ", ".join(f"{n:,} {kind}s" for kind, n in result["kinds"].items())
        agreement = result["agreement"]
        return ReportSection(
            "Deployment, and its first users: simulated ones",
            "A fastlm serve process answered over HTTP. No person said any of this: the users"
            f" prefer what the reward model {result['reward_model']} scores higher, with errors.",
            facts={
                "requests": f"{result['requests']:,}, {result['errors']:,} of them failed",
                "time of a request for two answers": f"{result['seconds_p50']:.2f} s (p50),"
                f" {result['seconds_p99']:.2f} s (p99), {self.clients} at the same time",
                "speed": f"{result['tokens_per_second']:,.0f} tokens/s of {result['tokens']:,}",
                "users": ", ".join(f"{n:,} {kind}" for kind, n in result["users"].items()),
                "feedback": kinds,
                "consent to keep the text": f"{result['consented']:,} of {result['questions']:,}",
                "mean score": f"{result['score']:+.3f}",
                "agree with the scores": "no pick, no thumb"
                if agreement is None
                else f"{100 * agreement:.1f} % of picks and thumbs",
            },
            cards=[(percent(result["liked"]), "of answers were liked by simulated users")],
        )


def _why(reply: "Reply") -> str:
    error = reply.body.get("error")
    said = error.get("message") if isinstance(error, Mapping) else None
    return said or (f"HTTP {reply.status}" if reply.status else "the connection broke")


def _reference(prompt: "Prompt") -> str | None:
    """The answer in the row that a prompt was read from, None if it has none."""
    from fastlm.data.conversations import conversation_of

    try:
        content = conversation_of(prompt.row).messages[-1].get("content")
    except InputError:
        return None
    return content if isinstance(content, str) and content.strip() else None
