// A panel of one axis at this step: a bar each, where there are many the largest first.

import { h } from "../core/dom.js";
import { significant, whole } from "../core/numbers.js";
import { entryAt, entryName, sizeOf, stepOf } from "../core/panels.js";

const MOST = 24;

function drawPanelBars(host, block) {
  const k = stepOf(block);
  const size = sizeOf(block);
  const all = Array.from({ length: size }, (_, q) => q);
  const off = q => Math.abs(entryAt(block, k, q) - block.null) || 0;
  const order = size > MOST ? all.sort((a, b) => off(b) - off(a)).slice(0, MOST) : all;
  host.replaceChildren(
    h(
      "div",
      { class: "sub matrix-head" },
      h("b", { class: "matrix-step" }, `at step ${whole(block.at[k])}`),
      size > MOST ? ` the ${MOST} largest of ${whole(size)}` : "",
    ),
    h(
      "div",
      { class: "bars wide" },
      order.map(q => barOfEntry(block, k, q)),
    ),
  );
}

function barOfEntry(block, k, q) {
  const v = entryAt(block, k, q);
  const amount = Math.max(-1, Math.min(1, (v - block.null) / block.cap));
  const share = Math.abs(amount) * (block.signed ? 50 : 100);
  const left = block.signed && amount < 0 ? 50 - share : block.signed ? 50 : 0;
  const hue = !block.signed ? "--soft" : amount < 0 ? "--minus" : "--plus";
  const bar = Number.isFinite(v)
    ? h("i", { style: `left:${left}%;width:${share}%;background:var(${hue})` })
    : h("i", { class: "undefined" });
  return h(
    "div",
    { class: "bar-row" },
    h("span", { title: entryName(block, q) }, entryName(block, q)),
    h("div", {}, block.signed ? h("u", {}) : null, bar),
    h("b", {}, significant(v)),
  );
}

/** @type {PanelChart} */
export const panelBars = {
  name: "bars",
  fits: block => block.shape.length === 1,
  draw: drawPanelBars,
  step: drawPanelBars,
};
