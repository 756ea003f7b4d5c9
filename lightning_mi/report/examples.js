// Which training examples matter: proponents and opponents, each token coloured by its share.

const SIDES = [
  ["proponents", "Proponents", "removing them would raise the loss", "--plus"],
  ["opponents", "Opponents", "removing them would lower it", "--minus"],
];

function drawExamples() {
  const E = D.examples, host = $("sides");
  if (!E) return notMeasured(host, "No influence was measured. Add InfluenceMonitor() to the Trainer.");
  $("examples-sub").textContent = exampleWords(E);
  const longest = Math.max(...[...E.proponents, ...E.opponents].map(e => Math.abs(e.score)), 1e-12);
  host.replaceChildren(...SIDES.map(([key, title, meaning, hue]) => {
    const rows = E[key].map(e => exampleRow(e, longest, hue));
    const none = h("div", { class: "empty" }, `no candidate ${key === "proponents" ? "lowers" : "raises"} the loss`);
    return h("div", {}, h("h3", { class: key }, h("span", {}, title), " ", h("span", { class: "sub" }, meaning)),
      rows.length ? h("table", {}, h("tbody", {}, rows)) : none);
  }));
}

function exampleWords(E) {
  const next = answerText(), tail = TOKENS.slice(-8).join("");
  const query = E.query ?? (next != null && D.prompt ? `loss of “${show(next)}” after “… ${inText(tail)}”` : "loss of the first query");
  const when = E.summed ? `sum over ${E.steps.length || "all"} checkpoints (small bars)` : `at step ${whole(E.at)}`;
  return `on the ${query}. ${E.method}, ${whole(E.candidates)} candidates, ${when}${E.unit ? `, ${E.unit}` : ""}`;
}

function exampleRow(example, longest, hue) {
  const length = Math.max(2, 100 * Math.abs(example.score) / longest);
  const bar = h("div", { class: "length", style: `width:${length}%;background:var(${hue})` });
  return h("tr", {},
    h("td", {}, bar, h("span", {}, signed(example.score, digitsFor(longest)))),
    h("td", {}, exampleText(example), h("div", { class: "muted" }, example.words)),
    h("td", {}, smallBars(example.by)));
}

/** Enough digits to tell the scores apart, however small they all are. */
const digitsFor = longest => Math.min(8, Math.max(2, 2 - Math.floor(Math.log10(longest))));

function exampleText(example) {
  const most = Math.max(...example.tokens.map(([, share]) => Math.abs(share ?? 0)), 1e-12);
  const digits = digitsFor(Math.abs(example.score));
  const words = example.tokens.map(([text, share]) => {
    const amount = (share ?? 0) / most, back = plusMinus(amount * .7);
    const style = Math.abs(amount) > .06 ? `background:${rgb(back)};color:${readable(back)}` : null;
    return hint(h("span", { style }, inText(text)), () => [
      `“${show(text)}”`, `carries ${signed(share ?? NaN, digits)} of ${signed(example.score, digits)}`, "shares of all tokens add up to the score",
    ]);
  });
  return h("div", { class: "text", dir: "auto" }, example.before ? "… " : "", ...words, example.after ? " …" : "");
}

/** The score by checkpoint. */
function smallBars(values) {
  const width = 66, height = 26, middle = height / 2, defined = values.filter(v => v != null);
  if (!defined.length) return "";
  const most = Math.max(...defined.map(Math.abs), 1e-12), each = width / values.length;
  const bars = values.map((v, k) => v == null ? null : s("rect", {
    x: k * each, width: Math.max(1, each - 1), fill: `var(${v > 0 ? "--plus" : "--minus"})`,
    y: v > 0 ? middle - v / most * middle : middle, height: Math.max(.5, Math.abs(v) / most * middle),
  }));
  return s("svg", { width, height, role: "img", "aria-label": "score by checkpoint" }, bars, s("line", { class: "axis", x1: 0, x2: width, y1: middle, y2: middle }));
}
