// What did it look at, in images: the chosen method over steps, a row an image.

import { D, nearest } from "../core/data.js";
import { card } from "../core/card.js";
import { h } from "../core/dom.js";
import { whole } from "../core/numbers.js";
import { gridOf, pictureOf, pictureScale } from "../core/pictures.js";
import { S, set } from "../core/state.js";

const MOST = 7; // steps shown

/** Some of a block's steps, evenly spaced, the first and the last among them. */
function filmSteps(block) {
  const last = block.at.length - 1;
  const most = Math.min(MOST, last + 1);
  return [...new Set(Array.from({ length: most }, (_, q) => Math.round((q * last) / Math.max(1, most - 1))))];
}

/** A click on a step moves the cursor there. */
function drawFilm(host) {
  const block = D.pictures[S.method];
  const columns = filmSteps(block).map(k => ({
    head: h(
      "button",
      { type: "button", class: "plain", onclick: () => set({ i: nearest(D.steps, block.at[k]) }) },
      whole(block.at[k]),
    ),
    cell: e => pictureOf(block, e, () => k),
  }));
  host.replaceChildren(gridOf(block, block.examples, columns), pictureScale(block));
}

card({
  id: "film",
  into: "looked",
  order: 31,
  kind: "pictures still",
  title: "",
  uses: ["method"],
  shown: () => Boolean(D.pictures[S.method]),
  draw: drawFilm,
});
