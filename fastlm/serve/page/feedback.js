// Feedback about an answer, sent to the server.

import { $, ask, button, el, say } from "./common.js";

/** Send feedback about an answer; with the conversation, if the user consented since. */
export async function sendFeedback(turn, conversation, feedback) {
  const body = { response_id: turn.id, conversation_id: conversation, choice: turn.choice, ...feedback };
  const sendsText = $("consent").checked && !turn.sent; // once: consent may have been withdrawn since
  if (sendsText) {
    body.conversation = { consent: true, messages: turn.prompt, choices: turn.texts };
  }
  try {
    const { text_stored: textStored } = await (await ask("/v1/feedback", body)).json();
    turn.sent ||= sendsText;
    say(textStored ? "Thank you: stored, with the conversation."
      : `Thank you: stored; the text of the answer is not stored, since ${turn.sent
        ? "its consent was withdrawn" : "there is no consent (Store my conversations)"}.`);
    return true;
  } catch (error) { say(`Not stored: ${error.message}`); return false; }
}

/** Show a form with the declared numbers under ``node``. Resolves to the values, or null. */
export function askNumbers(node, metrics) {
  return new Promise((resolve) => {
    const inputs = metrics.map(({ name, kind, low, high, level, better }) => {
      const input = kind === "boolean"
        ? el("select", {}, ...["", "yes", "no"].map((text) => el("option", { value: text, textContent: text })))
        : el("input", { type: "number", min: low, max: high, step: "any", placeholder: `${low} to ${high}` });
      const text = `${name}${level === "conversation" ? ", of the conversation" : ""} (${better} is better)`;
      return { name, input, label: el("label", {}, text, input) };
    });
    const done = (value) => { box.remove(); resolve(value); };
    const box = el("form", { className: "box numbers" }, ...inputs.map(({ label }) => label),
      el("div", { className: "row" }, button("Cancel", () => done(null)),
        el("button", { type: "submit", className: "main", textContent: "Save" })));
    box.onsubmit = (event) => {
      event.preventDefault();
      const values = inputs.filter(({ input }) => input.value !== "").map(({ name, input }) =>
        [name, input.type === "number" ? Number(input.value) : input.value === "yes"]);
      done(Object.fromEntries(values));
    };
    box.onkeydown = (event) => {
      if (event.key === "Escape") { event.stopPropagation(); done(null); }
    };
    node.append(box);
    inputs[0].input.focus();
  });
}
