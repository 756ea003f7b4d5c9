// When did the explanations settle? How much attributions moved: the chosen method in colour.

import { D, lastDefined, nearest } from "../core/data.js";
import { card } from "../core/card.js";
import { csvSeries } from "../core/csv.js";
import { curve, endLabels, lane, listen, yAxis } from "../core/lane.js";
import { fmt, whole } from "../core/numbers.js";
import { S, methods, set } from "../core/state.js";

const HEIGHT = 130;
const M = D.moved;

function drawMoved(host) {
  if (!M) return;
  const all = M.series.flatMap(one => [...one.values].filter(Number.isFinite));
  const bottom = Math.min(0, Math.floor(Math.min(...all) * 4) / 4);
  const Y = v => HEIGHT - 6 - ((HEIGHT - 14) * (v - bottom)) / (1 - bottom);
  lane(host, HEIGHT, `Likeness of attributions to ${M.against} over training steps`, svg => {
    yAxis(
      svg,
      [-1, -0.5, 0, 0.5, 1].filter(v => v >= bottom),
      Y,
    );
    const labels = M.series.map(one => lineOf(svg, one, Y));
    endLabels(
      svg,
      labels.sort((a, b) => Number(a.plain) - Number(b.plain)),
      HEIGHT,
    );
  });
}

function lineOf(svg, one, Y) {
  const chosen = one.key === S.method;
  const stroke = chosen ? "var(--plus)" : "var(--soft)";
  const value = k => one.values[k];
  curve(svg, one, value, Y, { stroke, "stroke-width": chosen ? 2.2 : 1.1, opacity: chosen ? 1 : 0.6 });
  // Where all end at 1 a label stands beside its curve's middle, not its end.
  const middle = value(Math.floor(one.at.length / 2));
  const y = Y(Number.isFinite(middle) ? middle : lastDefined(one.at.length, value));
  return {
    y,
    text: one.name,
    fill: stroke,
    plain: !chosen,
    pick: () => methods.includes(one.key) && set({ method: one.key }),
  };
}

function wordsAt(i) {
  if (!M) return null;
  const words = M.series.map(one => `${one.name} ${fmt(one.values[nearest(one.at, D.steps[i])])}`).join(", ");
  return [
    `step ${whole(D.steps[i])}`,
    words,
    `Spearman correlation of the scores of an example's inputs with ${M.against}.`,
  ];
}

card({
  id: "moved",
  place: "left",
  order: 40,
  title: "When did the explanations settle?",
  uses: ["method"],
  shown: () => Boolean(M),
  sub: () => `rank correlation with ${M?.against}, mean of the examples`,
  csv: () => csvSeries(M?.series ?? []),
  build: host => listen(host, wordsAt),
  draw: drawMoved,
});
