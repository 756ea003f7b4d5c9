// Heads × steps, under their curves: who took over from whom.

import { D, HEADS, headName, nearest, scoreAt } from "../core/data.js";
import { card } from "../core/card.js";
import { aboveChance, colour, ramp } from "../core/colour.js";
import { $ } from "../core/dom.js";
import { lane, listen, scaleOf } from "../core/lane.js";
import { nameRows, paintRows, rowHeight } from "../core/rows.js";
import { S, chosenScore, set } from "../core/state.js";
import { scoreWords } from "./head_curves.js";

const FEW = 16; // up to so many heads are all shown
const MOST = 40;

/** Which heads have a row, and the words over them. */
function headRows() {
  const score = chosenScore();
  const all = Array.from({ length: HEADS }, (_, j) => j);
  if (HEADS <= FEW) return { rows: all, words: "Every head, one row each" };
  const rising = score.rising.map(one => one.head);
  const rows = rising.slice(0, MOST);
  if (rows.length) {
    const over = rising.length - rows.length;
    const rest = HEADS - rising.length;
    return {
      rows,
      words: `The ${rows.length === 1 ? "head that rises" : `${rows.length} heads that rise, in order of rising`}; ${over ? `${over} more rise, ` : ""}the other ${rest} stay near chance`,
    };
  }
  const last = score.at.length - 1;
  const order = all.sort((a, b) => (scoreAt(score, last, b) || 0) - (scoreAt(score, last, a) || 0));
  return { rows: order.slice(0, 8), words: `No head rises; the 8 highest of ${HEADS}` };
}

function drawHeadRows(host) {
  const score = chosenScore();
  const { rows } = headRows();
  $("head-rows-scale").replaceChildren(
    scaleOf(
      "chance",
      ramp(t => colour(score.name, t)),
      "1",
    ),
  );
  lane(
    host,
    rowHeight(rows.length) * rows.length,
    `${score.title} score, one row a head, over training steps`,
    svg => {
      nameRows(svg, rows.map(headName), place => ({
        bold: rows[place] === S.head,
        pick: () => set({ head: rows[place] }),
      }));
    },
    true,
  );
  paintRows(
    host,
    score,
    rows,
    (k, j) => scoreAt(score, k, j),
    v => aboveChance(score, v),
  );
}

function wordsAt(i, y) {
  const score = chosenScore();
  const { rows } = headRows();
  const place = Math.floor(y / rowHeight(rows.length));
  return place < rows.length ? scoreWords(score, nearest(score.at, D.steps[i]), rows[place]) : null;
}

card({
  id: "head-rows",
  into: "heads",
  head: true,
  order: 21,
  title: "",
  uses: ["head", "score"],
  shown: () => Boolean(D.scores),
  sub: () =>
    `${headRows().words}${D.runs ? ", of run A" : ""}${chosenScore().thinned ? `; every ${chosenScore().thinned} measurements` : ""}`,
  build: host => listen(host, wordsAt),
  draw: drawHeadRows,
});
