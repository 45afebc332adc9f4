// The dashboard: draws the data of /dashboard/data for a period, and updates it regularly.

import { $, ask, button, el, say, themes } from "./common.js";
import { bars, lines } from "./charts.js";

const WINDOWS = { hour: "Hour", day: "Day", week: "Week", all: "All" };
const UPDATE_MS = { hour: 10_000, day: 30_000, week: 60_000, all: 60_000 };
const SHIFT = 0.2; // a PSI above it is called a shift, if it is significant, too

let period = "hour", reference = null, data = null, timer = 0, request = null;

// ---- numbers as text

const FEW = 5; // a rate's n, below which an interval says nothing
const small = (value) => (value === 0 ? "0" : value < 1 ? value.toFixed(2) : value < 10 ? value.toFixed(1) : Math.round(value).toLocaleString("en"));
const percent = (value) => `${value > 0 && value < 0.0995 ? (value * 100).toFixed(1) : Math.round(value * 100)} %`;
const seconds = (value) => (value === 0 ? "0 s" : value < 1 ? `${Math.round(value * 1000)} ms` : `${value < 10 ? value.toFixed(1) : Math.round(value)} s`);
const integer = (value) => Math.round(value).toLocaleString("en");
const orDash = (value, format) => (value === null || value === undefined ? "–" : format(value));

function time(at) {
  const date = new Date(at * 1000), two = (n) => String(n).padStart(2, "0");
  const clock = `${two(date.getHours())}:${two(date.getMinutes())}`;
  const day = `${date.getFullYear()}-${two(date.getMonth() + 1)}-${two(date.getDate())}`.slice(5);
  const length = data.until - data.since;
  return length <= 43_200 ? clock : length <= 8 * 86_400 ? `${day} ${clock}` : day;
}

// ---- loading

async function load() {
  clearTimeout(timer);
  request?.abort();
  const current = (request = new AbortController());
  const query = new URLSearchParams({ window: period, ...(reference ?? {}) });
  try {
    data = await (await ask(`/dashboard/data?${query}`, undefined, current.signal)).json();
    draw();
    $("key-label").hidden = true;
    say(`updated ${new Date().toLocaleTimeString("en-GB")}`);
  } catch (error) {
    if (current.signal.aborted) return;
    if (error.message.startsWith("an API key")) {
      $("key-label").hidden = false;
      say("an API key is needed");
    } else say(`Not updated: ${error.message}`);
  }
  timer = setTimeout(() => (document.hidden ? waitUntilVisible() : load()), UPDATE_MS[period]);
}

/** Wait until the page is visible. */
function waitUntilVisible() {
  document.addEventListener("visibilitychange", load, { once: true });
}

/** Show the shortest period that has answers, or the hour if none has. */
async function openPeriod() {
  for (const name of [...Object.keys(WINDOWS), "hour"]) {
    period = name;
    await load();
    const clicked = location.hash.slice(1) in WINDOWS;
    if (clicked || !data || data.groups[0].summary.answers) return;
  }
}

// ---- drawing

/** Return the groups to draw: each model if there are several, else all together. */
function groupsToDraw() {
  const groups = data.groups.length > 1 ? data.groups.slice(1) : data.groups;
  return groups.map((group, i) => ({ ...group, name: group.model ?? data.models[0] ?? "all", color: `var(--s${i})` }));
}

function draw() {
  const groups = groupsToDraw(), single = groups.length === 1;
  $("model").textContent = single ? data.models[0] ?? "" : `${data.models.length} models`;
  for (const choice of $("windows").children) choice.ariaPressed = String(choice.value === period);
  drawAlerts();
  drawTable();
  $("legend").replaceChildren(...(single ? [] : groups.map((group) => {
    const key = el("span", { className: "key" });
    key.style.background = group.color;
    return el("span", { className: "model" }, key, group.name);
  })), "A line is the median or the rate, a dashed one the 95th percentile, a band the 95 % interval.");
  $("charts").replaceChildren();
  const series = (key, dashed) => groups.map((group) =>
    ({ name: single ? "" : group.name, color: group.color, values: group.series[key], dashed }));
  const quantiles = (key) => groups.flatMap((group) => [
    { name: single ? "" : group.name, color: group.color, values: group.series[`${key}_p50`] },
    { name: single ? "" : group.name, color: group.color, values: group.series[`${key}_p95`], dashed: true }]);
  const { edges, rate_edges: rateEdges } = data, rates = { format: percent, time, minTop: 0.05, maxTop: 1 };
  lines($("charts"), "Answers per minute", series("per_minute"), edges, { format: small, time });
  lines($("charts"), "Time to first token, p50 / p95", quantiles("first_token"), edges, { format: seconds, time });
  lines($("charts"), "Complete answer, p50 / p95", quantiles("latency"), edges, { format: seconds, time });
  lines($("charts"), "Refusals", series("refusal"), rateEdges, rates);
  lines($("charts"), "Toxic answers", series("toxicity"), rateEdges, rates);
  lines($("charts"), "Errors", series("errors"), rateEdges, rates);
  lines($("charts"), "Thumbs up, of all thumbs", series("thumbs"), rateEdges, { ...rates, minTop: 1 });
  $("lengths").replaceChildren();
  for (const [key, title] of [["prompt_tokens", "Tokens of prompts"], ["new_tokens", "Tokens of answers"]]) {
    bars($("lengths"), title, groups.map(({ name, color, lengths }) => ({ name, color, counts: lengths[key] })), data.length_edges);
  }
  drawDrift();
  drawMeasurements();
}

