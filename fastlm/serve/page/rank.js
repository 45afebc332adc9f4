// The page of `fastlm rank`: the rater orders the answers to a prompt; each item is stored at once.

import { $, askText, button, el, say } from "./common.js";
import { RaterLoop, answerText, onKeys } from "./rater.js";

let cards = [];

const loop = new RaterLoop("/v1/rank", {
  draw,
  progress: ({ ranked, skipped, total }) => `${ranked} of ${total} ranked, ${skipped} skipped`,
  nothingLeft: "There is nothing left to rank.",
  nextFields: (lastId) => ($("skipped").checked ? { skipped: true, after: lastId } : {}),
});

function draw(item) {
  cards = (item?.answers ?? []).map(createCard);
  drawOrder();
  cards[0]?.node.focus();
  showAgreement().catch((error) => say(error.message));
}

function createCard(messages, index) {
  const content = messages.at(-1).content;
  const place = el("span", { className: "place" });
  const card = { index, tied: false, place };
  card.tie = button("= as the previous one", () => tie(card), { ariaPressed: "false" });
  card.node = el("article", { tabIndex: 0, draggable: true, role: "listitem" }, place, answerText(messages),
    el("div", { className: "row tools" }, button("Earlier", () => move(card, -1)),
      button("Later", () => move(card, 1)), card.tie, button("Correct", () => correct(card, content))));
  card.node.onkeydown = (event) => onKey(event, card);
  card.node.ondragstart = (event) => event.dataTransfer.setData("text/plain", String(index));
  card.node.ondragover = (event) => { event.preventDefault(); card.node.classList.add("over"); };
  card.node.ondragleave = () => card.node.classList.remove("over");
  card.node.ondrop = (event) => {
    event.preventDefault();
    card.node.classList.remove("over");
    const dragged = cards.find((other) => other.index === Number(event.dataTransfer.getData("text/plain")));
    if (dragged && dragged !== card) move(dragged, cards.indexOf(card) - cards.indexOf(dragged));
  };
  return card;
}

function onKey(event, card) {
  if (event.target !== card.node) return;
  const steps = { ArrowLeft: -1, ArrowUp: -1, ArrowRight: 1, ArrowDown: 1 };
  if (event.key in steps) { event.preventDefault(); move(card, steps[event.key]); }
  if (event.key === "=") tie(card);
}

function move(card, by) {
  const from = cards.indexOf(card), to = Math.max(0, Math.min(cards.length - 1, from + by));
  cards.splice(to, 0, ...cards.splice(from, 1));
  drawOrder();
  card.node.focus();
  say(`Answer at position ${to + 1} of ${cards.length}`);
}

function tie(card) {
  card.tied = !card.tied && cards.indexOf(card) > 0;
  drawOrder();
}

/** Return the rank of each card; 0 is the best. */
function ranks() {
  let rank = 0;
  return cards.map((card, i) => (i === 0 || card.tied ? rank : ++rank));
}

/** Show the cards on the page in their order. */
function drawOrder() {
  if (cards[0]) cards[0].tied = false;
  ranks().forEach((rank, i) => {
    cards[i].place.textContent = `${rank + 1}.`;
    cards[i].tie.ariaPressed = String(cards[i].tied);
  });
  $("answers").replaceChildren(...cards.map((card) => card.node));
}

const skip = () => loop.store("judge", {}, "Skipped.");

function save() {
  const cardRanks = ranks(), answerRanks = Array(cards.length);
  cards.forEach((card, i) => { answerRanks[card.index] = cardRanks[i]; });
  return loop.store("judge", { ranks: answerRanks }, "Stored.");
}

async function correct(card, content) {
  const { rater, item } = loop;
  if (item === null) return;
  const text = await askText(card.node, "The corrected answer", content);
  if (!text?.trim() || text === content) return;
  try {
    await loop.post("correct", { rater, item: item.id, answer: card.index, text });
    say("Correction stored.");
  } catch (error) { say(`Not stored: ${error.message}`); }
}

async function showAgreement() {
  const report = await loop.post("agreement", {});
  $("alpha").textContent = report.alpha === null
    ? "Krippendorff's alpha: none yet, no two raters ranked the same prompt"
    : `Krippendorff's alpha (ordinal): ${report.alpha.toFixed(3)}, prompts with two raters or more: ${report.items}`;
  const row = (tag, ...cells) => el("tr", {}, ...cells.map((text) => el(tag, { textContent: String(text) })));
  $("raters").replaceChildren(row("th", "rater", "ranked", "skipped", "corrected"),
    ...Object.entries(report.raters).map(([name, n]) => row("td", name, n.ranked, n.skipped, n.corrected)),
    ...report.pairs.map((pair) =>
      row("td", pair.raters.join(", "), `${pair.alike} of ${pair.pairs} pairs in the same order`)));
}

$("save").onclick = save;
$("skip").onclick = skip;
onKeys((key) => {
  if (key === "Ctrl+Enter") save();
  else if (key === "s") skip();
  else if (key === "b") loop.back();
});
showAgreement().catch(() => {});
