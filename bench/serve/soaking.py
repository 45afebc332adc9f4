"""What clients of a soak send: all that the API has, politely or not.

Every prompt carries a marker that its answer has to begin with (the server's grammar sees to it),
so an answer that reached another client would show. Half of the prompts begin with the same text,
which the server's prefix cache has.
"""

import json
import random
import time
from dataclasses import dataclass
from typing import Any

import httpx
from traffic import NEW_TOKENS, SAMPLING, WORDS, Load, ask, counted

SYSTEM = " ".join(random.Random(0).choice(WORDS) for _ in range(150))
PROMPT_WORDS = (16, 160)  # beside those of SYSTEM
TOOL_TOKENS = 256  # a call with a marker is shorter
UNKIND = (b"{", b'{"model": 1}', b"\xff" * 64, b"[" * 4000, b'{"messages": [], "model": "x"}')


@dataclass
class Sent:
    """A request, and what its answers have to begin with."""

    path: str
    body: dict[str, Any]
    begins: str


def request_of(draw: random.Random, model: str, marker: str) -> Sent:
    """A chat (one in eight with a tool that has to be called) or, in one of five, a completion; one
    in eight has two answers, one in five is not streamed."""
    words = " ".join(draw.choice(WORDS) for _ in range(draw.randint(*PROMPT_WORDS)))
    shared = draw.random() < 0.5
    body: dict[str, Any] = {
        "model": model, "max_tokens": draw.randint(*NEW_TOKENS), "seed": draw.randrange(2**31),
        **SAMPLING,
    }  # fmt: skip
    if draw.random() < 0.8:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    if draw.random() < 1 / 8:
        body["n"] = 2
    form = {"structured_outputs": {"regex": f"{marker} [a-z ]*"}}
    if draw.random() < 0.2:
        text = f"{SYSTEM} {marker} {words}" if shared else f"{marker} {words}"
        return Sent("completions", body | form | {"prompt": text}, f"{marker} ")
    messages = [{"role": "user", "content": f"{marker} {words}"}]
    if shared:
        messages.insert(0, {"role": "system", "content": SYSTEM})
    body["messages"] = messages
    if draw.random() >= 1 / 8:
        return Sent("chat/completions", body | form, f"{marker} ")
    arguments = {
        "type": "object", "properties": {"marker": {"const": marker}}, "required": ["marker"],
        "additionalProperties": False,
    }  # fmt: skip
    tool = {"type": "function", "function": {"name": "note", "parameters": arguments}}
    body |= {"tools": [tool], "tool_choice": "required", "max_tokens": TOOL_TOKENS}
    return Sent("chat/completions", body, json.dumps({"marker": marker}))


async def whole(
    http: httpx.AsyncClient, sent: Sent, load: Load, patience: float | None
) -> tuple[str, dict[int, str]] | None:
    """The id and the answers of a request that is not streamed; None: not before the client, after
    `patience` seconds, has left."""
    began = time.perf_counter()
    limit = http.timeout if patience is None else patience
    try:
        response = await http.post(sent.path, json=sent.body, timeout=limit)
    except httpx.ReadTimeout:
        if patience is None:
            raise
        return None
    if response.status_code != 200:
        raise RuntimeError(f"{response.status_code}: {response.text:.200}")
    told = response.json()
    load.latency.append(time.perf_counter() - began)
    counted(load, sent.body, told["usage"])
    return told["id"], {choice["index"]: _said(choice) for choice in told["choices"]}


def _said(choice: dict[str, Any]) -> str:
    message = choice.get("message") or {"content": choice.get("text")}
    calls = message.get("tool_calls") or ()
    return (message["content"] or "") + "".join(c["function"]["arguments"] for c in calls)


async def embed(http: httpx.AsyncClient, model: str, marker: str, load: Load) -> None:
    """Embed two texts, one of them twice: a vector of another request would show."""
    texts = [f"{marker} tree", f"{marker} river", f"{marker} tree"]
    response = await http.post("embeddings", json={"model": model, "input": texts})
    if response.status_code != 200:
        raise RuntimeError(f"{response.status_code}: {response.text:.200}")
    first, other, again = (one["embedding"] for one in response.json()["data"])
    if first != again or first == other:
        load.faults.append(f"crossed: embeddings of {marker}")
    load.ended["embedded"] += 1


async def like(http: httpx.AsyncClient, id: str, marker: str, load: Load) -> None:
    """Tell the server what an answer is worth."""
    feedback = {"response_id": id, "thumb": "up", "comment": marker}
    response = await http.post("feedback", json=feedback)
    if response.status_code != 200:
        raise RuntimeError(f"feedback: {response.status_code}: {response.text:.200}")
    load.ended["liked"] += 1


async def malformed(http: httpx.AsyncClient, draw: random.Random, load: Load) -> None:
    response = await http.post(
        "chat/completions",
        content=draw.choice(UNKIND),
        headers={"content-type": "application/json"},
    )
    load.ended[f"malformed, {response.status_code}"] += 1
    if not 400 <= response.status_code < 500:
        load.faults.append(f"a malformed body got {response.status_code}: {response.text:.100}")


async def take_turn(
    http: httpx.AsyncClient, draw: random.Random, load: Load, model: str, marker: str
) -> None:
    """`_take_turn`; a model whose chat template writes no tools refuses them, as it should."""
    try:
        await _take_turn(http, draw, load, model, marker)
    except RuntimeError as error:
        if "400" not in str(error) or "chat template does not write" not in str(error):
            raise
        load.ended["tools, 400"] += 1


async def _take_turn(
    http: httpx.AsyncClient, draw: random.Random, load: Load, model: str, marker: str
) -> None:
    """Be malformed, embed, or ask, leaving in the middle of one answer in five."""
    kind = draw.random()
    if kind < 0.1:
        return await malformed(http, draw, load)
    if kind < 0.15:
        return await embed(http, model, marker, load)
    sent, leaves, likes = request_of(draw, model, marker), draw.random() < 0.2, draw.random() < 0.2
    if sent.body.get("stream"):
        quits = draw.randint(1, 20) if leaves else 0
        answered = await ask(http, sent.body, load, path=sent.path, quit_after=quits)
    else:
        answered = await whole(http, sent, load, draw.uniform(0.05, 2.0) if leaves else None)
    load.ended["left" if leaves else "whole"] += 1
    load.done += 1
    if answered is None:
        return
    id, texts = answered
    if not leaves and len(texts) != sent.body.get("n", 1):
        load.faults.append(f"{len(texts)} answers, expected {sent.body.get('n', 1)}")
    for text in texts.values():
        said = json.dumps(json.loads(text)) if "tools" in sent.body else text
        if not sent.begins.startswith(said[: len(sent.begins)]):
            load.faults.append(f"crossed: expected {sent.begins}, got {text:.40}")
    if likes:
        await like(http, id, marker, load)
