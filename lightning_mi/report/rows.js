// Maps over steps, one row each: heads × steps and tokens × steps.

/**
 * Paint rows over steps on a canvas under the lane's marks.
 * @param block values over its own steps
 * @param {number[]} rows which entries, top to bottom
 * @param {(k, row) => number} value at the k-th step
 * @param {(value) => number[]} shade its colour
 */
function paintRows(id, block, rows, height, value, shade) {
  const host = $(id), scale = devicePixelRatio || 1, width = W - LEFT - RIGHT;
  const canvas = h("canvas", { width: Math.round(width * scale), height: Math.round(height * scale * rows.length), "aria-hidden": "true" });
  canvas.style.cssText = `left:${LEFT}px;top:0;width:${width}px;height:${height * rows.length}px`;
  const context = canvas.getContext("2d"), hatch = hatched(context), edges = columns(block.at);
  context.scale(scale, scale);
  rows.forEach((row, place) => {
    for (let k = 0; k < block.at.length; k++) {
      const v = value(k, row);
      context.fillStyle = Number.isFinite(v) ? rgb(shade(v)) : hatch;
      context.fillRect(edges[k] - LEFT, place * height, edges[k + 1] - edges[k] + .4, height - (height > 9 ? 1 : 0));
    }
  });
  host.prepend(canvas);
}

/** Where each step's column begins: half way between neighbours; the first and last end at theirs. */
function columns(steps) {
  const x = steps.map(X), edges = [x[0]];
  for (let k = 1; k < x.length; k++) edges.push((x[k - 1] + x[k]) / 2);
  edges.push(x.length > 1 ? x[x.length - 1] : x[0] + 6);
  return edges;
}

/** Undefined is hatched, never zero. */
function hatched(context) {
  const tile = h("canvas", { width: 6, height: 6 }), paint = tile.getContext("2d");
  paint.strokeStyle = isDark() ? "#434b58" : "#c9cdd4";
  paint.lineWidth = 1.5;
  paint.beginPath();
  for (const shift of [-6, 0, 6]) { paint.moveTo(shift, 6); paint.lineTo(shift + 6, 0); }
  paint.stroke();
  return context.createPattern(tile, "repeat");
}

/** Names left of the rows. */
function nameRows(svg, names, height, options) {
  names.forEach((name, place) => {
    const { bold, pick, mono } = options(place);
    svg.append(s("text", {
      x: LEFT - 8, y: place * height + height / 2 + 4, "text-anchor": "end", class: pick ? "link" : "",
      style: `${bold ? "font-weight:700;fill:var(--ink);" : ""}${mono ? "font-family:var(--mono);font-size:11px;white-space:pre" : ""}`,
      onclick: pick ?? (() => {}),
    }, name));
  });
}

// ---------- heads × steps

const FEW_HEADS = 16, MOST_ROWS = 40;

function headRows() {
  const score = chosenScore();
  if (HEADS <= FEW_HEADS) return [Array.from({ length: HEADS }, (_, j) => j), "Every head, one row each"];
  const rising = score.rising.map(one => one.head), kept = rising.slice(0, MOST_ROWS);
  if (kept.length) {
    const over = rising.length - kept.length, rest = HEADS - rising.length;
    return [kept, `The ${kept.length} heads that rise, in order of rising; ${over ? `${over} more rise, ` : ""}the other ${rest} stay near chance`];
  }
  const last = score.at.length - 1, order = Array.from({ length: HEADS }, (_, j) => j);
  order.sort((a, b) => (scoreAt(score, last, b) || 0) - (scoreAt(score, last, a) || 0));
  return [order.slice(0, 8), `No head rises; the 8 highest of ${HEADS}`];
}

const rowHeight = count => (count <= 10 ? 18 : count <= 20 ? 14 : 11);

function drawHeadRows() {
  $("map-head").hidden = !D.scores;
  if (!D.scores) return;
  const score = chosenScore(), [rows, words] = headRows(), height = rowHeight(rows.length);
  $("rows-sub").textContent = words;
  $("ramp-score").style.background = ramp(t => colour(score.name, t));
  lane("rows", height * rows.length, `${score.title} score, one row a head, over training steps`, svg => {
    nameRows(svg, rows.map(headName), height, place => ({ bold: rows[place] === S.head, pick: () => set({ head: rows[place] }) }));
  });
  paintRows("rows", score, rows, height, (k, j) => scoreAt(score, k, j), v => aboveChance(score, v));
}

function sayHeadRows(event, i, y) {
  if (!D.scores) return;
  const score = chosenScore(), [rows] = headRows(), place = Math.floor(y / rowHeight(rows.length));
  if (place < rows.length) say(event, ...scoreWords(score, nearest(score.at, D.steps[i]), rows[place]));
}

