// Canvases of which every pixel is a value: painting them, and finding what is under the pointer.

/**
 * Paint a canvas pixel by pixel, row by row. What is undefined stays clear, so that the hatching
 * behind the canvas shows.
 * @param {any} canvas
 * @param {(j: number) => number} value of the j-th pixel
 * @param {(value: number, j: number) => number[]} shade its colour
 */
export function paintPixels(canvas, value, shade) {
  const { width, height } = canvas;
  const context = canvas.getContext("2d");
  const image = context.createImageData(width, height);
  for (let j = 0; j < width * height; j++) {
    const v = value(j);
    if (!Number.isFinite(v)) continue;
    const [r, g, b] = shade(v, j);
    const first = 4 * j;
    image.data[first] = r;
    image.data[first + 1] = g;
    image.data[first + 2] = b;
    image.data[first + 3] = 255;
  }
  context.putImageData(image, 0, 0);
  canvas.classList.add("pixels");
}

/** Index of the pixel under the pointer, row by row. */
export function pixelUnder(canvas, event) {
  const box = canvas.getBoundingClientRect();
  const clip = (share, count) => Math.min(count - 1, Math.max(0, Math.floor(share * count)));
  const row = clip((event.clientY - box.top) / box.height, canvas.height);
  return row * canvas.width + clip((event.clientX - box.left) / box.width, canvas.width);
}
