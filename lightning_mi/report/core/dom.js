// Elements and the tooltip. User text enters the page only through these: as text, never as HTML.

/** The element with an id that page.html or a card is known to have. */
export const $ = id => /** @type {any} */ (document.getElementById(id));

const SVG = $("defs").namespaceURI;

/** Fill an element with attributes, listeners ("on…") and children; null is left out. */
function fill(element, attributes, children) {
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else if (value != null) element.setAttribute(key, value);
  }
  element.append(...children.flat(3).filter(child => child != null));
  return element;
}

/**
 * Make an HTML element: h("b", {class: "x"}, "text").
 * @returns {any}
 */
export const h = (tag, attributes = {}, ...children) =>
  fill(document.createElement(tag), attributes, children);

/**
 * Make an SVG element.
 * @returns {any}
 */
export const s = (tag, attributes = {}, ...children) =>
  fill(document.createElementNS(SVG, tag), attributes, children);

/** Say what was not measured and what would measure it, in place of a chart. */
export function notMeasured(host, text) {
  host.replaceChildren(h("div", { class: "empty" }, text));
}

// ---------- tooltip

export const tip = $("tip");

/**
 * Show a tooltip beside the pointer: a bold part, a plain one, a small one.
 * @param {PointerEvent} event
 * @param {Words} words nothing hides it
 */
export function say(event, words) {
  if (!words) {
    hush();
    return;
  }
  const [bold, plain, small] = words;
  tip.replaceChildren(h("b", {}, bold), plain ? ` ${plain}` : "", small ? h("small", {}, small) : "");
  tip.style.display = "block";
  const box = tip.getBoundingClientRect();
  tip.style.left = `${Math.max(6, Math.min(innerWidth - box.width - 8, event.clientX + 14))}px`;
  tip.style.top = `${Math.max(6, event.clientY - box.height - 12)}px`;
}

export const hush = () => {
  tip.style.display = "none";
};

/** Attach a tooltip to an element: `words` returns its parts, or nothing. */
export function hint(element, words) {
  element.addEventListener("pointermove", event => say(event, words(event)));
  element.addEventListener("pointerleave", hush);
  return element;
}