// ---------- tokens × steps

const FEW_TOKENS = 12;
const inputAt = (block, k, position) => (position < block.width ? block.values[k * block.width + position] : NaN);

/** What the rows are called: tokens of the prompt, or features of a table. */
const rowNames = block => block.names ?? TOKENS;
const lanes = { ...D.tables, ...D.inputs };       // what is drawn as rows over steps

/** The tokens with the largest values, in the order of the prompt; or all of them. */
function tokenRows(block) {
  const all = rowNames(block).map((_, q) => q);
  if (S.all || all.length <= FEW_TOKENS) return all;
  const peak = all.map(q => block.at.reduce((m, _, k) => m + Math.abs(inputAt(block, k, q) || 0), 0));
  return [...all].sort((a, b) => peak[b] - peak[a]).slice(0, FEW_TOKENS).sort((a, b) => a - b);
}

const inputShade = block => v => (block.signed ? plusMinus(v / block.cap) : colour("ink", v / block.cap));
const isShare = block => block.unit === "share of the total";

function inputScale(block) {
  if (isShare(block)) return `0 to ${fmt(100 * block.cap, 0)} %`;
  return `${block.signed ? "±" : "0 to "}${+block.cap.toPrecision(2)} ${block.unit}`;
}

/** Why there is no map of tokens. */
function unseen() {
  const found = D.undrawn.filter(name => name.endsWith("/values")).map(name => name.split("/")[0].replaceAll("_", " "));
  return found.length
    ? `Measured, but not of tokens: ${found.join(" and ")}. Look at them in the loggers' pictures and in the run folder.`
    : "No attributions were recorded. Add SaliencyMonitor() or IntegratedGradientsMonitor() to the Trainer.";
}

function drawInputs() {
  const block = lanes[S.method];
  $("inputs-sub").textContent = "";
  if (!block && D.pictures[S.method]) {
    const signs = D.pictures[S.method].signed ? " Blue supports the target, orange opposes it." : "";
    $("inputs-sub").textContent = `Each row an image, each column a step; channels summed, one scale for the whole run.${signs}`;
    $("inputs").replaceChildren();
    cursors.delete("inputs");
    return;
  }
  if (!block) return notMeasured($("inputs"), unseen());
  const rows = tokenRows(block), height = rowHeight(rows.length);
  const source = block.names || D.prompt.source == null ? "" : ", ◂ the one to copy";
  const what = block.names ? `a feature, mean of ${block.n}` : "a token of the prompt";
  $("inputs-sub").textContent = `Each row ${what}${source}; ${block.unit}, one scale for the whole run: ${inputScale(block)}`;
  lane("inputs", height * rows.length, `${block.title} of each ${block.names ? "feature" : "token"} over training steps`, svg => {
    const isSource = q => !block.names && q === D.prompt.source;
    nameRows(svg, rows.map(q => show(rowNames(block)[q]).slice(0, block.names ? 17 : 7) + (isSource(q) ? " ◂" : "")), height,
      place => ({ bold: isSource(rows[place]), mono: true }));
  });
  paintRows("inputs", block, rows, height, (k, q) => inputAt(block, k, q), inputShade(block));
}

function sayInputs(event, i, y) {
  const block = lanes[S.method];
  if (!block) return;
  const rows = tokenRows(block), q = rows[Math.floor(y / rowHeight(rows.length))], k = nearest(block.at, D.steps[i]);
  if (q != null) say(event, block.names ? block.names[q] : `“${show(TOKENS[q])}” at position ${q}`, `${inputWords(block, k, q)} at step ${whole(block.at[k])}`, inputNote(block, k));
}

function inputWords(block, k, q) {
  const value = inputAt(block, k, q);
  return isShare(block) ? `${fmt(100 * value, 1)} % of the total` : `${fmt(value)} ${block.unit}`;
}

function inputNote(block, k) {
  const target = block.target ? ` Target: “${show(block.target)}”.` : "";
  if (block.title === "saliency" && isShare(block)) return `size of the gradient with respect to the token's embedding, as a share of the sum over tokens.${target}`;
  if (!block.signed) return isShare(block) ? `a share of the sum over tokens.${target}` : target;
  const gap = block.gap ? ` Completeness gap ${fmt(block.gap[k], 4)}.` : "";
  return `blue supports, orange opposes.${target}${gap}${block.how ? ` ${block.how}.` : ""}`;
}

onLayout.push(drawHeadRows, drawInputs);
listen("rows", sayHeadRows);
listen("inputs", sayInputs);
