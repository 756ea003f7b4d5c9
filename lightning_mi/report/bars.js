// Features of a table at the cursor's step: a signed bar each, largest first, one scale for the run.

const featured = Object.entries(D.tables), MOST_BARS = 14;

/** The features with the largest mean size over the run: their order does not jump with the cursor. */
function barRows(block) {
  const peak = block.names.map((_, q) => block.at.reduce((sum, _, k) => sum + Math.abs(inputAt(block, k, q) || 0), 0));
  return block.names.map((_, q) => q).sort((a, b) => peak[b] - peak[a]).slice(0, MOST_BARS);
}

function barOf(block, k, q) {
  const v = inputAt(block, k, q), share = Math.min(1, Math.abs(v) / block.cap) * (block.signed ? 50 : 100);
  const left = block.signed ? (v < 0 ? 50 - share : 50) : 0, shade = block.signed ? plusMinus(v < 0 ? -1 : 1) : colour("ink", .8);
  const bar = h("i", { style: Number.isFinite(v) ? `left:${left}%;width:${share}%;background:${rgb(shade)}` : `left:0;width:100%;background:${HATCH}` });
  const zero = block.signed ? h("u", {}) : null;
  return h("div", { class: "bar-row" }, h("span", { title: block.names[q] }, block.names[q]), h("div", {}, zero, bar), h("b", {}, Number.isFinite(v) ? fmt(v) : "—"));
}

function drawBars() {
  if (!featured.length || D.prompt) return;
  const block = D.tables[S.method] ?? featured[0][1], k = at(block), rows = barRows(block), rest = block.names.length - rows.length;
  $("prompt-title").textContent = "Features at this step";
  $("prompt-sub").textContent = `${block.title}${block.target ? ` of “${show(block.target)}”` : ""}, mean of ${block.n}; ${inputScale(block)}`;
  $("prompt").replaceChildren(h("div", { class: "bars" }, ...rows.map(q => barOf(block, k, q))));
  $("key").replaceChildren(h("span", {}, [rest ? `${rest} smaller ones are not shown.` : "", block.signed ? "Blue supports the target, orange opposes it." : ""].join(" ")));
}

onStep.push(drawBars);
