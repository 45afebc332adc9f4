// What the pages of raters share: the rater's name, the next item, going back, and keys.

import { $, ask, el, say, themes } from "./common.js";
import { show } from "./markdown.js";

const DOUBLE_CLICK_MS = 500; // the longest time between both clicks by the default of common systems

/** Return a node with the text of a message and its tool calls, as `message_text` of fastlm.pipeline.text. */
function messageText({ role, content, tool_calls: calls }) {
  const text = el("div", { className: "text" });
  if (role === "assistant") show(text, content);
  else text.textContent = content;
  if (calls?.length) text.append(el("p", {}, el("code", { textContent: JSON.stringify(calls) })));
  return text;
}

const messageNode = (message) =>
  el("article", { className: "user" }, el("strong", { textContent: message.role }), messageText(message));

/** Return a node with the messages of an answer, with their roles if one is the user's. */
export function answerText(messages) {
  const isConversation = messages.some(({ role }) => role === "user");
  return el("div", {}, ...messages.map(isConversation ? messageNode : messageText));
}

/** The loop over the items of the API below ``path``, which stores each one at once. What the rater enters is
 * about the item on the page: while a request runs, nothing else is stored or loaded. ``page`` has:
 * draw(item, response), item: null if none is left; progress(counts), the line of the progress;
 * nothingLeft, the line at the end; nextFields(lastId), further fields of a request for the item after that one. */
export class RaterLoop {
  rater = "";
  item = null; // the one on the page
  #path;
  #page;
  #doneIds = [];
  #shownAt = 0; // when the item appeared
  isBusy = false; // a request runs

  constructor(path, page) {
    this.#path = path;
    this.#page = page;
    $("who").onsubmit = (event) => {
      event.preventDefault();
      if (this.isBusy) say("Wait for the last request, then start again.");
      else this.#run(() => this.#start());
    };
    $("back").onclick = () => this.back();
    // the second click of a double click is not about the item that has just appeared; of a key, detail is 0
    document.querySelector("main").addEventListener("click", (event) => {
      if (event.detail === 0 || performance.now() - this.#shownAt >= DOUBLE_CLICK_MS) return;
      event.stopPropagation();
      say("The item has just appeared: click again.");
    }, true);
    themes("theme");
  }

  async post(name, body) {
    return (await ask(`${this.#path}/${name}`, body)).json();
  }

  /** Run ``action``, unless an earlier one still runs. */
  async #run(action) {
    if (this.isBusy) return;
    this.isBusy = true;
    try {
      await action();
    } catch (error) {
      say(error.message);
    } finally {
      this.isBusy = false;
    }
  }

  async #start() {
    sessionStorage.setItem("key", $("key").value);
    this.rater = $("rater").value.trim();
    this.item = null; // the one on the page is another rater's
    this.#doneIds = [];
    $("help").hidden = $("do").hidden = true;
    await this.#load("");
  }

  /** Show the item with this id, or the next one, and a message. */
  async #load(message, id) {
    const next = id === undefined ? this.#page.nextFields?.(this.#doneIds.at(-1) ?? 0) : { item: id };
    const response = await this.post("next", { rater: this.rater, ...next });
    this.item = response.item;
    $("progress").textContent = `${this.rater}: ${this.#page.progress(response.progress)}`;
    $("help").hidden = $("do").hidden = this.item === null;
    $("prompt").replaceChildren(...(this.item?.prompt ?? []).map(messageNode));
    say(this.item === null ? this.#page.nothingLeft : message);
    this.#page.draw(this.item, response);
    this.#shownAt = performance.now();
  }

  /** Store what the rater entered about the item, and show the next one. */
  store(name, body, message) {
    return this.#run(async () => {
      if (this.item === null) return;
      const { id } = this.item;
      await this.post(name, { rater: this.rater, item: id, ...body }).catch((error) => {
        throw new Error(`Not stored: ${error.message}`);
      });
      this.#doneIds.push(id);
      await this.#load(message);
    });
  }

  /** Show the item before this one. */
  back() {
    return this.#run(async () => {
      if (this.#doneIds.length === 0) return;
      await this.#load("", this.#doneIds.at(-1));
      this.#doneIds.pop();
    });
  }
}

/** Call ``action(key, event)`` for a key that is pressed outside text fields, but not again while it is held;
 * "Ctrl+Enter" is one. */
export function onKeys(action) {
  document.addEventListener("keydown", (event) => {
    if (["INPUT", "TEXTAREA"].includes(event.target.tagName) || event.metaKey || event.altKey) return;
    if (!event.repeat) action(event.ctrlKey ? `Ctrl+${event.key}` : event.key, event);
  });
}
