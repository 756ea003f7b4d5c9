// Heads of several runs at this step: A, B and, of two, the difference B − A.

import { D, HEADS, LAYERS, WIDTH, headName } from "../core/data.js";
import { card } from "../core/card.js";
import { aboveChance, plusMinus } from "../core/colour.js";
import { h, hint } from "../core/dom.js";
import { fmt, withSign } from "../core/numbers.js";
import { paintPixels, pixelUnder } from "../core/pixels.js";
import { S, at, chosenScore, set, step } from "../core/state.js";

/** The map of each run that has one for the chosen score and the shape of the first. */
function mapsOfRuns() {
  const made = (D.runs ?? []).flatMap(run => {
    const block = run.maps?.[S.score];
    return block
      ? [
          {
            name: run.letter,
            label: run.label,
            value: j => block.values[at(block) * HEADS + j],
            signed: false,
          },
        ]
      : [];
  });
  if (made.length !== 2) return made;
  const [a, b] = made;
  return [
    a,
    b,
    { name: "B − A", label: "the difference", value: j => b.value(j) - a.value(j), signed: true },
  ];
}

/** @type {(() => void)[]} */
let refreshes = [];

function drawPairs(host) {
  refreshes = [];
  host.style.gridTemplateColumns = `repeat(${Math.max(1, mapsOfRuns().length)}, minmax(0, 1fr))`;
  host.replaceChildren(...mapsOfRuns().map(one => mapOf(one)));
}

function mapOf(one) {
  const canvas = h("canvas", { width: WIDTH, height: LAYERS, role: "img" });
  const caption = h("span");
  const under = event => pixelUnder(canvas, event);
  const written = v => (one.signed ? withSign(v, 2) : fmt(v));
  hint(canvas, event => [`${headName(under(event))} ${written(one.value(under(event)))}`, one.label]);
  canvas.addEventListener("click", event => set({ head: under(event) }));
  refreshes.push(() => {
    paintPixels(canvas, one.value, v => (one.signed ? plusMinus(v) : aboveChance(chosenScore(), v)));
    caption.textContent = written(one.value(S.head));
    canvas.setAttribute(
      "aria-label",
      `${chosenScore().title} of ${one.name} at step ${step()}: selected head ${caption.textContent}`,
    );
  });
  return h(
    "figure",
    {},
    h("figcaption", {}, h("b", {}, one.name), caption),
    h("div", { class: "wrap", style: `aspect-ratio:${Math.max(1, WIDTH / LAYERS)}` }, canvas),
  );
}

card({
  id: "pairs",
  place: "side",
  order: 12,
  kind: "maps pairs",
  title: "The same place in each run",
  uses: ["score", "head"],
  shown: () => Boolean(D.runs) && Boolean(D.scores) && mapsOfRuns().length > 1,
  sub: () => `${chosenScore().title}; from another seed the same place need not have the same role`,
  draw: drawPairs,
  step: () => refreshes.forEach(refresh => refresh()),
});
