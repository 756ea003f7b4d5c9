// The data of the run: D. Packed numbers become Float32Array, undefined ones NaN.

const D = JSON.parse($("data").textContent);

/** Undo pack() of pack.py: a plain list, or deflated unsigned integers. */
async function unpack(packed) {
  if (Array.isArray(packed)) return Float32Array.from(packed, v => v ?? NaN);
  const bytes = Uint8Array.from(atob(packed.z), c => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  const buffer = await new Response(stream).arrayBuffer();
  const codes = packed.bits === 8 ? new Uint8Array(buffer) : new Uint16Array(buffer);
  const nothing = 2 ** packed.bits - 1;
  return Float32Array.from(codes, c => (c === nothing ? NaN : packed.offset + packed.scale * c));
}

/** Everything that has values over steps. */
const blocks = [
  ...(D.scores?.list ?? []), ...(D.behaviour?.series ?? []), ...(D.behaviour?.also ?? []),
  ...Object.values(D.inputs), ...Object.values(D.tables), ...Object.values(D.pictures), ...(D.agreement?.series ?? []), ...(D.moved?.series ?? []), ...(D.attention ? [D.attention] : []),
];
await Promise.all(blocks.map(async block => {
  for (const key of ["values", "stderr", "gap", "each", "inputs"]) if (block[key]) block[key] = await unpack(block[key]);
}));

/** Index of the entry of an increasing list that is nearest to a value. */
function nearest(list, value) {
  let low = 0, high = list.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (list[middle] <= value) low = middle; else high = middle;
  }
  return Math.abs(list[low] - value) <= Math.abs(list[high] - value) ? low : high;
}

const LAST = D.steps.length - 1;
const LAYERS = D.scores?.layers ?? 0, WIDTH = D.scores?.heads ?? 0, HEADS = LAYERS * WIDTH;
const TOKENS = D.prompt?.tokens ?? [];
const headName = index => `L${Math.floor(index / WIDTH)}H${index % WIDTH}`;

/** One head's value of a score at the k-th step of that score. */
const scoreAt = (score, k, head) => score.values[k * HEADS + head];

/** The head with the highest defined value at the k-th step. */
function best(score, k) {
  let found = 0;
  for (let j = 1; j < HEADS; j++) if ((scoreAt(score, k, j) || 0) > (scoreAt(score, k, found) || 0)) found = j;
  return found;
}

/** The last defined value of a curve, which is what its label stands beside. */
function lastDefined(count, value) {
  for (let k = count - 1; k >= 0; k--) if (Number.isFinite(value(k))) return value(k);
  return NaN;
}
