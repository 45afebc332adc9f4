// The chat page: a conversation with the model. The browser stores conversations (conversations.js).

import { $, ask, button, copy, el, iconButton, menu, randomId, say, themes, timing, askText } from "./common.js";
import { idOf, list, load, remove, save, titleOf } from "./conversations.js";
import { askNumbers, sendFeedback } from "./feedback.js";
import { show } from "./markdown.js";

const STORED_SETTINGS = ["system", "temperature", "top_p", "max_tokens"];
let model = { id: "", fastlm: {} };
let conversation; // {id, title, updated, turns: [{role, content, node, id, choice, texts, ends, sent, prompt, tokens, thumb}]}
let running = null; // AbortController of the running answer
let hasError = false; // the status has the reason why the model is unknown
let pending = null; // two answers, none of which is picked yet

const scrollTo = (node) => node.scrollIntoView({ block: "end" });
const number = (id) => ($(id).value === "" ? undefined : Number($(id).value));
const idInAddress = () => location.hash.slice(1);

async function start() {
  themes("theme");
  for (const id of STORED_SETTINGS) {
    $(id).value = localStorage.getItem(id) ?? $(id).value;
    $(id).onchange = () => localStorage.setItem(id, $(id).value);
  }
  $("key").value = sessionStorage.getItem("key") ?? "";
  $("key").onchange = () => { sessionStorage.setItem("key", $("key").value); describe(); };
  open(idInAddress());
  await describe();
}

/** Read the model from the server; return whether that worked. */
async function describe() {
  try {
    model = (await (await ask("/v1/models")).json()).data[0];
    $("model").textContent = model.id;
    $("consent-label").hidden = !model.fastlm.feedback;
    if (!model.fastlm.chat) say("This model has no chat template: it cannot chat.");
    else if (hasError) say("");
    hasError = false;
    draw(); // now earlier answers have their buttons
    return true;
  } catch (error) {
    hasError = true;
    say(error.message, ...retry(error, describe));
    return false;
  }
}

const retry = (error, action) => (error.passing ? [button("Try again", action)] : []);

// ---- asking

function messages(until = conversation.turns.length) {
  const system = $("system").value.trim();
  return [...(system ? [{ role: "system", content: system }] : []),
    ...conversation.turns.slice(0, until).map(({ role, content }) => ({ role, content }))];
}

function body(n, until) {
  const hasConsent = $("consent").checked && !$("consent-label").hidden;
  return {
    model: model.id, messages: messages(until), n, stream: true,
    stream_options: { include_usage: true }, temperature: number("temperature"),
    top_p: number("top_p"), max_tokens: number("max_tokens"), seed: number("seed"),
    ...(hasConsent ? { store: true, conversation_id: conversation.id } : {}),
  };
}

/** Read server-sent events of a response. */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  const broken = Object.assign(new Error("the answer is incomplete: the connection was closed"), { passing: true });
  let buffer = "";
  for (;;) {
    const { value, done } = await reader.read().catch((error) => { throw error.name === "AbortError" ? error : broken; });
    if (done) throw broken;
    buffer += value;
    const lines = buffer.split("\n\n");
    buffer = lines.pop();
    for (const line of lines) {
      const data = line.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new Error(event.error.message);
      yield event;
    }
  }
}

/** Ask for the next turn. ``old``: the answer that it replaces when it is complete. */
async function answer(old = null) {
  const n = $("two").checked ? 2 : 1;
  const request = body(n, old ? conversation.turns.indexOf(old) : undefined);
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
  const start = performance.now();
  let id, first, usage, failed = null, frame = 0;
  const ends = Array(n).fill("");
  const drawTexts = () => {
    frame = 0;
    const page = document.documentElement; // a reader further up is not scrolled
    const follows = scrollY + innerHeight > page.scrollHeight - 150;
    parts.forEach((part, i) => show(part, texts[i]));
    if (follows) scrollTo(pair);
  };
  try {
    const response = await ask("/v1/chat/completions", request, control.signal);
    for await (const event of events(response)) {
      if (running !== control) return;
      id = event.id;
      usage = event.usage ?? usage;
      for (const { index, delta, finish_reason } of event.choices) {
        ends[index] = finish_reason ?? ends[index];
        if (!delta.content) continue;
        first ??= performance.now();
        texts[index] += delta.content;
        frame ||= setTimeout(drawTexts, 30);
      }
    }
  } catch (error) {
    failed = error.name === "AbortError" ? new Error("stopped") : error;
  }
  clearTimeout(frame);
  if (running !== control) return; // another conversation was opened
  drawTexts();
  const now = performance.now();
  const time = usage && first ? timing(usage.completion_tokens, n, (now - start) / 1000, (now - first) / 1000) : "";
  setIdle();
  say(failed?.message ?? time);
  if (!texts.some((text) => text)) {
    pair.remove();
    if (!failed) say("The answer is empty.");
    if (!old) restoreMessage();
    if (failed?.code === "context_length_exceeded") offerToForget(old);
    else if (failed) say(failed.message, ...retry(failed, () => (old ? regenerate(old) : $("form").requestSubmit())));
    return;
  }
  if (old && failed) {
    pair.remove();
    say(`${failed.message}; the previous answer stays`, ...retry(failed, () => regenerate(old)));
    return;
  }
  if (old) removeTurnsFrom(conversation.turns.indexOf(old));
  const turn = {
    role: "assistant", texts, ends, id: failed ? null : id, sent: Boolean(request.store),
    prompt: request.messages, tokens: usage?.completion_tokens,
  };
  if (n === 1) addAnswer(turn, 0, pair);
  else offerChoice(turn, pair);
  if (failed) say(failed.message, ...retry(failed, () => regenerate(turn)));
  keep();
}

