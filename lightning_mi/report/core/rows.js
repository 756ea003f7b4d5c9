// Maps over steps, one row each: the ground of heads × steps, tokens × steps and any other axis.

import { h, s } from "./dom.js";
import { isDark, rgb } from "./colour.js";
import { LEFT, X, plotWidth } from "./time.js";

/** So many letters of a name have room left of a row; the whole name is in the tooltip. */
export const LETTERS = Math.floor((LEFT - 8) / 6.7);

/** Height of a row, by how many there are. */
export const rowHeight = count => (count <= 10 ? 18 : count <= 20 ? 14 : 11);

/**
 * Paint rows over steps on a canvas under the lane's marks.
 * @param {HTMLElement} host of the lane
 * @param {{at: number[]}} block whose steps are the columns
 * @param {number[]} rows which entries, top to bottom
 * @param {(k: number, row: number) => number} value at the k-th step
 * @param {(value: number) => number[]} shade its colour
 */
export function paintRows(host, block, rows, value, shade) {
  const scale = devicePixelRatio || 1;
  const width = plotWidth();
  const height = rowHeight(rows.length);
  const canvas = h("canvas", {
    width: Math.round(width * scale),
    height: Math.round(height * scale * rows.length),
    "aria-hidden": "true",
  });
  canvas.style.cssText = `left:${LEFT}px;top:0;width:${width}px;height:${height * rows.length}px`;
  const context = canvas.getContext("2d");
  const hatch = hatched(context);
  const edges = columns(block.at);
  context.scale(scale, scale);
  rows.forEach((row, place) => {
    for (let k = 0; k < block.at.length; k++) {
      const v = value(k, row);
      context.fillStyle = Number.isFinite(v) ? rgb(shade(v)) : hatch;
      context.fillRect(
        edges[k] - LEFT,
        place * height,
        edges[k + 1] - edges[k] + 0.4,
        height - (height > 9 ? 1 : 0),
      );
    }
  });
  host.prepend(canvas);
}

/** Where each step's column begins: half way between neighbours; the first and last end at theirs. */
function columns(steps) {
  const x = steps.map(X);
  const edges = [x[0]];
  for (let k = 1; k < x.length; k++) edges.push((x[k - 1] + x[k]) / 2);
  edges.push(x.length > 1 ? x[x.length - 1] : x[0] + 6);
  return edges;
}

/** Undefined is hatched, never zero. */
function hatched(context) {
  const tile = h("canvas", { width: 6, height: 6 });
  const paint = tile.getContext("2d");
  paint.strokeStyle = isDark() ? "#5a6372" : "#b4b9c2";
  paint.lineWidth = 1.5;
  paint.beginPath();
  for (const shift of [-6, 0, 6]) {
    paint.moveTo(shift, 6);
    paint.lineTo(shift + 6, 0);
  }
  paint.stroke();
  return context.createPattern(tile, "repeat");
}

/** Names left of the rows; `options(place)` gives bold, mono and what a click does. */
export function nameRows(svg, names, options) {
  const height = rowHeight(names.length);
  names.forEach((name, place) => {
    const { bold, pick, mono } = options(place);
    svg.append(
      s(
        "text",
        {
          x: LEFT - 8,
          y: place * height + height / 2 + 4,
          "text-anchor": "end",
          class: pick ? "link" : "",
          style: `${bold ? "font-weight:700;fill:var(--ink);" : ""}${mono ? "font-family:var(--mono);font-size:11px;white-space:pre" : ""}`,
          ...(pick ? { onclick: pick } : {}),
        },
        name,
      ),
    );
  });
}
