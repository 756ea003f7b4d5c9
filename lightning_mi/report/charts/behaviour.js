// Did the behaviour change? The loss on both copies of repeated random tokens.

import { D, valueNear } from "../core/data.js";
import { card, withoutHeads } from "../core/card.js";
import { comparing, drawRuns } from "../core/compare.js";
import { csvSeries } from "../core/csv.js";
import { endLabels, labelledCurve, lane, listen, yAxis } from "../core/lane.js";
import { fmt, ticks, whole } from "../core/numbers.js";

const HEIGHT = 112;
const B = D.behaviour;

function drawBehaviour(host) {
  if (!B) return;
  const shown = [...B.series, ...(D.runs ?? []).flatMap(run => run.behaviour ?? [])];
  const highest = shown.reduce((m, one) => one.values.reduce((n, v) => (v > n ? v : n), m), 0);
  const high = highest * 1.05 || 1;
  const Y = v => HEIGHT - 6 - ((HEIGHT - 14) * v) / high;
  lane(host, HEIGHT, "Loss on repeated random tokens over training steps", svg => {
    yAxis(svg, ticks(0, high, 3), Y);
    endLabels(svg, comparing ? linesOfRuns(svg, Y) : linesOfCopies(svg, Y), HEIGHT);
  });
}

function linesOfCopies(svg, Y) {
  const { series } = /** @type {Behaviour} */ (B);
  return series.map((one, k) => {
    const second = k === series.length - 1;
    const style = { stroke: second ? "var(--ink)" : "var(--hair)", "stroke-width": second ? 2 : 1.6 };
    return labelledCurve(svg, one, Y, style, one.name, second ? "var(--ink)" : "var(--soft)");
  });
}

/** Of several runs, only the copy that can be predicted. */
function linesOfRuns(svg, Y) {
  const curves = (D.runs ?? []).map(
    run => run.behaviour && { ...run.behaviour, text: `${run.letter} second copy` },
  );
  return drawRuns(svg, curves, Y, { stroke: "var(--ink)", name: "2nd copy," });
}

function wordsAt(i) {
  if (!B) return null;
  const value = one => `${one.name} ${fmt(valueNear(one, i))}`;
  const also = B.also.map(value).join(", ");
  const note = `mean loss in ${B.unit}; a gap between the copies is use of the context`;
  return [`step ${whole(D.steps[i])}`, B.series.map(value).join(", "), also ? `${note}. ${also}` : note];
}

card({
  id: "when",
  place: "left",
  order: 10,
  title: "Did the behaviour change?",
  shown: () => Boolean(B) || !withoutHeads(),
  has: () => Boolean(B),
  missing: () => "No loss on repeated tokens was recorded. HeadMonitor() records it.",
  sub: () => `loss on repeated random tokens, ${B?.unit}`,
  csv: () =>
    csvSeries(
      comparing
        ? (D.runs ?? []).flatMap(run => (run.behaviour ? [{ ...run.behaviour, name: run.label }] : []))
        : [...(B?.series ?? []), ...(B?.also ?? [])],
    ),
  build: host => listen(host, wordsAt),
  draw: drawBehaviour,
});
