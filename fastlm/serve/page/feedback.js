// What a person says of an answer, sent to the server.

import { $, ask, button, el, say } from "./common.js";

/** Send feedback about an answer; with the conversation, if the user consented since. */
export async function sendFeedback(turn, conversation, what) {
  const given = { response_id: turn.id, conversation_id: conversation, choice: turn.choice, ...what };
  const sends = $("consent").checked && !turn.sent; // once: consent may have been withdrawn since
  if (sends) {
    given.conversation = { consent: true, messages: turn.seen, choices: turn.texts };
  }
  try {
    const { text_stored: isTextStored } = await (await ask("/v1/feedback", given)).json();
    turn.sent ||= sends;
    say(isTextStored ? "Thank you: stored, with the conversation."
      : `Thank you: stored; the text of the answer is not kept, since ${turn.sent
        ? "its consent was withdrawn" : "nobody consented (Keep my conversations)"}.`);
    return true;
  } catch (error) { say(`Not stored: ${error.message}`); return false; }
}

/** A form with the numbers that the server asks for, under ``node``. Resolves to those given, or null. */
export function numbers(node, metrics) {
  return new Promise((resolve) => {
    const asked = metrics.map(({ name, kind, low, high, level, better }) => {
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
