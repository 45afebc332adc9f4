// What the pages of raters share: the rater's name, the next item, going back, and keys.

import { $, ask, el, say, themes } from "./common.js";
import { show } from "./markdown.js";

/** Show the messages of a prompt. */
export function drawPrompt(messages) {
  $("prompt").replaceChildren(...messages.map(messageNode));
}

function messageNode(message) {
  const text = el("div", { className: "text" });
  if (message.role === "assistant") show(text, message.content);
  else text.textContent = message.content;
  return el("article", { className: "user" }, el("strong", { textContent: message.role }), text);
}

/** Return a node with the messages of an answer, with their roles if one is the user's. */
export function answerText(messages) {
  const text = el("div", { className: "text" });
  if (messages.some(({ role }) => role === "user")) text.append(...messages.map(messageNode));
  else show(text, messages.map((m) => (m.tool_calls ? JSON.stringify(m.tool_calls) : m.content)).join("\n\n"));
  return text;
}

/** The loop over the items of the API below ``path``, which stores each one at once. ``page`` has:
 * draw(item, response), item: null if none is left; progress(counts), the line of the progress;
 * nothingLeft, the line at the end; nextFields(lastId), further fields of a request for the item after that one. */
export class RaterLoop {
  rater = "";
  item = null;
  #path;
  #page;
  #doneIds = [];

  constructor(path, page) {
    this.#path = path;
    this.#page = page;
    $("who").onsubmit = async (event) => {
      event.preventDefault();
      this.rater = $("rater").value.trim();
      sessionStorage.setItem("key", $("key").value);
      this.#doneIds = [];
      try { say(""); await this.#load(); } catch (error) { say(error.message); }
    };
    $("back").onclick = () => this.back();
    themes("theme");
  }

  async post(name, body) {
    return (await ask(`${this.#path}/${name}`, body)).json();
  }

  async #load(id) {
    this.item = null; // until it is shown, so that a key is not about another item
    const next = id === undefined ? this.#page.nextFields?.(this.#doneIds.at(-1) ?? 0) : { item: id };
    const response = await this.post("next", { rater: this.rater, ...next });
    this.item = response.item;
    $("progress").textContent = `${this.rater}: ${this.#page.progress(response.progress)}`;
    $("help").hidden = $("do").hidden = this.item === null;
    drawPrompt(this.item?.prompt ?? []);
    await this.#page.draw(this.item, response);
    if (this.item === null) say(this.#page.nothingLeft);
  }

  /** Store what the rater entered about the item, and show the next one. */
  async store(name, body, message) {
    const item = this.item;
    if (item === null) return;
    this.item = null;
    try {
      await this.post(name, { rater: this.rater, item: item.id, ...body });
      this.#doneIds.push(item.id);
    } catch (error) {
      this.item = item;
      say(`Not stored: ${error.message}`);
      return;
    }
    say(message);
    try { await this.#load(); } catch (error) { say(error.message); }
  }

  /** Show the item before this one. */
  async back() {
    const item = this.item, id = this.#doneIds.pop();
    if (id === undefined) return;
    try {
      await this.#load(id);
    } catch (error) {
      this.item = item;
      this.#doneIds.push(id);
      say(error.message);
    }
  }
}

/** Call ``action(key)`` for a key that is pressed outside text fields; "Ctrl+Enter" is one. */
export function onKeys(action) {
  document.addEventListener("keydown", (event) => {
    if (["INPUT", "TEXTAREA"].includes(event.target.tagName) || event.metaKey || event.altKey) return;
    action(event.ctrlKey ? `Ctrl+${event.key}` : event.key);
  });
}
