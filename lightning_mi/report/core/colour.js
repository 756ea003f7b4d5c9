// Colour is evidence: zero is the paper, and one scale holds for the whole run.

/** Hue and chroma of each role in OKLCH. */
export const HUES = {
  induction: [292, .19], previous_token: [178, .11], duplicate_token: [350, .16],
  current_token: [88, .12], first_position: [258, .035],
  ink: [258, .03], size: [0, .2], plus: [255, .16], minus: [52, .15],
};
export const HATCH = "repeating-linear-gradient(45deg, var(--hair) 0 2px, transparent 2px 4px)";

export const isDark = () => document.documentElement.dataset.theme === "dark";
export const rgb = colour => `rgb(${colour})`;

/** OKLCH to sRGB, 0 to 255. */
export function oklch(lightness, chroma, hue) {
  const a = chroma * Math.cos(hue * Math.PI / 180), b = chroma * Math.sin(hue * Math.PI / 180);
  const l = (lightness + .3963377774 * a + .2158037573 * b) ** 3;
  const m = (lightness - .1055613458 * a - .0638541728 * b) ** 3;
  const n = (lightness - .0894841775 * a - 1.291485548 * b) ** 3;
  return [
    4.0767416621 * l - 3.3077115913 * m + .2309699292 * n,
    -1.2684380046 * l + 2.6097574011 * m - .3413193965 * n,
    -.0041960863 * l - .7034186147 * m + 1.707614701 * n,
  ].map(v => (v <= .0031308 ? 12.92 * v : 1.055 * v ** (1 / 2.4) - .055)).map(v => Math.round(255 * Math.min(1, Math.max(0, v))));
}

/** 256 colours from the paper to the full hue, in the current theme. */
function shadesFrom(role) {
  const [hue, chroma] = HUES[role], paper = isDark() ? [22, 26, 33] : [255, 255, 255];
  return Array.from({ length: 256 }, (_, q) => {
    const t = q / 255, mix = Math.min(1, t / .14);
    const ink = isDark()
      ? oklch(.27 + .64 * t, chroma * Math.sin(Math.PI * Math.min(1, .12 + t * .56)), hue)
      : oklch(.955 - .57 * t, chroma * Math.sin(Math.PI * Math.min(1, .08 + t * .52)), hue);
    return ink.map((v, z) => Math.round(mix * v + (1 - mix) * paper[z]));
  });
}

const shadesOf = {};

/** The colour of a role at 0 (paper) to 1. */
export function colour(role, amount) {
  const shades = shadesOf[role + isDark()] ??= shadesFrom(role);
  return shades[Math.round(255 * Math.min(1, Math.max(0, amount)))];
}

/** Signed values: blue supports, orange opposes. */
export const plusMinus = amount => colour(amount < 0 ? "minus" : "plus", Math.abs(amount));

/**
 * Paint a canvas pixel by pixel, row by row. What is undefined stays clear, so that the hatching
 * behind the canvas shows.
 * @param {any} canvas
 * @param {(j: number) => number} value of the j-th pixel
 * @param {(value: number, j: number) => number[]} shade its colour
 */
export function paintPixels(canvas, value, shade) {
  const { width, height } = canvas, context = canvas.getContext("2d"), image = context.createImageData(width, height);
  for (let j = 0; j < width * height; j++) {
    const v = value(j);
    if (!Number.isFinite(v)) continue;
    const [r, g, b] = shade(v, j), first = 4 * j;
    image.data[first] = r;
    image.data[first + 1] = g;
    image.data[first + 2] = b;
    image.data[first + 3] = 255;
  }
  context.putImageData(image, 0, 0);
  canvas.classList.add("pixels");
}

/** A score as colour: what lies above chance, up to 1. */
export function aboveChance(score, value) {
  const chance = score.chance ?? 0;
  return colour(score.name, (value - chance) / (1 - chance));
}

/** Black or white, whichever reads better on a colour. */
export function readable(onto) {
  const [r, g, b] = onto.map(v => (v /= 255) <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
  return .2126 * r + .7152 * g + .0722 * b > .179 ? "#000" : "#fff";
}

/** A CSS gradient that shows a scale from `low` (0 or −1) to 1. */
export function ramp(at, low = 0) {
  const stops = Array.from({ length: 13 }, (_, k) => rgb(at(low + (1 - low) * k / 12)));
  return `linear-gradient(90deg, ${stops.join(", ")})`;
}
