// Copy the numbers of a chart.

const cell = value => {
  const text = value == null || Number.isNaN(value) ? "" : typeof value === "number" ? String(+value.toPrecision(6)) : String(value);
  return /[",\n\r]/.test(text) ? `"${text.replace(/"/g, '""')}"` : text;
};
const lines = (head, rows) => [head, ...rows.map(row => row.map(cell).join(","))].join("\n") + "\n";
const overSteps = (block, rowsAt) => block.at.flatMap((stepNumber, k) => rowsAt(k).map(row => [stepNumber, ...row]));
const series = list => lines("step,series,value", list.flatMap(one => overSteps(one, k => [[one.name, one.values[k]]])));

const CSV = {
  behaviour: () => series([...(D.behaviour?.series ?? []), ...(D.behaviour?.also ?? [])]),
  agreement: () => series(D.agreement?.series ?? []),
  moved: () => series(D.moved?.series ?? []),
  scores: () => lines("step,score,layer,head,value", (D.scores?.list ?? []).flatMap(score => overSteps(score, k =>
    Array.from({ length: HEADS }, (_, j) => [score.name, Math.floor(j / WIDTH), j % WIDTH, scoreAt(score, k, j)])))),
  inputs: () => lines("step,method,position,token,value", Object.values(lanes).flatMap(block => overSteps(block, k =>
    rowNames(block).map((token, q) => [block.title, q, token, inputAt(block, k, q)])))),
  examples: () => lines("example,score,description,token,share", [...(D.examples?.proponents ?? []), ...(D.examples?.opponents ?? [])]
    .flatMap(e => (e.tokens.length ? e.tokens : [["", null]]).map(([token, share]) => [e.index, e.score, e.words, token, share]))),
};

/** Copy, or offer a file where the clipboard is closed to us. */
async function copyCsv(button) {
  const name = button.dataset.csv, text = CSV[name]();
  try {
    await navigator.clipboard.writeText(text);
    button.textContent = "copied";
  } catch {
    h("a", { href: URL.createObjectURL(new Blob([text], { type: "text/csv" })), download: `${name}.csv` }).click();
    button.textContent = "saved";
  }
  setTimeout(() => { button.textContent = "copy CSV"; }, 1200);
}

document.querySelectorAll("[data-csv]").forEach(button => button.addEventListener("click", () => copyCsv(button)));
