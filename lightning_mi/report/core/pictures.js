// Attributions over images in grey; one scale for the run, blue supports and orange opposes.

import { colour, HUES, isDark, oklch, plusMinus, ramp } from "./colour.js";
import { h, hint } from "./dom.js";
import { show, whole } from "./numbers.js";
import { paintPixels } from "./pixels.js";

const targetOf = (block, e) => (block.targets[e] == null ? "" : ` of “${show(block.targets[e])}”`);

/** What has no sign has a hue of its own over an image, and ink on paper. */
const pictureRole = block => (block.signed ? "plus" : block.inputs ? "size" : "ink");

/** Lightness of the image beneath: colours must stay readable over it. */
const beneath = grey => (isDark() ? 0.28 + 0.42 * grey : 0.55 + 0.42 * grey);

/** The colour of a value over a pixel: mixed in OKLab, zero is the image itself. */
function over(block, value, grey) {
  const amount = Math.max(-1, Math.min(1, value / block.cap));
  if (!block.inputs) return block.signed ? plusMinus(amount) : colour("ink", amount);
  const [hue, chroma] = HUES[amount < 0 ? "minus" : pictureRole(block)];
  const t = Math.abs(amount);
  return oklch(beneath(grey) * (1 - t) + (isDark() ? 0.72 : 0.5) * t, chroma * 1.15 * t, hue);
}

function paintPicture(canvas, block, k, e) {
  const size = block.width * block.height;
  const first = (k * block.examples + e) * size;
  paintPixels(
    canvas,
    j => block.values[first + j],
    (v, j) => over(block, v, block.inputs ? block.inputs[e * size + j] / 255 : 0),
  );
}

/** One picture; `k` gives the step it shows. It repaints itself through `refresh`. */
export function pictureOf(block, e, k) {
  const canvas = h("canvas", { width: block.width, height: block.height, role: "img" });
  hint(canvas, () => [
    block.title,
    `${targetOf(block, e).trim()} at step ${whole(block.at[k()])}`,
    "channels summed",
  ]);
  canvas.refresh = () => {
    canvas.setAttribute("aria-label", `${block.title}${targetOf(block, e)} at step ${block.at[k()]}`);
    paintPicture(canvas, block, k(), e);
  };
  canvas.refresh();
  return canvas;
}

/** The image itself. */
function inputOf(block, e) {
  const canvas = h("canvas", {
    width: block.width,
    height: block.height,
    role: "img",
    "aria-label": `input ${e}`,
  });
  const size = block.width * block.height;
  paintPixels(
    canvas,
    j => block.inputs[e * size + j],
    grey => [grey, grey, grey],
  );
  return canvas;
}

/** A grid with a head over each column, and in its first column the inputs. */
export function gridOf(block, count, columns) {
  const first = block.inputs ? [{ head: "input", cell: e => inputOf(block, e) }] : [];
  const all = [...first, ...columns];
  const grid = h("div", {
    class: "grid-of",
    style: `grid-template-columns:repeat(${all.length}, minmax(0, 1fr))`,
  });
  grid.append(...all.map(one => h("div", {}, one.head)));
  for (let e = 0; e < count; e++) grid.append(...all.map(one => one.cell(e)));
  return grid;
}

/** The scale of a block; `brief` leaves the words out. */
export function pictureScale(block, brief = false) {
  const cap = String(+block.cap.toPrecision(2));
  const says = word => (brief ? "" : ` ${word}`);
  const unit = block.unit ? ` ${block.unit}` : "";
  const low = block.signed ? `−${cap}${says("opposes")}` : "0";
  const high = block.signed ? `+${cap}${unit}${says("supports")}` : `${cap}${unit}`;
  const at = t =>
    block.inputs ? over(block, t * block.cap, 1) : block.signed ? plusMinus(t) : colour("ink", t);
  return h(
    "div",
    { class: "scale" },
    low,
    h("span", { class: "ramp", style: `background:${ramp(at, block.signed ? -1 : 0)}` }),
    high,
  );
}
