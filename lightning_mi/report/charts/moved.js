// When did the explanations settle? How much attributions moved: the chosen method in colour.

import { D, valueNear } from "../core/data.js";
import { card } from "../core/card.js";
import { csvSeries } from "../core/csv.js";
import { endLabels, labelledCurve, lane, listen, yAxis } from "../core/lane.js";
import { extent, fmt, show, whole } from "../core/numbers.js";
import { S, methods, set } from "../core/state.js";

const HEIGHT = 130;
const M = D.moved;

function drawMoved(host) {
  if (!M) return;
  const [lowest] = extent(M.series.flatMap(one => extent(one.values)));
  const bottom = Math.min(0, Math.floor(lowest * 4) / 4);
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
  const style = { stroke, "stroke-width": chosen ? 2.2 : 1.1, opacity: chosen ? 1 : 0.6 };
  const label = labelledCurve(svg, one, Y, style, show(one.name.replace("gradients", "gr."), 16));
  // Where all end at 1 a label stands beside its curve's middle, not its end.
  const middle = one.values[Math.floor(one.at.length / 2)];
  return {
    ...label,
    y: Number.isFinite(middle) ? Y(middle) : label.y,
    plain: !chosen,
    pick: () => methods.includes(one.key) && set({ method: one.key }),
  };
}

function wordsAt(i) {
  if (!M) return null;
  const words = M.series.map(one => `${one.name} ${fmt(valueNear(one, i))}`).join(", ");
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
