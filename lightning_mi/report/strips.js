// Several texts at the cursor's step, each token on the colour of its value.

let stripped = [];                                // [example, position, its element]

const stripBlock = () => (D.inputs[S.method]?.texts.length ? D.inputs[S.method] : null);
const eachAt = (block, k, e, q) => block.each[(k * block.texts.length + e) * block.width + q];

/** The texts are laid out once for each method; the cursor changes only their colours. */
function drawStrips() {
  const block = stripBlock();
  stripped = [];
  $("strips-head").hidden = !block;
  $("strips").replaceChildren(...(block ? block.texts.map((text, e) => stripOf(block, text, e)) : []));
  if (block) $("strips-sub").textContent = `${block.title} of each example at this step; ${inputScale(block)}`;
}

function stripOf(block, text, e) {
  const tokens = text.tokens.map((token, q) => {
    const word = h("span", { class: "piece" }, show(token));
    stripped.push([e, q, word]);
    return hint(word, () => {
      const k = at(block), v = eachAt(block, k, e, q);
      return [`“${show(token)}” at position ${q}`, block.signed ? `${fmt(v)} ${block.unit}` : `${fmt(100 * v, 1)} % of the total`, `at step ${whole(block.at[k])}`];
    });
  });
  const target = text.target == null ? null : h("b", {}, `${show(text.target)}:`);
  return h("p", { class: "strip" }, target, ...tokens);
}

function paintStrips() {
  const block = stripBlock();
  if (!block) return;
  const k = at(block), shade = inputShade(block);
  for (const [e, q, word] of stripped) {
    const v = eachAt(block, k, e, q), onto = Number.isFinite(v) ? shade(v) : null;
    word.style.background = onto ? rgb(onto) : HATCH;
    word.style.color = onto ? readable(onto) : "";
  }
}

onLayout.push(drawStrips);
onStep.push(paintStrips);
