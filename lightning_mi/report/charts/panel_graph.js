// Edges at this step: a graph from the inputs at the bottom to the outputs on top, and their list.
// It fits a panel over (writer, reader), or one over edges whose names read "a->b".

import { h, hint, s } from "../core/dom.js";
import { significant, whole } from "../core/numbers.js";
import { entryAt, entryName, labelOf, panelWords, placeOf, sizeOf } from "../core/panels.js";
import { at } from "../core/state.js";

const MOST = 24; // edges drawn, the largest
const LISTED = 10;
const ROW = 46;
const BOX = 54; // height of a layer, width of a node

const isPair = block => block.axes.join() === "writer,reader";
const isList = block =>
  block.axes.join() === "edge" && (block.labels.edge?.every(name => name.split("->").length === 2) ?? false);

/** Writer and reader of an entry. */
function endsOf(block, entry) {
  const place = placeOf(block, entry);
  if (isPair(block)) return [labelOf(block, "writer", place[0]), labelOf(block, "reader", place[1])];
  return block.labels.edge[entry].split("->");
}

/** The node that an input belongs to: L1H0.k is read by L1H0; positions are left out. */
const ownerOf = name => name.replace(/@.*$/, "").replace(/\.[qkv]$/, "");

/** How high a node stands: its layer, MLPs above heads; what only reads is on top, what only writes at the bottom. */
function heightOf(name, reads, writes) {
  const layer = /(\d+)/.exec(name);
  if (!writes.has(name) && !layer) return Infinity;
  if (!layer || (!reads.has(name) && !/\d/.test(name))) return -1;
  return 2 * Number(layer[1]) + (/mlp|^m\d/i.test(name) ? 1 : 0);
}

function strongest(block, k) {
  const known = Array.from({ length: sizeOf(block) }, (_, entry) => entry).filter(entry =>
    entryAt(block, k, entry),
  );
  return known.sort((a, b) => Math.abs(entryAt(block, k, b)) - Math.abs(entryAt(block, k, a))).slice(0, MOST);
}

/** Place of every node: rows by height, side by side within one. */
function placesOf(pairs, wide) {
  const writes = new Set(pairs.map(([a]) => a));
  const reads = new Set(pairs.map(([, b]) => b));
  const rows = new Map();
  for (const name of new Set(pairs.flat())) {
    const level = heightOf(name, reads, writes);
    rows.set(level, [...(rows.get(level) ?? []), name]);
  }
  const levels = [...rows.keys()].sort((a, b) => b - a);
  const found = new Map();
  levels.forEach((level, row) => {
    const names = rows.get(level).sort((a, b) => a.localeCompare(b, "en", { numeric: true }));
    names.forEach((name, n) =>
      found.set(name, { x: (wide * (n + 1)) / (names.length + 1), y: 18 + row * ROW }),
    );
  });
  return { found, height: 36 + (levels.length - 1) * ROW };
}

function drawGraph(host, block) {
  const k = at(block);
  const edges = strongest(block, k);
  const pairs = edges.map(entry => endsOf(block, entry).map(ownerOf));
  if (!edges.length) {
    host.replaceChildren(h("div", { class: "empty" }, `no edge at step ${whole(block.at[k])}`));
    return;
  }
  const wide = Math.max(320, host.clientWidth * 0.6);
  const { found, height } = placesOf(pairs, wide);
  const largest = Math.abs(entryAt(block, k, edges[0])) || 1;
  const lines = edges
    .map((entry, n) => edgeLine(block, k, entry, found.get(pairs[n][0]), found.get(pairs[n][1]), largest))
    .reverse();
  const nodes = [...found].map(([name, { x, y }]) => [
    s("rect", { class: "node", x: x - BOX / 2, y: y - 10, width: BOX, height: 20, rx: 6 }),
    s("text", { x, y: y + 4, "text-anchor": "middle", style: "fill:var(--ink)" }, name),
  ]);
  const svg = s(
    "svg",
    {
      viewBox: `0 0 ${wide} ${height}`,
      role: "img",
      class: "graph",
      "aria-label": `${block.title} at step ${block.at[k]}: the ${edges.length} strongest edges`,
    },
    lines,
    nodes,
  );
  host.replaceChildren(h("div", { class: "graph-and-list" }, svg, listOf(block, k, edges, largest)));
}

/** Width is size; blue and orange are signs, and what is negative is dashed too. */
function edgeLine(block, k, entry, a, b, largest) {
  const v = entryAt(block, k, entry);
  const middle = (a.y + b.y) / 2;
  const path =
    a.y === b.y
      ? `M${a.x},${a.y}Q${(a.x + b.x) / 2},${a.y - ROW / 2} ${b.x},${b.y}`
      : `M${a.x},${a.y - 10}C${a.x},${middle} ${b.x},${middle} ${b.x},${b.y + 10}`;
  const line = s("path", {
    d: path,
    fill: "none",
    stroke: `var(${v < 0 ? "--minus" : "--plus"})`,
    "stroke-width": 0.8 + (5 * Math.abs(v)) / largest,
    opacity: 0.35 + (0.6 * Math.abs(v)) / largest,
    ...(v < 0 ? { "stroke-dasharray": "5 3" } : {}),
  });
  return hint(line, () => panelWords(block, k, entry));
}

function listOf(block, k, edges, largest) {
  const rows = edges.slice(0, LISTED).map(entry => {
    const v = entryAt(block, k, entry);
    const length = (100 * Math.abs(v)) / largest;
    return h(
      "tr",
      {},
      h("td", {}, entryName(block, entry).replace("->", " → ")),
      h(
        "td",
        {},
        h("div", {
          class: "length",
          style: `width:${length}%;background:var(${v < 0 ? "--minus" : "--plus"})`,
        }),
      ),
      h("td", {}, significant(v)),
    );
  });
  return h(
    "table",
    { class: "edges" },
    h("caption", {}, `the strongest edges at step ${whole(block.at[k])}`),
    h("tbody", {}, rows),
  );
}

/** @type {PanelChart} */
export const panelGraph = {
  name: "graph",
  fits: block => isPair(block) || isList(block),
  step: drawGraph,
};
