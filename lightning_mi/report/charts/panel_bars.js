// A panel of one axis at this step: a bar each, where there are many the largest first.

import { barRow } from "../core/bars.js";
import { h } from "../core/dom.js";
import { significant, whole } from "../core/numbers.js";
import { entryAt, entryName, sizeOf } from "../core/panels.js";
import { at } from "../core/state.js";

const MOST = 24;

function drawPanelBars(host, block) {
  const k = at(block);
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
  const amount = (v - block.null) / block.cap;
  const hue = !block.signed ? "--soft" : amount < 0 ? "--minus" : "--plus";
  return barRow(entryName(block, q), amount, block.signed, `var(${hue})`, significant(v));
}

/** @type {PanelChart} */
export const panelBars = {
  name: "bars",
  fits: block => block.shape.length === 1,
  step: drawPanelBars,
};
