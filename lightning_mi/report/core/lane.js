// A lane: one plot on the time axis, with the onset's band, the future and the cursor.

import { D, LAST, lastDefined } from "./data.js";
import { h, hush, s, say } from "./dom.js";
import { show } from "./numbers.js";
import { set, step } from "./state.js";
import { atX, bandOf, END, laneWidth, LEFT, onsetInterval, plotWidth, X } from "./time.js";

/** Cursor of each lane, by its host. */
const cursors = new Map();

/**
 * Draw a lane.
 * @param {HTMLElement} host the element it stands in
 * @param {number} height in pixels
 * @param {string} label for those who do not see it
 * @param {(svg: any) => void} draw adds the marks
 * @param {boolean} map whether colours lie beneath, which a band would tint
 */
export function lane(host, height, label, draw, map = false) {
  const svg = s("svg", { width: laneWidth(), height, role: "img", "aria-label": label });
  host.replaceChildren(svg);
  const rose = onsetInterval();
  if (rose) svg.append(...(map ? edgesOf(rose, height) : [bandOf(rose, height)]));
  if (D.run.state === "running" && END > D.steps[LAST]) {
    const x = X(D.steps[LAST]);
    svg.append(
      s("rect", {
        class: "future",
        x,
        y: 0,
        width: Math.max(0, LEFT + plotWidth() - x),
        height,
        fill: "url(#future)",
      }),
    );
  }
  draw(svg);
  const cursor = s("line", { class: "cursor", y1: 0, y2: height });
  svg.append(cursor);
  cursors.set(host, cursor);
}

const edgesOf = (rose, height) =>
  rose.map(at => s("line", { class: "onset-edge", x1: X(at), x2: X(at), y1: 0, y2: height }));

/**
 * The pointer moves the cursor when pressed, and asks for words when not.
 * @param {HTMLElement} host
 * @param {(i: number, y: number) => Words} words
 */
export function listen(host, words) {
  const place = event => event.clientX - host.getBoundingClientRect().left;
  host.addEventListener("pointerdown", event => {
    if (/** @type {Element} */ (event.target).closest(".link, button, select, .empty")) return;
    host.setPointerCapture(event.pointerId);
    set({ i: atX(place(event)) });
  });
  host.addEventListener("pointermove", event => {
    const i = atX(place(event));
    if (event.buttons) set({ i });
    else say(event, words(i, event.clientY - host.getBoundingClientRect().top));
  });
  host.addEventListener("pointerleave", hush);
}

/** Put every cursor at the chosen step. */
export function moveCursors() {
  const x = X(step());
  for (const [host, cursor] of cursors) {
    if (!cursor.isConnected) {
      cursors.delete(host);
      continue;
    }
    cursor.setAttribute("x1", x);
    cursor.setAttribute("x2", x);
  }
}

// ---------- marks

const across = (kind, y) => s("line", { class: kind, x1: LEFT, x2: LEFT + plotWidth(), y1: y, y2: y });

/** A dashed line through the plot, such as chance; returns the label for its end. */
export function level(svg, y, text, kind = "chance") {
  svg.append(across(kind, y));
  return { y, text, fill: "var(--soft)", plain: true };
}

/** Whatever the size of a number, it fits beside the axis. */
const tickText = v => (Math.abs(v) < 1e7 ? String(v) : v.toExponential()).replaceAll("-", "−");

/** Horizontal grid lines with their values. */
export function yAxis(svg, values, Y) {
  for (const v of values) {
    svg.append(across("grid", Y(v)));
    svg.append(s("text", { x: LEFT - 8, y: Y(v) + 4, "text-anchor": "end" }, tickText(v)));
  }
}

/** A curve over a block's own steps; an undefined value leaves a gap, a lone one is a dot. */
export function curve(svg, block, value, Y, style) {
  let path = "";
  let drawn = false;
  const defined = k => Number.isFinite(value(k));
  block.at.forEach((stepNumber, k) => {
    if (!defined(k)) {
      drawn = false;
      return;
    }
    const x = X(stepNumber);
    const y = Y(value(k));
    if (!drawn && !(k + 1 < block.at.length && defined(k + 1)))
      svg.append(s("circle", { class: "dot", cx: x, cy: y, r: 2.6, fill: style.stroke }));
    path += `${drawn ? "L" : "M"}${x.toFixed(1)},${y.toFixed(1)}`;
    drawn = true;
  });
  svg.append(s("path", { d: path, fill: "none", "stroke-linejoin": "round", ...style }));
}

/** A curve of a block's own values; returns the label for its end. */
export function labelledCurve(svg, one, Y, style, text, fill = style.stroke) {
  const value = k => one.values[k];
  curve(svg, one, value, Y, style);
  return { y: Y(lastDefined(one.at.length, value)), text, fill };
}

/** The area between two curves. */
export function area(svg, block, low, high, Y, style) {
  const point = (k, value) => `${X(block.at[k]).toFixed(1)},${Y(value(k)).toFixed(1)}`;
  const kept = block.at.map((_, k) => k).filter(k => Number.isFinite(low(k)) && Number.isFinite(high(k)));
  const back = [...kept].reverse();
  if (kept.length < 2) return;
  svg.append(
    s("path", {
      d: `M${kept.map(k => point(k, high)).join("L")}L${back.map(k => point(k, low)).join("L")}Z`,
      ...style,
    }),
  );
}

const LINE = 13; // height of a label

/**
 * Labels at the ends of lines, pushed apart; those that find no room are left out. A line that is
 * nowhere defined is named at the bottom.
 * @param {any} svg
 * @param {EndLabel[]} labels the most important first
 * @param {number} height of the lane
 */
export function endLabels(svg, labels, height) {
  const room = Math.floor(height / LINE);
  const kept = labels
    .map(label =>
      Number.isFinite(label.y) ? label : { ...label, y: height, text: `${show(label.text, 13)} —` },
    )
    .slice(0, room)
    .sort((a, b) => a.y - b.y);
  kept.forEach((label, k) => {
    if (k) label.y = Math.max(label.y, kept[k - 1].y + LINE);
  });
  let limit = height - 2;
  for (let k = kept.length - 1; k >= 0; k--, limit -= LINE) kept[k].y = Math.min(kept[k].y, limit);
  for (const { y, text, fill, plain, pick } of kept) {
    svg.append(
      s(
        "text",
        {
          class: `${plain ? "" : "label"} ${pick ? "link" : ""}`,
          x: LEFT + plotWidth() + 8,
          y: y + 4,
          style: `fill:${fill}`,
          ...(pick ? { onclick: pick } : {}),
        },
        text,
      ),
    );
  }
}

/** A scale: its low end, its colours, its high end. */
export const scaleOf = (low, gradient, high) =>
  h(
    "span",
    { class: "scale" },
    low,
    " ",
    h("span", { class: "ramp", style: `background:${gradient}` }),
    ` ${high}`,
  );
