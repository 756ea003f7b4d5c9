// The one time axis: steps or tokens, linear or logarithmic, the same for every chart on the left.

import { D, LAST, nearest } from "./data.js";
import { $, s } from "./dom.js";
import { short, ticks, whole } from "./numbers.js";
import { S } from "./state.js";

/** Right margin of the plots: labels of lines. */
const RIGHT = 112;

const NARROW = 62;
const BROAD = 132;

/** Left margin, the same for all: names of heads and tokens are short, those of features and edges are not. */
export const LEFT =
  (Object.keys(D.tables).length && !D.prompt) || D.panels.some(group => group.arrays.some(named))
    ? BROAD
    : NARROW;

/** Whether a panel has names of its own. */
function named(block) {
  return Object.values(block.labels).some(labels => labels.some(label => label.length > 6));
}

let W = 0;

/** Width of the lanes, measured anew by measureWidth. */
export const laneWidth = () => W;

/** Measure the plots; true where their width has changed. */
export function measureWidth() {
  const before = W;
  W = $("axis").clientWidth;
  return W !== before;
}

/** Where the axis ends: the end of training as planned, or the last step of any of the runs. */
export const END = Math.max(D.run.max_steps, ...(D.runs ?? []).map(run => run.last), D.steps[LAST]) || 1;
const FIRST = D.steps.find(v => v > 0) || 1; // the log axis begins at the first step measured

/** Position on the axis before scaling: steps, or the tokens seen by then. */
export function along(stepNumber) {
  if (S.unit !== "tokens" || !D.tokens || LAST < 1) return stepNumber;
  let k = nearest(D.steps, stepNumber);
  if (D.steps[k] > stepNumber || k === LAST) k -= 1;
  k = Math.max(0, k);
  const rate = (D.tokens[k + 1] - D.tokens[k]) / (D.steps[k + 1] - D.steps[k]);
  return D.tokens[k] + rate * (stepNumber - D.steps[k]);
}

/** 0 to 1 along the axis. */
export function share(value) {
  const end = along(END);
  const first = along(FIRST) || 1;
  return S.log ? Math.log1p(value / first) / Math.log1p(end / first) : value / end;
}

export const plotWidth = () => Math.max(40, W - LEFT - RIGHT);
export const fromLeft = portion => LEFT + plotWidth() * portion;
export const X = stepNumber => fromLeft(share(along(stepNumber)));

/** Index of the measured step nearest to a place on the screen. */
export function atX(pixels) {
  let found = 0;
  let distance = Infinity;
  for (let i = 0; i <= LAST; i++) {
    const d = Math.abs(X(D.steps[i]) - pixels);
    if (d < distance) {
      found = i;
      distance = d;
    }
  }
  return found;
}

function timeTicks() {
  const end = along(END);
  if (!S.log) return ticks(0, end, 5).filter(Number.isInteger);
  const first = along(FIRST);
  const found = [0];
  for (let power = 1; power <= end; power *= 10) {
    for (const v of [power, 3 * power]) if (v >= first && v <= end) found.push(v);
  }
  return found.filter((v, k) => !k || fromLeft(share(v)) - fromLeft(share(found[k - 1])) > 34 || k === 1);
}

/** The steps between which induction formed, in one run or from the first to the last of several. */
export function onsetInterval() {
  return D.headline.state === "formed" ? (D.headline.interval ?? null) : null;
}

/** Draw the axis under the slider. */
export function drawAxis() {
  const height = 36;
  const svg = s("svg", { width: W, height, "aria-hidden": "true" });
  $("axis").replaceChildren(svg);
  $("range").style.cssText = `margin-left:${LEFT - 8}px;width:${plotWidth() + 16}px`;
  const rose = onsetInterval();
  if (rose) svg.append(bandOf(rose, height), bandLabel(rose));
  for (const t of timeTicks()) {
    const x = fromLeft(share(t));
    svg.append(s("line", { class: "axis", x1: x, x2: x, y1: 0, y2: 5 }));
    svg.append(s("text", { x, y: 18, "text-anchor": "middle" }, S.unit === "tokens" ? short(t) : whole(t)));
  }
  svg.append(s("text", { x: W - RIGHT + 30, y: 18 }, S.unit));
}

function bandLabel([low, high]) {
  const words = `induction forms, step ${low === high ? whole(low) : `${whole(low)} to ${whole(high)}`}`;
  const left = X(high) + 196 > W;
  return s(
    "text",
    {
      class: "label",
      x: left ? X(low) - 6 : X(high) + 6,
      y: 32,
      "text-anchor": left ? "end" : "start",
      style: "fill:var(--induction)",
    },
    words,
  );
}

/** The onset as a band through a plot. */
export function bandOf([low, high], height) {
  return s("rect", {
    class: "onset",
    x: X(low),
    y: 0,
    width: Math.max(2, X(high) - X(low)),
    height,
    fill: "var(--band)",
  });
}
