// The controls of the explorer: buttons, the strip of all heads, keys, the pointer, and lambda.

import { hundredths, lambdasOf, nameOfHead, thousandths } from "./map_words.js";
import { MEAN, indexAt, layout, modesOf, pointUnder } from "./maps.js";
import { choices, listenToKeys, make, moved, press } from "./panel.js";

export function drawControls(view) {
  const { run, info, mode, state, strip } = view;
  const heads = ["mean", ...Array.from({ length: info.heads }, (_, head) => head + 1)];
  choices(view.find(".vx-blocks"), run.blocks.map(({ label }) => label), state.block, (block) => view.show({ block }));
  choices(view.find(".vx-heads"), heads, state.head + 1, (i) => view.show({ head: i - 1 }));
  for (const button of view.find(".vx-modes").children) {
    button.disabled = !modesOf(info).includes(button.dataset.mode);
    press(button, button.dataset.mode === mode);
  }
  for (const button of view.find(".vx-scales").children) press(button, button.dataset.scale === state.scale);
  for (const figure of view.figures) press(figure.querySelector("button"), figure.dataset.stream === view.streamOf(state.block));
  strip.forEach((buttons, block) => buttons.forEach((button, i) => press(button, block === state.block && i - 1 === state.head)));
  [...view.find(".vx-bars").children].forEach((button, block) => press(button, block === state.block));
  drawWhatIf(view);
}

export function listen(view) {
  const slider = view.find(".vx-what-if input");
  slider.oninput = () => view.show({ stream: "differential" }, Number(slider.value));
  view.find(".vx-what-if button").onclick = () => view.show({}, null);
  for (const button of view.find(".vx-modes").children) button.onclick = () => view.show({ mode: button.dataset.mode });
  for (const button of view.find(".vx-scales").children) button.onclick = () => view.show({ scale: button.dataset.scale });
  for (const figure of view.figures) figure.querySelector("button").onclick = () => view.show({ stream: figure.dataset.stream });
  for (const button of view.find(".vx-looks").children) button.onclick = () => view.show({ look: button.dataset.look });
  view.root.addEventListener("keydown", (event) => {
    const isTyped = event.ctrlKey || event.metaKey || event.altKey;
    if (event.key === "c" && !isTyped && view.current) view.show({ look: view.state.look === "cells" ? "smooth" : "cells" });
  });
  view.find(".vx-again").onclick = () => view.trigger("submit");
  for (const canvas of [view.large, ...view.figures.map((figure) => figure.querySelector("canvas"))]) listenToPointer(view, canvas);
  listenToKeys(view.root, {
    isReady: ({ target, key }) => view.current && !(target === slider && key.startsWith("Arrow")),
    query: (_, right, down) => view.show({ query: moved(view.info, view.lattice("query"), view.state.query, right, down) }),
    block: (_, step) => view.show({ block: view.state.block + step }),
    head: (_, step) => view.show({ head: view.state.head + step }),
  });
}

function listenToPointer(view, canvas) {
  const under = (event) => pointUnder(canvas, event, layout(canvas, view.info, view.aspect, canvas === view.large));
  canvas.addEventListener("click", (event) => {
    const point = view.current && under(event);
    if (!point || (point.prefix !== null && !view.lattice("query").prefix)) return;
    view.show({ query: point.prefix === null ? point : { ...view.state.query, prefix: point.prefix } });
  });
  canvas.addEventListener("pointermove", (event) => {
    if (!view.current) return;
    const point = under(event);
    const isOutside = !point || (point.prefix !== null && !view.lattice("key").prefix);
    const key = isOutside ? null : indexAt(view.info, view.lattice("key"), point);
    if (key === view.hover) return;
    view.hover = key;
    view.drawPanels();
  });
  canvas.addEventListener("pointerleave", () => {
    view.hover = null;
    if (view.current) view.drawPanels();
  });
}

// ---- The strip: neighbouring blocks of one grid and number of heads stand together, the stages of a pyramid

