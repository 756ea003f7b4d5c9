// The one time axis: steps or tokens, linear or logarithmic, the same for every chart on the left.

const RIGHT = 112, LEFT = Object.keys(D.tables).length && !D.prompt ? 132 : 62;   // margins of the plots
let W = 0;                                        // width of the plots, set by layout

const END = Math.max(D.run.max_steps, D.steps[LAST]) || 1;
const FIRST = D.steps.find(v => v > 0) || 1;      // the log axis begins at the first step measured

/** Position on the axis before scaling: steps, or the tokens seen by then. */
function along(stepNumber) {
  if (S.unit !== "tokens") return stepNumber;
  if (LAST < 1) return stepNumber;
  let k = nearest(D.steps, stepNumber);
  if (D.steps[k] > stepNumber || k === LAST) k -= 1;
  k = Math.max(0, k);
  const rate = (D.tokens[k + 1] - D.tokens[k]) / (D.steps[k + 1] - D.steps[k]);
  return D.tokens[k] + rate * (stepNumber - D.steps[k]);
}

/** 0 to 1 along the axis. */
function share(value) {
  const end = along(END), first = along(FIRST) || 1;
  return S.log ? Math.log1p(value / first) / Math.log1p(end / first) : value / end;
}

const fromLeft = portion => LEFT + (W - LEFT - RIGHT) * portion;
const X = stepNumber => fromLeft(share(along(stepNumber)));

/** Index of the measured step nearest to a place on the screen. */
function atX(pixels) {
  let found = 0, distance = Infinity;
  for (let i = 0; i <= LAST; i++) {
    const d = Math.abs(X(D.steps[i]) - pixels);
    if (d < distance) { found = i; distance = d; }
  }
  return found;
}

function timeTicks() {
  const end = along(END);
  if (!S.log) return ticks(0, end, 5).filter(Number.isInteger);
  const first = along(FIRST), found = [0];
  for (let power = 1; power <= end; power *= 10) {
    for (const v of [power, 3 * power]) if (v >= first && v <= end) found.push(v);
  }
  return found.filter((v, k) => !k || fromLeft(share(v)) - fromLeft(share(found[k - 1])) > 34 || k === 1);
}

/** The step interval in which the first induction head rose, if that may be claimed. */
function onsetInterval() {
  const score = D.scores?.list.find(one => one.name === "induction");
  return score?.rising.find(one => one.state === "formed")?.interval ?? null;
}

function drawAxis() {
  const height = 36, svg = s("svg", { width: W, height, "aria-hidden": "true" });
  $("axis").replaceChildren(svg);
  $("range").style.cssText = `margin-left:${LEFT - 8}px;width:${W - LEFT - RIGHT + 16}px`;
  const rose = onsetInterval();
  if (rose) {
    svg.append(bandOf(rose, height));
    const words = `induction forms, step ${whole(rose[0])} to ${whole(rose[1])}`;
    const left = X(rose[1]) + 6 + 190 > W;
    svg.append(s("text", {
      class: "label", x: left ? X(rose[0]) - 6 : X(rose[1]) + 6, y: 32,
      "text-anchor": left ? "end" : "start", style: "fill:var(--induction)",
    }, words));
  }
  for (const t of timeTicks()) {
    const x = fromLeft(share(t));
    svg.append(s("line", { class: "axis", x1: x, x2: x, y1: 0, y2: 5 }));
    svg.append(s("text", { x, y: 18, "text-anchor": "middle" }, S.unit === "tokens" ? short(t) : whole(t)));
  }
  svg.append(s("text", { x: W - RIGHT + 30, y: 18 }, S.unit));
}

function bandOf([low, high], height) {
  return s("rect", {
    x: X(low), y: 0, width: Math.max(2, X(high) - X(low)), height, fill: "var(--band)",
  });
}
