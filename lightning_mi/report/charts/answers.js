// What the model says after the prompt, at this step, and what it should.

import { D } from "../core/data.js";
import { card } from "../core/card.js";
import { h } from "../core/dom.js";
import { fmt, show } from "../core/numbers.js";
import { asOf, at } from "../core/state.js";

const A = D.answers;

function sayAnswers(host) {
  if (!A) return;
  const k = at(A);
  const quoted = text => h("b", {}, `“${show(text)}”`);
  const p = A.probability[k];
  const best = A.top[k].map(([text, much]) => h("span", {}, quoted(text), ` ${fmt(much)}`));
  const right =
    A.right == null ? null : h("span", {}, "answer ", quoted(A.right), p == null ? "" : ` ${fmt(p)}`);
  const late = asOf(A) ? h("span", {}, asOf(A)) : null;
  host.replaceChildren(
    ...[h("span", {}, "model says"), ...best, right, late].filter(element => element !== null),
  );
}

card({
  id: "answers-now",
  into: "prompt",
  order: 21,
  kind: "says still",
  title: "",
  shown: () => Boolean(A) && Boolean(D.prompt),
  step: sayAnswers,
});
