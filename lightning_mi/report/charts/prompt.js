// The prompt at this step: under each token its saliency, integrated gradients and the attention
// that the selected head pays it from the last token.

import { D, TOKENS, answerText, headName, inputAt } from "../core/data.js";
import { card, withoutHeads } from "../core/card.js";
import { HATCH, colour, plusMinus, ramp, rgb } from "../core/colour.js";
import { $, h, hint } from "../core/dom.js";
import { inputScale, inputShade, inputWords } from "../core/inputs.js";
import { fmt, show } from "../core/numbers.js";
import { S, at, methods, set, soon } from "../core/state.js";

const MOST = 160; // so many tokens, the last ones
const NAMES = 34; // width of the names of rows, in pixels

/** Short names of the rows. */
const BRIEF = { saliency: "sal", integrated_gradients: "IG", input_x_gradient: "i×g", attn_lrp: "LRP" };

/** @type {{name: string, block: any, value: (k: number, q: number) => number, shade: (v: number) => number[]}[]} */
const rows = Object.entries(D.inputs).map(([name, block]) => ({
  name: BRIEF[name] ?? name.slice(0, 4),
  block,
  value: (k, q) => inputAt(block, k, q),
  shade: inputShade(block),
}));
if (D.attention)
  rows.push({ name: "attn", block: D.attention, value: attentionAt, shade: v => colour("induction", v) });

/** Attention of the selected head; undefined where that head's row was not kept. */
function attentionAt(k, q) {
  const A = D.attention;
  if (!A) return NaN;
  const row = A.heads.indexOf(D.scores ? headName(S.head) : A.heads[0]);
  return row < 0 || q >= A.width ? NaN : A.values[(k * A.heads.length + row) * A.width + q];
}

/** Tokens with what changes under them. */
/** @type {{q: number, cell: HTMLElement, bars: HTMLElement[]}[]} */
let cells = [];
let room = 0; // width for which the lines were broken
const letters = text => 7.55 * [...text].length + 4;

/** Break the tokens into lines by hand, so that each line has the names of its rows. */
function drawPrompt(host) {
  if (room === host.clientWidth && cells.length) return;
  room = host.clientWidth;
  cells = [];
  host.replaceChildren();
  const width = Math.max(80, room - NAMES);
  let line = h("div");
  let used = Infinity;
  const place = (element, wide, names) => {
    if (used + wide > width) {
      line = lineIn(host, names);
      used = 0;
    }
    used += wide;
    line.append(element);
  };
  for (let q = Math.max(0, TOKENS.length - MOST); q < TOKENS.length; q++) {
    const text = show(TOKENS[q]);
    const wide = Math.min(width, Math.max(17, letters(text)));
    place(tokenCell(q, text, wide), wide, rows);
  }
  const next = answerText();
  if (next != null)
    place(h("div", { class: "token next" }, h("span", {}, `→ ${show(next)}`)), letters(show(next)) + 26, []);
}

function lineIn(host, names) {
  const column = h(
    "div",
    { class: "names" },
    h("span", {}, "\u00a0"),
    names.map(row => h("i", {}, row.name)),
  );
  const line = h("div", { class: "row" }, column);
  host.append(line);
  return line;
}

function tokenCell(q, text, wide) {
  const spaces = /^·+/.exec(text)?.[0] ?? "";
  const word = h("span", {}, h("u", {}, spaces), text.slice(spaces.length));
  const bars = rows.map(() => h("i"));
  const cell = h(
    "div",
    {
      class: q === D.prompt?.source ? "token source" : "token",
      style: `width:${wide}px`,
      "data-q": q,
      onclick: () => set({ token: S.token === q ? -1 : q }),
    },
    word,
    bars,
  );
  cells.push({ q, cell, bars });
  return hint(cell, () => [
    `“${text}” at position ${q}`,
    "",
    rows.map(row => tokenWords(row, q)).join(" · "),
  ]);
}

function tokenWords(row, q) {
  const k = at(row.block);
  if (row.name === "attn")
    return `${D.scores ? headName(S.head) : "the head"} attends ${fmt(row.value(k, q))}`;
  return `${row.block.title} ${inputWords(row.block, k, q)}`;
}

function paintPrompt() {
  const steps = rows.map(row => at(row.block));
  for (const { q, cell, bars } of cells) {
    cell.classList.toggle("chosen-token", q === S.token);
    rows.forEach((row, place) => {
      const v = row.value(steps[place], q);
      bars[place].style.background = Number.isFinite(v) ? rgb(row.shade(v)) : HATCH;
    });
  }
  $("key").replaceChildren(...rows.flatMap(keyOf));
  $("chosen-token").textContent =
    S.token < 0
      ? ""
      : `“${show(TOKENS[S.token])}” at position ${S.token}: ${rows.map(row => tokenWords(row, S.token)).join(" · ")}`;
}

/** What the colours of a row mean, with their scale. */
function keyOf({ name, block }) {
  const attends = name === "attn";
  const gradient = block.signed ? ramp(plusMinus, -1) : ramp(t => colour(attends ? "induction" : "ink", t));
  const words = attends
    ? attentionWords()
    : `${block.title}${block.signed ? ": opposes, supports" : ", share of the total"}`;
  return [
    h("span", { class: "ramp", style: `background:${gradient}` }),
    h("span", {}, words),
    h("span", {}, attends ? "0 to 1" : inputScale(block)),
  ];
}

function attentionWords() {
  if (!D.attention || !D.scores) return "attention from the last token";
  const kept = Number.isFinite(attentionAt(at(D.attention), 0));
  const name = headName(S.head);
  return kept
    ? `attention of ${name} from the last token`
    : `attention of ${name} was not kept (the top ${D.attention.heads.length} heads are)`;
}

/** With the keyboard the tokens are one stop; arrow keys go from token to token. */
function buildPrompt(host) {
  host.after(
    h("div", { class: "sub", id: "chosen-token", "aria-live": "polite" }),
    h("div", { class: "key", id: "key" }),
  );
  if (!D.prompt) return;
  for (const [name, value] of Object.entries({
    tabindex: "0",
    role: "group",
    "aria-label": "Tokens of the prompt; arrow keys choose one",
  }))
    host.setAttribute(name, value);
  host.addEventListener("keydown", event => {
    const way = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (way) set({ token: Math.min(TOKENS.length - 1, Math.max(0, soon("token") + way)) });
    else if (event.key === "Escape") set({ token: -1 });
    else return;
    event.preventDefault();
    event.stopPropagation();
  });
}

card({
  id: "prompt",
  place: "side",
  order: 20,
  kind: "prompt",
  title: "The prompt at this step",
  uses: ["head", "token", "score"],
  shown: () => Boolean(D.prompt) || !(withoutHeads() || methods.length),
  has: () => Boolean(D.prompt),
  missing: () => "No prompt was recorded. HeadMonitor() and the attribution monitors record one.",
  sub: () =>
    [TOKENS.length > MOST ? `its last ${MOST} of ${TOKENS.length} tokens` : "", D.runs ? "run A" : ""]
      .filter(Boolean)
      .join(", "),
  build: buildPrompt,
  draw: drawPrompt,
  step: paintPrompt,
});
