// What both pages use. Text from models and users becomes text nodes, never HTML.

export const $ = (id) => document.getElementById(id);

/** An element with properties and children. */
export function el(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in made) made[name] = value;
    else made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

export const button = (text, onclick, more = {}) =>
  el("button", { type: "button", textContent: text, onclick, ...more });

export function headers() {
  const key = sessionStorage.getItem("key");
  return { "content-type": "application/json", ...(key ? { authorization: `Bearer ${key}` } : {}) };
}

/** The response to a POST, or GET without a body; the server's reason as an Error with its code. */
export async function ask(path, body, signal) {
  const options = body === undefined
    ? { headers: headers(), signal }
    : { method: "POST", headers: headers(), body: JSON.stringify(body), signal };
  const response = await fetch(path, options);
  if (response.ok) return response;
  let reason = response.statusText, code = null;
  try {
    ({ message: reason, code } = (await response.json()).error);
  } catch { /* not ours: of a proxy */ }
  if (response.status === 401) reason = "an API key is needed (Settings)";
  throw Object.assign(new Error(reason), { code });
}

/** Show a text with its code blocks, `code` and **bold**. */
export function show(node, text) {
  node.replaceChildren();
  text.split(/^```/m).forEach((part, i) => {
    if (i % 2) {
      const code = part.replace(/^[^\n]*\n?/, "");
      node.append(el("pre", { tabIndex: 0 }, el("code", { textContent: code })));
      return;
    }
    for (const piece of part.split(/(`[^`\n]+`|\*\*[^*\n]+\*\*)/)) {
      if (/^`.+`$/.test(piece)) node.append(el("code", { textContent: piece.slice(1, -1) }));
      else if (/^\*\*.+\*\*$/.test(piece)) node.append(el("strong", { textContent: piece.slice(2, -2) }));
      else node.append(piece);
    }
  });
}

/** The button with this id switches between the system's theme, light and dark. */
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

/** A box to write a text in, under ``node``. Resolves to the text, or null. */
export function write(node, label, text = "") {
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
