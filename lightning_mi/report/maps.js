// Heads at this step: the chosen score large, with numbers where there is room, the others small.

const WITH_NUMBERS = 32;

/** A figure of one score; its `refresh` repaints it at the cursor's step. */
function headMap(score, large) {
  const canvas = h("canvas", { width: WIDTH, height: LAYERS, role: "img" });
  const shape = Math.min(3, Math.max(LAYERS <= 4 ? 1.7 : .8, WIDTH / LAYERS));
  const chosen = h("div", { class: "chosen" }), numbers = h("div");
  const wrap = h("div", { class: "wrap", style: `aspect-ratio:${shape}` }, canvas, numbers, chosen);
  const value = h("span"), caption = h("figcaption", {}, h("b", { style: `color:var(--${score.name})` }, score.title), value);
  const under = event => {
    const box = canvas.getBoundingClientRect(), clip = (v, n) => Math.min(n - 1, Math.max(0, Math.floor(v * n)));
    return clip((event.clientY - box.top) / box.height, LAYERS) * WIDTH + clip((event.clientX - box.left) / box.width, WIDTH);
  };
  canvas.addEventListener("pointermove", event => say(event, ...scoreWords(score, at(score), under(event))));
  canvas.addEventListener("pointerleave", hush);
  canvas.addEventListener("click", event => set({ head: under(event), score: score.name }));
  const figure = h("figure", {}, caption, wrap);
  figure.refresh = () => {
    const k = at(score), top = best(score, k);
    value.textContent = `${headName(top)} ${fmt(scoreAt(score, k, top))}`;
    canvas.setAttribute("aria-label", `${score.title} at step ${score.at[k]}: highest ${value.textContent}`);
    paintMap(canvas, score, k);
    if (large && HEADS <= WITH_NUMBERS) writeNumbers(numbers, score, k);
    chosen.style.cssText = cellStyle(S.head, true);
  };
  return figure;
}

function paintMap(canvas, score, k) {
  const context = canvas.getContext("2d"), image = context.createImageData(WIDTH, LAYERS);
  const undefinedGrey = isDark() ? [60, 66, 78] : [214, 216, 220];
  for (let j = 0; j < HEADS; j++) {
    const v = scoreAt(score, k, j);
    image.data.set([...(Number.isFinite(v) ? aboveChance(score, v) : undefinedGrey), 255], 4 * j);
  }
  context.putImageData(image, 0, 0);
}

function cellStyle(j, sized) {
  const column = j % WIDTH, row = Math.floor(j / WIDTH), half = sized ? 0 : .5;
  const place = `left:${100 * (column + half) / WIDTH}%;top:${100 * (row + half) / LAYERS}%`;
  return sized ? `${place};width:${100 / WIDTH}%;height:${100 / LAYERS}%` : place;
}

function writeNumbers(host, score, k) {
  host.replaceChildren(...Array.from({ length: HEADS }, (_, j) => {
    const v = scoreAt(score, k, j), ink = Number.isFinite(v) ? readable(aboveChance(score, v)) : "var(--ink)";
    return h("span", { class: "value", style: `${cellStyle(j)};color:${ink}` }, fmt(v).replace("0.", "."));
  }));
}

let figures = [];

function drawMaps() {
  const host = $("maps");
  $("pick").hidden = !D.scores;
  if (!D.scores) return notMeasured(host, "No head scores were recorded. Add HeadMonitor() to the Trainer.");
  const score = chosenScore(), others = D.scores.list.filter(one => one !== score);
  const large = headMap(score, true), small = others.map(one => headMap(one, false));
  figures = [large, ...small];
  host.classList.toggle("alone", !small.length);
  host.replaceChildren(large, ...(small.length ? [h("div", { class: "minor" }, small)] : []));
}

function buildPicker() {
  $("head").replaceChildren(...Array.from({ length: HEADS }, (_, j) => h("option", { value: j }, headName(j))));
  $("head").addEventListener("change", () => set({ head: +$("head").value }));
}

onLayout.push(drawMaps);
onStep.push(() => {
  if (!D.scores) return;
  figures.forEach(figure => figure.refresh());
  const score = chosenScore(), last = score.at.length - 1;
  $("head").value = S.head;
  $("head-score").textContent = `${score.title} ${fmt(scoreAt(score, at(score), S.head))} at this step, ` +
    `${fmt(lastDefined(last + 1, k => scoreAt(score, k, S.head)))} at the end`;
});
buildPicker();
