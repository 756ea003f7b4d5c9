// Curves over steps: the behaviour, the heads, the agreement.

// ---------- Did the behaviour change?

const BEHAVIOUR = 112;

function drawBehaviour() {
  const B = D.behaviour;
  if (!B) return notMeasured($("behaviour"), "No loss on repeated tokens was recorded. HeadMonitor() records it.");
  $("behaviour-sub").textContent = `loss on repeated random tokens, ${B.unit}`;
  const high = Math.max(...B.series.map(one => one.values.reduce((m, v) => (v > m ? v : m), 0))) * 1.05 || 1;
  const Y = v => BEHAVIOUR - 6 - (BEHAVIOUR - 14) * v / high;
  lane("behaviour", BEHAVIOUR, "Loss on repeated random tokens over training steps", svg => {
    yAxis(svg, ticks(0, high, 3), Y);
    endLabels(svg, B.series.map((one, k) => {
      const second = k === B.series.length - 1, value = q => one.values[q];
      curve(svg, one, value, Y, { stroke: second ? "var(--ink)" : "var(--hair)", "stroke-width": second ? 2 : 1.6 });
      return { y: Y(lastDefined(one.at.length, value)), text: one.name, fill: second ? "var(--ink)" : "var(--soft)" };
    }), BEHAVIOUR);
  });
}

function sayBehaviour(event, i) {
  if (!D.behaviour) return;
  const value = one => `${one.name} ${fmt(one.values[nearest(one.at, D.steps[i])])}`;
  const also = D.behaviour.also.map(value).join(", ");
  say(event, `step ${whole(D.steps[i])}`, D.behaviour.series.map(value).join(", "),
    `mean loss in ${D.behaviour.unit}; a gap between the copies is use of the context${also ? `. ${also}` : ""}`);
}

// ---------- Which heads formed, and when?

const CURVES = 232, ALL_LINES = 40, NAMED = 12;

/** The score drawn dashed beside the chosen one: an induction head needs a previous-token head. */
function companion() {
  const other = S.score === "previous_token" ? "induction" : S.score === "induction" ? "previous_token" : null;
  return D.scores.list.find(score => score.name === other) ?? null;
}

/** Full scale of the curves: 1, or less where nothing comes near it. */
function topOf(scores) {
  let high = 0;
  for (const score of scores) for (const v of score.values) if (v > high) high = v;
  return high > .5 ? 1 : high > .25 ? .5 : .25;
}

function drawCurves() {
  if (!D.scores) return notMeasured($("curves"), "No head scores were recorded. Add HeadMonitor() to the Trainer.");
  const score = chosenScore(), other = companion(), rising = score.rising.map(one => one.head);
  const top = topOf(other ? [score, other] : [score]), Y = v => CURVES - 6 - (CURVES - 14) * Math.min(1, v / top);
  const end = [];
  lane("curves", CURVES, `${score.title} score of every head over training steps`, svg => {
    yAxis(svg, ticks(0, top, 4), Y);
    drawRest(svg, score, new Set([...rising, S.head]), Y);
    if (other) drawRising(svg, other, other.rising.slice(0, 3).map(one => one.head), Y, end, true);
    const chosen = rising.includes(S.head) ? [] : [S.head];
    drawRising(svg, score, [...rising, ...chosen], Y, end, false);
    drawChance(svg, score, Y, end);
    endLabels(svg, end, CURVES);
  });
}

/** Heads that do not rise: faint lines, or a 5–99 % band where they are many. */
function drawRest(svg, score, named, Y) {
  const rest = Array.from({ length: HEADS }, (_, j) => j).filter(j => !named.has(j)), stroke = `var(--${score.name})`;
  if (rest.length <= ALL_LINES) {
    for (const j of rest) curve(svg, score, k => scoreAt(score, k, j), Y, { stroke, "stroke-width": 1, opacity: .35 });
    return;
  }
  const ranked = score.at.map((_, k) => Float32Array.from(rest, j => scoreAt(score, k, j)).sort());
  const part = q => k => ranked[k][Math.floor(q * (rest.length - 1))];
  area(svg, score, part(.05), part(.99), Y, { fill: stroke, opacity: .2 });
}

