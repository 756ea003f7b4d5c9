// The data of the run: D. Packed numbers become Float32Array, undefined ones NaN.
// What is in it, and which Python module makes it, is written in ../types.d.ts.

const holder = /** @type {HTMLElement} */ (document.getElementById("data"));

/** @type {Data} */
export const D = JSON.parse(holder.textContent ?? "");

/** Undo pack() of pack.py: a plain list, or deflated unsigned integers. */
async function unpack(packed) {
  if (Array.isArray(packed)) return Float32Array.from(packed, v => v ?? NaN);
  const bytes = Uint8Array.from(atob(packed.z), c => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  const buffer = await new Response(stream).arrayBuffer();
  const codes = packed.bits === 8 ? new Uint8Array(buffer) : new Uint16Array(buffer);
  const nothing = 2 ** packed.bits - 1;
  const values = new Float32Array(codes.length);
  for (let k = 0; k < codes.length; k++) {
    values[k] = codes[k] === nothing ? NaN : packed.offset + packed.scale * codes[k];
  }
  return values;
}

/** Keys under which pack() puts numbers, wherever in D they stand. */
const PACKED = new Set(["values", "stderr", "gap", "each", "inputs"]);

/** Find every packed entry below a part of D and what will unpack it. */
function unpackBelow(part, jobs) {
  for (const [key, value] of Object.entries(part)) {
    if (PACKED.has(key) && isPacked(value))
      jobs.push(
        unpack(value).then(found => {
          part[key] = found;
        }),
      );
    else if (value && typeof value === "object") unpackBelow(value, jobs);
  }
  return jobs;
}

const isPacked = value =>
  value?.z !== undefined || (Array.isArray(value) && value.every(v => v === null || typeof v === "number"));

await Promise.all(unpackBelow(D, []));

/** A function of a block, or of a score, that is computed once for each. */
export function once(make) {
  const known = new WeakMap();
  return block => {
    if (!known.has(block)) known.set(block, make(block));
    return known.get(block);
  };
}

/** Index of the last measured step. */
export const LAST = D.steps.length - 1;

/** Index of the entry of an increasing list that is nearest to a value. */
export function nearest(list, value) {
  let low = 0;
  let high = list.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (list[middle] <= value) low = middle;
    else high = middle;
  }
  return Math.abs(list[low] - value) <= Math.abs(list[high] - value) ? low : high;
}

/** What a curve is nearest to the i-th measured step. */
export const valueNear = (one, i) => one.values[nearest(one.at, D.steps[i])];

/** The last defined value of a curve, which is what its label stands beside. */
export function lastDefined(count, value) {
  for (let k = count - 1; k >= 0; k--) if (Number.isFinite(value(k))) return value(k);
  return NaN;
}

// ---------- heads

export const LAYERS = D.scores?.layers ?? 0;
export const WIDTH = D.scores?.heads ?? 0;
export const HEADS = LAYERS * WIDTH;
export const headName = index => `L${Math.floor(index / WIDTH)}H${index % WIDTH}`;

/** One head's value of a score at the k-th step of that score. */
export const scoreAt = (score, k, head) => score.values[k * HEADS + head];

/** The curve of one head: at every measured step for the heads that were kept whole. */
export function headCurve(score, head) {
  const place = score.whole ? score.whole.heads.indexOf(head) : -1;
  if (place < 0) return { at: score.at, value: k => scoreAt(score, k, head) };
  const { at, values, heads } = score.whole;
  return { at, value: k => values[k * heads.length + place] };
}

/** The head with the highest defined value at the k-th step. */
export function best(score, k) {
  let found = 0;
  for (let j = 1; j < HEADS; j++)
    if ((scoreAt(score, k, j) || 0) > (scoreAt(score, k, found) || 0)) found = j;
  return found;
}

// ---------- texts and attributions

export const TOKENS = D.prompt?.tokens ?? [];

/** What an attribution of the prompt or of a table gives to one entry at its k-th step. */
export const inputAt = (block, k, q) => (q < block.width ? block.values[k * block.width + q] : NaN);

/** What the model was asked for: the token that really follows, or the target of an attribution. */
export const answerText = () =>
  D.answers?.right ?? Object.values(D.inputs).find(block => block.target)?.target ?? null;
