// A lane: one plot on the time axis, with the onset's band, the future and the cursor.

const cursors = new Map();                        // of each lane, by the id of its host

/**
 * Draw a lane.
 * @param {string} id of the element it stands in
 * @param {number} height in pixels
 * @param {string} label for those who do not see it
 * @param {(svg, host) => void} draw adds the marks
 */
function lane(id, height, label, draw) {
  const host = $(id), svg = s("svg", { width: W, height, role: "img", "aria-label": label });
  host.replaceChildren(svg);
  const rose = onsetInterval();
  if (rose) svg.append(bandOf(rose, height));
  if (D.run.state === "running" && END > D.steps[LAST]) {
    const x = X(D.steps[LAST]);
    svg.append(s("rect", { x, y: 0, width: W - RIGHT - x, height, fill: "url(#future)" }));
  }
  draw(svg, host);
  const cursor = s("line", { class: "cursor", y1: 0, y2: height });
  svg.append(cursor);
  cursors.set(id, cursor);
}

/** The pointer moves the cursor when pressed, and asks for words when not. */
function listen(id, words) {
  const host = $(id), place = event => event.clientX - host.getBoundingClientRect().left;
  host.addEventListener("pointerdown", event => {
    if (event.target.classList.contains("link")) return;
    host.setPointerCapture(event.pointerId);
    set({ i: atX(place(event)) });
  });
  host.addEventListener("pointermove", event => {
    if (event.buttons) set({ i: atX(place(event)) });
    else words(event, atX(place(event)), event.clientY - host.getBoundingClientRect().top);
  });
  host.addEventListener("pointerleave", hush);
}

onStep.push(() => {
  for (const cursor of cursors.values()) {
    cursor.setAttribute("x1", X(step()));
    cursor.setAttribute("x2", X(step()));
  }
});

// ---------- marks

/** Horizontal grid lines with their values. */
function yAxis(svg, values, Y) {
  for (const v of values) {
    svg.append(s("line", { class: "grid", x1: LEFT, x2: W - RIGHT, y1: Y(v), y2: Y(v) }));
    svg.append(s("text", { x: LEFT - 8, y: Y(v) + 4, "text-anchor": "end" }, String(v).replace("-", "−")));
  }
}

/** A curve over a block's own steps; an undefined value leaves a gap, a lone one is a dot. */
function curve(svg, block, value, Y, style) {
  let path = "", drawn = false;
  const defined = k => Number.isFinite(value(k));
  block.at.forEach((stepNumber, k) => {
    if (!defined(k)) { drawn = false; return; }
    const x = X(stepNumber), y = Y(value(k));
    if (!drawn && !defined(k + 1)) svg.append(s("circle", { cx: x, cy: y, r: 2.6, fill: style.stroke }));
    path += `${drawn ? "L" : "M"}${x.toFixed(1)},${y.toFixed(1)}`;
    drawn = true;
  });
  svg.append(s("path", { d: path, fill: "none", "stroke-linejoin": "round", ...style }));
}

/** The area between two curves. */
function area(svg, block, low, high, Y, style) {
  const point = (k, value) => `${X(block.at[k]).toFixed(1)},${Y(value(k)).toFixed(1)}`;
  const kept = block.at.map((_, k) => k).filter(k => Number.isFinite(low(k)) && Number.isFinite(high(k)));
  const back = [...kept].reverse();
  if (kept.length < 2) return;
  svg.append(s("path", { d: `M${kept.map(k => point(k, high)).join("L")}L${back.map(k => point(k, low)).join("L")}Z`, ...style }));
}

/** Labels at the ends of lines, pushed apart; those that find no room are counted. */
function endLabels(svg, labels, height) {
  const room = Math.floor(height / 13), kept = labels.slice(0, room).sort((a, b) => a.y - b.y);
  kept.forEach((label, k) => { if (k) label.y = Math.max(label.y, kept[k - 1].y + 13); });
  const over = kept.length ? Math.max(0, kept[kept.length - 1].y - height + 2) : 0;
  for (let k = kept.length - 1, limit = height - 2; over && k >= 0; k--, limit -= 13) kept[k].y = Math.min(kept[k].y, limit);
  for (const { y, text, fill: colourOf, plain, pick } of kept) {
    svg.append(s("text", {
      class: `${plain ? "" : "label"} ${pick ? "link" : ""}`, x: W - RIGHT + 8, y: y + 4,
      style: `fill:${colourOf}`, onclick: pick ?? (() => {}),
    }, text));
  }
}
