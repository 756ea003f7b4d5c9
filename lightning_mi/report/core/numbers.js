// Numbers and tokens as a person reads them.

const UNDEFINED = "—";

/** A number with a true minus sign; what is not finite is a dash. */
export const fmt = (value, digits = 2) =>
  value != null && Number.isFinite(value)
    ? value
        .toFixed(digits)
        .replace(/^-(?=[0.]*$)/, "")
        .replace("-", "−")
    : UNDEFINED;

/** A number with its sign, plus signs too. */
export const withSign = (value, digits = 3) => (value > 0 ? "+" : "") + fmt(value, digits);

/** Three significant digits, whatever the size: 1,234 0.0123 4.5e−9. */
export function significant(value, digits = 3) {
  if (value == null || !Number.isFinite(value)) return UNDEFINED;
  const size = Math.abs(value);
  if (size >= 1e15 || (size < 1e-4 && size > 0)) return value.toExponential(digits - 1).replaceAll("-", "−");
  return (+value.toPrecision(digits)).toLocaleString("en", { maximumFractionDigits: 8 }).replace("-", "−");
}

export const whole = value => Math.round(value).toLocaleString("en");

/** 2,826,240 tokens are "2.8 M". */
export function short(value) {
  for (const [size, unit] of /** @type {[number, string][]} */ ([
    [1e9, "B"],
    [1e6, "M"],
    [1e4, "k"],
  ])) {
    if (value >= size)
      return `${+((value / size) * (unit === "k" ? 10 : 1)).toFixed(unit === "k" ? 0 : 1)} ${unit}`;
  }
  return whole(value);
}

const LONGEST = 24;
const INVISIBLE =
  /[\u0000-\u0009\u000b-\u001f\u007f-\u009f\u00ad\u061c\u200b-\u200f\u202a-\u202e\u2060-\u206f\ufeff]/g;

/** A token made visible: spaces at its ends, line ends, and characters that show nothing. */
export function show(token, longest = LONGEST) {
  const text = String(token)
    .replace(/\n/g, "⏎")
    .replace(INVISIBLE, "◌")
    .replace(/^ +| +$/g, run => "·".repeat(run.length));
  const letters = [...text];
  return letters.length > longest ? letters.slice(0, longest - 1).join("") + "…" : text || "∅";
}

/** Like show, for running text: spaces stay spaces. */
export function inText(token) {
  const text = String(token).replace(/\n/g, "⏎").replace(INVISIBLE, "◌");
  return text.length > 200 ? text.slice(0, 199) + "…" : text;
}

/** The lowest and the highest of any number of values, those that are not finite left out. */
export function extent(values) {
  let low = Infinity;
  let high = -Infinity;
  for (const v of values) {
    if (!Number.isFinite(v)) continue;
    low = Math.min(low, v);
    high = Math.max(high, v);
  }
  return [low, high];
}

/** Round values between two bounds, for an axis. */
export function ticks(low, high, about = 4) {
  if (!(high > low)) return [low];
  const unit = 10 ** Math.floor(Math.log10((high - low) / about));
  const step = [1, 2, 2.5, 5, 10].map(m => m * unit).find(v => (high - low) / v <= about) ?? 10 * unit;
  const found = [];
  for (let v = Math.ceil(low / step - 1e-9) * step; v <= high + 1e-9 * (high - low); v += step)
    found.push(+v.toPrecision(6));
  return found;
}

/** Enough digits to tell numbers apart whose largest is this one. */
export const digitsFor = largest => Math.min(8, Math.max(2, 2 - Math.floor(Math.log10(largest || 1))));
