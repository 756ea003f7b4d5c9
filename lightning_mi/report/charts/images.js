// The images at this step: a row an image, a column a method.

import { D } from "../core/data.js";
import { card } from "../core/card.js";
import { h } from "../core/dom.js";
import { show } from "../core/numbers.js";
import { gridOf, pictureOf, pictureScale } from "../core/pictures.js";
import { S, at, set } from "../core/state.js";

const pictures = Object.entries(D.pictures);
const sample = pictures.find(([, block]) => block.inputs)?.[1] ?? pictures[0]?.[1];

/** What to repaint when the cursor moves. */
/** @type {any[]} */
let painted = [];

function drawImages(host) {
  painted = [];
  const most = Math.max(...pictures.map(([, block]) => block.examples));
  const columns = pictures.map(([name, block]) => ({
    head: h(
      "button",
      {
        type: "button",
        class: "plain",
        "aria-pressed": String(S.method === name),
        onclick: () => set({ method: name }),
      },
      block.title,
    ),
    cell: e => (e < block.examples ? kept(pictureOf(block, e, () => at(block))) : h("span")),
  }));
  const key = pictures.map(([, block]) =>
    h("div", { class: "one" }, h("span", {}, block.title), pictureScale(block, true)),
  );
  host.replaceChildren(
    gridOf(sample, Math.min(most, sample.examples), columns),
    h("div", { class: "key" }, key),
  );
}

const kept = canvas => {
  painted.push(canvas);
  return canvas;
};

card({
  id: "images",
  place: "side",
  order: 21,
  kind: "pictures still",
  title: "The images at this step",
  uses: ["method"],
  shown: () => pictures.length > 0 && !D.prompt,
  sub: () =>
    sample?.targets.length ? `explaining ${sample.targets.map(text => `“${show(text)}”`).join(", ")}` : "",
  draw: drawImages,
  step: () => painted.forEach(canvas => canvas.refresh()),
});
