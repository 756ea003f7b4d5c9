// Which training examples matter: proponents and opponents, each token coloured by its share.

const SIDES = [
  ["proponents", "Proponents", "--plus"],
  ["opponents", "Opponents", "--minus"],
];

function drawExamples() {
  const E = D.examples, host = $("sides");
  if (!E) return notMeasured(host, "No influence was measured. Add InfluenceMonitor() to the Trainer.");
  $("examples-sub").textContent = exampleWords(E);
  const longest = Math.max(...[...E.proponents, ...E.opponents].map(e => Math.abs(e.score)), 1e-12);
  host.replaceChildren(...SIDES.map(([key, title, hue], side) => {
    const rows = E[key].map(e => exampleRow(e, longest, hue));
    const none = h("div", { class: "empty" }, `no candidate ${key === "proponents" ? "lowers" : "raises"} the loss`);
    return h("div", {}, h("h3", { class: key }, h("span", {}, title), " ", h("span", { class: "sub" }, E.meaning[side])),
      rows.length ? h("table", {}, h("tbody", {}, rows)) : none);
  }));
}

function exampleWords(E) {
  const next = answerText(), tail = TOKENS.slice(-8).join("");
  const query = next != null && D.prompt ? `“${show(next)}” after “… ${inText(tail)}”` : "the first query";
  const when = E.steps.length > 1 ? `sum over ${E.steps.length} checkpoints (small bars)` : `at step ${whole(E.at)}`;
  const of = E.of ? ` of ${whole(E.of)}` : "";
  return `on the loss of ${query}. ${E.method}, ${whole(E.candidates)} candidates${of}, ${when}${E.unit ? `, ${E.unit}` : ""}`;
}

function exampleRow(example, longest, hue) {
  const length = Math.max(2, 100 * Math.abs(example.score) / longest);
  const bar = h("div", { class: "length", style: `width:${length}%;background:var(${hue})` });
  return h("tr", {},
    h("td", {}, bar, h("span", {}, signed(example.score, digitsFor(longest)))),
    h("td", {}, exampleText(example), h("div", { class: "muted" }, [example.name, example.words].filter(Boolean).join(", "))),
    h("td", {}, smallBars(example.by)));
}

/** Enough digits to tell the scores apart, however small they all are. */
const digitsFor = longest => Math.min(8, Math.max(2, 2 - Math.floor(Math.log10(longest))));

function exampleText(example) {
  const most = Math.max(...example.tokens.map(([, part]) => Math.abs(part ?? 0)), 1e-12);
  const spans = example.tokens.map(([text, part]) => {
    const amount = (part ?? 0) / most, back = plusMinus(amount * .7);
    const style = Math.abs(amount) > .06 ? `background:${rgb(back)};color:${readable(back)}` : null;
    const span = h("span", { style }, inText(text));
    return part == null ? span : hint(span, () => shareWords(example.split, text, part));
  });
  if (!spans.length) return example.note ? h("div", { class: "sub" }, example.note) : null;
  return h("div", { class: "text", dir: "auto" }, example.before ? "… " : "", ...spans, example.after ? " …" : "");
}

function shareWords(split, text, part) {
  const digits = digitsFor(Math.abs(split.score ?? 1) || 1);
  return [`“${show(text)}”`, `carries ${signed(part, digits)} of ${signed(split.score, digits)} at step ${whole(split.step)}`,
    "the shares of all its tokens add up to its score at that step"];
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
