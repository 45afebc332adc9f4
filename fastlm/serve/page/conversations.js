// Conversations in this browser's localStorage, one item each. Nothing of them is sent anywhere.

import { $, button, el, menu, say } from "./common.js";

const PREFIX = "fastlm:conversation:";
const MAX_TITLE = 60;

/** Load the conversation with this id as {id, title, updated, turns}; null if there is none. */
export function load(id) {
  try {
    const { title, updated, messages, turns } = JSON.parse(localStorage.getItem(PREFIX + id));
    const loaded = turns.map((turn) => ({ ...turn, content: String(turn.content), prompt: turn.prompt?.map((i) => messages[i]) }));
    return { id, title: String(title), updated: Number(updated), turns: loaded };
  } catch { return null; } // there is none, or another program wrote it
}

/** Store a conversation. Throws an Error if there is no space. */
export function save(conversation) {
  // the prompts of the answers have most messages in common: each message is stored once
  const indexes = new Map();
  const index = (message) => {
    const text = JSON.stringify(message);
    if (!indexes.has(text)) indexes.set(text, indexes.size);
    return indexes.get(text);
  };
  const turns = conversation.turns.map(({ node, ...turn }) => ({ ...turn, prompt: turn.prompt?.map(index) }));
  const messages = [...indexes.keys()].map((text) => JSON.parse(text));
  const { title, updated } = conversation;
  try {
    localStorage.setItem(PREFIX + conversation.id, JSON.stringify({ title, updated, messages, turns }));
  } catch {
    throw new Error("Not stored: this browser's storage is full. Delete conversations that you no longer need.");
  }
}

export const remove = (id) => localStorage.removeItem(PREFIX + id);

/** Return the id of the conversation in the storage item ``key``, or null. */
export const idOf = (key) => (key?.startsWith(PREFIX) ? key.slice(PREFIX.length) : null);

const all = () => Object.keys(localStorage).map(idOf).filter((id) => id !== null).map(load).filter(Boolean)
  .sort((a, b) => b.updated - a.updated);

/** Return the title of a new conversation: the beginning of its first message. */
export function titleOf(text) {
  const line = text.trim().split("\n")[0];
  return line.length > MAX_TITLE ? `${line.slice(0, MAX_TITLE - 1).trimEnd()}…` : line;
}

/** List all conversations in #list. ``open(id)`` shows one, ``onChange(id)`` is called after it is renamed or deleted. */
export function list(current, open, onChange) {
  const conversations = all();
  $("list").replaceChildren(...conversations.map((conversation) => {
    const item = el("li", {}, button(conversation.title || "Untitled", () => open(conversation.id),
      { className: "title", title: conversation.title, ariaCurrent: conversation.id === current ? "true" : null }));
    item.append(menu(`More about ${conversation.title}`, [
      ["Rename", () => rename(item, conversation, () => onChange(conversation.id))],
      ["Delete", () => { if (confirm(question([conversation]))) { remove(conversation.id); onChange(conversation.id); } }],
    ]));
    return item;
  }));
  $("clear").hidden = conversations.length < 2;
  $("clear").onclick = () => {
    if (!confirm(question(conversations))) return;
    for (const { id } of conversations) { remove(id); onChange(id); }
  };
}

function question(conversations) {
  const name = conversations.length === 1 ? `“${conversations[0].title}”` : `all ${conversations.length} conversations`;
  const isOnServer = conversations.some(({ turns }) => turns.some((turn) => turn.sent));
  return `Delete ${name} from this browser?${isOnServer ? " Text that you allowed the server to store stays there." : ""}`;
}

function rename(item, { id, title }, done) {
  const input = el("input", { value: title, maxLength: 200, ariaLabel: "Name of the conversation" });
  const form = el("form", {}, input);
  const end = (accept) => {
    input.onblur = null;
    const conversation = load(id); // as it is now
    const name = input.value.trim();
    if (accept && name && conversation) {
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
