// Features of a table at the cursor's step: a signed bar each, largest first, one scale for the run.

import { D, inputAt } from "../core/data.js";
import { barRow } from "../core/bars.js";
import { card } from "../core/card.js";
import { colour, plusMinus, rgb } from "../core/colour.js";
import { h } from "../core/dom.js";
import { bySize, inputScale } from "../core/inputs.js";
import { fmt, show } from "../core/numbers.js";
import { S, at } from "../core/state.js";

const MOST = 14;
const first = Object.values(D.tables)[0];

const tableBlock = () => D.tables[S.method] ?? first;

function barOf(block, k, q) {
  const v = inputAt(block, k, q);
  const shade = block.signed ? plusMinus(v < 0 ? -1 : 1) : colour("ink", 0.8);
  return barRow(block.names[q], v / block.cap, block.signed, rgb(shade), fmt(v));
}

function drawBars(host) {
  const block = tableBlock();
  const k = at(block);
  const rest = Math.max(0, block.names.length - MOST);
  const notes = [
    rest ? `${rest} smaller ones are not shown.` : "",
    block.signed ? "Blue supports the target, orange opposes it." : "",
  ];
  host.replaceChildren(
    h(
      "div",
      { class: "bars" },
      bySize(block)
        .slice(0, MOST)
        .map(q => barOf(block, k, q)),
    ),
    h("div", { class: "key" }, h("span", { class: "one" }, notes.join(" "))),
  );
}

card({
  id: "features",
  place: "side",
  order: 22,
  kind: "still",
  title: "Features at this step",
  uses: ["method"],
  shown: () => Boolean(first) && !D.prompt,
  sub: () =>
    `${tableBlock().title}${tableBlock().target ? ` of “${show(tableBlock().target)}”` : ""}, mean of ${tableBlock().n}; ${inputScale(tableBlock())}`,
  step: drawBars,
});
