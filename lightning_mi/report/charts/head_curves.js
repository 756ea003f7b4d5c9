// Which heads formed, and when? The chosen score of every head over steps.

import { D, HEADS, WIDTH, headCurve, headName, lastDefined, nearest, once, scoreAt } from "../core/data.js";
import { card, withoutHeads } from "../core/card.js";
import { APART, comparing, drawRuns } from "../core/compare.js";
import { csvLines, overSteps } from "../core/csv.js";
import { area, curve, endLabels, lane, level, listen, yAxis } from "../core/lane.js";
import { extent, fmt, ticks } from "../core/numbers.js";
import { S, chosenScore, set } from "../core/state.js";

const HEIGHT = 232;
const ALL_LINES = 40; // up to so many heads have a line each
const NAMED = 12; // and so many a label

/** The score drawn dashed beside the chosen one: an induction head needs a previous-token head. */
const COMPANION = { previous_token: "induction", induction: "previous_token" };
const companion = () => D.scores?.list.find(score => score.name === COMPANION[S.score]) ?? null;

/** Full scale: 1, or less where nothing comes near it, in any of the runs. */
function topOf(score) {
  const others = (D.runs ?? []).flatMap(run => run.roles[score.name] ?? []);
  const [, high] = extent([score, companion() ?? score, ...others].flatMap(one => extent(one.values)));
  return high > 0.5 ? 1 : high > 0.25 ? 0.5 : 0.25;
}

const scaleFor = score => {
  const top = topOf(score);
  return v => HEIGHT - 6 - (HEIGHT - 14) * Math.min(1, v / top);
};

function drawCurves(host) {
  const score = chosenScore();
  const Y = scaleFor(score);
  const labels = [];
  lane(host, HEIGHT, `${score.title} score of every head over training steps`, svg => {
    yAxis(svg, ticks(0, topOf(score), 4), Y);
    if (comparing) labels.push(...drawRoles(svg, score, Y));
    else drawHeads(svg, score, Y, labels);
    drawChance(svg, score, Y, labels);
    endLabels(svg, labels, HEIGHT);
  });
}

function drawHeads(svg, score, Y, labels) {
  const other = companion();
  const rising = score.rising.map(one => one.head);
  drawRest(svg, score, new Set([...rising, S.head]), Y);
  if (other)
    drawNamed(
      svg,
      other,
      other.rising.slice(0, 3).map(one => one.head),
      Y,
      labels,
      true,
    );
  drawNamed(svg, score, rising.includes(S.head) ? rising : [...rising, S.head], Y, labels, false);
}

/** Heads that do not rise: faint lines, or a 5–99 % band where they are many. */
function drawRest(svg, score, named, Y) {
  const rest = Array.from({ length: HEADS }, (_, j) => j).filter(j => !named.has(j));
  const stroke = `var(--${score.name})`;
  if (rest.length <= ALL_LINES) {
    for (const j of rest)
      curve(svg, score, k => scoreAt(score, k, j), Y, { stroke, "stroke-width": 1, opacity: 0.35 });
    return;
  }
  const ranked = rankedRest(score);
  const part = q => k => ranked[k][Math.floor(q * (ranked[k].length - 1))];
  area(svg, score, part(0.05), part(0.99), Y, { class: "rest", fill: stroke, opacity: 0.2 });
}

/** Sorted values of the heads that do not rise, at each step; sorted once, not at every click. */
const rankedRest = once(score => {
  const rising = new Set(score.rising.map(one => one.head));
  const rest = Array.from({ length: HEADS }, (_, j) => j).filter(j => !rising.has(j));
  return score.at.map((_, k) =>
    Float32Array.from(rest, j => scoreAt(score, k, j))
      .filter(Number.isFinite)
      .sort(),
  );
});

