// Render Markdown as elements: headings, lists, quotes, tables, code, links, emphasis, as models write
// them. Text becomes text nodes, and links go only to http, https and mailto, so that nothing of a text
// can run. An image is a link: the page loads nothing from elsewhere. Time is linear in the text.

import { button, copy, el } from "./common.js";

const MAX_DEPTH = 12; // of lists and quotes within each other, and of emphasis: the rest is text
const SCHEMES = ["http:", "https:", "mailto:"];
const FENCE = /^( *)(`{3,}|~{3,})([^`]*)$/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)])( +|$)/;
const HEADING = /^ {0,3}(#{1,6})(?: +|$)/;
const RULE = /^ {0,3}(?:(?:- *){3,}|(?:\* *){3,}|(?:_ *){3,})$/;
const QUOTE = /^ {0,3}> ?/;

const indent = (line) => line.length - line.trimStart().length;
const blank = (line) => line.trim() === "";

/** Append children to ``node``, in any number (a call has a maximum number of arguments). */
const fill = (node, children) => {
  for (const child of children) node.append(child);
  return node;
};

const blocks = new WeakMap(); // node -> the sources of its blocks

/** Show a text in ``node``. Blocks that did not change stay, with their selection. */
export function show(node, text) {
  const before = blocks.get(node) ?? [];
  const now = split(text.replaceAll("\0", "\ufffd").replaceAll("\t", "    ").split(/\r\n|\r|\n/));
  const sources = now.map(({ kind, lines }) => `${kind}\n${lines.join("\n")}`);
  let same = 0;
  while (same < sources.length && sources[same] === before[same]) same++;
  if (before.length === 0) node.replaceChildren();
  while (node.childNodes.length > same) node.lastChild.remove();
  fill(node, now.slice(same).map((block) => element(block, 0)));
  blocks.set(node, sources);
}

// ---- blocks

/** Split lines into blocks, [{kind, lines}]. */
function split(lines) {
  const result = [];
  let i = 0;
  while (i < lines.length) {
    const line = lines[i], start = i;
    let kind = "p";
    if (blank(line)) { i++; continue; }
    if (FENCE.test(line)) {
      kind = "code";
      i = fenceEnd(lines, i);
    } else if (HEADING.test(line)) { kind = "heading"; i++; }
    else if (RULE.test(line)) { kind = "rule"; i++; }
    else if (QUOTE.test(line)) {
      kind = "quote";
      while (i < lines.length && QUOTE.test(lines[i])) i++;
    } else if (ITEM.test(line)) {
      kind = "list";
      i = listEnd(lines, i);
    } else if (isTable(lines, i)) {
      kind = "table";
      while (i < lines.length && !blank(lines[i]) && lines[i].includes("|")) i++;
    } else {
      do i++; while (i < lines.length && !blank(lines[i]) && !begins(lines, i));
    }
    result.push({ kind, lines: lines.slice(start, i) });
  }
  return result;
}

/** Return whether a block starts here that ends a paragraph. A number other than 1 may be part of a
 * sentence. */
function begins(lines, i) {
  const line = lines[i], item = ITEM.exec(line);
  return FENCE.test(line) || HEADING.test(line) || RULE.test(line) || QUOTE.test(line) || isTable(lines, i)
    || Boolean(item && item[3] && (!/\d/.test(item[2]) || /^1\D/.test(item[2])));
}

/** Return the index after a block of code; a block without an end goes to the last line. */
function fenceEnd(lines, start) {
  const [, , fence] = FENCE.exec(lines[start]);
  for (let i = start + 1; i < lines.length; i++) {
    const line = lines[i].trim();
    if (line.length >= fence.length && line === fence[0].repeat(line.length)) return i + 1;
  }
  return lines.length;
}

const marker = (line) => { // of an item: the kind of its list, the indent of the item and of its text
  const item = RULE.test(line) ? null : ITEM.exec(line);
  if (!item) return null;
  return { kind: item[2].at(-1), at: item[1].length, width: item[0].length, number: parseInt(item[2], 10) };
};

/** Return the index after a list: its items, indented lines below them, and lines that continue them. */
function listEnd(lines, start) {
  const { kind, at } = marker(lines[start]);
  let i = start + 1, end = i;
  while (i < lines.length) {
    const line = lines[i], item = marker(line);
    if (blank(line)) { i++; continue; }
    const inside = indent(line) > at + 1, after = blank(lines[i - 1]);
    if (!inside) {
      const next = item && item.at <= at + 1;
      if (next ? item.kind !== kind : after || begins(lines, i)) break;
    }
    i = inside && FENCE.test(line) ? fenceEnd(lines, i) : i + 1;
    end = i;
  }
  return end;
}

const cells = (line) => line.trim().replace(/^\||(?<!\\)\|$/g, "").split(/(?<!\\)\|/).map((c) => c.trim());

function isTable(lines, i) {
  const next = lines[i + 1];
  if (!lines[i].includes("|") || !next?.includes("-") || !/^[ |:-]+$/.test(next)) return false;
  const rule = cells(next);
  return rule.every((cell) => /^:?-+:?$/.test(cell)) && rule.length === cells(lines[i]).length;
}

function element({ kind, lines }, depth) {
  const [first] = lines;
  if (kind === "code") return code(lines);
  if (kind === "heading") {
    const level = HEADING.exec(first)[1].length;
    const text = first.replace(HEADING, "").trimEnd().replace(/(?:^| )#+$/, "");
    return fill(el(`h${Math.min(6, level + 2)}`, { className: `level${level}` }), inline(text)); // h1 and h2 are the page's
  }
  if (kind === "rule") return el("hr");
  if (kind === "table") return table(lines);
  if (depth < MAX_DEPTH && kind === "quote") {
    return fill(el("blockquote"), children(lines.map((line) => line.replace(QUOTE, "")), depth));
  }
  if (depth < MAX_DEPTH && kind === "list") return list(lines, depth);
  return fill(el("p"), inline(lines.join("\n")));
}

const children = (lines, depth) => split(lines).map((block) => element(block, depth + 1));

function list(lines, depth) {
  const { at, number } = marker(lines[0]);
  const items = [];
  for (let i = 0; i < lines.length;) {
    const { width } = marker(lines[i]), start = i;
    for (i++; i < lines.length;) {
      const item = marker(lines[i]);
      if (item && indent(lines[i]) <= at + 1) break;
      i = FENCE.test(lines[i]) ? fenceEnd(lines, i) : i + 1;
    }
    const rest = lines.slice(start + 1, i).map((line) => line.slice(Math.min(indent(line), width)));
    items.push(fill(el("li"), children([lines[start].slice(width)].concat(rest), depth)));
  }
  return fill(Number.isNaN(number) ? el("ul") : el("ol", { start: number }), items);
}

function table(lines) {
  const [head, rule, ...rows] = lines.map(cells);
  const sides = rule.map((cell) => cell.endsWith(":") && (cell.startsWith(":") ? "center" : "right"));
  const row = (tag, texts) => fill(el("tr"), texts.slice(0, rule.length).map((text, i) => {
    const cell = fill(el(tag), inline(text.replaceAll("\\|", "|")));
    if (sides[i]) cell.style.textAlign = sides[i];
    return cell;
  }));
  return el("div", { className: "scroll", tabIndex: 0 }, el("table", {},
    el("thead", {}, row("th", head)), fill(el("tbody"), rows.map((texts) => row("td", texts)))));
}

function code([open, ...lines]) {
  const [, before, fence, language] = FENCE.exec(open);
  const last = lines.at(-1)?.trim() ?? "";
  if (last.length >= fence.length && last === fence[0].repeat(last.length)) lines.pop();
  const text = lines.map((line) => line.slice(Math.min(indent(line), before.length))).join("\n");
  const label = language.trim().split(" ")[0];
  return el("figure", { className: "code" },
    el("figcaption", {}, el("span", { textContent: label }), button("Copy", (event) => copy(event.target, text))),
    el("pre", { tabIndex: 0 }, el("code", { textContent: text && `${text}\n` })));
}

// ---- inline

// a piece that the text around it does not change: an escape, code, a link or image, an address
const PIECE = new RegExp([
  /\\([!-/:-@[-`{-~])/,
  /(?<!`)(`+)(?!`)([^]*?[^`])\2(?!`)/,
  /!?\[((?:[^[\]\n]|\\[[\]]){0,500})\]\(<?((?:[^\s()<>]|\([^\s()<>]*\)){1,2000})>?(?: +"[^"\n]{0,500}")?\)/,
  /<((?:https?:\/\/|mailto:)[^\s<>]{1,2000})>/,
  /\b(https?:\/\/[^\s<>"`]{1,2000})/,
].map((part) => part.source).join("|"), "g");
const MARKS = { "**": "strong", __: "strong", "~~": "del", "*": "em", _: "em" };
const MARK = /\*\*|__|~~|\*|_/g;

/** Return text with emphasis, code and links as nodes. Links have no links inside. */
function inline(text, links = true) {
  // pieces become \0, which no text has, so that marks within them have no effect
  const pieces = [], parts = [];
  let end = 0;
  for (const match of text.matchAll(PIECE)) {
    const [full, escape, ticks, inner, label, target, angled, bare] = match;
    let piece = null, length = full.length;
    if (escape) piece = escape;
    else if (ticks) {
      const padded = /^ .*[^ ].* $/s.test(inner); // a space on each side belongs to the marks
      piece = el("code", { textContent: (padded ? inner.slice(1, -1) : inner).replaceAll("\n", " ") });
    } else if (!links) continue;
    else if (target) piece = link(target, inline(label || target, false));
    else if (angled) piece = link(angled, [angled.replace(/^mailto:/, "")]);
    else {
      const address = trimAddress(bare);
      piece = link(address, [address]);
      length = address.length;
    }
    if (piece === null) continue;
    parts.push(text.slice(end, match.index), "\0");
    pieces.push(piece);
    end = match.index + length;
  }
  parts.push(text.slice(end));
  return emphasise(parts.join(""), pieces.values(), 0);
}

/** Return an address without the punctuation of the sentence around it. */
function trimAddress(address) {
  for (;;) {
    const last = address.at(-1);
    const count = (sign) => address.split(sign).length;
    if (!/[.,;:!?'*_~)\]]/.test(last) || (last === ")" && count("(") >= count(")"))) return address;
    address = address.slice(0, -1);
  }
}

/** Return a link to an address if that is safe to follow, else null. */
function link(address, content) {
  if (!URL.canParse(address) || !SCHEMES.includes(new URL(address).protocol)) return null;
  return fill(el("a", { href: address, target: "_blank", rel: "noopener noreferrer", title: address }), content);
}

/** Return the nodes of a text with marks as elements; \0 stands for the next of ``pieces``. */
function emphasise(text, pieces, depth) {
  const nodes = [], unclosed = new Set(); // marks without an end in the rest of the text
  const put = (plain) => plain.split("\0").forEach((part, i) => {
    if (i) nodes.push(pieces.next().value);
    if (part) nodes.push(part);
  });
  let end = 0;
  for (let at = 0; depth < MAX_DEPTH && at < text.length;) {
    MARK.lastIndex = at;
    const match = MARK.exec(text);
    if (!match) break;
    const [mark] = match, start = match.index, inner = start + mark.length;
    const close = unclosed.has(mark) || !opens(text, start, mark) ? -1 : closing(text, inner, mark, unclosed);
    if (close < 0) { at = inner; continue; }
    put(text.slice(end, start));
    nodes.push(fill(el(MARKS[mark]), emphasise(text.slice(inner, close), pieces, depth + 1)));
    at = end = close + mark.length;
  }
  put(text.slice(end));
  return nodes;
}

const isWord = (sign) => sign !== undefined && /[\p{L}\p{N}]/u.test(sign);
const isSpace = (sign) => sign === undefined || /\s/.test(sign);

function opens(text, start, mark) {
  return !isSpace(text[start + mark.length]) && !(mark[0] === "_" && isWord(text[start - 1]));
}

function closing(text, from, mark, unclosed) {
  for (let at = text.indexOf(mark, from + 1); at >= 0; at = text.indexOf(mark, at + 1)) {
    let run = at;
    while (text[run] === mark[0]) run++;
    if (mark.length === 1 && run - at > 1) { // ** within * belongs to the inner mark, unless it ends both
      if (run - at === 2) { at = run - 1; continue; }
      at = run - 1;
    } else if (mark.length === 2 && run - at > 2) at = run - 2;
    if (!isSpace(text[at - 1]) && !(mark[0] === "_" && isWord(text[at + mark.length]))) return at;
    at = Math.max(at, run - 1);
  }
  unclosed.add(mark);
  return -1;
}
