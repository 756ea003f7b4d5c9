// Attributions in words and colours, the same in every chart that shows them.

import { TOKENS, inputAt, once } from "./data.js";
import { colour, plusMinus } from "./colour.js";
import { fmt, show, significant } from "./numbers.js";

/** The colour of a value on the one scale of the run. */
export const inputShade = block => v =>
  block.signed ? plusMinus(v / block.cap) : colour("ink", v / block.cap);

/** What the rows are called: tokens of the prompt, or features of a table. */
export const rowNames = block => block.names ?? TOKENS;

/** Rows by their mean size over the run, largest first: the order does not jump with the cursor. */
export const bySize = once(block => {
  const rows = rowNames(block).map((_, q) => q);
  const sum = rows.map(q => block.at.reduce((m, _, k) => m + Math.abs(inputAt(block, k, q) || 0), 0));
  return rows.sort((a, b) => sum[b] - sum[a]);
});

const isShare = block => block.unit === "share of the total";

/** A share of many tokens is small, and still not none. */
const percent = (share, digits) =>
  100 * share < 10 ** -digits ? significant(100 * share, 2) : fmt(100 * share, digits);

/** The ends of that scale. */
export function inputScale(block) {
  if (isShare(block)) return `0 to ${percent(block.cap, 0)} %`;
  return `${block.signed ? "±" : "0 to "}${+block.cap.toPrecision(2)} ${block.unit}`;
}

/** One value with its unit. */
export const valueWords = (block, value) =>
  isShare(block) ? `${percent(value, 1)} % of the total` : `${fmt(value)} ${block.unit}`;
export const inputWords = (block, k, q) => valueWords(block, inputAt(block, k, q));

/** What is needed to read it: sign, target, gap, recipe. */
export function inputNote(block, k) {
  const target = block.target ? ` Target: “${show(block.target)}”.` : "";
  if (block.title === "saliency" && isShare(block))
    return `size of the gradient with respect to the token's embedding, as a share of the sum over tokens.${target}`;
  if (!block.signed) return isShare(block) ? `a share of the sum over tokens.${target}` : target;
  const gap = block.gap ? ` Completeness gap ${fmt(block.gap[k], 4)}.` : "";
  return `blue supports, orange opposes.${target}${gap}${block.how ? ` ${block.how}.` : ""}`;
}
