// The chat page. The conversation is in this page alone: a reload forgets it.

import { $, ask, button, el, show, themes, write } from "./common.js";

const KEPT = ["system", "temperature", "top_p", "max_tokens"]; // settings that a reload keeps
let model = { id: "", fastlm: {} };
let turns = []; // {role, content, node, id, choice, texts, sent}
let conversation = crypto.randomUUID();
let running = null; // AbortController of the answer that is written
let generation = 0; // of conversations: what was asked in an older one is not shown in this one

const say = (text) => { $("status").textContent = text; };
const see = (node) => node.scrollIntoView({ block: "end" });
const number = (id) => ($(id).value === "" ? undefined : Number($(id).value));

async function start() {
  themes("theme");
  for (const id of KEPT) {
    $(id).value = localStorage.getItem(id) ?? $(id).value;
    $(id).onchange = () => localStorage.setItem(id, $(id).value);
  }
  $("key").value = sessionStorage.getItem("key") ?? "";
  $("key").onchange = () => { sessionStorage.setItem("key", $("key").value); describe(); };
  await describe();
}

async function describe() {
  try {
    model = (await (await ask("/v1/models")).json()).data[0];
    $("model").textContent = model.id;
    $("consent-label").hidden = !model.fastlm.feedback;
    say(model.fastlm.chat ? "" : "This model has no chat template: it cannot chat.");
  } catch (error) { say(error.message); }
}

// ---- asking

function messages(until = turns.length) {
  const system = $("system").value.trim();
  return [...(system ? [{ role: "system", content: system }] : []),
    ...turns.slice(0, until).map(({ role, content }) => ({ role, content }))];
}

function body(n, until) {
  const consented = $("consent").checked && !$("consent-label").hidden;
  return {
    model: model.id, messages: messages(until), n, stream: true,
    stream_options: { include_usage: true }, temperature: number("temperature"),
    top_p: number("top_p"), max_tokens: number("max_tokens"), seed: number("seed"),
    ...(consented ? { store: true, conversation_id: conversation } : {}),
  };
}

/** Read server-sent events of a response. */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new Error("the answer broke off: its connection has ended");
    held += value;
    const lines = held.split("\n\n");
    held = lines.pop();
    for (const line of lines) {
      const data = line.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new Error(event.error.message);
      yield event;
    }
  }
}

/** Ask for the next turn. ``old``: the answer that it replaces once it is whole. */
async function answer(old = null) {
  const n = $("two").checked ? 2 : 1;
  const asked = body(n, old ? turns.indexOf(old) : turns.length);
  const mine = generation;
  const texts = Array(n).fill("");
  const parts = texts.map(() => el("div", { className: "text" }));
  const pair = el("div", { className: n > 1 ? "pair" : "single" }, ...parts.map((part, i) =>
    el("article", { className: "assistant", ariaLabel: n > 1 ? `Answer ${i + 1}` : "Answer" }, part)));
  if (old) old.node.after(pair);
  else $("log").append(pair);
  $("log").ariaBusy = "true";
  const control = running = new AbortController();
  $("stop").hidden = false; $("send").disabled = true;
  $("text").focus({ preventScroll: true });
  say("writing …");
  let id, first, usage, failed = "", full = false;
  const ends = Array(n).fill("");
  try {
    const response = await ask("/v1/chat/completions", asked, control.signal);
    for await (const event of events(response)) {
      if (mine !== generation) return;
      id = event.id;
      usage = event.usage ?? usage;
      const page = document.documentElement; // who reads further up is left there
      const follows = scrollY + innerHeight > page.scrollHeight - 150;
      for (const { index, delta, finish_reason } of event.choices) {
        ends[index] = finish_reason ?? ends[index];
        if (!delta.content) continue;
        first ??= performance.now();
        texts[index] += delta.content;
        show(parts[index], texts[index]);
      }
      if (follows) see(pair);
    }
  } catch (error) {
    failed = error.name === "AbortError" ? "stopped" : error.message;
    full = error.code === "context_length_exceeded";
  }
  if (mine !== generation) return; // "New" has cleaned up
  const seconds = (performance.now() - first) / 1000;
  const speed = usage && usage.completion_tokens > n
    ? `${usage.completion_tokens} tokens, ${((usage.completion_tokens - n) / seconds).toFixed(1)} tokens/s`
    : "";
  idle();
  say(failed || speed);
  const whole = !failed;
  if (!texts.some((text) => text)) {
    pair.remove();
    if (!failed) say("The answer is empty.");
    if (!old) takeBack();
    if (full) offerToForget(old);
    return;
  }
  if (old && !whole) { pair.remove(); say(`${failed}; the answer before it stays`); return; }
  if (old) cut(turns.indexOf(old));
  const turn = {
    role: "assistant", texts, ends, id: whole ? id : null, sent: Boolean(asked.store),
    seen: asked.messages, tokens: usage?.completion_tokens,
  };
  if (n === 1) settle(turn, 0, pair, speed);
  else choose(turn, pair, speed);
}

