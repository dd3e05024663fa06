// ---- Lambda: a chart of all blocks, and a slider for the one on show

function buildChart() {
  const values = run.blocks.flatMap((block) => [block.lambda1, block.lambda2]).filter((value) => value !== null);
  find(".vx-lambda").hidden = !values.length;
  if (!values.length) return;
  const [low, high] = [Math.min(0, ...values), Math.max(1, ...values)];
  const part = (value) => (100 * (value - low)) / (high - low);
  const bars = run.blocks.map((block, index) => {
    const title = `Block ${block.label}: ${lambdasOf(block).join(", ") || "no λ"}`;
    const button = make("button", { type: "button", title, onclick: () => show({ block: index }) });
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
  find(".vx-bars").replaceChildren(...bars);
  find(".vx-bars").style.setProperty("--zero", `${part(0)}%`);
  find(".vx-below").hidden = low === 0;
  const ticks = [...new Set([high, ...(high > 1.2 ? [1] : []), 0, ...(low < -0.05 ? [low] : [])])];
  find(".vx-axis").replaceChildren(...ticks.map((value) => {
    const tick = make("span", { textContent: Number.isInteger(value) ? value : value.toFixed(1).replace("-", "−") });
    tick.style.bottom = `${part(value)}%`;
    return tick;
  }));
}

function drawWhatIf() {
  const own = info()[`lambda${stage()}`];
  const name = ["λ₁", "λ₂"][stage() - 1];
  const possible = mode() !== "effective" && own !== null;
  find(".vx-what-if").hidden = own === null && mode() !== "effective";
  slider.disabled = !possible;
  slider.value = whatIf ?? own ?? 0;
  find(".vx-what-if label span").textContent = possible ? `What if ${name} of block ${info().label} were` : "What if λ were different?";
  find(".vx-what-if output").textContent = possible ? hundredths(Number(slider.value)) : "";
  find(".vx-what-if button").disabled = whatIf === null;
  const differential = ["D₁", "D₂"][stage() - 1];
  find(".vx-what-if p").textContent = possible
    ? `This redraws the map ${differential} only. The model ran with ${name} = ${thousandths(own)}; its answer does not change.`
    : "Choose Stage I or Stage II. E also holds row factors that the model computed with its own λ, so it cannot be redrawn here.";
}

slider.oninput = () => show({ stream: "differential" }, Number(slider.value));
find(".vx-what-if button").onclick = () => show({}, null);

// ---- Controls

function drawControls() {
  const heads = ["mean", ...Array.from({ length: info().heads }, (_, head) => head + 1)];
  choices(find(".vx-blocks"), run.blocks.map(({ label }) => label), state.block, (block) => show({ block }));
  choices(find(".vx-heads"), heads, state.head + 1, (i) => show({ head: i - 1 }));
  for (const button of find(".vx-modes").children) {
    button.disabled = !modesOf(info()).includes(button.dataset.mode);
    press(button, button.dataset.mode === mode());
  }
  for (const button of find(".vx-scales").children) press(button, button.dataset.scale === state.scale);
  for (const panel of panels) press(panel.querySelector("button"), panel.dataset.stream === streamOf(state.block));
  strip.forEach((buttons, block) => buttons.forEach((button, i) => press(button, block === state.block && i - 1 === state.head)));
  [...find(".vx-bars").children].forEach((button, block) => press(button, block === state.block));
  drawWhatIf();
}

// Shows another view. Another lambda is kept while block and map stay.
function show(change, lambda = whatIf) {
  const before = `${state.block} ${state.mode}`;
  Object.assign(state, change);
  state.block = clamp(state.block, 0, run.blocks.length - 1);
  state.head = clamp(state.head, MEAN, run.blocks[state.block].heads - 1);
  const moved = before !== `${state.block} ${state.mode}`;
  whatIf = moved ? null : lambda;
  if (moved) hover = null;
  draw();
  writeLink();
}

// Neighbouring blocks of one grid and number of heads stand together: the stages of a pyramid.
function buildStrip() {
  const groups = [];
  run.blocks.forEach((facts, block) => {
    const like = (other) => `${other.grid} ${other.heads}`;
    if (!groups.length || like(run.blocks[groups.at(-1)[0]]) !== like(facts)) groups.push([]);
    groups.at(-1).push(block);
  });
  strip = run.blocks.map(() => []);
  const label = (textContent) => make("span", { textContent });
  find(".vx-groups").replaceChildren(...groups.map((blocks) => {
    const facts = run.blocks[blocks[0]];
    const grid = make("div", { className: "vx-strip-grid" });
    const widest = groups.length === 1 ? 92 : facts.heads > 8 ? 44 : 64;
    grid.style.gridTemplateColumns = `2.8em repeat(${blocks.length}, minmax(40px, ${widest}px))`;
    grid.append(label(""), ...blocks.map((block) => label(run.blocks[block].label)));
    for (let head = MEAN; head < facts.heads; head++) {
      grid.append(label(head === MEAN ? "mean" : head + 1), ...blocks.map((block) => cell(block, head)));
    }
    if (groups.length === 1) return grid;
    const group = make("div");
    group.append(make("h3", { textContent: `${facts.grid.join(" × ")} patches` }), grid);
    return group;
  }));
}

function cell(block, head) {
  const button = make("button", { type: "button", title: `Block ${run.blocks[block].label}, ${nameOfHead(head)}` });
  const canvas = make("canvas");
  canvas.style.aspectRatio = photo.naturalWidth / photo.naturalHeight;
  button.append(canvas);
  button.setAttribute("aria-label", button.title);
  button.onclick = () => show({ block, head });
  strip[block].push(button);
  return button;
}

function moveQuery(right, down) {
  const queries = lattice("query");
  const { x, y, prefix } = state.query;
  const [rows, cols] = queries.size;
  if (prefix !== null && prefix < queries.prefix) {
    return show({ query: { x, y: down > 0 ? 0 : y, prefix: down > 0 ? null : clamp(prefix + right, 0, queries.prefix - 1) } });
  }
  let [r, c] = cellAt(info(), queries, state.query);
  if (down < 0 && r === 0 && queries.prefix) return show({ query: { x, y, prefix: 0 } });
  r = clamp(r + down, 0, rows - 1);
  c = clamp(c + right, 0, cols - 1);
  const [left, top, rightEdge, bottom] = outline(info(), queries, queries.prefix + r * cols + c);
  show({ query: { x: (left + rightEdge) / 2, y: (top + bottom) / 2, prefix: null } });
}

const KEYS = {
  ArrowLeft: () => moveQuery(-1, 0),
  ArrowRight: () => moveQuery(1, 0),
  ArrowUp: () => moveQuery(0, -1),
  ArrowDown: () => moveQuery(0, 1),
  "[": () => show({ block: state.block - 1 }),
  "]": () => show({ block: state.block + 1 }),
  ",": () => show({ head: state.head - 1 }),
  ".": () => show({ head: state.head + 1 }),
};

root.addEventListener("keydown", (event) => {
  if (!current || !KEYS[event.key] || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.target === slider && event.key.startsWith("Arrow")) return;
  event.preventDefault();
  KEYS[event.key]();
});

for (const button of find(".vx-modes").children) button.onclick = () => show({ mode: button.dataset.mode });
for (const button of find(".vx-scales").children) button.onclick = () => show({ scale: button.dataset.scale });
for (const panel of panels) panel.querySelector("button").onclick = () => show({ stream: panel.dataset.stream });
for (const canvas of [large, ...panels.map((panel) => panel.querySelector("canvas"))]) {
  const under = (event) => pointUnder(canvas, event, layout(canvas, info(), aspect(), canvas === large));
  canvas.addEventListener("click", (event) => {
    const point = current && under(event);
    if (!point || (point.prefix !== null && !lattice("query").prefix)) return;
    show({ query: point.prefix === null ? point : { ...state.query, prefix: point.prefix } });
  });
  canvas.addEventListener("pointermove", (event) => {
    if (!current) return;
    const point = under(event);
    const outside = !point || (point.prefix !== null && !lattice("key").prefix);
    const key = outside ? null : indexAt(info(), lattice("key"), point);
    if (key === hover) return;
    hover = key;
    drawPanels();
  });
  canvas.addEventListener("pointerleave", () => {
    hover = null;
    if (current) drawPanels();
  });
}