export function buildStrip(view) {
  const { blocks } = view.run;
  const groups = [];
  blocks.forEach((facts, block) => {
    const like = (other) => `${other.grid} ${other.heads}`;
    if (!groups.length || like(blocks[groups.at(-1)[0]]) !== like(facts)) groups.push([]);
    groups.at(-1).push(block);
  });
  view.strip = blocks.map(() => []);
  const label = (textContent) => make("span", { textContent });
  view.find(".vx-groups").replaceChildren(...groups.map((members) => {
    const facts = blocks[members[0]];
    const grid = make("div", { className: "vx-strip-grid" });
    const widest = groups.length === 1 ? 92 : facts.heads > 8 ? 44 : 64;
    grid.style.gridTemplateColumns = `2.8em repeat(${members.length}, minmax(40px, ${widest}px))`;
    grid.append(label(""), ...members.map((block) => label(blocks[block].label)));
    for (let head = MEAN; head < facts.heads; head++) {
      grid.append(label(head === MEAN ? "mean" : head + 1), ...members.map((block) => cell(view, block, head)));
    }
    if (groups.length === 1) return grid;
    const group = make("div");
    group.append(make("h3", { textContent: `${facts.grid.join(" × ")} patches` }), grid);
    return group;
  }));
}

function cell(view, block, head) {
  const button = make("button", { type: "button", title: `Block ${view.run.blocks[block].label}, ${nameOfHead(head)}` });
  const canvas = make("canvas");
  canvas.style.aspectRatio = view.photo.naturalWidth / view.photo.naturalHeight;
  button.append(canvas);
  button.setAttribute("aria-label", button.title);
  button.onclick = () => view.show({ block, head });
  view.strip[block].push(button);
  return button;
}

// ---- Lambda: a chart of all blocks, and a slider for the one on show

export function buildChart(view) {
  const { blocks } = view.run;
  const values = blocks.flatMap((block) => [block.lambda1, block.lambda2]).filter((value) => value !== null);
  view.find(".vx-lambda").hidden = !values.length;
  if (!values.length) return;
  const [low, high] = [Math.min(0, ...values), Math.max(1, ...values)];
  const part = (value) => (100 * (value - low)) / (high - low);
  const bars = blocks.map((block, index) => {
    const title = `Block ${block.label}: ${lambdasOf(block).join(", ") || "no λ"}`;
    const button = make("button", { type: "button", title, onclick: () => view.show({ block: index }) });
    button.setAttribute("aria-label", title);
    for (const stage of [1, 2]) {
      const value = block[`lambda${stage}`];
      if (value === null) continue;
      const bar = make("i", { className: value < 0 ? "vx-negative" : "" });
      bar.dataset.stage = stage;
      bar.style.bottom = `${part(Math.min(0, value))}%`;
      bar.style.height = `${Math.max(Math.abs(part(value) - part(0)), 1)}%`;
      button.append(bar);
    }
    button.append(make("span", { textContent: block.label }));
    return button;
  });
  view.find(".vx-bars").replaceChildren(...bars);
  view.find(".vx-bars").style.setProperty("--zero", `${part(0)}%`);
  view.find(".vx-below").hidden = low === 0;
  const ticks = [...new Set([high, ...(high > 1.2 ? [1] : []), 0, ...(low < -0.05 ? [low] : [])])];
  view.find(".vx-axis").replaceChildren(...ticks.map((value) => {
    const tick = make("span", { textContent: Number.isInteger(value) ? value : value.toFixed(1).replace("-", "−") });
    tick.style.bottom = `${part(value)}%`;
    return tick;
  }));
}

function drawWhatIf(view) {
  const { info, mode, stage, whatIf } = view;
  const slider = view.find(".vx-what-if input");
  const own = info[`lambda${stage}`];
  const name = ["λ₁", "λ₂"][stage - 1];
  const isPossible = mode !== "effective" && own !== null;
  view.find(".vx-what-if").hidden = own === null && mode !== "effective";
  slider.disabled = !isPossible;
  slider.value = whatIf ?? own ?? 0;
  view.find(".vx-what-if label span").textContent = isPossible ? `What if ${name} of block ${info.label} were` : "What if λ were different?";
  view.find(".vx-what-if output").textContent = isPossible ? hundredths(Number(slider.value)) : "";
  view.find(".vx-what-if button").disabled = whatIf === null;
  const differential = ["D₁", "D₂"][stage - 1];
  view.find(".vx-what-if p").textContent = isPossible
    ? `This redraws the map ${differential} only. The model ran with ${name} = ${thousandths(own)}; its answer does not change.`
    : "Choose Stage I or Stage II. E also holds row factors that the model computed with its own λ, so it cannot be redrawn here.";
}
