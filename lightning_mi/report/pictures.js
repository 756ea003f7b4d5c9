// Attributions of the first image at this step, one scale for the run; blue supports, orange opposes.

const pictures = Object.values(D.pictures);
let painted = [];

/** A figure of one method; its `refresh` repaints it at the cursor's step. */
function pictureOf(block) {
  const canvas = h("canvas", { width: block.width, height: block.height, role: "img" });
  const when = h("span"), target = block.target == null ? "" : ` of “${show(block.target)}”`;
  const low = block.signed ? `−${fmtCap(block)}` : "0", high = `${block.signed ? "+" : ""}${fmtCap(block)} ${block.unit}`;
  const scale = h("div", { class: "scale" }, low, h("span", { class: "ramp", style: `background:${ramp(pictureShade(block), block.signed ? -1 : 0)}` }), high);
  hint(canvas, () => [block.title, `${target.trim()} ${when.textContent}`.trim(), "channels summed"]);
  const figure = h("figure", {}, h("figcaption", {}, h("b", {}, block.title), target, when), canvas, scale);
  figure.refresh = () => {
    when.textContent = asOf(block) ? `, ${asOf(block)}` : "";
    canvas.setAttribute("aria-label", `${block.title}${target} at step ${block.at[at(block)]}`);
    paintPicture(canvas, block, at(block));
  };
  return figure;
}

const fmtCap = block => String(+block.cap.toPrecision(2));

/** What has no sign has the ink of saliency everywhere on the page. */
const pictureShade = block => (block.signed ? plusMinus : amount => colour("ink", amount));

function paintPicture(canvas, block, k) {
  const size = block.width * block.height, context = canvas.getContext("2d");
  const image = context.createImageData(block.width, block.height), undefinedGrey = isDark() ? [60, 66, 78] : [214, 216, 220];
  const shade = pictureShade(block);
  for (let j = 0; j < size; j++) {
    const v = block.values[k * size + j];
    image.data.set([...(Number.isFinite(v) ? shade(v / block.cap) : undefinedGrey), 255], 4 * j);
  }
  context.putImageData(image, 0, 0);
}

function drawPictures() {
  painted = pictures.map(pictureOf);
  $("pictures").replaceChildren(...painted);
}

onLayout.push(drawPictures);
onStep.push(() => painted.forEach(figure => figure.refresh()));
