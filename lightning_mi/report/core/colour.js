// Colour is evidence: zero is the paper, and one scale holds for the whole run.

/** Hue and chroma of each role in OKLCH. */
export const HUES = {
  induction: [292, 0.19],
  previous_token: [178, 0.11],
  duplicate_token: [350, 0.16],
  current_token: [88, 0.12],
  first_position: [258, 0.035],
  ink: [258, 0.03],
  size: [0, 0.2],
  plus: [255, 0.16],
  minus: [52, 0.15],
};
export const HATCH = "repeating-linear-gradient(45deg, var(--hair) 0 2px, transparent 2px 4px)";

export const isDark = () => document.documentElement.dataset.theme === "dark";
export const rgb = colour => `rgb(${colour})`;

/** OKLCH to sRGB, 0 to 255. */
export function oklch(lightness, chroma, hue) {
  const a = chroma * Math.cos((hue * Math.PI) / 180);
  const b = chroma * Math.sin((hue * Math.PI) / 180);
  const l = (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3;
  const m = (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3;
  const n = (lightness - 0.0894841775 * a - 1.291485548 * b) ** 3;
  return [
    4.0767416621 * l - 3.3077115913 * m + 0.2309699292 * n,
    -1.2684380046 * l + 2.6097574011 * m - 0.3413193965 * n,
    -0.0041960863 * l - 0.7034186147 * m + 1.707614701 * n,
  ]
    .map(v => (v <= 0.0031308 ? 12.92 * v : 1.055 * v ** (1 / 2.4) - 0.055))
    .map(v => Math.round(255 * Math.min(1, Math.max(0, v))));
}

/** 256 colours from the paper to the full hue, in the current theme. */
function shadesFrom(role) {
  const [hue, chroma] = HUES[role];
  const paper = isDark() ? [22, 26, 33] : [255, 255, 255];
  return Array.from({ length: 256 }, (_, q) => {
    const t = q / 255;
    const mix = Math.min(1, t / 0.14);
    const ink = isDark()
      ? oklch(0.27 + 0.64 * t, chroma * Math.sin(Math.PI * Math.min(1, 0.12 + t * 0.56)), hue)
      : oklch(0.955 - 0.57 * t, chroma * Math.sin(Math.PI * Math.min(1, 0.08 + t * 0.52)), hue);
    return ink.map((v, z) => Math.round(mix * v + (1 - mix) * paper[z]));
  });
}

const shadesOf = {};

/** The colour of a role at 0 (paper) to 1. */
export function colour(role, amount) {
  const shades = (shadesOf[role + isDark()] ??= shadesFrom(role));
  return shades[Math.round(255 * Math.min(1, Math.max(0, amount)))];
}

/** Signed values: blue supports, orange opposes. */
export const plusMinus = amount => colour(amount < 0 ? "minus" : "plus", Math.abs(amount));

/** A score as colour: what lies above chance, up to 1. */
export function aboveChance(score, value) {
  const chance = score.chance ?? 0;
  return colour(score.name, (value - chance) / (1 - chance));
}

/** Black or white, whichever reads better on a colour. */
export function readable(onto) {
  const [r, g, b] = onto.map(v => ((v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b > 0.179 ? "#000" : "#fff";
}

/** A CSS gradient that shows a scale from `low` (0 or −1) to 1. */
export function ramp(at, low = 0) {
  const stops = Array.from({ length: 13 }, (_, k) => rgb(at(low + ((1 - low) * k) / 12)));
  return `linear-gradient(90deg, ${stops.join(", ")})`;
}
