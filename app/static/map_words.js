// ---- Words

const number = (value) => (value === 0 ? "0" : Math.abs(value) < 0.001 ? value.toExponential(1) : value.toPrecision(3)).replace("-", "−");
const ordinal = (n) => n + (n % 100 > 10 && n % 100 < 14 ? "th" : (["th", "st", "nd", "rd"][n % 10] ?? "th"));

// What the streams of a map are called; a map without a negative part has one name.
function titlesOf(info, mode) {
  if (isSigned(info, mode)) return TITLES[mode];
  return { positive: info.streams[1] ? { effective: "Effective E", stage1: "Attention A₁", stage2: "Attention A₂" }[mode] : "Attention A" };
}

const TITLES = {
  effective: { positive: "Draws in", negative: "Pushes away", differential: "Effective E" },
  stage1: { positive: "Positive A₁⁺", negative: "Negative A₁⁻", differential: "Differential D₁" },
  stage2: { positive: "Positive A₂⁺", negative: "Negative A₂⁻", differential: "Differential D₂" },
};

// What a map says, in a sentence or two.
function meaningOf({ kind, streams, tokens, grid, window }, mode) {
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

// ---- The page

const make = (tag, properties) => Object.assign(document.createElement(tag), properties);
const press = (button, pressed) => button.setAttribute("aria-pressed", pressed);

// A row of buttons; kept while their number stays, so that the focus does too.
function choices(container, labels, chosen, choose) {
  if (container.children.length !== labels.length) {
    container.replaceChildren(...labels.map(() => make("button", { type: "button" })));
  }
  labels.forEach((textContent, i) => {
    press(Object.assign(container.children[i], { textContent, onclick: () => choose(i) }), i === chosen);
  });
}
