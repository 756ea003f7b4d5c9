// What did it look at? Tokens of the prompt, or features of a table, × steps.

import { D, TOKENS, inputAt, nearest } from "../core/data.js";
import { card } from "../core/card.js";
import { csvLines, overSteps } from "../core/csv.js";
import { bySize, inputNote, inputScale, inputShade, inputWords, rowNames } from "../core/inputs.js";
import { lane, listen } from "../core/lane.js";
import { show, whole } from "../core/numbers.js";
import { nameRows, paintRows, rowHeight } from "../core/rows.js";
import { S, methodTitle, methods, set } from "../core/state.js";

const FEW = 12; // so many rows are shown unless all are asked for

/** What is drawn as rows over steps, by method. */
const lanes = { ...D.tables, ...D.inputs };

/** The rows with the largest values, in their own order; or all of them. */
function tokenRows(block) {
  const all = rowNames(block).map((_, q) => q);
  if (S.all || all.length <= FEW) return all;
  return bySize(block)
    .slice(0, FEW)
    .sort((a, b) => a - b);
}

/** Why there is no map of tokens. */
function unseen() {
  const found = D.undrawn
    .filter(name => name.endsWith("/values"))
    .map(name => name.split("/")[0].replaceAll("_", " "));
  return found.length
    ? `Measured, but not of tokens: ${found.join(" and ")}. Look at them in the loggers' pictures and in the run folder.`
    : "No attributions were recorded. Add SaliencyMonitor() or IntegratedGradientsMonitor() to the Trainer.";
}

function subtitle() {
  const block = lanes[S.method];
  if (!block) return pictureWords();
  const source = block.names || D.prompt?.source == null ? "" : ", ◂ the one to copy";
  const what = block.names ? `a feature, mean of ${block.n}` : "a token of the prompt";
  return `Each row ${what}${source}; ${block.unit}, one scale for the whole run: ${inputScale(block)}${D.runs ? "; run A" : ""}`;
}

function pictureWords() {
  const signs = D.pictures[S.method]?.signed ? " Blue supports the target, orange opposes it." : "";
  return D.pictures[S.method]
    ? `Each row an image, each column a step; channels summed, one scale for the whole run.${signs}`
    : "";
}

function drawTokenRows(host) {
  const block = lanes[S.method];
  if (!block) {
    host.replaceChildren();
    return;
  } // film.js draws these below
  const rows = tokenRows(block);
  const isSource = q => !block.names && q === D.prompt?.source;
  lane(
    host,
    rowHeight(rows.length) * rows.length,
    `${block.title} of each ${block.names ? "feature" : "token"} over training steps`,
    svg => {
      nameRows(
        svg,
        rows.map(q => show(rowNames(block)[q], block.names ? 17 : 8) + (isSource(q) ? " ◂" : "")),
        place => ({
          bold: isSource(rows[place]) || rows[place] === S.token,
          mono: true,
          pick: block.names ? null : () => set({ token: S.token === rows[place] ? -1 : rows[place] }),
        }),
      );
    },
    true,
  );
  paintRows(host, block, rows, (k, q) => inputAt(block, k, q), inputShade(block));
}

function wordsAt(i, y) {
  const block = lanes[S.method];
  if (!block) return null;
  const rows = tokenRows(block);
  const q = rows[Math.floor(y / rowHeight(rows.length))];
  const k = nearest(block.at, D.steps[i]);
  if (q == null) return null;
  const name = block.names ? block.names[q] : `“${show(TOKENS[q])}” at position ${q}`;
  return [name, `${inputWords(block, k, q)} at step ${whole(block.at[k])}`, inputNote(block, k)];
}

const rowsOf = (block, k) => rowNames(block).map((token, q) => [block.title, q, token, inputAt(block, k, q)]);
const manyRows = () => Object.values(lanes).some(block => rowNames(block).length > FEW);

card({
  id: "looked",
  place: "left",
  order: 30,
  title: "What did it look at?",
  uses: ["method", "all", "token"],
  has: () => methods.length > 0,
  missing: unseen,
  sub: subtitle,
  tabs: () => [
    ...methods.map(name => ["method", name, methodTitle(name)]),
    ...(manyRows() ? [["all", 1, "all rows", 0]] : []),
  ],
  tabsName: "Method",
  csv: Object.keys(lanes).length
    ? () =>
        csvLines(
          "step,method,position,token,value",
          Object.values(lanes).flatMap(block => overSteps(block, k => rowsOf(block, k))),
        )
    : undefined,
  build: host => listen(host, wordsAt),
  draw: drawTokenRows,
});
