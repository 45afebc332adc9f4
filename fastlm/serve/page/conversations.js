// Conversations in this browser's localStorage, an item each: nothing of them is sent anywhere.

import { $, button, el, menu, say } from "./common.js";

const PREFIX = "fastlm:conversation:";
const MAX_TITLE = 60;

/** The conversation with this id as {id, title, updated, turns}; null if there is none. */
export function load(id) {
  try {
    const { title, updated, messages, turns } = JSON.parse(localStorage.getItem(PREFIX + id));
    const read = turns.map((turn) => ({ ...turn, content: String(turn.content), seen: turn.seen?.map((i) => messages[i]) }));
    return { id, title: String(title), updated: Number(updated), turns: read };
  } catch { return null; } // there is none, or another program wrote it
}

/** Keep a conversation. An Error says that there is no space for it. */
export function save(conversation) {
  // what was asked before each answer has most messages in common: each is stored once
  const places = new Map();
  const place = (message) => {
    const text = JSON.stringify(message);
    if (!places.has(text)) places.set(text, places.size);
    return places.get(text);
  };
  const turns = conversation.turns.map(({ node, ...turn }) => ({ ...turn, seen: turn.seen?.map(place) }));
  const messages = [...places.keys()].map((text) => JSON.parse(text));
  const { title, updated } = conversation;
  try {
    localStorage.setItem(PREFIX + conversation.id, JSON.stringify({ title, updated, messages, turns }));
  } catch {
    throw new Error("Not kept: this browser's storage is full. Delete conversations that you no longer need.");
  }
}

export const remove = (id) => localStorage.removeItem(PREFIX + id);

/** The id of the conversation in the storage item ``key``; null if it holds none. */
export const idOf = (key) => (key?.startsWith(PREFIX) ? key.slice(PREFIX.length) : null);

const all = () => Object.keys(localStorage).map(idOf).filter((id) => id !== null).map(load).filter(Boolean)
  .sort((a, b) => b.updated - a.updated);

/** The title of a conversation that has none yet: how its first message begins. */
export function titleOf(text) {
  const line = text.trim().split("\n")[0];
  return line.length > MAX_TITLE ? `${line.slice(0, MAX_TITLE - 1).trimEnd()}…` : line;
}

/** List all conversations in #list. ``open(id)`` shows one, ``changed(id)`` follows its new name or end. */
export function list(current, open, changed) {
  const every = all();
  $("list").replaceChildren(...every.map((one) => {
    const item = el("li", {}, button(one.title || "Untitled", () => open(one.id),
      { className: "title", title: one.title, ariaCurrent: one.id === current ? "true" : null }));
    item.append(menu(`More about ${one.title}`, [
      ["Rename", () => rename(item, one, () => changed(one.id))],
      ["Delete", () => { if (confirm(question([one]))) { remove(one.id); changed(one.id); } }],
    ]));
    return item;
  }));
  $("clear").hidden = every.length < 2;
  $("clear").onclick = () => {
    if (!confirm(question(every))) return;
    for (const { id } of every) { remove(id); changed(id); }
  };
}

function question(ones) {
  const what = ones.length === 1 ? `“${ones[0].title}”` : `all ${ones.length} conversations`;
  const stays = ones.some(({ turns }) => turns.some((turn) => turn.sent));
  return `Delete ${what} from this browser?${stays ? " What the server keeps with your consent stays there." : ""}`;
}

function rename(item, { id, title }, done) {
  const input = el("input", { value: title, maxLength: 200, ariaLabel: "Name of the conversation" });
  const form = el("form", {}, input);
  const end = (keeps) => {
    input.onblur = null;
    const conversation = load(id); // as it is now
    const name = input.value.trim();
    if (keeps && name && conversation) {
      try { save({ ...conversation, title: name }); } catch (error) { say(error.message); }
    }
    done();
  };
  form.onsubmit = (event) => { event.preventDefault(); end(true); };
  input.onblur = () => end(true);
  input.onkeydown = (event) => {
    if (event.key === "Escape") { event.stopPropagation(); end(false); }
  };
  item.replaceChildren(form);
  input.select();
}
