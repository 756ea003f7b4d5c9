// Several texts at the cursor's step, each token on the colour of its value.

import { D } from "../core/data.js";
import { card } from "../core/card.js";
import { HATCH, readable, rgb } from "../core/colour.js";
import { h, hint } from "../core/dom.js";
import { inputScale, inputShade, valueWords } from "../core/inputs.js";
import { show, whole } from "../core/numbers.js";
import { S, at } from "../core/state.js";

/** Pieces of text that change their colour with the step. */
/** @type {{e: number, q: number, word: HTMLElement}[]} */
let stripped = [];

const stripBlock = () => (D.inputs[S.method]?.texts.length ? D.inputs[S.method] : null);
const eachAt = (block, e, q) => block.each[(at(block) * block.texts.length + e) * block.width + q];

/** The texts are laid out once for each method; the cursor changes only their colours. */
function drawStrips(host) {
  const block = stripBlock();
  stripped = [];
  if (block) host.replaceChildren(...block.texts.map((text, e) => stripOf(block, text, e)));
}

function stripOf(block, text, e) {
  const tokens = text.tokens.map((token, q) => {
    const word = h("span", { class: "piece" }, show(token));
    stripped.push({ e, q, word });
    return hint(word, () => [
      `“${show(token)}” at position ${q}`,
      valueWords(block, eachAt(block, e, q)),
      `at step ${whole(block.at[at(block)])}`,
    ]);
  });
  const target = text.target == null ? null : h("b", {}, `${show(text.target)}:`);
  return h("p", { class: "strip" }, target, ...tokens);
}

function paintStrips() {
  const block = stripBlock();
  if (!block) return;
  const shade = inputShade(block);
  for (const { e, q, word } of stripped) {
    const v = eachAt(block, e, q);
    const onto = Number.isFinite(v) ? shade(v) : null;
    word.style.background = onto ? rgb(onto) : HATCH;
    word.style.color = onto ? readable(onto) : "";
  }
}

card({
  id: "strips",
  into: "looked",
  head: true,
  order: 33,
  kind: "strips",
  title: "",
  uses: ["method"],
  shown: () => Boolean(stripBlock()),
  sub: () => `${stripBlock()?.title} of each example at this step; ${inputScale(stripBlock())}`,
  draw: drawStrips,
  step: paintStrips,
});
