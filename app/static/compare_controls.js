// ---- Controls

function drawControls() {
  const infos = sides.map(infoOf);
  const equal = pair.sides[0].blocks.length === pair.sides[1].blocks.length;
  const heads = Math.max(...infos.map(({ heads }) => heads));
  find(".vc-depth").textContent = equal ? "Block" : "Depth";
  choices(find(".vc-blocks"), Array.from({ length: depths() }, (_, i) => i + 1), state.depth, (depth) => show({ depth }));
  choices(find(".vc-heads"), ["mean", ...Array.from({ length: heads }, (_, i) => i + 1)], state.head + 1, (i) => show({ head: i - 1 }));
  for (const button of find(".vc-modes").children) {
    button.disabled = !infos.some((info) => modesOf(info).includes(button.dataset.mode));
    press(button, button.dataset.mode === (infos.some((info) => modesOf(info).includes(state.mode)) ? state.mode : "effective"));
  }
  for (const button of find(".vc-scales").children) press(button, button.dataset.scale === state.scale);
}

function show(change) {
  Object.assign(state, change);
  state.depth = clamp(state.depth, 0, depths() - 1);
  state.head = clamp(state.head, MEAN, Math.max(...sides.map((side) => infoOf(side).heads)) - 1);
  draw();
}

// Moves the query by one cell of a side.
function moveQuery(side, right, down) {
  const info = infoOf(side);
  const lattice = latticeOf(info, modeOn(side), "query");
  const point = pointOn(side);
  if (lattice.prefix && point.prefix !== null && point.prefix < lattice.prefix) {
    const next = down > 0 ? { ...point, y: 0, prefix: null } : { ...point, prefix: clamp(point.prefix + right, 0, lattice.prefix - 1) };
    return show({ query: queryAt(side, next) });
  }
  const [r, c] = cellAt(info, lattice, point);
  if (down < 0 && r === 0 && lattice.prefix) return show({ query: queryAt(side, { ...point, prefix: 0 }) });
  const [row, column] = [clamp(r + down, 0, lattice.size[0] - 1), clamp(c + right, 0, lattice.size[1] - 1)];
  const [left, top, rightEdge, bottom] = outline(info, lattice, lattice.prefix + row * lattice.size[1] + column);
  show({ query: queryAt(side, { x: (left + rightEdge) / 2, y: (top + bottom) / 2, prefix: null }) });
}

const KEYS = {
  ArrowLeft: (side) => moveQuery(side, -1, 0),
  ArrowRight: (side) => moveQuery(side, 1, 0),
  ArrowUp: (side) => moveQuery(side, 0, -1),
  ArrowDown: (side) => moveQuery(side, 0, 1),
  "[": () => show({ depth: state.depth - 1 }),
  "]": () => show({ depth: state.depth + 1 }),
  ",": () => show({ head: state.head - 1 }),
  ".": () => show({ head: state.head + 1 }),
};

root.addEventListener("keydown", (event) => {
  if (!sides.length || !KEYS[event.key] || event.ctrlKey || event.metaKey || event.altKey) return;
  event.preventDefault();
  const side = sides.find((each) => each.root.contains(event.target)) ?? sides[0];
  KEYS[event.key](side);
});

function listen(i, canvas) {
  canvas.onclick = (event) => {
    const side = sides[i];
    if (!side?.rows) return;
    const named = canvas.parentElement.matches(".vc-large") ? side.run.prefixNames : null;
    const place = layout(canvas, infoOf(side), side.photo.naturalHeight / side.photo.naturalWidth, named);
    const point = pointUnder(canvas, event, place);
    const { prefix } = latticeOf(infoOf(side), modeOn(side), "query");
    if (point && (point.prefix === null || point.prefix < prefix)) show({ query: queryAt(side, point) });
  };
}

sections.forEach((section, i) => {
  listen(i, section.querySelector(".vc-large canvas"));
  section.querySelector(".vv-panels").replaceChildren(...STREAMS.map((stream) => {
    const figure = make("figure");
    figure.dataset.stream = stream;
    const canvas = make("canvas");
    canvas.setAttribute("role", "img");
    figure.append(make("button", { type: "button", onclick: () => show({ stream }) }), canvas, make("i"), make("p", { className: "vv-marks" }));
    listen(i, canvas);
    return figure;
  }));
});

for (const button of find(".vc-modes").children) button.onclick = () => show({ mode: button.dataset.mode });
for (const button of find(".vc-scales").children) button.onclick = () => show({ scale: button.dataset.scale });
find(".vc-again").onclick = () => trigger("submit");
find(".vc-stop").onclick = () => {
  trigger("stop");
  isStopped = true;
  root.dataset.state = "empty";
  note(ask);
};
range.oninput = () => look({ step: Number(range.value) });
find(".vv-branch input").onchange = (event) => look({ withoutClass: event.target.checked });
const redraw = () => {
  if (!sides.length) return;
  draw();
  drawLambdas();
};
new ResizeObserver(redraw).observe(root);
new MutationObserver(redraw).observe(document.body, { attributes: true, attributeFilter: ["class"] });
watch("value", receive);
root.compare = { state, get sides() { return sides; }, get film() { return film; }, get isIdle() { return !pair?.isLooking; } };
receive();