function drawAlerts() {
  $("alerts").replaceChildren(...data.alerts.map((alert) => {
    const up = alert.above !== null;
    const format = alert.low === null ? small : (value) => (alert.high <= 1 ? percent(value) : small(value));
    const value = orDash(alert.value, format) + (alert.value !== null && alert.low !== null ? ` (${format(alert.low)} to ${format(alert.high)})` : "");
    const since = alert.since === null ? "" : ` since ${new Date(alert.since * 1000).toLocaleString("en-GB")}`;
    return el("div", { className: `alert${alert.firing ? " firing" : ""}` },
      el("span", { className: "state", textContent: alert.firing ? "firing" : "quiet" }),
      el("span", { className: "name", textContent: alert.name }),
      el("span", { className: "quiet", textContent: `${alert.metric} ${value}, ${up ? "above" : "below"} ${up ? alert.above : alert.below}`
        + ` over ${alert.window}${alert.model ? `, ${alert.model}` : ""}${since}` }));
  }));
  if (!data.alerts.length) {
    $("alerts").append(el("p", { className: "quiet", textContent: "There are no rules: fastlm serve --alerts FILE." }));
  }
}

function drawTable() {
  const groups = data.groups;
  const row = (name, cell, note = "") => el("tr", {},
    el("th", { scope: "row" }, name, note ? el("span", { className: "quiet", textContent: note }) : ""),
    ...groups.map(({ summary }) => el("td", {}, ...[cell(summary)].flat())));
  const interval = (low, high, format) => el("span", { className: "quiet", textContent: `${format(low)} to ${format(high)}` });
  // an interval of one is nearly the whole scale
  const few = (n) => el("span", { className: "quiet", textContent: `n = ${n}` });
  const rate = (r) => (r.n ? [percent(r.value), r.n < FEW ? few(r.n) : interval(r.low, r.high, percent)] : "–");
  const two = (q, format) => (q.n ? [`${orDash(q.p50, format)} / ${orDash(q.p95, format)}`] : "–");
  const number = (r) => (r.n ? [r.value.toFixed(2), ...(r.low === null ? [] : [interval(r.low, r.high, (x) => x.toFixed(2))])] : "–");
  const judge = (key) => groups[0].summary[key];
  const names = groups.map(({ model }) => el("th", { scope: "col", textContent: model ?? (groups.length > 1 ? "all" : data.models[0] ?? "all") }));
  $("table").replaceChildren(
    el("thead", {}, el("tr", {}, el("th", { scope: "col", textContent: "" }), ...names)),
    el("tbody", {},
      row("Answers", (s) => integer(s.answers)),
      row("Answers per minute", (s) => small(s.per_minute)),
      row("Time in the queue", (s) => two(s.queue, seconds), "p50 / p95"),
      row("Time to first token", (s) => two(s.first_token, seconds), "p50 / p95"),
      row("Complete answer", (s) => two(s.latency, seconds), "p50 / p95"),
      row("Tokens of a prompt", (s) => two(s.prompt_tokens, integer), "p50 / p95"),
      row("Tokens of an answer", (s) => two(s.new_tokens, integer), "p50 / p95"),
      row("Truncated at the maximum length", (s) => rate(s.truncated)),
      row("Errors", (s) => rate(s.errors)),
      row("Rejected, queue full", (s) => rate(s.rejected)),
      row("Client disconnected", (s) => rate(s.disconnected)),
      ...["refusal", "toxicity"].filter(judge).map((key) =>
        row(key === "refusal" ? "Refusals" : "Toxic answers", (s) => rate(s[key]), `judge: ${judge(key).judge}`)),
      row("Answers with feedback", (s) => rate(s.feedback)),
      row("Thumbs up", (s) => rate(s.thumbs), "of all thumbs; higher is better"),
      row("Comments, corrections, picks", ({ feedback_counts: counts }) => `${counts.comment}, ${counts.corrected}, ${counts.picked}`),
      ...Object.entries(groups[0].summary.metrics).map(([name, { kind, better, level, scale }]) =>
        row(name, (s) => (kind === "boolean" ? rate : number)(s.metrics[name]),
          `${kind === "boolean" ? "yes" : `mean, ${scale[0]} to ${scale[1]}`}; of ${level}s; ${better} is better`))));
  const notes = ["Small numbers are 95 % intervals. Feedback counts at the time of its answer, even if it came later."];
  for (const key of ["refusal", "toxicity"]) {
    const value = judge(key);
    if (!value) continue;
    notes.push(`${value.judge}: ${value.method}.${value.other_judges ? ` ${integer(value.other_judges)} answers have another judge's score and are left out.` : ""}`);
  }
  if (data.unmatched) notes.push(`Feedback about answers that were not measured here: ${integer(data.unmatched)}, in no model's column.`);
  if (data.truncated) notes.push("The period has more answers than are read: these are the newest 100,000.");
  $("notes").textContent = notes.join(" ");
}

function drawDrift() {
  const { drift: result } = data;
  const counts = `${result.truncated ? "the newest " : ""}${integer(result.prompts)} prompts of this period, ${integer(result.reference_prompts)} of the reference (${result.reference})`;
  if (!result.enough_prompts) {
    $("drift-text").textContent = `Too few to compare: ${counts}; at least ${result.min_prompts} of each are needed.`;
    $("drift").replaceChildren();
    return;
  }
  const p = (value) => (value < 0.01 ? value.toFixed(3) : value.toFixed(2));
  const changed = result.mmd.p < 0.01;
  $("drift-text").textContent = `${counts}. All features and words together, MMD: ${result.mmd.value.toFixed(4)}, p = ${p(result.mmd.p)}: `
    + `${changed ? "the prompts have changed" : "no significant change"}. PSI below: the mark is its 95 % quantile without a change.`;
  const maxPsi = Math.max(0.3, ...result.features.map(({ psi, floor }) => Math.max(psi, floor)));
  $("drift").replaceChildren(
    el("thead", {}, el("tr", {}, ...["Feature", "PSI", "p"].map((name) => el("th", { scope: "col", textContent: name })))),
    el("tbody", {}, ...result.features.map((feature) => {
      const shifted = feature.psi > SHIFT && feature.p < 0.05;
      const fill = el("span"), mark = el("i"), bar = el("span", { className: `bar${shifted ? " shifted" : ""}`, ariaHidden: "true" }, fill, mark);
      fill.style.width = `${(100 * feature.psi) / maxPsi}%`;
      mark.style.left = `${(100 * feature.floor) / maxPsi}%`;
      return el("tr", {}, el("th", { scope: "row", textContent: feature.name }),
        el("td", {}, bar, `${feature.psi.toFixed(2)}${shifted ? " shifted" : ""}`), el("td", { textContent: p(feature.p) }));
    })));
}

function drawMeasurements() {
  const { measurements } = data;
  $("measurements").textContent = `Measurements of answers, without their text: ${integer(measurements.written)} written since this server started, `
    + `${integer(measurements.dropped)} dropped because the queue was full, ${integer(measurements.database_errors)} times the database could not be used`
    + `${measurements.judge_errors ? `, ${integer(measurements.judge_errors)} times a judge failed` : ""}. `
    + `They are stored for ${measurements.retention_days} days, at most ${integer(measurements.retention_rows)}.`;
}

// ---- controls

themes("theme");
$("windows").append(...Object.entries(WINDOWS).map(([value, text]) =>
  button(text, () => { period = value; location.hash = value; load(); }, { value })));
$("key").value = sessionStorage.getItem("key") ?? "";
$("key").onchange = () => { sessionStorage.setItem("key", $("key").value); start(); };
$("reference").onsubmit = (event) => {
  event.preventDefault();
  reference = { begin: $("begin").value, end: $("end").value };
  load();
};
$("default").onclick = () => { reference = null; $("begin").value = $("end").value = ""; load(); };
let resizeTimer = 0;
window.onresize = () => { clearTimeout(resizeTimer); resizeTimer = setTimeout(() => data && draw(), 150); };
function start() {
  const name = location.hash.slice(1);
  if (!(name in WINDOWS)) return openPeriod();
  period = name;
  return load();
}
start();