/** No answer is being written. */
function idle() {
  running = null;
  $("stop").hidden = true; $("send").disabled = false;
  $("log").ariaBusy = "false";
}

/** Nothing came of the last message: it goes back to where it was written. */
function takeBack() {
  const last = turns.at(-1);
  if (last?.role !== "user") return;
  turns.pop();
  last.node.remove();
  $("text").value ||= last.content;
}

/** The conversation is longer than the model's context: offer to ask without its oldest turn. */
function offerToForget(old) {
  const before = old ? turns.indexOf(old) - 1 : turns.length; // turns that the question does not need
  if (before < 1) return; // the message alone is too long
  const next = turns.findIndex((turn, i) => i > 0 && turn.role === "user");
  $("status").append(" ", button("Forget the oldest turn", () => {
    if (running) return;
    for (const turn of turns.splice(0, next < 0 ? before : next)) turn.node.remove();
    if (old) again(old);
    else $("form").requestSubmit();
  }));
}

/** Let the user pick one of two answers. */
function choose(turn, pair, speed) {
  const pick = (i) => {
    if (pending !== turn) return; // the conversation went on without them
    document.removeEventListener("keydown", keys);
    settle(turn, i, pair, speed);
    if (turn.id) opine(turns.at(-1), { preferred_over: [{ choice: 1 - i }] });
    $("text").focus();
  };
  const keys = (event) => { if (event.altKey && "12".includes(event.key)) pick(Number(event.key) - 1); };
  document.addEventListener("keydown", keys);
  [...pair.children].forEach((part, i) => part.append(
    button(`Pick answer ${i + 1}`, () => pick(i), { className: "main", title: `Alt+${i + 1}` })));
  pair.querySelector("button").focus({ preventScroll: true });
  see(pair);
  pending = turn;
}
let pending = null; // two answers of which none is picked yet

/** Make one of the texts the next turn of the conversation. */
function settle(turn, i, pair, speed) {
  pending = null;
  const node = el("article", { className: "assistant", ariaLabel: "Answer" }, el("div", { className: "text" }));
  show(node.firstChild, turn.texts[i]);
  Object.assign(turn, { content: turn.texts[i], choice: i, node });
  pair.replaceWith(node);
  turns.push(turn);
  tools(turn, speed);
  if (turn.ends[i] === "length") tellCut(turn);
}

/** Say that an answer is not complete. */
function tellCut(turn) {
  const limit = Number($("max_tokens").value);
  const most = turn.texts.length === 1 && turn.tokens || limit;
  turn.node.append(el("div", { className: "row tools" },
    el("span", { className: "quiet", textContent: most ? `Cut at ${most} tokens.` : "Cut." }),
    button("Answer again with twice as many", () => {
      $("max_tokens").value = 2 * (limit || most || 512);
      $("max_tokens").onchange();
      again(turn);
    })));
}

function tools(turn, speed) {
  const row = el("div", { className: "row tools" });
  row.append(button("Again", () => again(turn), { title: "Another answer instead of this one" }));
  if (model.fastlm.feedback && turn.id) {
    const thumb = (name, label) => button(label, async (event) => {
      if (await opine(turn, { thumb: name })) {
        for (const other of row.querySelectorAll("[aria-pressed]")) other.ariaPressed = "false";
        event.target.ariaPressed = "true";
      }
    }, { ariaPressed: "false" });
    row.append(thumb("up", "Good"), thumb("down", "Bad"), button("Comment", async () => {
      const comment = await write(turn.node, "What is good or bad about it?");
      if (comment?.trim()) await opine(turn, { comment });
    }));
    if (model.fastlm.metrics?.length) row.append(button("Rate", async () => {
      const metrics = await numbers(turn.node);
      if (metrics !== null && Object.keys(metrics).length) await opine(turn, { metrics });
    }));
  }
  row.append(button("Correct", () => correct(turn), { title: "Write what the answer should have been" }));
  row.append(el("span", { className: "quiet", textContent: speed }));
  turn.node.append(row);
  see(turn.node);
}

