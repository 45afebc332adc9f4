// The dashboard: what /dashboard/data has of a period, drawn again every while.

import { $, ask, button, el, say, themes } from "./common.js";
import { bars, lines } from "./charts.js";

const WINDOWS = { hour: "Hour", day: "Day", week: "Week", all: "All" };
const EVERY = { hour: 10_000, day: 30_000, week: 60_000, all: 60_000 };
const MOVED = 0.2; // of PSI: more is called a shift; below its own noise it is none

let period = "hour", reference = null, told = null, timer = 0, asking = null;

// ---- numbers as text

const small = (value) => (value === 0 ? "0" : value < 1 ? value.toFixed(2) : value < 10 ? value.toFixed(1) : Math.round(value).toLocaleString("en"));
const percent = (value) => `${value > 0 && value < 0.0995 ? (value * 100).toFixed(1) : Math.round(value * 100)} %`;
const seconds = (value) => (value === 0 ? "0 s" : value < 1 ? `${Math.round(value * 1000)} ms` : `${value < 10 ? value.toFixed(1) : Math.round(value)} s`);
const whole = (value) => Math.round(value).toLocaleString("en");
const or = (value, format) => (value === null || value === undefined ? "–" : format(value));

function time(at) {
  const date = new Date(at * 1000), two = (n) => String(n).padStart(2, "0");
  const clock = `${two(date.getHours())}:${two(date.getMinutes())}`;
  const day = `${date.getFullYear()}-${two(date.getMonth() + 1)}-${two(date.getDate())}`.slice(5);
  const length = told.until - told.since;
  return length <= 43_200 ? clock : length <= 8 * 86_400 ? `${day} ${clock}` : day;
}

// ---- loading

async function load() {
  clearTimeout(timer);
  asking?.abort();
  const mine = (asking = new AbortController());
  const query = new URLSearchParams({ window: period, ...(reference ?? {}) });
  try {
    told = await (await ask(`/dashboard/data?${query}`, undefined, mine.signal)).json();
    draw();
    $("key-label").hidden = true;
    say(`updated ${new Date().toLocaleTimeString("en-GB")}`);
  } catch (error) {
    if (mine.signal.aborted) return;
    if (error.message.startsWith("an API key")) {
      $("key-label").hidden = false;
      say("an API key is needed");
    } else say(`Not updated: ${error.message}`);
  }
  timer = setTimeout(() => (document.hidden ? again() : load()), EVERY[period]);
}

/** Wait until somebody looks. */
function again() {
  document.addEventListener("visibilitychange", load, { once: true });
}

/** Show the shortest period that has answers, the hour where none has. */
async function open() {
  for (const one of [...Object.keys(WINDOWS), "hour"]) {
    period = one;
    await load();
    const clicked = location.hash.slice(1) in WINDOWS;
    if (clicked || !told || told.groups[0].summary.answers) return;
  }
}

// ---- drawing

/** The groups that are drawn: each model where there are several, else all. */
function drawn() {
  const groups = told.groups.length > 1 ? told.groups.slice(1) : told.groups;
  return groups.map((group, i) => ({ ...group, name: group.model ?? told.models[0] ?? "all", color: `var(--s${i})` }));
}

function draw() {
  const groups = drawn(), one = groups.length === 1;
  $("model").textContent = one ? told.models[0] ?? "" : `${told.models.length} models`;
  for (const choice of $("windows").children) choice.ariaPressed = String(choice.value === period);
  alerts();
  table();
  $("legend").replaceChildren(...(one ? [] : groups.map((group) => {
    const key = el("span", { className: "key" });
    key.style.background = group.color;
    return el("span", { className: "model" }, key, group.name);
  })), "A line is the median or the rate, a dashed one the 95th percentile, a band the 95 % interval.");
  $("charts").replaceChildren();
  const line = (key, dashed) => groups.map((group) =>
    ({ name: one ? "" : group.name, color: group.color, values: group.series[key], dashed }));
  const both = (key) => groups.flatMap((group) => [
    { name: one ? "" : group.name, color: group.color, values: group.series[key] },
    { name: one ? "" : group.name, color: group.color, values: group.series[`${key}_high`], dashed: true }]);
  const { edges, rate_edges: wide } = told, rates = { format: percent, time, most: 0.05, top: 1 };
  lines($("charts"), "Answers a minute", line("per_minute"), edges, { format: small, time });
  lines($("charts"), "To the first token, p50 / p95", both("first_token"), edges, { format: seconds, time });
  lines($("charts"), "Whole answer, p50 / p95", both("whole"), edges, { format: seconds, time });
  lines($("charts"), "Refusals", line("refusal"), wide, rates);
  lines($("charts"), "Toxic answers", line("toxicity"), wide, rates);
  lines($("charts"), "Errors", line("errors"), wide, rates);
  lines($("charts"), "Thumbs up, of all thumbs", line("thumbs"), wide, { ...rates, most: 1 });
  $("lengths").replaceChildren();
  for (const [key, title] of [["prompt_tokens", "Tokens of prompts"], ["new_tokens", "Tokens of answers"]]) {
    bars($("lengths"), title, groups.map(({ name, color, lengths }) => ({ name, color, counts: lengths[key] })), told.length_edges);
  }
  drift();
  kept();
}

