// Functions that all pages use. Text from models and users becomes text nodes, never HTML.

export const $ = (id) => document.getElementById(id);

/** Create an element with properties and children. */
export function el(tag, properties = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in node) node[name] = value;
    else node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
}

export const button = (text, onclick, more = {}) =>
  el("button", { type: "button", textContent: text, onclick, ...more });

/** Show a line in #status, with buttons for actions. */
export const say = (text, ...actions) => $("status").replaceChildren(text, ...actions.flatMap((action) => [" ", action]));

export function headers() {
  const key = sessionStorage.getItem("key");
  return { "content-type": "application/json", ...(key ? { authorization: `Bearer ${key}` } : {}) };
}

/** Return the response to a POST, or to a GET without a body. Otherwise throw an Error with the server's
 * reason and code, and ``passing`` if the same request may succeed later. */
export async function ask(path, body, signal) {
  const options = body === undefined
    ? { headers: headers(), signal }
    : { method: "POST", headers: headers(), body: JSON.stringify(body), signal };
  const response = await fetch(path, options).catch((error) => {
    throw error.name === "AbortError" ? error : Object.assign(
      new Error("The server does not answer. Is it running?"), { passing: true });
  });
  if (response.ok) return response;
  let reason = response.statusText || `status ${response.status}`, code = null;
  try {
    ({ message: reason, code } = (await response.json()).error);
  } catch { /* the answer of a proxy */ }
  if (response.status === 401) reason = `an API key is needed${$("settings") ? " (Settings)" : ""}`;
  throw Object.assign(new Error(reason), { code, passing: response.status >= 500 || response.status === 429 });
}

/** Format the time of n answers, since the question, and since the first token for the rate. A rate
 * is shown for enough tokens only. */
export function timing(tokens, n, seconds, writing) {
  const rate = tokens - n >= 20 && writing >= 1 ? `, ${((tokens - n) / writing).toFixed(1)} tokens/s` : "";
  return `${tokens} token${tokens === 1 ? "" : "s"} in ${seconds.toFixed(1)} s${rate}`;
}

/** Return a random id. crypto.randomUUID is missing if the page comes by http from another machine. */
export function randomId() {
  return [...crypto.getRandomValues(new Uint8Array(16))].map((n) => n.toString(16).padStart(2, "0")).join("");
}

/** Copy a text, and show that next to the button for a moment. */
export async function copy(source, text) {
  let copied = true;
  try {
    await navigator.clipboard.writeText(text);
  } catch { // no permission, or http from another machine: the older way
    const area = el("textarea", { value: text, className: "hidden", ariaLabel: "Text to copy" });
    document.body.append(area);
    area.select();
    copied = document.execCommand("copy");
    area.remove();
    source.focus();
  }
  const notice = el("span", { className: "notice", role: "status", textContent: copied ? "Copied" : "Not copied" });
  source.after(notice);
  setTimeout(() => notice.remove(), 2000);
}

// icons of 24 x 24, as lines
const ICONS = {
  up: "M7 21V10l4.5-8c1.5 0 2.6 1.3 2.3 2.8L13 9h6a2 2 0 0 1 2 2.4l-1.5 8A2 2 0 0 1 17.5 21zM7 10H3v11h4",
  down: "M17 3v11l-4.5 8c-1.5 0-2.6-1.3-2.3-2.8L11 15H5a2 2 0 0 1-2-2.4l1.5-8A2 2 0 0 1 6.5 3zM17 14h4V3h-4",
  copy: "M9 9h11v12H9zM5 15H4V3h11v2",
  more: "M5 12h.01M12 12h.01M19 12h.01",
};

/** Create a button with an icon; its name is shown on hover and read aloud. */
export function iconButton(icon, name, onclick, more = {}) {
  const node = el("button", { type: "button", className: "icon", ariaLabel: name, title: name, onclick, ...more });
  const ns = "http://www.w3.org/2000/svg";
  const svg = document.createElementNS(ns, "svg"), path = document.createElementNS(ns, "path");
  svg.setAttribute("viewBox", "0 0 24 24");
  svg.setAttribute("aria-hidden", "true");
  path.setAttribute("d", ICONS[icon]);
  svg.append(path);
  node.append(svg);
  return node;
}

/** Create a button that opens a menu of ``items``, [[text, function], ...]. */
export function menu(name, items) {
  const list = el("div", { className: "menu", role: "menu", ariaLabel: name, hidden: true });
  const opener = iconButton("more", name, () => (list.hidden ? open() : close()), { ariaHasPopup: "menu", ariaExpanded: "false" });
  const outside = (event) => { if (!node.contains(event.target)) close(false); };
  const open = () => {
    list.hidden = false;
    opener.ariaExpanded = "true";
    list.classList.toggle("above", list.getBoundingClientRect().bottom > innerHeight);
    list.firstChild.focus();
    document.addEventListener("pointerdown", outside);
  };
  const close = (focus = true) => {
    list.hidden = true;
    opener.ariaExpanded = "false";
    document.removeEventListener("pointerdown", outside);
    if (focus) opener.focus();
  };
  list.append(...items.map(([text, action]) =>
    button(text, () => { close(); action(); }, { role: "menuitem", tabIndex: -1 })));
  const node = el("span", { className: "opener" }, opener, list);
  node.onkeydown = (event) => {
    if (list.hidden) return;
    const buttons = [...list.children], index = buttons.indexOf(document.activeElement);
    const next = { ArrowDown: index + 1, ArrowUp: index - 1, Home: 0, End: -1 }[event.key];
    if (next !== undefined) { event.preventDefault(); buttons.at(next % buttons.length).focus(); }
    if (event.key === "Escape") { event.stopPropagation(); close(); }
    if (event.key === "Tab") close(false);
  };
  return node;
}

/** Make the button with this id switch between the system's theme, light and dark. */
export function themes(id) {
  const names = ["auto", "light", "dark"];
  const set = (name) => {
    document.documentElement.dataset.theme = name;
    $(id).textContent = `Theme: ${name}`;
    localStorage.setItem("theme", name);
  };
  set(names.includes(localStorage.getItem("theme")) ? localStorage.getItem("theme") : "auto");
  $(id).onclick = () =>
    set(names[(names.indexOf(document.documentElement.dataset.theme) + 1) % names.length]);
}

/** Show a text box under ``node``. Resolves to the text, or null. */
export function askText(node, label, text = "") {
  return new Promise((resolve) => {
    const area = el("textarea", { value: text, rows: Math.min(12, 2 + text.length / 60) });
    const done = (value) => { box.remove(); resolve(value); };
    const box = el("form", { className: "box" }, el("label", {}, label, area),
      el("div", { className: "row" }, button("Cancel", () => done(null)),
        el("button", { type: "submit", className: "main", textContent: "Save" })));
    box.onsubmit = (event) => { event.preventDefault(); done(area.value); };
    box.onkeydown = (event) => {
      if (event.key === "Escape") { event.stopPropagation(); done(null); }
      if (event.key === "Enter" && event.ctrlKey) { event.preventDefault(); done(area.value); }
    };
    node.append(box);
    area.focus();
  });
}
