"""The stage `Simulate`: simulated users of a served model, to rehearse the feedback loop."""

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
    from fastlm.feedback.local_server import HttpReply, LocalServer

DATABASE, LOG = "simulated.db", "serve.log"
ANSWERS = 2  # to each question


@dataclass(frozen=True)
class Simulate(Stage):
    """Serve a model, and let simulated users ask it and judge two answers to each question.

    Their preference is that of a reward model (RLAIF, Lee et al. 2023, arXiv:2309.00267), with
    errors. It takes the path of real feedback: `fastlm serve`, HTTP, a feedback database. No person
    says any of it. A question that is in the data several times is asked once; the first answer to
    it in the data is the text of corrections.
    """

    kind = "simulate"
    command = ("feedback", "simulate")
    version = 2
    inputs = {
        "model": InputSpec(
            ("quantized", "model"), "Model to serve, as for `fastlm serve`", flag="m"
        ),
        "reward_model": InputSpec(("reward",), "Reward model with the preference of the users"),
    }  # fmt: skip
    outputs = {"feedback_db": DATABASE}
    sources_in = ("data",)
    result = {
        "questions": int, "requests": int, "errors": int, "seconds_p50": float,
        "seconds_p99": float, "tokens": int, "tokens_per_second": float,
        "feedback_counts": dict[str, int], "consents": int, "like_rate": dict[str, float],
        "score": float, "agreement": float | None, "users": dict[str, int], "reward_model": str,
    }  # fmt: skip
    notes = f"""The database is OUT/{DATABASE}: `fastlm feedback build OUT/{DATABASE} -o rows`.
The same command starts again from the beginning."""

    data: Annotated[
        tuple[str, ...],
        Positional("Read the users' questions, as for ppo; the answers in them become corrections"),
    ] = ()
    limit: Annotated[int, "Ask at most this many questions, drawn at random"] = 200
    users: Annotated[int, "Simulate this many users, who ask in turn"] = 12
    reviewers: Annotated[int, "Let this many other users judge the same answers"] = 2
    noise: Annotated[float, "Set the error rate of the users"] = 0.1
    malicious_share: Annotated[
        float, "Make this share of the users say the opposite, or anything"
    ] = 0.0
    consent_rate: Annotated[float, "Give consent to store the text of this share of questions"] = (
        0.9
    )
    thumb_threshold: Annotated[float, "Give a thumb up to answers with at least this score"] = 0.0
    clients: Annotated[int, "Send this many concurrent requests"] = 8
    max_new_tokens: Annotated[int, "Limit the tokens per answer"] = 64
    temperature: Annotated[float, "Set the sampling temperature"] = 1.0
    seed: Annotated[int, "Set the seed of the answers and of the users"] = 0

    def check(self) -> None:
        at_least_one(self, "limit", "clients", "max_new_tokens")
        if not self.data:
            raise InputError("data: expected questions, got none")
        if self.users < 2:
            raise InputError(f"users: expected 2 or more, got {self.users}")
        if self.reviewers < 0:
            raise InputError(f"reviewers: expected 0 or more, got {self.reviewers}")
        for name in ("noise", "malicious_share", "consent_rate"):
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

        from fastlm.feedback.local_server import run_local_server
        from fastlm.feedback.pairwise import judge_answers
        from fastlm.feedback.simulated_users import (
            AnsweredQuestion,
            simulate_feedback,
            simulate_users,
        )
        from fastlm.serve.feedback_store import FeedbackStore
        from fastlm.stats.intervals import wilson

        prompts = self._prompts(ctx)
        make_folder(ctx.out)
        for suffix in ("", "-wal", "-shm"):  # left by a run that was killed
            (ctx.out / f"{DATABASE}{suffix}").unlink(missing_ok=True)
        database, log = ctx.out / DATABASE, ctx.out / LOG
        with run_local_server(ctx.path("model"), database, log, torch.get_num_threads()) as server:
            began = time.perf_counter()
            replies = self._ask(server, prompts, ctx)
            seconds = time.perf_counter() - began
            answered = [i for i, reply in enumerate(replies) if reply.status == 200]
            if not answered:
                raise InputError(f"model: expected answers, got none: {_error(replies[0])}")
            texts = [
                [choice["message"]["content"] or "" for choice in replies[i].body["choices"]]
                for i in answered
            ]
            (flat_scores,) = judge_answers(
                [ctx.path("reward_model")], [prompts[i] for i in answered],
                [[text for pair in texts for text in pair]], ctx.warning,
            )  # fmt: skip
            scores = [flat_scores[i : i + ANSWERS] for i in range(0, len(flat_scores), ANSWERS)]
            questions = [
                AnsweredQuestion(replies[i].body["id"], pair, pair_scores, _reference(prompts[i]))
                for i, pair, pair_scores in zip(answered, texts, scores, strict=True)
            ]
            users = simulate_users(self.users, self.malicious_share, self.noise, self.seed)
            feedback = simulate_feedback(
                questions, users, reviewers=self.reviewers, thumb_threshold=self.thumb_threshold,
                seed=self.seed,
            )  # fmt: skip
            feedback_replies = [
                server.post("/v1/feedback", item.body)
                for item in ctx.track(feedback, "giving feedback", unit="requests")
            ]
        with FeedbackStore(database):  # merges the write-ahead log, so that readers change no file
            pass
        failed = [reply for reply in (*replies, *feedback_replies) if reply.status != 200]
        if failed:
            ctx.warning(f"{len(failed):,} requests failed, the first one: {_error(failed[0])}")
        seconds_per_request = [replies[i].seconds for i in answered]
        tokens = sum(replies[i].body["usage"]["completion_tokens"] for i in answered)
        thumbs = [item.body["thumb"] == "up" for item in feedback if item.kind == "thumb"]
        total = max(1, len(thumbs))
        like_rate = wilson(sum(thumbs), total)
        agrees = [item.agrees for item in feedback if item.agrees is not None]
        return {
            "questions": len(prompts), "requests": len(replies) + len(feedback_replies),
            "errors": len(failed),
            "seconds_p50": float(np.quantile(seconds_per_request, 0.5)),
            "seconds_p99": float(np.quantile(seconds_per_request, 0.99)), "tokens": tokens,
            "tokens_per_second": tokens / seconds,
            "feedback_counts": dict(sorted(Counter(item.kind for item in feedback).items())),
            "consents": sum(self._has_consent(prompts[i]) for i in answered),
            "like_rate": {
                "value": sum(thumbs) / total, "low": like_rate.low, "high": like_rate.high,
                "n": len(thumbs),
            },
            "score": float(np.mean(scores)),
            "agreement": sum(agrees) / len(agrees) if agrees else None,
            "users": dict(Counter(user.kind for user in users)),
            "reward_model": ctx.inputs["reward_model"][0].name,
        }  # fmt: skip

    def _prompts(self, ctx: StageContext) -> "list[Prompt]":
        from fastlm.data.prompts import read_prompts

        prompts: dict[str, Prompt] = {}
        for prompt in read_prompts(self.data, cache=ctx.cache_dir):
            prompts.setdefault(prompt.key(), prompt)
        if not prompts:
            raise InputError(f"data: expected questions, got none in {', '.join(self.data)}")
        # not `hash_fraction`: its first prompts are those that trainings hold out
        return sorted(prompts.values(), key=lambda p: self._random_number("order", p))[: self.limit]

    def _random_number(self, purpose: str, prompt: "Prompt") -> int:
        """Return a number below 2^48 that depends only on seed, purpose and prompt."""
        text = f"{self.seed}/{purpose}/{prompt.key()}".encode("utf-8", "replace")
        return int.from_bytes(blake2b(text, digest_size=6).digest(), "big")

    def _has_consent(self, prompt: "Prompt") -> bool:
        return self._random_number("consent", prompt) < self.consent_rate * 2**48

    def _ask(
        self, server: "LocalServer", prompts: "Sequence[Prompt]", ctx: StageContext
    ) -> "list[HttpReply]":
        from fastlm.feedback.local_server import MODEL_NAME

        def ask(prompt: "Prompt") -> "HttpReply":
            body: dict[str, Any] = {
                "model": MODEL_NAME, "messages": prompt.messages, "n": ANSWERS,
                "seed": self._random_number("seed", prompt),
                "max_tokens": self.max_new_tokens, "temperature": self.temperature,
                "store": self._has_consent(prompt),
            }  # fmt: skip
            if prompt.tools is not None:
                body["tools"] = prompt.tools
            return server.post("/v1/chat/completions", body)

        with ThreadPoolExecutor(self.clients) as pool:
            return list(ctx.track(pool.map(ask, prompts), "asking", len(prompts), unit="questions"))

    def summary(self, result: Mapping[str, Any], ctx: StageContext) -> str:
        counts = ", ".join(f"{n:,} {kind}s" for kind, n in result["feedback_counts"].items())
        return (
            f"{ctx.out / DATABASE}: {result['questions']:,} questions, {result['errors']:,} errors;"
            f" simulated users gave {counts} and liked {percent(result['like_rate'])} of answers"
        )

    def report(self, ctx: StageContext, result: Mapping[str, Any]) -> ReportSection:
        counts = ", ".join(f"{n:,} {kind}s" for kind, n in result["feedback_counts"].items())
        agreement = result["agreement"]
        return ReportSection(
            "Deployment with simulated users",
            "A fastlm serve process answered over HTTP. No person said any of this: the users"
            f" prefer answers that the reward model {result['reward_model']} scores higher, with"
            " errors.",
            facts={
                "requests": f"{result['requests']:,}, {result['errors']:,} of them failed",
                "time of a request for two answers": f"{result['seconds_p50']:.2f} s (p50),"
                f" {result['seconds_p99']:.2f} s (p99), {self.clients} concurrent",
                "speed": f"{result['tokens_per_second']:,.0f} tokens/s of {result['tokens']:,}",
                "users": ", ".join(f"{n:,} {kind}" for kind, n in result["users"].items()),
                "feedback": counts,
                "consent to store the text": f"{result['consents']:,} of {result['questions']:,}",
                "mean score": f"{result['score']:+.3f}",
                "agreement with the scores": "no pick, no thumb"
                if agreement is None
                else f"{100 * agreement:.1f} % of picks and thumbs",
            },
            cards=[(percent(result["like_rate"]), "of answers were liked by simulated users")],
        )


def _error(reply: "HttpReply") -> str:
    error = reply.body.get("error")
    message = error.get("message") if isinstance(error, Mapping) else None
    return message or (f"HTTP {reply.status}" if reply.status else "the connection broke")


def _reference(prompt: "Prompt") -> str | None:
    """Return the answer in the row of a prompt, None if it has none."""
    from fastlm.data.conversations import parse_conversation

    try:
        content = parse_conversation(prompt.row).messages[-1].get("content")
    except InputError:
        return None
    return content if isinstance(content, str) and content.strip() else None
