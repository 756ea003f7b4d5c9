// Panels without axes: a curve each, those of one unit in one plot, with error and chance. Of several
// runs each panel has a plot of its own.

import { comparing, drawRuns } from "../core/compare.js";
import { D, valueNear } from "../core/data.js";
import { h, s } from "../core/dom.js";
import { area, endLabels, labelledCurve, lane, level, listen, yAxis } from "../core/lane.js";
import { extent, show, significant, ticks, whole } from "../core/numbers.js";
import { LEFT } from "../core/time.js";

const HEIGHT = 118;
const MOST = 7; // curves in one plot

/** Told apart by hue, dash and label. */
const LOOKS = [
  { stroke: "var(--ink)", "stroke-width": 2 },
  { stroke: "var(--plus)", "stroke-width": 1.8, "stroke-dasharray": "6 2.5" },
  { stroke: "var(--minus)", "stroke-width": 1.8, "stroke-dasharray": "2 2" },
  { stroke: "var(--previous_token)", "stroke-width": 1.8, "stroke-dasharray": "9 3 2 3" },
  { stroke: "var(--induction)", "stroke-width": 1.8 },
  { stroke: "var(--current_token)", "stroke-width": 1.8, "stroke-dasharray": "6 2.5" },
  { stroke: "var(--soft)", "stroke-width": 1.6 },
];

/** Curves of one unit stand in one plot, a few at a time; those of several runs by themselves. */
function plotsOf({ measurement, curves }) {
  if (comparing) return curves.map(one => ({ unit: one.unit, list: [one], runs: ofRuns(measurement, one) }));
  const groups = new Map();
  for (const one of curves) groups.set(one.unit, [...(groups.get(one.unit) ?? []), one]);
  return [...groups].flatMap(([unit, list]) =>
    Array.from({ length: Math.ceil(list.length / MOST) }, (_, k) => ({
      unit,
      list: list.slice(k * MOST, (k + 1) * MOST),
      runs: null,
    })),
  );
}

/** The same curve of each run; null where it was not measured. */
function ofRuns(measurement, { what, name }) {
  return (D.runs ?? []).map(run => {
    const found = run.panels[`${measurement}/${what}`];
    return found ? { ...found, text: `${run.letter} ${show(name, 15)}` } : null;
  });
}

/** From the lowest to the highest value, zero among them where it is near. */
function rangeOf(list) {
  let [low, high] = extent(list.flatMap(one => [...extent(one?.values ?? []), one?.null ?? NaN]));
  if (low > high) return [0, 1]; // nothing is defined
  if (low > 0 && low < 0.6 * high) low = 0;
  if (high < 0 && high > 0.6 * low) high = 0;
  const room = (high - low) * 0.04 || Math.abs(high) * 0.1 || 1;
  return [low === 0 ? 0 : low - room, high === 0 ? 0 : high + room];
}

function drawPlot(host, { unit, list, runs }) {
  const [low, high] = rangeOf([...list, ...(runs ?? [])]);
  const Y = v => HEIGHT - 8 - ((HEIGHT - 18) * (v - low)) / (high - low);
  lane(host, HEIGHT, `${list.map(one => one.name).join(", ")} over training steps`, svg => {
    yAxis(svg, ticks(low, high, 3), Y);
    if (unit) svg.append(s("text", { x: LEFT, y: 8 }, show(unit)));
    const labels = runs
      ? drawRuns(svg, runs, Y, { stroke: "var(--ink)", name: show(list[0].name, 9) })
      : list.flatMap((one, k) => lineOf(svg, one, LOOKS[k], Y, list.length === 1));
    endLabels(svg, labels, HEIGHT);
  });
}

function lineOf(svg, one, look, Y, alone) {
  const value = k => one.values[k];
  if (one.stderr)
    area(
      svg,
      one,
      k => value(k) - one.stderr[k],
      k => value(k) + one.stderr[k],
      Y,
      { fill: look.stroke, opacity: 0.16, class: "error" },
    );
  const label = labelledCurve(svg, one, Y, { ...look, class: "own" }, show(one.name, 15));
  return alone && one.null ? [label, level(svg, Y(one.null), `chance ${significant(one.null)}`)] : [label];
}

function wordsAt({ unit, list, runs }, i) {
  const value = one => `${one.text ?? one.name} ${significant(valueNear(one, i))}${unit ? ` ${unit}` : ""}`;
  const shown = runs ? runs.filter(one => one !== null) : list;
  return [
    `step ${whole(D.steps[i])}`,
    shown.map(value).join(", "),
    list.map(one => one.says).filter(Boolean)[0] ?? "",
  ];
}

export const panelCurves = {
  build(host, group) {
    for (const plot of plotsOf(group)) {
      const place = h("div", { class: "plot" });
      host.append(place);
      listen(place, i => wordsAt(plot, i));
    }
  },
  draw(host, group) {
    plotsOf(group).forEach((plot, k) => drawPlot(host.children[k], plot));
  },
};
