// The page of `fastlm label`: the rater labels an answer or a pair; each label is stored at once.

import { $, button, el, say } from "./common.js";
import { RaterLoop, answerText, onKeys } from "./rater.js";

// scale -> [key, label, text], with the keys of the terminal. Of a pair, A is the first answer here
const LABELS = {
  "pass": [["p", "pass", "Pass"], ["f", "fail", "Fail"]],
  "1-5": grades(5),
  "1-10": grades(10),
  "pair": [["1", "A", "1 is better"], ["2", "B", "2 is better"], ["=", "tie", "Equal"]],
};
const HELPS = {
  "pass": "Keys: p passes, f fails, s skips, b goes back.",
  "1-5": "Keys: 1 to 5 by the rubric above (5 is the best), s skips, b goes back.",
  "1-10": "Keys: 1 to 10 and Enter, by the rubric above (10 is the best), s skips, b goes back.",
  "pair": "Keys: 1 or 2 is better, = they are equally good or equally bad, s skips, b goes back.",
};
let labels = [];
let typed = ""; // the digits of a grade that Enter stores

function grades(count) {
  return Array.from({ length: count }, (_, i) => [String(i + 1), i + 1, String(i + 1)]);
}

const loop = new RaterLoop("/v1/label", {
  draw,
  progress: ({ labelled, skipped, total }) => `${labelled} of ${total} labelled, ${skipped} skipped`,
  nothingLeft: "There is nothing left to label.",
});

function draw(item, { rubric }) {
  labels = LABELS[rubric.scale];
  typed = "";
  $("rubric").textContent = rubric.text;
  $("labels").replaceChildren(...labels.map(([key, label, text]) =>
    button(text, () => store(label), { className: "main", title: `key ${key}` })));
  $("help").textContent = HELPS[rubric.scale];
  const answers = item?.answers ?? [];
  $("answers").replaceChildren(...answers.map((messages, i) => el("article", { role: "listitem", tabIndex: 0 },
    el("span", { className: "place", textContent: answers.length > 1 ? `${i + 1}` : "Answer" }), answerText(messages))));
  $("answers").firstChild?.focus();
}

const store = (label) => loop.store("label", { label }, "Stored.");
const skip = () => loop.store("label", {}, "Skipped.");

$("skip").onclick = skip;
onKeys((key, event) => {
  if (key === "s") skip();
  else if (key === "b") loop.back();
  else if (labels.some(([name]) => name.length > 1)) typeGrade(key, event);
  else storeKey(key);
});

function storeKey(key) {
  const entry = labels.find(([name]) => name === key);
  if (entry) store(entry[1]);
}

/** Collect the digits of a grade until Enter: 1 is the beginning of 10. A digit that cannot follow starts a new number. */
function typeGrade(key, event) {
  if (loop.item === null || loop.isBusy) return;
  if (key === "Enter") {
    if (typed) event.preventDefault(); // it is about the grade, not about a button
    storeKey(typed);
  } else {
    typed = [typed + key, key].find((text) => labels.some(([name]) => name.startsWith(text))) ?? "";
    say(typed && `${typed}: Enter stores it.`);
  }
}
