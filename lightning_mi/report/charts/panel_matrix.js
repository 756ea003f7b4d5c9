// A matrix at this step: the last two axes of a panel; a list chooses the rest.

import { readable } from "../core/colour.js";
import { h, hint } from "../core/dom.js";
import { show, significant, whole } from "../core/numbers.js";
import {
  choose,
  entryAt,
  labelOf,
  panelShade,
  panelWords,
  placeLabel,
  placeOf,
  sizeOf,
} from "../core/panels.js";
import { paintPixels, pixelUnder } from "../core/pixels.js";
import { LETTERS } from "../core/rows.js";
import { S, at } from "../core/state.js";
import { plotWidth } from "../core/time.js";

const NAMED = 32; // up to so many rows or columns have names
const NUMBERED = 26; // pixels of a cell that has room for its number

const sliceKey = block => block.name;

/** Which of the leading entries is shown: all axes but the last two, counted as one. */
function sliceOf(block) {
  const [rows, columns] = block.shape.slice(-2);
  const slices = sizeOf(block) / (rows * columns);
  return {
    rows,
    columns,
    slices,
    chosen: Math.min(slices - 1, Math.max(0, Math.floor(Number(S.panel[sliceKey(block)]) || 0))),
  };
}

/** Width and height of a cell: as large as there is room for. */
function cellOf(rows, columns) {
  const width = Math.max(1, Math.min(44, plotWidth() / columns));
  return { width, height: Math.max(1, Math.min(26, width, 420 / rows)) };
}

function drawMatrix(host, block) {
  const { rows, columns } = sliceOf(block);
  const { width, height } = cellOf(rows, columns);
  const [rowAxis, columnAxis] = block.axes.slice(-2);
  const style = `width:${width * columns}px;height:${height * rows}px`;
  const canvas = h("canvas", { width: columns, height: rows, role: "img", style });
  const under = event => sliceOf(block).chosen * rows * columns + pixelUnder(canvas, event);
  hint(canvas, event => panelWords(block, at(block), under(event)));
  const body = h("div", { class: "matrix-body" }, canvas, h("div", { class: "matrix-numbers" }));
  const names = h("div", { class: "matrix-names" }, rowNamesOf(block, rowAxis, rows, height));
  host.replaceChildren(headOf(block), h("div", { class: "matrix" }, names, body));
  if (columns <= NAMED && width >= 12) host.append(columnNames(block, columnAxis, columns, width));
}

/** The step, what the rows and columns are, and a list for the rest. */
function headOf(block) {
  const { rows, columns, slices } = sliceOf(block);
  const [rowAxis, columnAxis] = block.axes.slice(-2).map(axis => axis.replaceAll("_", " "));
  const words = ` rows ${rowAxis}, columns ${columnAxis}`;
  const list = slices > 1 ? picker(block, slices, rows * columns) : null;
  return h("div", { class: "sub matrix-head" }, h("b", { class: "matrix-step" }), words, list);
}

/** Names left of the rows, where there is room. */
function rowNamesOf(block, axis, rows, height) {
  if (rows > NAMED || height < 10) return [];
  const style = `height:${height}px;line-height:${height}px`;
  return Array.from({ length: rows }, (_, r) =>
    h("span", { style, title: labelOf(block, axis, r) }, show(placeLabel(block, axis, r), LETTERS)),
  );
}

/** Names under the columns, upright where they are short. */
function columnNames(block, axis, columns, width) {
  const texts = Array.from({ length: columns }, (_, c) => placeLabel(block, axis, c));
  const fits = texts.every(text => [...text].length * 6.5 < width);
  return h(
    "div",
    { class: `matrix-columns${fits ? "" : " tilted"}` },
    texts.map(text =>
      h("span", { style: `width:${width}px`, title: text }, h("i", {}, show(text, fits ? 9 : 14))),
    ),
  );
}

function picker(block, slices, each) {
  const axes = block.axes.slice(0, -2);
  const names = Array.from({ length: slices }, (_, n) => nameOfSlice(block, axes, n * each));
  const select = h(
    "select",
    {
      "aria-label": axes.join(", ").replaceAll("_", " "),
      onchange: event => choose(sliceKey(block), event.target.value),
    },
    names.map((name, n) =>
      h("option", { value: n, selected: n === sliceOf(block).chosen ? "" : null }, name),
    ),
  );
  return h("span", { class: "picker" }, " ", select);
}

const nameOfSlice = (block, axes, entry) => {
  const place = placeOf(block, entry);
  return axes.map((axis, a) => show(labelOf(block, axis, place[a]))).join(" · ");
};

function paintMatrix(host, block) {
  const { rows, columns, chosen } = sliceOf(block);
  const k = at(block);
  const first = chosen * rows * columns;
  const canvas = host.querySelector("canvas");
  paintPixels(
    canvas,
    j => entryAt(block, k, first + j),
    v => panelShade(block, v),
  );
  canvas.setAttribute("aria-label", `${block.title} at step ${block.at[k]}`);
  host.querySelector(".matrix-step").textContent = `at step ${whole(block.at[k])}`;
  writeNumbers(host.querySelector(".matrix-numbers"), canvas, block, { rows, columns, first, k });
}

/** The numbers themselves, where a cell has room for one. */
function writeNumbers(host, canvas, block, { rows, columns, first, k }) {
  const width = parseFloat(canvas.style.width) / columns;
  const height = parseFloat(canvas.style.height) / rows;
  if (width < NUMBERED || height < 16) {
    host.replaceChildren();
    return;
  }
  host.replaceChildren(
    ...Array.from({ length: rows * columns }, (_, j) => {
      const v = entryAt(block, k, first + j);
      const ink = Number.isFinite(v) ? readable(panelShade(block, v)) : "var(--ink)";
      return h(
        "span",
        {
          style: `left:${((j % columns) + 0.5) * width}px;top:${(Math.floor(j / columns) + 0.5) * height}px;color:${ink}`,
        },
        significant(v, 2).replace(/^(−?)0\./, "$1."),
      );
    }),
  );
}

/** @type {PanelChart} */
export const panelMatrix = {
  name: "matrix",
  fits: block => block.shape.length > 1,
  draw: drawMatrix,
  step: paintMatrix,
};
