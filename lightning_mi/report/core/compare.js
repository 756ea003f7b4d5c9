// Several runs in one plot: two to four as labelled dashes, more as their median and a band.

import { D } from "./data.js";
import { area, labelledCurve } from "./lane.js";

/** Dashes of the first four runs; the first is solid. */
const DASHES = [null, "7 3", "2 2.5", "9 3 2 3"];

/** Up to so many runs have a line of their own. */
export const APART = 4;

export const comparing = Boolean(D.runs);

/**
 * Draw one quantity of several runs; returns the labels for the ends of the lines.
 * @param {any} svg
 * @param {({at: number[], values: ArrayLike<number>, text: string} | null)[]} curves one for each run, null where it has none
 * @param {(value: number) => number} Y
 * @param {{stroke: string, width?: number, name?: string}} style
 */
export function drawRuns(svg, curves, Y, { stroke, width = 1.8, name = "" }) {
  if (curves.length > APART)
    return drawBand(
      svg,
      curves.filter(one => one !== null),
      Y,
      { stroke, name },
    );
  return curves.flatMap((one, k) => {
    if (!one) return [];
    const style = {
      stroke,
      "stroke-width": width,
      "stroke-dasharray": DASHES[k],
      class: `run run-${D.runs?.[k].letter}`,
    };
    return [labelledCurve(svg, one, Y, style, one.text)];
  });
}

function drawBand(svg, curves, Y, { stroke, name }) {
  if (!curves.length) return [];
  const block = spread(curves);
  area(
    svg,
    block,
    q => block.low[q],
    q => block.high[q],
    Y,
    { fill: stroke, opacity: 0.16, class: "band" },
  );
  const style = { stroke, "stroke-width": 2, class: "median" };
  return [labelledCurve(svg, block, Y, style, `${name} median`.trim())];
}

/** Median, lowest and highest of several curves at every step at which one of them was measured. */
function spread(curves) {
  const at = [...new Set(curves.flatMap(one => one.at))].sort((a, b) => a - b);
  const ranked = at.map(stepNumber =>
    curves
      .map(one => between(one, stepNumber))
      .filter(Number.isFinite)
      .sort((a, b) => a - b),
  );
  const median = list => (list.length ? (list[(list.length - 1) >> 1] + list[list.length >> 1]) / 2 : NaN);
  return {
    at,
    values: ranked.map(median),
    low: ranked.map(list => list[0] ?? NaN),
    high: ranked.map(list => list[list.length - 1] ?? NaN),
  };
}

/** A curve between two of its measurements; undefined outside of them. */
function between({ at, values }, stepNumber) {
  const k = at.findIndex(v => v >= stepNumber);
  if (k < 0 || (k === 0 && at[0] > stepNumber)) return NaN;
  if (at[k] === stepNumber) return values[k];
  const t = (stepNumber - at[k - 1]) / (at[k] - at[k - 1]);
  return values[k - 1] * (1 - t) + values[k] * t;
}
