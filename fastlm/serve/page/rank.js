// The page of `fastlm rank`: the answers to a prompt in the rater's order, stored item by item.

import { $, ask, button, el, say, themes, write } from "./common.js";
import { show } from "./markdown.js";

let rater = "", item = null, cards = [], done = [], after = 0;

const post = async (name, body) => (await ask(`/v1/rank/${name}`, body)).json();

async function load(id) {
  const only = $("skipped").checked;
  const body = id === undefined ? { rater, skipped: only, after: only ? after : 0 } : { rater, item: id };
  const found = await post("next", body);
  const { ranked, skipped, total } = found.progress;
  $("progress").textContent = `${rater}: ${ranked} of ${total} ranked, ${skipped} skipped`;
  item = found.item;
  draw();
  await agreement();
}

function draw() {
  $("help").hidden = $("do").hidden = item === null;
  $("prompt").replaceChildren(...(item?.prompt ?? []).map((message) => {
    const text = el("div", { className: "text" });
    if (message.role === "assistant") show(text, message.content);
    else text.textContent = message.content;
    return el("article", { className: "user" }, el("strong", { textContent: message.role }), text);
  }));
  cards = (item?.answers ?? []).map(card);
  order();
  if (item === null) say("Nothing left to rank.");
  else cards[0].node.focus();
}

function card(messages, shown) {
  const text = el("div", { className: "text" });
  const said = messages.at(-1).content;
  show(text, messages.map((m) => (m.tool_calls ? JSON.stringify(m.tool_calls) : m.content)).join("\n\n"));
  const place = el("span", { className: "place" });
  const made = { shown, tied: false, place };
  made.tie = button("= as the one before", () => tie(made), { ariaPressed: "false" });
  made.node = el("article", { tabIndex: 0, draggable: true, role: "listitem" }, place, text,
    el("div", { className: "row tools" }, button("Earlier", () => move(made, -1)),
      button("Later", () => move(made, 1)), made.tie, button("Correct", () => correct(made, said))));
  made.node.onkeydown = (event) => keys(event, made);
  made.node.ondragstart = (event) => event.dataTransfer.setData("text/plain", String(shown));
  made.node.ondragover = (event) => { event.preventDefault(); made.node.classList.add("over"); };
  made.node.ondragleave = () => made.node.classList.remove("over");
  made.node.ondrop = (event) => {
    event.preventDefault();
    made.node.classList.remove("over");
    const moved = cards.find((one) => one.shown === Number(event.dataTransfer.getData("text/plain")));
    if (moved && moved !== made) move(moved, cards.indexOf(made) - cards.indexOf(moved));
  };
  return made;
}

function keys(event, made) {
  if (event.target !== made.node) return;
  const steps = { ArrowLeft: -1, ArrowUp: -1, ArrowRight: 1, ArrowDown: 1 };
  if (event.key in steps) { event.preventDefault(); move(made, steps[event.key]); }
  if (event.key === "=") tie(made);
}

function move(made, by) {
  const at = cards.indexOf(made), to = Math.max(0, Math.min(cards.length - 1, at + by));
  cards.splice(to, 0, ...cards.splice(at, 1));
  order();
  made.node.focus();
  say(`Answer at place ${to + 1} of ${cards.length}`);
}

function tie(made) {
  made.tied = !made.tied && cards.indexOf(made) > 0;
  order();
}

/** The rank of each card from the best, 0, and the cards on the page in that order. */
function ranks() {
  let rank = 0;
  return cards.map((one, i) => (i === 0 || one.tied ? rank : ++rank));
}

function order() {
  if (cards[0]) cards[0].tied = false;
  ranks().forEach((rank, i) => {
    cards[i].place.textContent = `${rank + 1}.`;
    cards[i].tie.ariaPressed = String(cards[i].tied);
  });
  $("answers").replaceChildren(...cards.map((one) => one.node));
}

async function judge(skip) {
  if (item === null) return;
  const found = ranks(), given = Array(cards.length);
  cards.forEach((one, i) => { given[one.shown] = found[i]; });
  try {
    await post("judge", { rater, item: item.id, ...(skip ? {} : { ranks: given }) });
    done.push(item.id);
    after = item.id;
    say(skip ? "Skipped." : "Stored.");
    await load();
  } catch (error) { say(`Not stored: ${error.message}`); }
}

async function correct(made, said) {
  const text = await write(made.node, "The answer as it should be", said);
  if (!text?.trim() || text === said) return;
  try {
    await post("correct", { rater, item: item.id, answer: made.shown, text });
    say("Correction stored.");
  } catch (error) { say(`Not stored: ${error.message}`); }
}

async function back() {
  if (done.length) await load(done.pop());
}

async function agreement() {
  const have = await post("agreement", {});
  $("alpha").textContent = have.alpha === null
    ? "Krippendorff's alpha: none yet, no two raters ranked the same prompt"
    : `Krippendorff's alpha (ordinal): ${have.alpha.toFixed(3)}, prompts with two raters or more: ${have.items}`;
  const row = (tag, ...cells) => el("tr", {}, ...cells.map((text) => el(tag, { textContent: String(text) })));
  $("raters").replaceChildren(row("th", "rater", "ranked", "skipped", "corrected"),
    ...Object.entries(have.raters).map(([name, n]) => row("td", name, n.ranked, n.skipped, n.corrected)),
    ...have.pairs.map((pair) =>
      row("td", pair.raters.join(", "), `${pair.alike} of ${pair.pairs} pairs in the same order`)));
}

$("who").onsubmit = async (event) => {
  event.preventDefault();
  rater = $("rater").value.trim();
  sessionStorage.setItem("key", $("key").value);
  done = []; after = 0;
  try { say(""); await load(); } catch (error) { say(error.message); }
};
$("save").onclick = () => judge(false);
$("skip").onclick = () => judge(true);
$("back").onclick = back;
document.addEventListener("keydown", (event) => {
  if (["INPUT", "TEXTAREA"].includes(event.target.tagName)) return;
  if (event.key === "Enter" && event.ctrlKey) judge(false);
  else if (event.key === "s" && !event.ctrlKey && !event.metaKey) judge(true);
  else if (event.key === "b" && !event.ctrlKey && !event.metaKey) back();
});
themes("theme");
agreement().catch(() => {});