function drawNamed(svg, score, heads, Y, labels, dashed) {
  const stroke = `var(--${score.name})`;
  heads.forEach((j, place) => {
    const whole = headCurve(score, j);
    const chosen = j === S.head && !dashed;
    curve(svg, whole, whole.value, Y, {
      class: `head ${headName(j)}`,
      stroke,
      "stroke-width": chosen ? 2.6 : dashed ? 1.4 : 1.7,
      ...(dashed ? { "stroke-dasharray": "4 2.5" } : {}),
    });
    if (place < NAMED || chosen)
      labels.push({
        y: Y(lastDefined(whole.at.length, whole.value)),
        fill: stroke,
        pick: () => set({ head: j }),
        text: headName(j) + (dashed ? ` ${score.title.split(" ")[0]}` : ""),
      });
  });
}

/** Several runs: the heads of one role stand for each other, the strongest of each first. */
function drawRoles(svg, score, Y) {
  const runs = D.runs ?? [];
  const most = Math.max(...runs.map(run => run.roles[score.name]?.length ?? 0));
  return Array.from({ length: runs.length > APART ? Math.min(1, most) : most }, (_, rank) => {
    const curves = runs.map(run => {
      const one = run.roles[score.name]?.[rank];
      return one ? { ...one, text: `${run.letter} ${one.head}` } : null;
    });
    return drawRuns(svg, curves, Y, {
      stroke: `var(--${score.name})`,
      width: rank ? 1.1 : 2,
      name: "strongest,",
    });
  }).flat();
}

function drawChance(svg, score, Y, labels) {
  if (score.chance == null) return;
  labels.push(level(svg, Y(score.chance), `chance ${fmt(score.chance, 3)}`));
}

function wordsAt(i, y) {
  const score = chosenScore();
  if (!score) return null;
  const k = nearest(score.at, D.steps[i]);
  const value = (1 - (y - 8) / (HEIGHT - 14)) * topOf(score);
  let near = 0;
  for (let j = 1; j < HEADS; j++)
    if (Math.abs(scoreAt(score, k, j) - value) < Math.abs(scoreAt(score, k, near) - value)) near = j;
  return scoreWords(score, k, near);
}

/** Value, where and when, and how it is computed: what every chart of heads says of one. */
export function scoreWords(score, k, j) {
  const error = score.stderr ? ` ± ${fmt(score.stderr[k * HEADS + j])}` : "";
  const rose = score.rising.find(one => one.head === j);
  return [
    `${headName(j)} ${score.title} ${fmt(scoreAt(score, k, j))}${error}`,
    `at step ${score.at[k].toLocaleString("en")}`,
    `${rose ? `${rose.says}. ` : ""}${score.how}.${score.n ? ` ${score.n} sequences.` : ""}` +
      (score.chance == null ? "" : ` Chance ${fmt(score.chance, 3)}.`),
  ];
}

const rowsOf = (score, k) =>
  Array.from({ length: HEADS }, (_, j) => [
    score.name,
    Math.floor(j / WIDTH),
    j % WIDTH,
    scoreAt(score, k, j),
  ]);

const rolesOf = run =>
  Object.entries(run.roles).flatMap(([score, list]) =>
    list.flatMap(one => overSteps(one, k => [[run.label, score, one.head, one.values[k]]])),
  );

card({
  id: "heads",
  place: "left",
  order: 20,
  title: "Which heads formed, and when?",
  uses: ["head", "score"],
  shown: () => Boolean(D.scores) || !withoutHeads(),
  has: () => Boolean(D.scores),
  missing: () => "No head scores were recorded. Add HeadMonitor() to the Trainer.",
  sub: () => (comparing ? "heads of a role stand for each other, the strongest first" : ""),
  tabs: () => (D.scores?.list ?? []).map(score => ["score", score.name, score.title]),
  tabsName: "Score",
  csv: () =>
    comparing
      ? csvLines("step,run,score,head,value", (D.runs ?? []).flatMap(rolesOf))
      : csvLines(
          "step,score,layer,head,value",
          (D.scores?.list ?? []).flatMap(score => overSteps(score, k => rowsOf(score, k))),
        ),
  build: host => listen(host, wordsAt),
  draw: drawCurves,
});