/** A form with the numbers that the server asks for, under ``node``. Resolves to those given, or null. */
function numbers(node) {
  return new Promise((resolve) => {
    const asked = model.fastlm.metrics.map(({ name, kind, low, high, level, better }) => {
      const input = kind === "boolean"
        ? el("select", {}, ...["", "yes", "no"].map((text) => el("option", { value: text, textContent: text })))
        : el("input", { type: "number", min: low, max: high, step: "any", placeholder: `${low} to ${high}` });
      const about = `${name}${level === "conversation" ? ", of the conversation" : ""} (${better} is better)`;
      return { name, input, label: el("label", {}, about, input) };
    });
    const done = (value) => { box.remove(); resolve(value); };
    const box = el("form", { className: "box numbers" }, ...asked.map(({ label }) => label),
      el("div", { className: "row" }, button("Cancel", () => done(null)),
        el("button", { type: "submit", className: "main", textContent: "Save" })));
    box.onsubmit = (event) => {
      event.preventDefault();
      const given = asked.filter(({ input }) => input.value !== "").map(({ name, input }) =>
        [name, input.type === "number" ? Number(input.value) : input.value === "yes"]);
      done(Object.fromEntries(given));
    };
    box.onkeydown = (event) => {
      if (event.key === "Escape") { event.stopPropagation(); done(null); }
    };
    node.append(box);
    asked[0].input.focus();
  });
}

async function again(turn) {
  if (running || !turns.includes(turn)) return;
  if (pending) { say("Pick one of the two answers first."); return; }
  await answer(turn);
}

async function correct(turn) {
  const stored = model.fastlm.feedback && turn.id ? " (what you write here is stored)" : "";
  const text = await write(turn.node, `The answer as it should have been${stored}`, turn.content);
  if (!text?.trim() || text === turn.content) return;
  if (model.fastlm.feedback && turn.id && !await opine(turn, { corrected: text })) return;
  turn.content = text;
  show(turn.node.querySelector(".text"), text);
}

/** Send an opinion about an answer; with the conversation, if the user consented since. */
async function opine(turn, what) {
  const given = { response_id: turn.id, conversation_id: conversation, choice: turn.choice, ...what };
  const sends = $("consent").checked && !turn.sent; // once: consent may have been withdrawn since
  if (sends) {
    given.conversation = { consent: true, messages: turn.seen, choices: turn.texts };
  }
  try {
    const { kept } = await (await ask("/v1/feedback", given)).json();
    turn.sent ||= sends;
    say(kept ? "Thank you: stored, with the conversation."
      : `Thank you: stored; the text of the answer is not kept, since ${turn.sent
        ? "its consent was withdrawn" : "nobody consented (Keep my conversations)"}.`);
    return true;
  } catch (error) { say(`Not stored: ${error.message}`); return false; }
}

// ---- the conversation

function cut(at) {
  if (pending) $("log").querySelector(".pair").remove();
  pending = null;
  for (const turn of turns.splice(at)) turn.node.remove();
}

function user(content) {
  const node = el("article", { className: "user", ariaLabel: "You" }, el("div", { className: "text" }));
  const turn = { role: "user", content, node };
  show(node.firstChild, content);
  node.append(el("div", { className: "row tools" }, button("Edit", async () => {
    const text = await write(node, "Your message", turn.content);
    if (!text?.trim() || running) return;
    cut(turns.indexOf(turn));
    user(text);
    await answer();
  })));
  turns.push(turn);
  $("log").append(node);
  see(node);
}

$("form").onsubmit = async (event) => {
  event.preventDefault();
  const text = $("text").value;
  if (!text.trim() || running) return;
  if (pending) { say("Pick one of the two answers first."); return; }
  $("text").value = "";
  user(text);
  await answer();
};
$("text").onkeydown = (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    $("form").requestSubmit();
  }
};
function stop() {
  if (!running) return;
  running.abort();
  $("text").focus({ preventScroll: true });
}
document.addEventListener("keydown", (event) => { if (event.key === "Escape") stop(); });
$("stop").onclick = stop;
$("new").onclick = () => {
  generation += 1;
  running?.abort();
  idle();
  turns = []; pending = null; conversation = crypto.randomUUID();
  $("log").replaceChildren();
  say("");
  $("text").focus();
};
$("options").onclick = () => {
  $("settings").hidden = !$("settings").hidden;
  $("options").ariaExpanded = String(!$("settings").hidden);
};
start();
