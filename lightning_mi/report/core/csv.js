// Copy the numbers of a chart.

import { h } from "./dom.js";
import { csvOf } from "./card.js";

function cell(value) {
  const text =
    value == null || Number.isNaN(value)
      ? ""
      : typeof value === "number"
        ? String(+value.toPrecision(6))
        : String(value);
  return /[",\n\r]/.test(text) ? `"${text.replace(/"/g, '""')}"` : text;
}

/** A table as CSV: a head, then rows of values; undefined values are empty. */
export const csvLines = (head, rows) => [head, ...rows.map(row => row.map(cell).join(","))].join("\n") + "\n";

/** Rows for every step of a block: `rowsAt(k)` gives those of the k-th, without the step. */
export const overSteps = (block, rowsAt) =>
  block.at.flatMap((stepNumber, k) => rowsAt(k).map(row => [stepNumber, ...row]));

/** Named curves as CSV. */
export const csvSeries = list =>
  csvLines(
    "step,series,value",
    list.flatMap(one => overSteps(one, k => [[one.name, one.values[k]]])),
  );

/** Copy, or offer a file where the clipboard is closed to us. */
async function copyCsv(button) {
  const name = button.dataset.csv;
  const text = csvOf(name);
  try {
    await navigator.clipboard.writeText(text);
    button.textContent = "copied";
  } catch {
    h("a", {
      href: URL.createObjectURL(new Blob([text], { type: "text/csv" })),
      download: `${name}.csv`,
    }).click();
    button.textContent = "saved";
  }
  setTimeout(() => {
    button.textContent = "copy CSV";
  }, 1200);
}

/** Make every "copy CSV" work. */
export function listenForCopies() {
  document
    .querySelectorAll("[data-csv]")
    .forEach(button => button.addEventListener("click", () => copyCsv(button)));
}
