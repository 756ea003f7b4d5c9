// What the page is made from: the JSON that data.py writes, what is chosen, and what a chart is.
// Only a type checker reads this file; nothing of it is in the page.

/** Packed numbers, after core/data.js has unpacked them; NaN where undefined. */
type Numbers = Float32Array;

/** A tooltip: a bold part, a plain one, a small one. */
type Words = string[] | null | undefined;

/** The end of a line: where its label stands, what it says, its colour, and what a click does. */
interface EndLabel {
  y: number;
  text: string;
  fill: string;
  plain?: boolean;
  pick?: () => void;
}

/** A scalar over its own steps. */
interface Curve {
  name: string;
  at: number[];
  values: Numbers;
  key?: string;
}

/** heads.py: one score of every head; values are [step, layer, head]. */
interface Score {
  name: string;
  title: string;
  how: string;
  n: number | null;
  chance: number | null;
  at: number[];
  values: Numbers;
  stderr: Numbers | null;
  /** Of how many measurements the map keeps one, where there were too many; the curves in `whole` keep all. */
  thinned: number | null;
  whole: { heads: number[]; at: number[]; values: Numbers } | null;
  rising: { head: number; state: string; interval: [number, number] | null; says: string }[];
}

interface Behaviour {
  series: Curve[];
  also: Curve[];
  unit: string;
}

/** inputs.py and tables.py: one attribution of the prompt or of a table; values are [step, width]. */
interface Input {
  title: string;
  signed: boolean;
  at: number[];
  values: Numbers;
  width: number;
  unit: string;
  cap: number;
  target: string | null;
  how?: string;
  gap?: Numbers | null;
  texts: { tokens: string[]; target: string | null }[];
  each: Numbers;
  names?: string[];
  n?: number;
}

/** pictures.py: attributions of images; values are [step, example, y, x]. */
interface Picture {
  title: string;
  at: number[];
  values: Numbers;
  examples: number;
  height: number;
  width: number;
  signed: boolean;
  unit: string;
  cap: number;
  targets: string[];
  inputs: Numbers | null;
}

/** examples.py: a training example with the share of each of its tokens. */
interface Example {
  index: number;
  score: number;
  name: string;
  note: string | null;
  words: string;
  by: (number | null)[];
  tokens: [string, number | null][];
  image: { height: number; width: number; values: Numbers } | null;
  before?: boolean;
  after?: boolean;
  split?: { step: number; score: number };
}

/** panels.py: a measurement that no other chart knows. */
interface PanelGroup {
  measurement: string;
  title: string;
  curves: any[];
  arrays: PanelBlock[];
}
interface PanelBlock {
  name: string;
  what: string;
  title: string;
  unit: string;
  says: string;
  axes: string[];
  shape: number[];
  labels: Record<string, string[]>;
  at: number[];
  values: Numbers;
  signed: boolean;
  null: number;
  cap: number;
  measured: number;
  reason: string | null;
}

/** compared.py: what is compared of one run. */
interface ComparedRun {
  letter: string;
  label: string;
  last: number;
  behaviour: Curve | null;
  agreement: Record<string, Curve>;
  panels: Record<string, Curve>;
  roles: Record<string, { head: string; at: number[]; values: Numbers }[]>;
  maps: Record<string, { at: number[]; values: Numbers }> | null;
}

/** data.py: everything the page shows. */
interface Data {
  steps: number[];
  measured: number;
  tokens: number[] | null;
  scores: { layers: number; heads: number; list: Score[] } | null;
  behaviour: Behaviour | null;
  prompt: { tokens: string[]; ends: number; source: number | null } | null;
  attention: { heads: string[]; at: number[]; values: Numbers; width: number } | null;
  answers: {
    at: number[];
    top: [string, number][][];
    right: string | null;
    probability: (number | null)[];
  } | null;
  inputs: Record<string, Input>;
  pictures: Record<string, Picture>;
  tables: Record<string, any>;
  moved: { series: Curve[]; against: string } | null;
  agreement: {
    series: (Curve & { key: string })[];
    floor: [number, number] | null;
    ceiling: { value: number; says: string } | null;
    n: number | null;
    head: string | null;
  } | null;
  examples: {
    proponents: Example[];
    opponents: Example[];
    meaning: [string, string];
    unit: string;
    candidates: number;
    of: number | null;
    steps: number[];
    at: number;
    method: string;
  } | null;
  checks: {
    check: string;
    compared: string;
    result: string;
    status: "pass" | "open" | "fail";
    run?: string;
  }[];
  run: { name: string; facts: string; state: string; last: number; max_steps: number; foot: string };
  runs: ComparedRun[] | null;
  panels: PanelGroup[];
  undrawn: string[];
  headline: {
    state: string;
    title: string;
    mark: string | null;
    text: string;
    interval: [number, number] | null;
  };
  short: { question: string; at: string; answer: string; note: string }[];
}

/** What is chosen. */
interface State {
  i: number;
  head: number;
  score: string;
  method: string;
  token: number;
  log: number;
  unit: string;
  all: number;
  panel: Record<string, string>;
  [key: string]: any;
}

/** What a file in charts/ hands to card(). Only `id`, `order`, `title` and `draw` or `step` are needed. */
interface Chart {
  /** Of the card; links lead to it. The chart draws into the element `<id>-plot`. */
  id: string;
  /** Over the time axis, beside it ("at this step"), or below over the whole width. */
  place?: "left" | "side" | "wide";
  /** Where it stands among the others, small ones first. */
  order: number;
  /** A question. */
  title: string;
  /** Id of a card in which this chart stands instead of one of its own. */
  into?: string;
  /** With `into`: whether a line stands over it. */
  head?: boolean;
  /** Classes of the element it draws into. */
  kind?: string;
  /** Keys of State whose change redraws it. The axis and the theme redraw everything. */
  uses?: string[];
  /** Whether there is anything to say; else the card is hidden. */
  shown?(): boolean;
  /** Whether there is data; else `missing` says what would measure it. */
  has?(): boolean;
  missing?(): string;
  /** Unit and scale, beside the title. */
  sub?(): string;
  /** Buttons: key of State, its value, text, and the value that a second click sets. */
  tabs?(): (string | number)[][];
  tabsName?: string;
  /** The numbers, for "copy CSV". */
  csv?(): string;
  /** Once, before the first drawing. */
  build?(host: HTMLElement): void;
  /** All of it, but what `step` adds, which is called after it. */
  draw?(host: HTMLElement): void;
  /** The cursor moved: only what depends on the step, cheaply. */
  step?(host: HTMLElement): void;
}

/** A chart for any panel whose axes it fits; see charts/panels.js. */
interface PanelChart {
  name: string;
  fits(block: PanelBlock): boolean;
  build?(host: HTMLElement, group: PanelGroup): void;
  draw?(host: HTMLElement, block: PanelBlock): void;
  step?(host: HTMLElement, block: PanelBlock): void;
}