/** Show that no answer is running. */
function setIdle() {
  running = null;
  $("stop").hidden = true; $("send").disabled = false;
  $("log").ariaBusy = "false";
}

/** Move the last message, which has no answer, back to the input. */
function restoreMessage() {
  const last = conversation.turns.at(-1);
  if (last?.role !== "user") return;
  conversation.turns.pop();
  last.node?.remove();
  $("text").value ||= last.content;
  keep();
}

/** The conversation is longer than the model's context: offer to ask without its oldest turn. */
function offerToForget(old) {
  const { turns } = conversation;
  const removable = old ? turns.indexOf(old) - 1 : turns.length; // the number of turns before the question
  if (removable < 1) return; // the message alone is too long
  const next = turns.findIndex((turn, i) => i > 0 && turn.role === "user");
  $("status").append(" ", button("Forget the oldest turn", () => {
    if (running) return;
    for (const turn of turns.splice(0, next < 0 ? removable : next)) turn.node.remove();
    keep();
    if (old) regenerate(old);
    else $("form").requestSubmit();
  }));
}

/** Let the user pick one of two answers. */
function offerChoice(turn, pair) {
  const pick = (i) => {
    if (pending !== turn) return; // the conversation continued without them
    document.removeEventListener("keydown", keys);
    addAnswer(turn, i, pair);
    keep();
    if (turn.id) sendAndKeep(turn, { preferred_over: [{ choice: 1 - i }] });
    $("text").focus();
  };
  const keys = (event) => { if (event.altKey && "12".includes(event.key)) pick(Number(event.key) - 1); };
  document.addEventListener("keydown", keys);
  [...pair.children].forEach((part, i) => part.append(
    button(`Pick answer ${i + 1}`, () => pick(i), { className: "main", title: `Alt+${i + 1}` })));
  pair.querySelector("button.main").focus({ preventScroll: true });
  scrollTo(pair);
  pending = turn;
}

/** Make one of the texts the next turn of the conversation. */
function addAnswer(turn, i, pair) {
  pending = null;
  Object.assign(turn, { content: turn.texts[i], choice: i });
  conversation.turns.push(turn);
  createAnswer(turn);
  pair.replaceWith(turn.node);
  scrollTo(turn.node);
}

// ---- turns on the page

/** Create the element of an answer. */
function createAnswer(turn) {
  turn.node = el("article", { className: "assistant", ariaLabel: "Answer" }, el("div", { className: "text" }));
  show(turn.node.firstChild, turn.content);
  const row = el("div", { className: "row tools" });
  row.append(button("Regenerate", () => regenerate(turn), { title: "Another answer instead of this one" }));
  const more = [["Correct", () => correct(turn)]];
  if (model.fastlm.feedback && turn.id) {
    const thumbs = [["up", "Good answer"], ["down", "Bad answer"]].map(([thumb, name]) => iconButton(thumb, name, async () => {
      if (!await sendAndKeep(turn, { thumb })) return;
      turn.thumb = thumb;
      keep();
      updateThumbs();
    }));
    const updateThumbs = () => thumbs.forEach((thumb, i) => { thumb.ariaPressed = String(turn.thumb === ["up", "down"][i]); });
    updateThumbs();
    row.append(...thumbs);
    more.unshift(["Comment", async () => {
      const comment = await askText(turn.node, "What is good or bad about it?");
      if (comment?.trim()) await sendAndKeep(turn, { comment });
    }]);
    if (model.fastlm.metrics?.length) more.splice(1, 0, ["Rate", async () => {
      const metrics = await askNumbers(turn.node, model.fastlm.metrics);
      if (metrics !== null && Object.keys(metrics).length) await sendAndKeep(turn, { metrics });
    }]);
  }
  const copier = iconButton("copy", "Copy answer", () => copy(copier, turn.content));
  row.append(copier, menu("More about this answer", more));
  turn.node.append(row);
  if (turn.ends?.[turn.choice] === "length") showTruncation(turn);
}

