// Bars at this step: a row an entry, its name, a bar from zero or from the null, and its value.

import { h } from "./dom.js";

/**
 * One row.
 * @param {string} name
 * @param {number} amount −1 to 1, or 0 to 1 where there is no sign; undefined is hatched
 * @param {boolean} signed whether zero is in the middle
 * @param {string} hue of the bar, as CSS
 * @param {string} text the value
 */
export function barRow(name, amount, signed, hue, text) {
  const share = Math.min(1, Math.abs(amount)) * (signed ? 50 : 100);
  const left = signed ? (amount < 0 ? 50 - share : 50) : 0;
  const bar = Number.isFinite(amount)
    ? h("i", { style: `left:${left}%;width:${share}%;background:${hue}` })
    : h("i", { class: "undefined" });
  return h(
    "div",
    { class: "bar-row" },
    h("span", { title: name }, name),
    h("div", {}, signed ? h("u", {}) : null, bar),
    h("b", {}, text),
  );
}
