import { MEAN, isSigned } from "./maps.js";

// ---- Words

export const number = (value) => (value === 0 ? "0" : Math.abs(value) < 0.001 ? value.toExponential(1) : value.toPrecision(3)).replace("-", "−");
export const ordinal = (n) => n + (n % 100 > 10 && n % 100 < 14 ? "th" : (["th", "st", "nd", "rd"][n % 10] ?? "th"));

// What the streams of a map are called; a map without a negative part has one name.
export function titlesOf(info, mode) {
  if (isSigned(info, mode)) return TITLES[mode];
  return { positive: info.streams[1] ? { effective: "Effective E", stage1: "Attention A₁", stage2: "Attention A₂" }[mode] : "Attention A" };
}

const TITLES = {
  effective: { positive: "Draws in", negative: "Pushes away", differential: "Effective E" },
  stage1: { positive: "Positive A₁⁺", negative: "Negative A₁⁻", differential: "Differential D₁" },
  stage2: { positive: "Positive A₂⁺", negative: "Negative A₂⁻", differential: "Differential D₂" },
};

// What a map says, in a sentence or two.
export function meaningOf({ kind, streams, tokens, grid, window }, mode) {
  const [first, second] = streams.map((count, i) => (count === 2 ? ["D₁", "D₂"] : ["A₁", "A₂"])[i]);
  if (mode === "effective" && Math.max(...streams) === 2) {
    const formula = streams[1] ? `diag(r₂) ${second} diag(r₁) ${first}` : `diag(r₁) ${first}`;
    return `What the boxed patch draws in (orange) or pushes away (blue)${streams[1] ? ", both stages in one" : ""}: E = ${formula}, exactly.`;
  }
  if (mode === "effective" && streams[1]) return `What the boxed patch draws in, both stages in one: E = ${second} ${first}, exactly.`;
  if (mode === "effective") return (String(window) !== String(grid) && PLAIN[kind]) || PLAIN.mhsa;
  if (mode === "stage2") {
    return `Which contrast tokens the boxed patch reads, each painted as its cell.${streams[1] === 2 ? " D₂ = A₂⁺ − λ₂ A₂⁻." : ""}`;
  }
  const whose = tokens
    ? "Where the boxed contrast token looks. The box is the cell of patches whose queries were averaged into it."
    : "Where the boxed patch looks.";
  return whose + (streams[0] === 2 ? " D₁ = A₁⁺ − λ₁ A₁⁻." : "");
}

const PLAIN = {
  mhsa: "Where the boxed patch looks. Plain self-attention has one map, never negative, and its rows sum to 1.",
  sr: "Where the boxed patch looks. A key is a cell of patches that a convolution reduced to one; the rows sum to 1.",
  window: "Where the boxed patch looks: nowhere but in its window, whose borders are drawn. A shifted window goes on at the opposite edge.",
  stripes: "Where the boxed patch looks: nowhere but in its stripe, whose borders are drawn. Half the heads look up and down, half sideways.",
};

const KINDS = {
  vca: "Visual-Contrast Attention", vca_stage1: "Contrast in Stage I only", vca_stage2: "Contrast in Stage II only",
  mhsa: "Self-attention", mhsa_dwc: "Self-attention and a depthwise convolution", diff: "Differential attention",
  agent: "Agent attention", sr: "Spatial-reduction attention", window: "Window attention", stripes: "Stripe attention",
};

// What a block is: its attention and its grids.
export function describe({ kind, grid, tokens, keys, window }) {
  const parts = [`${grid.join(" × ")} patches`];
  if (tokens) parts.push(`${tokens.join(" × ")} contrast tokens`);
  if (keys) parts.push(`${keys.join(" × ")} reduced keys`);
  if (window && String(window) !== String(grid)) parts.push(`${kind === "stripes" ? "stripes" : "windows"} of ${window.join(" × ")}`);
  return `${KINDS[kind] ?? kind}: ${parts.join(", ")}`;
}

// A probability; small ones with a decimal.
export const percent = (part) => (part < 0.0995 ? `${(100 * part).toFixed(1)} %` : `${Math.round(100 * part)} %`);

export const hundredths = (value) => value.toFixed(2).replace("-", "−");
export const thousandths = (value) => value.toFixed(3).replace("-", "−");

// The lambdas of a block, as far as it has any.
export const lambdasOf = ({ lambda1, lambda2 }) =>
  [["λ₁", lambda1], ["λ₂", lambda2]].filter(([, value]) => value !== null).map(([name, value]) => `${name} = ${thousandths(value)}`);

export const nameOfHead = (head) => (head === MEAN ? "mean of heads" : `head ${head + 1}`);

// The numbers below a colour bar.
export const marksOf = (stream, limit) => (stream === "differential" ? [`−${number(limit)}`, "0", `+${number(limit)}`] : ["0", number(limit)]);

export const SCALES = {
  map: "each map on a scale of its own",
  block: "the maps of a block on one scale",
  all: "all maps on one scale",
};