/** Show that an answer was truncated. */
function showTruncation(turn) {
  const limit = Number($("max_tokens").value);
  const tokens = turn.texts.length === 1 && turn.tokens || limit;
  turn.node.append(el("div", { className: "row" },
    el("span", { className: "quiet", textContent: tokens ? `Truncated at ${tokens} tokens.` : "Truncated." }),
    button("Answer again with twice as many", () => {
      $("max_tokens").value = 2 * (limit || tokens || 512);
      $("max_tokens").onchange();
      regenerate(turn);
    })));
}

async function sendAndKeep(turn, feedback) {
  const stored = await sendFeedback(turn, conversation.id, feedback);
  keep(); // it has whether the conversation was sent
  return stored;
}

async function regenerate(turn) {
  if (running || !conversation.turns.includes(turn)) return;
  if (pending) { say("Pick one of the two answers first."); return; }
  await answer(turn);
}

async function correct(turn) {
  const stored = model.fastlm.feedback && turn.id ? " (it is stored)" : "";
  const text = await askText(turn.node, `The corrected answer${stored}`, turn.content);
  if (!text?.trim() || text === turn.content) return;
  if (model.fastlm.feedback && turn.id && !await sendAndKeep(turn, { corrected: text })) return;
  turn.content = text;
  show(turn.node.querySelector(".text"), text);
  keep();
}

/** Create the element of a message, as plain text. */
function createMessage(turn) {
  turn.node = el("article", { className: "user", ariaLabel: "You" }, el("div", { className: "text", textContent: turn.content }),
    el("div", { className: "row tools" }, button("Edit", async () => {
      const text = await askText(turn.node, "Your message", turn.content);
      if (!text?.trim() || running) return;
      removeTurnsFrom(conversation.turns.indexOf(turn));
      await submit(text);
    })));
}

async function submit(content) {
  const turn = { role: "user", content };
  conversation.turns.push(turn);
  conversation.title ||= titleOf(content);
  conversation.updated = Date.now();
  keep();
  createMessage(turn);
  $("log").append(turn.node);
  scrollTo(turn.node);
  await answer();
}

// ---- the conversation

function removeTurnsFrom(index) {
  if (pending) $("log").querySelector(".pair").remove();
  pending = null;
  for (const turn of conversation.turns.splice(index)) turn.node.remove();
}

/** Store the conversation, unless it is empty, and update the list. */
function keep() {
  const empty = conversation.turns.length === 0;
  if (empty) {
    remove(conversation.id);
    conversation.title = "";
  } else {
    try {
      save(conversation);
    } catch (error) { say(error.message); }
  }
  history.replaceState(null, "", empty ? location.pathname : `#${conversation.id}`);
  refresh();
}

const refresh = () => list(conversation.id, (id) => { location.hash = id; }, onChange);

/** Update the page after the conversation with this id was renamed or deleted. */
function onChange(id) {
  const stored = load(id);
  if (id !== conversation.id) refresh();
  else if (stored) { conversation.title = stored.title; refresh(); }
  else startNew();
}

/** Show the turns of the conversation. */
function draw() {
  if (running || pending) return;
  for (const turn of conversation.turns) (turn.role === "user" ? createMessage : createAnswer)(turn);
  $("log").replaceChildren(...conversation.turns.map((turn) => turn.node));
}

/** Open the conversation with this id, or a new one. */
function open(id) {
  const control = running;
  setIdle();
  control?.abort();
  pending = null;
  conversation = load(id);
  if (!conversation && id) history.replaceState(null, "", location.pathname); // it was deleted
  conversation ??= { id: randomId(), title: "", updated: Date.now(), turns: [] };
  say("");
  draw();
  const last = conversation.turns.at(-1);
  if (last?.role === "user") {
    restoreMessage();
    say("The last message has no answer yet: it is back in the input.");
  }
  if (last) scrollTo($("log"));
  $("browse").ariaExpanded = "false";
  $("text").focus({ preventScroll: true });
  refresh();
}

function startNew() {
  history.replaceState(null, "", location.pathname);
  open("");
}

$("form").onsubmit = async (event) => {
  event.preventDefault();
  const text = $("text").value;
  if (!text.trim() || running) return;
  if (pending) { say("Pick one of the two answers first."); return; }
  if (!model.id && !await describe()) return;
  $("text").value = "";
  await submit(text);
};
for (const example of document.querySelectorAll("#examples button")) {
  example.onclick = () => { $("text").value = example.textContent; $("text").focus(); };
}
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
$("new").onclick = startNew;
$("browse").onclick = () => { $("browse").ariaExpanded = String($("browse").ariaExpanded !== "true"); };
$("options").onclick = () => {
  $("settings").hidden = !$("settings").hidden;
  $("options").ariaExpanded = String(!$("settings").hidden);
};
window.onhashchange = () => { if (idInAddress() !== conversation.id) open(idInAddress()); };
window.onstorage = ({ key, newValue }) => { // another page of this browser
  if (idOf(key) === null && key !== null) return;
  if (idOf(key) !== conversation.id || running || pending) refresh();
  else if (newValue === null) startNew();
  else open(conversation.id);
};
start();
