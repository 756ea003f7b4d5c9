// Panels that no chart of their own knows: names of their entries, colours, and what is chosen.

import { once } from "./data.js";
import { colour, plusMinus } from "./colour.js";
import { show, significant } from "./numbers.js";
import { S, set } from "./state.js";

/** The panel of a measurement that is drawn. */
export const chosenPanel = group =>
  group.arrays.find(one => one.what === S.panel[group.measurement]) ?? group.arrays[0];

/** Remember a choice of a panel, in the address too. */
export const choose = (key, value) => set({ panel: { ...S.panel, [key]: String(value) } });

/** Number of entries at each step. */
export const sizeOf = block => block.shape.reduce((product, n) => product * n, 1);

/** Index of an entry along each axis. */
export function placeOf(block, entry) {
  const found = [];
  for (let a = block.shape.length - 1; a >= 0; a--) {
    found.unshift(entry % block.shape[a]);
    entry = Math.floor(entry / block.shape[a]);
  }
  return found;
}

/** What the n-th entry along an axis is called. */
export const labelOf = (block, axis, n) => block.labels[axis]?.[n] ?? `${axis.replaceAll("_", " ")} ${n}`;

/** The same where the axis is named beside it: a bare number is enough. */
export const placeLabel = (block, axis, n) => block.labels[axis]?.[n] ?? String(n);

/** The whole name of an entry: L1H3, a→b, or the names along all axes. */
export function entryName(block, entry) {
  const place = placeOf(block, entry);
  const axes = block.axes;
  const layer = axes.indexOf("layer");
  const head = axes.indexOf("head");
  const rest = axes.map((_, a) => a).filter(a => a !== layer && a !== head);
  const bare = layer >= 0 && head >= 0 && !block.labels.head && !block.labels.layer;
  if (axes.join() === "writer,reader")
    return `${labelOf(block, "writer", place[0])} → ${labelOf(block, "reader", place[1])}`;
  const names = bare
    ? [`L${place[layer]}H${place[head]}`, ...rest.map(a => labelOf(block, axes[a], place[a]))]
    : place.map((n, a) => labelOf(block, axes[a], n));
  return names.map(name => show(name, 40)).join(" · ");
}

/** A short name for the margin: what has no name is its place along its axis. */
export function entryShort(block, entry) {
  const numbered = block.axes.every(axis => !block.labels[axis]);
  if (!numbered || entryName(block, entry).length < 9) return entryName(block, entry);
  return placeOf(block, entry).join(", ");
}

/** What such places count. */
export const countedBy = block =>
  entryShort(block, sizeOf(block) - 1) === entryName(block, sizeOf(block) - 1)
    ? ""
    : `, named by ${block.axes.join(", ").replaceAll("_", " ")}`;

export const entryAt = (block, k, entry) => block.values[k * sizeOf(block) + entry];

/** The colour of a value: what lies off the null, on the one scale of the run. */
export function panelShade(block, value) {
  const amount = (value - block.null) / block.cap;
  return block.signed ? plusMinus(amount) : colour("ink", amount);
}

/** The ends of that scale in words. */
export function panelScale(block) {
  const end = significant(block.cap, 2);
  const from = block.null ? `${significant(block.null, 2)} ± ` : block.signed ? "±" : "0 to ";
  return `${from}${end}${block.unit ? ` ${block.unit}` : ""}`;
}

/** Value, unit and meaning of an entry, for a tooltip. */
export const panelWords = (block, k, entry) => [
  entryName(block, entry),
  `${significant(entryAt(block, k, entry))} ${block.unit} at step ${block.at[k].toLocaleString("en")}`,
  block.says || block.title,
];

/** Entries by their largest distance from the null over the run, largest first. */
export const byPeak = once(block => {
  const size = sizeOf(block);
  const peak = new Float32Array(size).fill(-1);
  for (let k = 0, at = 0; k < block.at.length; k++) {
    for (let entry = 0; entry < size; entry++, at++) {
      const far = Math.abs(block.values[at] - block.null);
      if (far > peak[entry]) peak[entry] = far;
    }
  }
  return Array.from(peak.keys()).sort((a, b) => peak[b] - peak[a]);
});

/** Every step at which a panel was measured is drawn, unless there were too many numbers. */
export const thinnedWords = block =>
  block.measured > block.at.length ? `; ${block.at.length} of ${block.measured} steps` : "";
