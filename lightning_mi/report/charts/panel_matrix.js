// A matrix at this step: the last two axes of a panel, or its only one as bars; a list chooses the rest.

import { paintPixels, readable } from "../core/colour.js";
import { h, hint } from "../core/dom.js";
import { show, significant, whole } from "../core/numbers.js";
import { choose, entryAt, entryName, labelOf, panelShade, panelWords, placeLabel, placeOf, sizeOf, stepOf } from "../core/panels.js";
import { S } from "../core/state.js";
import { LEFT, plotWidth } from "../core/time.js";

const NAMED = 32;                                 // up to so many rows or columns have names
const NUMBERED = 26;                              // pixels of a cell that has room for its number
const MOST_BARS = 24;

const isLine = block => block.shape.length === 1;
const sliceKey = block => `${block.name}`;

/** Which of the leading entries is shown: all axes but the last two, counted as one. */
function sliceOf(block) {
  const [rows, columns] = block.shape.slice(-2), slices = sizeOf(block) / (rows * columns);
  return { rows, columns, slices, chosen: Math.min(slices - 1, Math.max(0, Math.floor(Number(S.panel[sliceKey(block)]) || 0))) };
}

function drawMatrix(host, block) {
  if (isLine(block)) return drawLine(host, block);
  const { rows, columns, slices } = sliceOf(block), room = plotWidth();
  const width = Math.max(1, Math.min(44, room / columns)), height = Math.max(1, Math.min(26, width, Math.max(11, 420 / rows), 420 / rows));
  const canvas = h("canvas", { width: columns, height: rows, role: "img", style: `width:${width * columns}px;height:${height * rows}px` });
  const under = event => {
    const box = canvas.getBoundingClientRect(), clip = (v, n) => Math.min(n - 1, Math.max(0, Math.floor(v * n)));
    return sliceOf(block).chosen * rows * columns + clip((event.clientY - box.top) / box.height, rows) * columns + clip((event.clientX - box.left) / box.width, columns);
  };
  hint(canvas, event => panelWords(block, stepOf(block), under(event)));
  const [rowAxis, columnAxis] = block.axes.slice(-2);
  const names = rows <= NAMED && height >= 10 ? Array.from({ length: rows }, (_, r) => h("span", { style: `height:${height}px;line-height:${height}px`, title: labelOf(block, rowAxis, r) }, show(placeLabel(block, rowAxis, r), Math.floor((LEFT - 8) / 6.7)))) : [];
  const heads = columns <= NAMED && width >= 12 ? columnNames(block, columnAxis, columns, width) : null;
  host.replaceChildren(
    h("div", { class: "sub matrix-head" }, h("b", { class: "matrix-step" }), ` rows ${rowAxis.replaceAll("_", " ")}, columns ${columnAxis.replaceAll("_", " ")}`, slices > 1 ? picker(block, slices, rows * columns) : null),
    h("div", { class: "matrix" }, h("div", { class: "matrix-names" }, names), h("div", { class: "matrix-body" }, canvas, h("div", { class: "matrix-numbers" }))), heads ?? h("span"));
}

/** Names under the columns, upright where they are short. */
function columnNames(block, axis, columns, width) {
  const texts = Array.from({ length: columns }, (_, c) => placeLabel(block, axis, c)), fits = texts.every(text => [...text].length * 6.5 < width);
  return h("div", { class: `matrix-columns${fits ? "" : " tilted"}` }, texts.map(text => h("span", { style: `width:${width}px`, title: text }, h("i", {}, show(text, fits ? 9 : 14)))));
}

function picker(block, slices, each) {
  const axes = block.axes.slice(0, -2), names = Array.from({ length: slices }, (_, n) => nameOfSlice(block, axes, n * each));
  const select = h("select", { "aria-label": axes.join(", ").replaceAll("_", " "), onchange: event => choose(sliceKey(block), event.target.value) },
    names.map((name, n) => h("option", { value: n, selected: n === sliceOf(block).chosen ? "" : null }, name)));
  return h("span", { class: "picker" }, " ", select);
}

const nameOfSlice = (block, axes, entry) => {
  const place = placeOf(block, entry);
  return axes.map((axis, a) => show(labelOf(block, axis, place[a]))).join(" · ");
};

function paintMatrix(host, block) {
  if (isLine(block)) { drawLine(host, block); return; }
  const { rows, columns, chosen } = sliceOf(block), k = stepOf(block), first = chosen * rows * columns;
  const canvas = host.querySelector("canvas");
  paintPixels(canvas, j => entryAt(block, k, first + j), v => panelShade(block, v));
  canvas.setAttribute("aria-label", `${block.title} at step ${block.at[k]}`);
  host.querySelector(".matrix-step").textContent = `at step ${whole(block.at[k])}`;
  writeNumbers(host.querySelector(".matrix-numbers"), canvas, block, { rows, columns, first, k });
}

/** The numbers themselves, where a cell has room for one. */
function writeNumbers(host, canvas, block, { rows, columns, first, k }) {
  const width = parseFloat(canvas.style.width) / columns, height = parseFloat(canvas.style.height) / rows;
  if (width < NUMBERED || height < 16) { host.replaceChildren(); return; }
  host.replaceChildren(...Array.from({ length: rows * columns }, (_, j) => {
    const v = entryAt(block, k, first + j), ink = Number.isFinite(v) ? readable(panelShade(block, v)) : "var(--ink)";
    return h("span", { style: `left:${(j % columns + .5) * width}px;top:${(Math.floor(j / columns) + .5) * height}px;color:${ink}` }, significant(v, 2).replace(/^(−?)0\./, "$1."));
  }));
}

/** A panel of one axis: a bar each, the largest first. */
function drawLine(host, block) {
  const k = stepOf(block), size = sizeOf(block), all = Array.from({ length: size }, (_, q) => q), off = q => Math.abs(entryAt(block, k, q) - block.null) || 0;
  const order = size > MOST_BARS ? all.sort((a, b) => off(b) - off(a)).slice(0, MOST_BARS) : all;
  host.replaceChildren(h("div", { class: "sub matrix-head" }, h("b", { class: "matrix-step" }, `at step ${whole(block.at[k])}`), size > MOST_BARS ? ` the ${MOST_BARS} largest of ${whole(size)}` : ""),
    h("div", { class: "bars wide" }, order.map(q => barOfEntry(block, k, q))));
}

function barOfEntry(block, k, q) {
  const v = entryAt(block, k, q), amount = Math.max(-1, Math.min(1, (v - block.null) / block.cap)), share = Math.abs(amount) * (block.signed ? 50 : 100);
  const left = block.signed && amount < 0 ? 50 - share : block.signed ? 50 : 0, hue = !block.signed ? "--soft" : amount < 0 ? "--minus" : "--plus";
  const bar = Number.isFinite(v) ? h("i", { style: `left:${left}%;width:${share}%;background:var(${hue})` }) : h("i", { class: "undefined" });
  return h("div", { class: "bar-row" }, h("span", { title: entryName(block, q) }, entryName(block, q)), h("div", {}, block.signed ? h("u", {}) : null, bar), h("b", {}, significant(v)));
}

/** @type {PanelChart} */
export const panelMatrix = { name: "matrix", fits: () => true, draw: drawMatrix, step: paintMatrix };
