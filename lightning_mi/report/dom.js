// Elements and the tooltip. User text enters the page only through these: as text, never as HTML.

const $ = id => document.getElementById(id);
const SVG = $("defs").namespaceURI;

/** Fill an element with attributes, listeners ("on…") and children; null is left out. */
function fill(element, attributes, children) {
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else if (value != null) element.setAttribute(key, value);
  }
  element.append(...children.flat().filter(child => child != null));
  return element;
}

/** Make an HTML element: h("b", {class: "x"}, "text"). */
const h = (tag, attributes = {}, ...children) =>
  fill(document.createElement(tag), attributes, children);

/** Make an SVG element. */
const s = (tag, attributes = {}, ...children) =>
  fill(document.createElementNS(SVG, tag), attributes, children);

/** Say what was not measured and what would measure it, in place of a chart. */
function notMeasured(host, text) {
  host.replaceChildren(h("div", { class: "empty" }, text));
}

// ---------- tooltip

const tip = $("tip");

/** Show a tooltip beside the pointer: a bold part, a plain one, a small one. */
function say(event, bold, plain, small) {
  tip.replaceChildren(h("b", {}, bold), plain ? ` ${plain}` : "", small ? h("small", {}, small) : "");
  tip.style.display = "block";
  const box = tip.getBoundingClientRect();
  tip.style.left = `${Math.max(6, Math.min(innerWidth - box.width - 8, event.clientX + 14))}px`;
  tip.style.top = `${Math.max(6, event.clientY - box.height - 12)}px`;
}

const hush = () => { tip.style.display = "none"; };

/** Attach a tooltip to an element: `words` returns the three parts. */
function hint(element, words) {
  element.addEventListener("pointermove", event => say(event, ...words()));
  element.addEventListener("pointerleave", hush);
  return element;
}
