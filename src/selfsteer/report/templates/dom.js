// Elements are made here and nowhere from text: what a model wrote is always a text node.
const make = (tag, attributes = {}, ...children) => {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value === true) node.setAttribute(name, "");
    else if (value !== false && value != null) node.setAttribute(name, value);
  }
  node.append(...children.filter((c) => c != null && c !== ""));
  return node;
};
const byId = (id) => document.getElementById(id);
// Into a region that is read out when it changes: the same again would be read out again.
const tell = (node, ...children) => {
  const text = children.map((c) => c.textContent ?? c).join("\n");
  if (node.dataset.told === text) return;
  node.dataset.told = text;
  node.replaceChildren(...children);
};
const count = (n) => n.toLocaleString("en-US");
const number = (x, digits = 2) => (x == null ? "" : x.toFixed(digits));
const signed = (x, digits = 2) => (x == null ? "" : (x > 0 ? "+" : "") + x.toFixed(digits));
const words = (name) => name.replaceAll("_", " ");

const table = (heads, rows) => make("table", {},
  make("thead", {}, make("tr", {}, ...heads.map((h) =>
    make("th", { scope: "col", class: h.class ?? null, title: h.title ?? null }, h.text ?? h)))),
  make("tbody", {}, ...rows));

const ask = async (path, values = {}) => {
  const url = new URL(path, location.origin);
  for (const [name, value] of Object.entries(values)) if (value !== "" && value != null) url.searchParams.set(name, value);
  const answer = await fetch(url, { headers: { Accept: "application/json" } });
  const found = await answer.json();
  if (!answer.ok) throw new Error(found.error ?? answer.statusText);
  return found;
};