function alerts() {
  $("alerts").replaceChildren(...told.alerts.map((alert) => {
    const up = alert.above !== null;
    const format = alert.low === null ? small : (value) => (alert.high <= 1 ? percent(value) : small(value));
    const value = or(alert.value, format) + (alert.value !== null && alert.low !== null ? ` (${format(alert.low)} to ${format(alert.high)})` : "");
    const since = alert.since === null ? "" : ` since ${new Date(alert.since * 1000).toLocaleString("en-GB")}`;
    return el("div", { className: `alert${alert.firing ? " firing" : ""}` },
      el("span", { className: "state", textContent: alert.firing ? "firing" : "quiet" }),
      el("span", { className: "name", textContent: alert.name }),
      el("span", { className: "quiet", textContent: `${alert.metric} ${value}, ${up ? "above" : "below"} ${up ? alert.above : alert.below}`
        + ` over ${alert.window}${alert.model ? `, ${alert.model}` : ""}${since}` }));
  }));
  if (!told.alerts.length) {
    $("alerts").append(el("p", { className: "quiet", textContent: "No rules: fastlm serve --alerts FILE." }));
  }
}

function table() {
  const groups = told.groups;
  const row = (name, cell, note = "") => el("tr", {},
    el("th", { scope: "row" }, name, note ? el("span", { className: "quiet", textContent: note }) : ""),
    ...groups.map(({ summary }) => el("td", {}, ...[cell(summary)].flat())));
  const between = (low, high, format) => el("span", { className: "quiet", textContent: `${format(low)} to ${format(high)}` });
  const rate = (found) => (found.n ? [percent(found.value), between(found.low, found.high, percent)] : "–");
  const two = (found, format) => (found.n ? [`${or(found.p50, format)} / ${or(found.p95, format)}`] : "–");
  const number = (found) => (found.n ? [found.value.toFixed(2), ...(found.low === null ? [] : [between(found.low, found.high, (x) => x.toFixed(2))])] : "–");
  const judge = (key) => groups[0].summary[key];
  const names = groups.map(({ model }) => el("th", { scope: "col", textContent: model ?? (groups.length > 1 ? "all" : told.models[0] ?? "all") }));
  $("table").replaceChildren(
    el("thead", {}, el("tr", {}, el("th", { scope: "col", textContent: "" }), ...names)),
    el("tbody", {},
      row("Answers", (s) => whole(s.answers)),
      row("Answers a minute", (s) => small(s.per_minute)),
      row("In the queue", (s) => two(s.queue, seconds), "p50 / p95"),
      row("To the first token", (s) => two(s.first_token, seconds), "p50 / p95"),
      row("Whole answer", (s) => two(s.whole, seconds), "p50 / p95"),
      row("Tokens of a prompt", (s) => two(s.prompt_tokens, whole), "p50 / p95"),
      row("Tokens of an answer", (s) => two(s.new_tokens, whole), "p50 / p95"),
      row("Cut at the longest length", (s) => rate(s.cut)),
      row("Errors", (s) => rate(s.errors)),
      row("Turned away, queue full", (s) => rate(s.refused)),
      row("Clients that left", (s) => rate(s.left)),
      ...["refusal", "toxicity"].filter(judge).map((key) =>
        row(key === "refusal" ? "Refusals" : "Toxic answers", (s) => rate(s[key]), `judge: ${judge(key).judge}`)),
      row("Answers with feedback", (s) => rate(s.feedback)),
      row("Thumbs up", (s) => rate(s.thumbs), "of all thumbs; higher is better"),
      row("Comments, corrections, picks", ({ feedback_counts: counts }) => `${counts.comment}, ${counts.corrected}, ${counts.picked}`),
      ...Object.entries(groups[0].summary.metrics).map(([name, { kind, better, level, scale }]) =>
        row(name, (s) => (kind === "boolean" ? rate : number)(s.metrics[name]),
          `${kind === "boolean" ? "yes" : `mean, ${scale[0]} to ${scale[1]}`}; of ${level}s; ${better} is better`))));
  const notes = ["Small numbers are 95 % intervals. Feedback counts at the time of its answer, whenever it came."];
  for (const key of ["refusal", "toxicity"]) {
    const found = judge(key);
    if (!found) continue;
    notes.push(`${found.judge}: ${found.method}.${found.other_judges ? ` ${whole(found.other_judges)} answers have another judge's score and are left out.` : ""}`);
  }
  if (told.unmatched) notes.push(`Feedback about answers that were not measured here: ${whole(told.unmatched)}, in no model's column.`);
  if (told.cut) notes.push("The period has more answers than are read: these are the newest 100,000.");
  $("notes").textContent = notes.join(" ");
}

function drift() {
  const { drift: found } = told;
  const counts = `${found.cut ? "the newest " : ""}${whole(found.prompts)} prompts of this period, ${whole(found.reference_prompts)} of the reference (${found.reference})`;
  if (!found.enough) {
    $("drift-text").textContent = `Too few to compare: ${counts}; at least ${found.least} of each are wanted.`;
    $("drift").replaceChildren();
    return;
  }
  const p = (value) => (value < 0.01 ? value.toFixed(3) : value.toFixed(2));
  const sure = found.mmd.p < 0.01;
  $("drift-text").textContent = `${counts}. All features and words together, MMD: ${found.mmd.value.toFixed(4)}, p = ${p(found.mmd.p)}: `
    + `${sure ? "the prompts have changed" : "no change that chance would not make"}. PSI below: the mark is what chance alone stays below in 95 of 100.`;
  const most = Math.max(0.3, ...found.features.map(({ psi, floor }) => Math.max(psi, floor)));
  $("drift").replaceChildren(
    el("thead", {}, el("tr", {}, ...["Feature", "PSI", "p"].map((name) => el("th", { scope: "col", textContent: name })))),
    el("tbody", {}, ...found.features.map((feature) => {
      const moved = feature.psi > MOVED && feature.p < 0.05;
      const fill = el("span"), mark = el("i"), bar = el("span", { className: `bar${moved ? " moved" : ""}`, ariaHidden: "true" }, fill, mark);
      fill.style.width = `${(100 * feature.psi) / most}%`;
      mark.style.left = `${(100 * feature.floor) / most}%`;
      return el("tr", {}, el("th", { scope: "row", textContent: feature.name }),
        el("td", {}, bar, `${feature.psi.toFixed(2)}${moved ? " shifted" : ""}`), el("td", { textContent: p(feature.p) }));
    })));
}

function kept() {
  const { measures } = told;
  $("kept").textContent = `Numbers about each answer, without its text: ${whole(measures.written)} written since this server started, `
    + `${whole(measures.dropped)} dropped because too many waited, ${whole(measures.database_errors)} times the database could not be used`
    + `${measures.judge_errors ? `, ${whole(measures.judge_errors)} times a judge failed` : ""}. `
    + `Kept for ${measures.keep_days} days, at most ${whole(measures.keep_rows)}.`;
}

// ---- controls

themes("theme");
$("windows").append(...Object.entries(WINDOWS).map(([value, text]) =>
  button(text, () => { period = value; location.hash = value; load(); }, { value })));
$("key").value = sessionStorage.getItem("key") ?? "";
$("key").onchange = () => { sessionStorage.setItem("key", $("key").value); begin(); };
$("reference").onsubmit = (event) => {
  event.preventDefault();
  reference = { begin: $("begin").value, end: $("end").value };
  load();
};
$("default").onclick = () => { reference = null; $("begin").value = $("end").value = ""; load(); };
let resized = 0;
window.onresize = () => { clearTimeout(resized); resized = setTimeout(() => told && draw(), 150); };
function begin() {
  const wanted = location.hash.slice(1);
  if (!(wanted in WINDOWS)) return open();
  period = wanted;
  return load();
}
begin();
