// Which training examples matter: proponents and opponents, images or texts, each token coloured by
// its share.

import { D, TOKENS, answerText } from "../core/data.js";
import { card, withoutHeads } from "../core/card.js";
import { plusMinus, readable, rgb } from "../core/colour.js";
import { csvLines } from "../core/csv.js";
import { h, hint, s } from "../core/dom.js";
import { digitsFor, inText, show, whole, withSign } from "../core/numbers.js";
import { paintPixels } from "../core/pixels.js";

const SIDES = [
  { key: "proponents", title: "Proponents", hue: "--plus", none: "no candidate lowers the loss" },
  { key: "opponents", title: "Opponents", hue: "--minus", none: "no candidate raises the loss" },
];
const FAINT = 0.06; // below this share of the largest no colour

function drawExamples(host) {
  const E = D.examples;
  if (!E) return;
  const longest = Math.max(...[...E.proponents, ...E.opponents].map(e => Math.abs(e.score)), 1e-12);
  host.replaceChildren(
    ...SIDES.map(({ key, title, hue, none }, side) => {
      const rows = E[key].map(e => exampleRow(e, longest, hue));
      return h(
        "div",
        {},
        h("h3", { class: key }, h("span", {}, title), " ", h("span", { class: "sub" }, E.meaning[side])),
        rows.length ? h("table", {}, h("tbody", {}, rows)) : h("div", { class: "empty" }, none),
      );
    }),
  );
}

function subtitle() {
  const E = D.examples;
  const next = answerText();
  const tail = TOKENS.slice(-8).join("");
  if (!E) return "";
  const query = next != null && D.prompt ? `“${show(next)}” after “… ${inText(tail)}”` : "the first query";
  const when =
    E.steps.length > 1 ? `sum over ${E.steps.length} checkpoints (small bars)` : `at step ${whole(E.at)}`;
  const of = E.of ? ` of ${whole(E.of)}` : "";
  return `on the loss of ${query}. ${E.method}, ${whole(E.candidates)} candidates${of}, ${when}${E.unit ? `, ${E.unit}` : ""}${D.runs ? "; run A" : ""}`;
}

function exampleRow(example, longest, hue) {
  const length = Math.max(2, (100 * Math.abs(example.score)) / longest);
  const bar = h("div", { class: "length", style: `width:${length}%;background:var(${hue})` });
  return h(
    "tr",
    {},
    h("td", {}, bar, h("span", {}, withSign(example.score, digitsFor(longest)))),
    h(
      "td",
      {},
      exampleImage(example),
      exampleText(example),
      h("div", { class: "muted" }, [example.name, example.words].filter(Boolean).join(", ")),
    ),
    h("td", {}, smallBars(example.by)),
  );
}

function exampleImage({ image, name }) {
  if (!image) return null;
  const { width, height } = image;
  const canvas = h("canvas", { class: "example", width, height, role: "img", "aria-label": name });
  paintPixels(
    canvas,
    j => image.values[j],
    grey => [grey, grey, grey],
  );
  return canvas;
}

function exampleText(example) {
  const most = Math.max(...example.tokens.map(([, part]) => Math.abs(part ?? 0)), 1e-12);
  const spans = example.tokens.map(([text, part]) => {
    const amount = (part ?? 0) / most;
    const back = plusMinus(amount * 0.7);
    const style = Math.abs(amount) > FAINT ? `background:${rgb(back)};color:${readable(back)}` : null;
    const span = h("span", { style, dir: "auto" }, inText(text));
    return part == null ? span : hint(span, () => shareWords(example.split, text, part));
  });
  if (!spans.length) return example.note ? h("div", { class: "sub" }, example.note) : null;
  return h(
    "div",
    { class: "text", dir: "auto" },
    example.before ? "… " : "",
    ...spans,
    example.after ? " …" : "",
  );
}

function shareWords(split, text, part) {
  const digits = digitsFor(Math.abs(split.score ?? 1) || 1);
  return [
    `“${show(text)}”`,
    `carries ${withSign(part, digits)} of ${withSign(split.score, digits)} at step ${whole(split.step)}`,
    "the shares of all its tokens add up to its score at that step",
  ];
}

/** The score by checkpoint. */
function smallBars(values) {
  const width = 66;
  const height = 26;
  const middle = height / 2;
  const defined = values.filter(v => v != null);
  if (!defined.length) return "";
  const most = Math.max(...defined.map(Math.abs), 1e-12);
  const each = width / values.length;
  const bars = values.map((v, k) =>
    v == null
      ? null
      : s("rect", {
          x: k * each,
          width: Math.max(1, each - 1),
          fill: `var(${v > 0 ? "--plus" : "--minus"})`,
          y: v > 0 ? middle - (v / most) * middle : middle,
          height: Math.max(0.5, (Math.abs(v) / most) * middle),
        }),
  );
  return s(
    "svg",
    {
      width,
      height,
      role: "img",
      "aria-label": `score by checkpoint: ${values.map(v => (v == null ? "—" : withSign(v, digitsFor(most)))).join(", ")}`,
    },
    bars,
    s("line", { class: "axis", x1: 0, x2: width, y1: middle, y2: middle }),
  );
}

const sharesOf = e =>
  (e.tokens.length ? e.tokens : [["", null]]).map(([token, share]) => [
    e.index,
    e.score,
    e.words,
    token,
    share,
  ]);

card({
  id: "examples",
  place: "wide",
  order: 10,
  kind: "sides still",
  title: "Which training examples matter?",
  shown: () => Boolean(D.examples) || !withoutHeads(),
  has: () => Boolean(D.examples),
  missing: () => "No influence was measured. Add InfluenceMonitor() to the Trainer.",
  sub: subtitle,
  csv: () =>
    csvLines(
      "example,score,description,token,share",
      [...(D.examples?.proponents ?? []), ...(D.examples?.opponents ?? [])].flatMap(sharesOf),
    ),
  draw: drawExamples,
});
