// Attributions of images, over the images in grey; one scale for the run, blue supports and orange
// opposes. At the cursor's step a row an example and a column a method; then one method over steps.

const pictures = Object.entries(D.pictures), FILM = 7;
let painted = [];                                 // what to repaint when the cursor moves

/** What has no sign has a hue of its own over an image, and ink on paper. */
const pictureRole = block => (block.signed ? "plus" : block.inputs ? "size" : "ink");
const fmtCap = block => String(+block.cap.toPrecision(2));
const targetOf = (block, e) => (block.targets[e] == null ? "" : ` of “${show(block.targets[e])}”`);

/** Lightness of the image beneath: colours must stay readable over it. */
const beneath = grey => (isDark() ? .28 + .42 * grey : .55 + .42 * grey);

/** The colour of a value over a pixel: mixed in OKLab, zero is the image itself. */
function over(block, value, grey) {
  const amount = Math.max(-1, Math.min(1, value / block.cap));
  if (!block.inputs) return block.signed ? plusMinus(amount) : colour("ink", amount);
  const [hue, chroma] = HUES[amount < 0 ? "minus" : pictureRole(block)], t = Math.abs(amount);
  return oklch(beneath(grey) * (1 - t) + (isDark() ? .72 : .5) * t, chroma * 1.15 * t, hue);
}

function paintPicture(canvas, block, k, e) {
  const size = block.width * block.height, context = canvas.getContext("2d"), first = (k * block.examples + e) * size;
  const image = context.createImageData(block.width, block.height), nothing = isDark() ? [60, 66, 78] : [214, 216, 220];
  for (let j = 0; j < size; j++) {
    const v = block.values[first + j], grey = block.inputs ? block.inputs[e * size + j] / 255 : 0;
    image.data.set([...(Number.isFinite(v) ? over(block, v, grey) : nothing), 255], 4 * j);
  }
  context.putImageData(image, 0, 0);
}

function paintInput(canvas, block, e) {
  const size = block.width * block.height, context = canvas.getContext("2d");
  const image = context.createImageData(block.width, block.height);
  for (let j = 0; j < size; j++) image.data.set([...Array(3).fill(block.inputs[e * size + j]), 255], 4 * j);
  context.putImageData(image, 0, 0);
}

/** One picture; `k` gives the step it shows. */
function pictureOf(block, e, k) {
  const canvas = h("canvas", { width: block.width, height: block.height, role: "img" });
  hint(canvas, () => [block.title, `${targetOf(block, e).trim()} at step ${whole(block.at[k()])}`, "channels summed"]);
  canvas.refresh = () => {
    canvas.setAttribute("aria-label", `${block.title}${targetOf(block, e)} at step ${block.at[k()]}`);
    paintPicture(canvas, block, k(), e);
  };
  painted.push(canvas);
  return canvas;
}

function inputOf(block, e) {
  const canvas = h("canvas", { width: block.width, height: block.height, role: "img", "aria-label": `input ${e}` });
  paintInput(canvas, block, e);
  return canvas;
}

/** A grid with a head over each column, and in its first column the inputs. */
function gridOf(block, rows, columns) {
  const first = block.inputs ? [{ head: "input", cell: e => inputOf(block, e) }] : [], all = [...first, ...columns];
  const grid = h("div", { class: "grid-of", style: `grid-template-columns:repeat(${all.length}, minmax(0, 1fr))` });
  grid.append(...all.map(one => h("div", { class: one.on ? "on" : "" }, one.head)));
  for (let e = 0; e < rows; e++) grid.append(...all.map(one => one.cell(e)));
  return grid;
}

function pictureScale(block, brief = false) {
  const says = word => (brief ? "" : ` ${word}`);
  const low = block.signed ? `−${fmtCap(block)}${says("opposes")}` : "0", high = block.signed ? `+${fmtCap(block)}${says("supports")}` : fmtCap(block);
  const at = t => (block.inputs ? over(block, t * block.cap, 1) : block.signed ? plusMinus(t) : colour("ink", t));
  return h("div", { class: "scale" }, low, h("span", { class: "ramp", style: `background:${ramp(at, block.signed ? -1 : 0)}` }), `${high} ${block.unit}`);
}

/** Up to seven of a block's steps, evenly spaced, the first and the last among them. */
function filmSteps(block) {
  const last = block.at.length - 1, most = Math.min(FILM, last + 1);
  return [...new Set(Array.from({ length: most }, (_, q) => Math.round(q * last / Math.max(1, most - 1))))];
}

/** The chosen method over steps; a click on a step moves the cursor there. */
function drawFilm(block) {
  const columns = filmSteps(block).map(k => ({
    head: h("button", { type: "button", class: "plain", onclick: () => set({ i: nearest(D.steps, block.at[k]) }) }, whole(block.at[k])),
    cell: e => pictureOf(block, e, () => k),
  }));
  $("pictures").replaceChildren(gridOf(block, block.examples, columns), pictureScale(block));
}

/** All methods at the cursor's step. */
function drawAtStep() {
  const rows = Math.max(...pictures.map(([, block]) => block.examples)), sample = pictures.find(([, block]) => block.inputs)?.[1] ?? pictures[0][1];
  const columns = pictures.map(([name, block]) => ({
    head: h("button", { type: "button", class: "plain", "aria-pressed": String(S.method === name), onclick: () => set({ method: name }) }, block.title),
    cell: e => (e < block.examples ? pictureOf(block, e, () => at(block)) : h("span")),
  }));
  const asked = sample.targets.length ? `explaining ${sample.targets.map(text => `“${show(text)}”`).join(", ")}` : "";
  $("prompt-title").textContent = "The images at this step";
  $("prompt-sub").textContent = asked;
  $("prompt").replaceChildren(gridOf(sample, Math.min(rows, sample.examples), columns));
  $("key").replaceChildren(...pictures.map(([, block]) => h("div", { class: "one" }, h("span", {}, block.title), pictureScale(block, true))));
}

function drawPictures() {
  if (!pictures.length) return;
  painted = [];
  const block = D.pictures[S.method];
  if (block) drawFilm(block); else $("pictures").replaceChildren();
  if (!D.prompt) drawAtStep();
}

onLayout.push(drawPictures);
onStep.push(() => painted.forEach(canvas => canvas.refresh()));