function drawRising(svg, score, heads, Y, end, dashed) {
  const last = score.at.length, stroke = `var(--${score.name})`;
  heads.forEach((j, place) => {
    const value = k => scoreAt(score, k, j), chosen = j === S.head && !dashed;
    curve(svg, score, value, Y, {
      stroke, "stroke-width": chosen ? 2.6 : dashed ? 1.4 : 1.7, "stroke-dasharray": dashed ? "4 2.5" : null,
    });
    if (place < NAMED || chosen) end.push({
      y: Y(lastDefined(last, value)), fill: stroke, pick: () => set({ head: j }),
      text: headName(j) + (dashed ? ` ${score.title.split(" ")[0]}` : ""),
    });
  });
}

function drawChance(svg, score, Y, end) {
  if (score.chance == null) return;
  const y = Y(score.chance);
  svg.append(s("line", { class: "chance", x1: LEFT, x2: W - RIGHT, y1: y, y2: y }));
  end.push({ y, text: `chance ${fmt(score.chance, 3)}`, fill: "var(--soft)", plain: true });
}

function sayCurves(event, i, y) {
  if (!D.scores) return;
  const score = chosenScore(), k = nearest(score.at, D.steps[i]);
  const top = topOf(companion() ? [score, companion()] : [score]);
  const value = (1 - (y - 8) / (CURVES - 14)) * top;
  let near = 0;
  for (let j = 1; j < HEADS; j++) if (Math.abs(scoreAt(score, k, j) - value) < Math.abs(scoreAt(score, k, near) - value)) near = j;
  say(event, ...scoreWords(score, k, near));
}

/** Value, where and when, and how it is computed. */
function scoreWords(score, k, j) {
  const error = score.stderr ? ` ± ${fmt(score.stderr[k * HEADS + j])}` : "";
  const rose = score.rising.find(one => one.head === j);
  return [
    `${headName(j)} ${score.title} ${fmt(scoreAt(score, k, j))}${error}`, `at step ${whole(score.at[k])}`,
    `${rose ? `${rose.says}. ` : ""}${score.how}.${score.n ? ` ${score.n} sequences.` : ""}` +
      (score.chance == null ? "" : ` Chance ${fmt(score.chance, 3)}.`),
  ];
}

// ---------- Do the explanations agree with the head?

const AGREE = 150;

function drawAgreement() {
  const A = D.agreement;
  if (!A) return notMeasured($("agreement"), "Not measured. HeadMonitor() with SaliencyMonitor() or IntegratedGradientsMonitor() on one prompt measures it.");
  const low = A.series.reduce((m, one) => one.values.reduce((n, v) => (v < n ? v : n), m), A.floor ? A.floor[0] : 0);
  const bottom = Math.max(-1, Math.floor(low * 4) / 4), Y = v => AGREE - 6 - (AGREE - 14) * (v - bottom) / (1 - bottom);
  lane("agreement", AGREE, "Rank correlation of attributions with the head's attention over training steps", svg => {
    if (A.floor) svg.append(s("rect", { x: LEFT, width: W - LEFT - RIGHT, y: Y(A.floor[1]), height: Y(A.floor[0]) - Y(A.floor[1]), fill: "var(--grid)" }));
    yAxis(svg, [-1, -.5, 0, .5, 1].filter(v => v >= bottom), Y);
    const end = A.series.map(one => {
      const saliency = one.key === "saliency", stroke = saliency ? "var(--ink)" : "var(--plus)", value = k => one.values[k];
      curve(svg, one, value, Y, { stroke, "stroke-width": 1.9, "stroke-dasharray": saliency ? "5 2.5" : null });
      return { y: Y(lastDefined(one.at.length, value)), text: saliency ? "saliency" : "integrated gr.", fill: stroke };
    });
    if (A.floor) end.push({ y: Y(0), text: `random ±${fmt(A.floor[1])}`, fill: "var(--soft)", plain: true });
    endLabels(svg, end, AGREE);
  });
}

function sayAgreement(event, i) {
  const A = D.agreement;
  if (!A) return;
  const values = A.series.map(one => `${one.name} ${fmt(one.values[nearest(one.at, D.steps[i])])}`).join(", ");
  say(event, `step ${whole(D.steps[i])}`, values,
    "Spearman correlation over input positions between the size of the attribution and the head's attention" +
    (A.head ? ` (${A.head} at the end)` : "") + (A.n ? `, n = ${A.n}` : "") + ". The grey band holds 95 % of random orders.");
}

onLayout.push(drawBehaviour, drawCurves, drawAgreement);
listen("behaviour", sayBehaviour);
listen("curves", sayCurves);
listen("agreement", sayAgreement);
