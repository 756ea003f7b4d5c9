// Heads at this step: the chosen score large, with numbers where there is room, the others small.

import { D, HEADS, LAYERS, WIDTH, best, headName, lastDefined, scoreAt } from "../core/data.js";
import { card, withoutHeads } from "../core/card.js";
import { aboveChance, readable } from "../core/colour.js";
import { $, h, hint } from "../core/dom.js";
import { fmt } from "../core/numbers.js";
import { paintPixels, pixelUnder } from "../core/pixels.js";
import { S, at, chosenScore, set } from "../core/state.js";
import { scoreWords } from "./head_curves.js";

const WITH_NUMBERS = 32; // up to so many heads have their number on the map

/** A figure of one score; its `refresh` repaints it at the cursor's step. */
function headMap(score, large) {
  const canvas = h("canvas", { width: WIDTH, height: LAYERS, role: "img" });
  const shape = Math.min(3, Math.max(LAYERS <= 4 ? 1.7 : 0.8, WIDTH / LAYERS));
  const chosen = h("div", { class: "chosen" });
  const numbers = h("div");
  const wrap = h("div", { class: "wrap", style: `aspect-ratio:${shape}` }, canvas, numbers, chosen);
  const value = h("span");
  const caption = h("figcaption", {}, h("b", { style: `color:var(--${score.name})` }, score.title), value);
  hint(canvas, event => scoreWords(score, at(score), pixelUnder(canvas, event)));
  canvas.addEventListener("click", event => set({ head: pixelUnder(canvas, event), score: score.name }));
  const refresh = () => {
    const k = at(score);
    const top = best(score, k);
    value.textContent = `${headName(top)} ${fmt(scoreAt(score, k, top))}`;
    canvas.setAttribute("aria-label", `${score.title} at step ${score.at[k]}: highest ${value.textContent}`);
    paintPixels(
      canvas,
      j => scoreAt(score, k, j),
      v => aboveChance(score, v),
    );
    if (large && HEADS <= WITH_NUMBERS) writeNumbers(numbers, score, k);
    chosen.style.cssText = cellStyle(S.head, true);
  };
  return { figure: h("figure", { "data-score": score.name }, caption, wrap), refresh };
}

function cellStyle(j, sized) {
  const column = j % WIDTH;
  const row = Math.floor(j / WIDTH);
  const half = sized ? 0 : 0.5;
  const place = `left:${(100 * (column + half)) / WIDTH}%;top:${(100 * (row + half)) / LAYERS}%`;
  return sized ? `${place};width:${100 / WIDTH}%;height:${100 / LAYERS}%` : place;
}

function writeNumbers(host, score, k) {
  host.replaceChildren(
    ...Array.from({ length: HEADS }, (_, j) => {
      const v = scoreAt(score, k, j);
      const ink = Number.isFinite(v) ? readable(aboveChance(score, v)) : "var(--ink)";
      return h("span", { class: "value", style: `${cellStyle(j)};color:${ink}` }, fmt(v).replace("0.", "."));
    }),
  );
}

/** @type {{figure: HTMLElement, refresh: () => void}[]} */
let figures = [];
let drawn = ""; // the score that the large figure shows

function drawMaps(host) {
  if (drawn !== S.score) layOut(host);
  drawn = S.score;
}

function layOut(host) {
  const score = chosenScore();
  const others = (D.scores?.list ?? []).filter(one => one !== score);
  const large = headMap(score, true);
  const small = others.map(one => headMap(one, false));
  figures = [large, ...small];
  host.classList.toggle("alone", !small.length);
  host.replaceChildren(
    large.figure,
    ...(small.length
      ? [
          h(
            "div",
            { class: "minor" },
            small.map(one => one.figure),
          ),
        ]
      : []),
  );
}

function refreshMaps() {
  const score = chosenScore();
  const j = S.head;
  figures.forEach(one => one.refresh());
  $("head").value = j;
  $("head-score").textContent =
    `${score.title} ${fmt(scoreAt(score, at(score), j))} at this step, ` +
    `${fmt(lastDefined(score.at.length, k => scoreAt(score, k, j)))} at the end`;
}

/** A list of all heads, for keyboards and screen readers. */
function buildPicker(host) {
  if (!D.scores) return;
  const options = Array.from({ length: HEADS }, (_, j) => h("option", { value: j }, headName(j)));
  const select = h("select", { id: "head", onchange: () => set({ head: +$("head").value }) }, options);
  host.after(
    h(
      "div",
      { class: "sub pick" },
      h("label", {}, "Selected ", select),
      " ",
      h("span", { id: "head-score" }),
    ),
  );
}

card({
  id: "at-step",
  place: "side",
  order: 10,
  kind: "maps",
  title: "Heads at this step",
  uses: ["head", "score"],
  shown: () => Boolean(D.scores) || !withoutHeads(),
  has: () => Boolean(D.scores),
  missing: () => "No head scores were recorded. Add HeadMonitor() to the Trainer.",
  sub: () => `rows are layers, columns heads${D.runs ? ", run A" : ""}`,
  build: buildPicker,
  draw: drawMaps,
  step: refreshMaps,
});
