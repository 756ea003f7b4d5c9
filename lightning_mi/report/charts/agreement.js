// Do the explanations agree with the head? Rank correlations between a floor and a ceiling.

import { D, valueNear } from "../core/data.js";
import { card, withoutHeads } from "../core/card.js";
import { comparing, drawRuns } from "../core/compare.js";
import { csvSeries } from "../core/csv.js";
import { s } from "../core/dom.js";
import { endLabels, labelledCurve, lane, level, listen, yAxis } from "../core/lane.js";
import { extent, fmt, whole } from "../core/numbers.js";
import { LEFT, plotWidth } from "../core/time.js";

const HEIGHT = 150;
const A = D.agreement;

/** Colour and dash of each explanation. */
const LOOKS = {
  saliency: { stroke: "var(--ink)", "stroke-dasharray": "5 2.5", text: "saliency" },
  integrated_gradients: { stroke: "var(--plus)", text: "integrated gr." },
};

function drawAgreement(host) {
  if (!A) return;
  const ofRuns = (D.runs ?? []).flatMap(run => Object.values(run.agreement));
  const [lowest] = extent([...A.series, ...ofRuns].flatMap(one => extent(one.values)));
  const low = Math.min(lowest, A.floor ? A.floor[0] : 0);
  const bottom = Math.max(-1, Math.floor(low * 4) / 4);
  const Y = v => HEIGHT - 6 - ((HEIGHT - 14) * (v - bottom)) / (1 - bottom);
  lane(
    host,
    HEIGHT,
    "Rank correlation of attributions with the head's attention over training steps",
    svg => {
      if (A.floor)
        svg.append(
          s("rect", {
            class: "floor",
            x: LEFT,
            width: plotWidth(),
            y: Y(A.floor[1]),
            height: Y(A.floor[0]) - Y(A.floor[1]),
            fill: "var(--grid)",
          }),
        );
      yAxis(
        svg,
        [-1, -0.5, 0, 0.5, 1].filter(v => v >= bottom),
        Y,
      );
      /** @type {EndLabel[]} */
      const labels = comparing ? linesOfRuns(svg, Y) : linesOfMethods(svg, Y);
      // How well another head of the same role agrees: more cannot be asked of an explanation.
      if (A.ceiling)
        labels.push(level(svg, Y(A.ceiling.value), `ceiling ${fmt(A.ceiling.value)}`, "chance ceiling"));
      if (A.floor)
        labels.push({ y: Y(0), text: `random ±${fmt(A.floor[1])}`, fill: "var(--soft)", plain: true });
      endLabels(svg, labels, HEIGHT);
    },
  );
}

function linesOfMethods(svg, Y) {
  return (A?.series ?? []).map(one => {
    const { text, ...look } = LOOKS[one.key];
    return labelledCurve(svg, one, Y, { ...look, "stroke-width": 1.9, class: one.key }, text);
  });
}

function linesOfRuns(svg, Y) {
  return (A?.series ?? []).flatMap(({ key }) => {
    const curves = (D.runs ?? []).map(
      run =>
        run.agreement[key] && {
          ...run.agreement[key],
          text: `${run.letter} ${key === "saliency" ? "saliency" : "IG"}`,
        },
    );
    return drawRuns(svg, curves, Y, {
      stroke: LOOKS[key].stroke,
      name: key === "saliency" ? "saliency," : "IG,",
    });
  });
}

function wordsAt(i) {
  if (!A) return null;
  const values = A.series.map(one => `${one.name} ${fmt(valueNear(one, i))}`).join(", ");
  return [
    `step ${whole(D.steps[i])}`,
    values,
    [
      `Spearman correlation over input positions between the size of the attribution and the head's attention${A.head ? ` (${A.head} at the end)` : ""}${A.n ? `, n = ${A.n}` : ""}.`,
      A.floor ? "The grey band holds 95 % of random orders." : "",
      A.ceiling ? `Ceiling: ${A.ceiling.says}.` : "",
    ]
      .filter(Boolean)
      .join(" "),
  ];
}

const seriesOf = run =>
  Object.values(run.agreement).map(one => ({ ...one, name: `${run.label}: ${one.name}` }));

card({
  id: "agree",
  place: "left",
  order: 50,
  title: "Do the explanations agree with the head?",
  shown: () => Boolean(A) || !withoutHeads(),
  has: () => Boolean(A),
  missing: () =>
    "Not measured. HeadMonitor() with SaliencyMonitor() or IntegratedGradientsMonitor() on one prompt measures it.",
  sub: () => "rank correlation over input positions",
  csv: () => csvSeries(comparing ? (D.runs ?? []).flatMap(seriesOf) : (A?.series ?? [])),
  build: host => listen(host, wordsAt),
  draw: drawAgreement,
});
