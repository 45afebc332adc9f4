"""Send requests of a soak test: all kinds that the API has, valid and malformed.

Every prompt has a marker with which its answer must begin (a grammar enforces it), so an answer
that reached another client is detected. Half of the prompts begin with the same text, which the
server's prefix cache has.
"""

import json
import random
import time
from dataclasses import dataclass
from typing import Any

import httpx
from traffic import NEW_TOKENS, SAMPLING, WORDS, Load, ask, count_usage

SYSTEM = " ".join(random.Random(0).choice(WORDS) for _ in range(150))
PROMPT_WORDS = (16, 160)  # without those of SYSTEM
TOOL_TOKENS = 256  # a call with a marker is shorter
MALFORMED = (b"{", b'{"model": 1}', b"\xff" * 64, b"[" * 4000, b'{"messages": [], "model": "x"}')


@dataclass
class SoakRequest:
    """A request, and the beginning that its answers must have."""

    path: str
    body: dict[str, Any]
    prefix: str


def random_request(draw: random.Random, model: str, marker: str) -> SoakRequest:
    """Return a random request: one in five is a completion, the others are chats. One chat in eight
    must call a tool; one request in eight has two answers; one in five is not streamed."""
    words = " ".join(draw.choice(WORDS) for _ in range(draw.randint(*PROMPT_WORDS)))
    has_system = draw.random() < 0.5
    body: dict[str, Any] = {
        "model": model, "max_tokens": draw.randint(*NEW_TOKENS), "seed": draw.randrange(2**31),
        **SAMPLING,
    }  # fmt: skip
    if draw.random() < 0.8:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    if draw.random() < 1 / 8:
        body["n"] = 2
    output_format = {"structured_outputs": {"regex": f"{marker} [a-z ]*"}}
    if draw.random() < 0.2:
        text = f"{SYSTEM} {marker} {words}" if has_system else f"{marker} {words}"
        return SoakRequest("completions", body | output_format | {"prompt": text}, f"{marker} ")
    messages = [{"role": "user", "content": f"{marker} {words}"}]
    if has_system:
        messages.insert(0, {"role": "system", "content": SYSTEM})
    body["messages"] = messages
    if draw.random() >= 1 / 8:
        return SoakRequest("chat/completions", body | output_format, f"{marker} ")
    arguments = {
        "type": "object", "properties": {"marker": {"const": marker}}, "required": ["marker"],
        "additionalProperties": False,
    }  # fmt: skip
    tool = {"type": "function", "function": {"name": "note", "parameters": arguments}}
    body |= {"tools": [tool], "tool_choice": "required", "max_tokens": TOOL_TOKENS}
    return SoakRequest("chat/completions", body, json.dumps({"marker": marker}))


async def ask_unstreamed(
    http: httpx.AsyncClient, request: SoakRequest, load: Load, patience: float | None
) -> tuple[str, dict[int, str]] | None:
    """Send a request that is not streamed; return its id and the answers. None: the client has
    disconnected after `patience` seconds."""
    start = time.perf_counter()
    limit = http.timeout if patience is None else patience
    try:
        response = await http.post(request.path, json=request.body, timeout=limit)
    except httpx.ReadTimeout:
        if patience is None:
            raise
        return None
    if response.status_code != 200:
        raise RuntimeError(f"{response.status_code}: {response.text:.200}")
    answer = response.json()
    load.latency.append(time.perf_counter() - start)
    count_usage(load, request.body, answer["usage"])
    return answer["id"], {choice["index"]: _text(choice) for choice in answer["choices"]}


def _text(choice: dict[str, Any]) -> str:
    message = choice.get("message") or {"content": choice.get("text")}
    calls = message.get("tool_calls") or ()
    return (message["content"] or "") + "".join(c["function"]["arguments"] for c in calls)


async def embed(http: httpx.AsyncClient, model: str, marker: str, load: Load) -> None:
    """Embed two texts, one of them twice, to detect a vector of another request."""
    texts = [f"{marker} tree", f"{marker} river", f"{marker} tree"]
    response = await http.post("embeddings", json={"model": model, "input": texts})
    if response.status_code != 200:
        raise RuntimeError(f"{response.status_code}: {response.text:.200}")
    first, other, repeated = (item["embedding"] for item in response.json()["data"])
    if first != repeated or first == other:
        load.faults.append(f"crossed: embeddings of {marker}")
    load.outcomes["embedded"] += 1


async def give_feedback(http: httpx.AsyncClient, id: str, marker: str, load: Load) -> None:
    """Send feedback on an answer."""
    feedback = {"response_id": id, "thumb": "up", "comment": marker}
    response = await http.post("feedback", json=feedback)
    if response.status_code != 200:
        raise RuntimeError(f"feedback: {response.status_code}: {response.text:.200}")
    load.outcomes["liked"] += 1


async def send_malformed(http: httpx.AsyncClient, draw: random.Random, load: Load) -> None:
    response = await http.post(
        "chat/completions",
        content=draw.choice(MALFORMED),
        headers={"content-type": "application/json"},
    )
    load.outcomes[f"malformed, {response.status_code}"] += 1
    if not 400 <= response.status_code < 500:
        load.faults.append(f"a malformed body got {response.status_code}: {response.text:.100}")


async def take_turn(
    http: httpx.AsyncClient, draw: random.Random, load: Load, model: str, marker: str
) -> None:
    """Run `_take_turn`, and accept that a model without a chat template for tools refuses them."""
    try:
        await _take_turn(http, draw, load, model, marker)
    except RuntimeError as error:
        if "400" not in str(error) or "chat template does not write" not in str(error):
            raise
        load.outcomes["tools, 400"] += 1


async def _take_turn(
    http: httpx.AsyncClient, draw: random.Random, load: Load, model: str, marker: str
) -> None:
    """Send a malformed body, an embedding or a request; disconnect during one answer in five."""
    kind = draw.random()
    if kind < 0.1:
        return await send_malformed(http, draw, load)
    if kind < 0.15:
        return await embed(http, model, marker, load)
    request = random_request(draw, model, marker)
    disconnects, gives_feedback = draw.random() < 0.2, draw.random() < 0.2
    if request.body.get("stream"):
        max_pieces = draw.randint(1, 20) if disconnects else 0
        result = await ask(http, request.body, load, path=request.path, max_pieces=max_pieces)
    else:
        patience = draw.uniform(0.05, 2.0) if disconnects else None
        result = await ask_unstreamed(http, request, load, patience)
    load.outcomes["disconnected" if disconnects else "complete"] += 1
    load.done += 1
    if result is None:
        return
    id, texts = result
    if not disconnects and len(texts) != request.body.get("n", 1):
        load.faults.append(f"{len(texts)} answers, expected {request.body.get('n', 1)}")
    for text in texts.values():
        answer = json.dumps(json.loads(text)) if "tools" in request.body else text
        if not request.prefix.startswith(answer[: len(request.prefix)]):
            load.faults.append(f"crossed: expected {request.prefix}, got {text:.40}")
    if gives_feedback:
        await give_feedback(http, id, marker, load)
