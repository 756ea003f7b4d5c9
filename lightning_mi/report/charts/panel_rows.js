// Any axis × steps: the entries farthest from their null, a row each.

import { D, nearest } from "../core/data.js";
import { h } from "../core/dom.js";
import { lane, listen } from "../core/lane.js";
import { show } from "../core/numbers.js";
import {
  byPeak,
  chosenPanel,
  countedBy,
  entryAt,
  entryShort,
  panelShade,
  panelWords,
  sizeOf,
} from "../core/panels.js";
import { LETTERS, nameRows, paintRows, rowHeight } from "../core/rows.js";

const MOST = 16;

/** Entries that have a row, in their own order. */
const shownRows = block =>
  byPeak(block)
    .slice(0, MOST)
    .sort((a, b) => a - b);

function drawRows(host, block) {
  const rows = shownRows(block);
  const height = rowHeight(rows.length) * rows.length;
  const rest = sizeOf(block) - rows.length;
  lane(
    host,
    height,
    `${block.title}, one row an entry, over training steps`,
    svg => {
      nameRows(
        svg,
        rows.map(entry => show(entryShort(block, entry), LETTERS)),
        () => ({ bold: false, mono: true }),
      );
    },
    true,
  );
  paintRows(
    host,
    block,
    rows,
    (k, entry) => entryAt(block, k, entry),
    v => panelShade(block, v),
  );
  if (rest)
    host.append(
      h(
        "div",
        { class: "sub" },
        `the ${rows.length} farthest from ${block.null ? "their null" : "zero"}${countedBy(block)}; ${rest.toLocaleString("en")} more are not shown here`,
      ),
    );
}

function wordsAt(block, i, y) {
  if (!block) return null;
  const rows = shownRows(block);
  const entry = rows[Math.floor(y / rowHeight(rows.length))];
  return entry === undefined ? null : panelWords(block, nearest(block.at, D.steps[i]), entry);
}

/** @type {PanelChart} */
export const panelRows = {
  name: "rows",
  fits: block => block.at.length > 1,
  build: (host, group) => listen(host, (i, y) => wordsAt(chosenPanel(group), i, y)),
  draw: drawRows,
};
