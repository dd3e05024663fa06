// Two models under one query. `props.value` is what compare.py sent (JSON): two sides, each a run like the explorer's;
// of generators also a film, the steps and pictures that can be looked into. The query is a point of the photo, so that
// it means the same in models that see different parts of it. The functions are those of maps.js.

const root = element.querySelector(".vc");
const find = (selector) => root.querySelector(selector);
const colours = colourTables(props.palette);

const state = { mode: "effective", stream: "differential", depth: Infinity, head: MEAN, scale: "shared", query: { x: 0.5, y: 0.5, prefix: null } };
let pair = null; // as received
let sides = []; // of both models: { run, photo, layers, rows, root }
let isStopped = false; // by the visitor, while pictures were made
let ask = ""; // what is said to who has not asked for pictures yet
let film = null; // of generators: what is shown of pair.film, { step, picture, withoutClass }, the step as an index
const sections = [...root.querySelectorAll(".vc-side")];
const range = find(".vv-timeline input");

// ---- Data

async function receive() {
  const received = props.value ? JSON.parse(props.value) : null;
  if (isStopped && received?.steps) return; // sent before the server knew
  isStopped = false;
  ask = received?.note ?? ask;
  pair = received?.sides ? received : null;
  sides = [];
  root.dataset.state = pair ? "loading" : received?.working ? "working" : "empty";
  find(".vc-body").hidden = !pair;
  if (received?.working) return work(received);
  if (!pair) return note(received?.problem ?? received?.note ?? EMPTY, { style: received?.problem ? "vv-problem" : "" });
  state.depth = Math.min(state.depth, depths() - 1);
  film = pair.film.token ? { step: pair.film.steps.length - 1, picture: 0, withoutClass: false } : null;
  range.max = film ? film.step : 0;
  writeFilm();
  writeFacts();
  drawLambdas();
  measure(pair);
  await open(pair);
}

// Shows the sides of the pair, as they were sent first or for another step or picture.
async function open(mine) {
  const runs = mine.sides;
  const isShown = () => pair === mine && mine.sides === runs;
  root.dataset.state = "loading";
  note("");
  const opened = runs.map((run, i) => ({ run, photo: Object.assign(new Image(), { src: run.image }), layers: [], rows: null, root: sections[i] }));
  await Promise.all(opened.map(({ photo }) => photo.decode()));
  if (!isShown()) return;
  sides = opened;
  sides.forEach(writeSide);
  drawControls();
  const arrived = await Promise.all(sides.map((side) => fetchSide(side, isShown)));
  if (!isShown()) return;
  if (arrived.includes("expired")) return forgotten();
  if (arrived.includes("lost")) return note("The server does not answer.", { style: "vv-above", button: film ? null : ".vc-again" });
  root.dataset.state = "complete";
}

// What the server is about: the name of a model and its steps, or that it will start.
function work({ working, step, steps }) {
  note(steps ? `Pictures of ${working}` : working, { button: ".vc-stop" });
  find(".vv-note progress").hidden = !steps;
  Object.assign(find(".vv-note progress"), { value: step ?? 0, max: steps ?? 1 });
  const mine = props.value;
  if (!steps) setTimeout(() => props.value === mine && !isStopped && note("Waiting for the pictures of other visitors …", { button: ".vc-stop" }), 2000);
}

function forgotten() {
  if (film) return note("These pictures are no longer kept on the server. Please generate them again.", { style: "vv-above" });
  note("These maps are no longer kept on the server.", { style: "vv-above", button: ".vc-again" });
}

// The maps of every block, those on show first.
async function fetchSide(side, isShown) {
  const { blocks, token } = side.run;
  for (let left = blocks.length; left; left--) {
    const shown = blockOf(side);
    const block = side.layers[shown] ? blocks.findIndex((_, b) => !side.layers[b]) : shown;
    const arrays = await server.fetch_maps({ token, block }).catch(() => ({ lost: true }));
    if (!isShown()) return "";
    if (arrays.expired) return "expired";
    if (arrays.lost) return "lost";
    side.layers[block] = prepare(blocks[block], arrays);
    if (block === blockOf(side)) draw();
  }
  return "";
}

async function measure(mine) {
  const names = mine.sides.map(({ model }) => model);
  for (;;) {
    const answer = await server.measure(names).catch(() => ({ failed: true }));
    if (pair !== mine) return;
    if (!answer.busy) return writeLatency(answer);
    await new Promise((done) => setTimeout(done, 1500));
  }
}

const EMPTY = find(".vv-note span").textContent;
function note(text, { style = "", button = null } = {}) {
  find(".vv-note").hidden = !text;
  find(".vv-note").className = `vv-note ${style}`;
  if (find(".vv-note span").textContent !== text) find(".vv-note span").textContent = text; // a screen reader says it once
  find(".vv-note progress").hidden = true;
  for (const each of find(".vv-note").querySelectorAll("button")) each.hidden = !each.matches(button ?? "none");
}

// ---- Steps and pictures of generators

// Shows another step, picture or branch; of many wishes at once, the last.
async function look(wish) {
  Object.assign(film, wish);
  writeFilm();
  const mine = pair;
  if (mine.isLooking) return;
  mine.isLooking = true;
  for (let asked = {}; pair === mine && Object.keys(film).some((key) => asked[key] !== film[key]); ) {
    asked = { ...film };
    const request = { ...asked, step: mine.film.steps[asked.step], token: mine.film.token };
    const answer = await server.look(request).catch(() => ({ expired: true }));
    if (pair !== mine) break;
    if (answer.expired) {
      forgotten();
      break;
    }
    mine.sides = mine.sides.map((side, i) => ({ ...side, ...answer.sides[i] }));
    await open(mine);
  }
  mine.isLooking = false;
}

function writeFilm() {
  find(".vc-film").hidden = !film;
  if (!film) return;
  const { steps, label, guided } = pair.film;
  const total = steps.at(-1);
  const where = film.step === steps.length - 1 ? "finished; the maps are those of the last step" : `after ${steps[film.step]} of ${total} steps`;
  range.value = film.step;
  range.setAttribute("aria-valuetext", `after ${steps[film.step]} of ${total} steps`);
  find(".vv-says").textContent = `${label}, picture ${film.picture + 1}: ${where}`;
  find(".vv-branch").hidden = !guided;
  find(".vv-branch input").checked = film.withoutClass;
}

// The pictures of a side, from a frame that holds them one below another.
async function drawPictures({ run, root }) {
  const { count, label } = pair.film;
  const pictures = root.querySelector(".vc-pictures");
  if (pictures.children.length !== count) {
    pictures.replaceChildren(...Array.from({ length: count }, (_, i) => {
      const button = make("button", { type: "button", onclick: () => look({ picture: i }) });
      button.append(make("canvas"));
      return button;
    }));
  }
  const frame = Object.assign(new Image(), { src: run.frame });
  await frame.decode();
  const [width, height] = [frame.naturalWidth, frame.naturalHeight / count];
  [...pictures.children].forEach((button, i) => {
    press(button, i === film?.picture);
    button.setAttribute("aria-label", `${run.name}: ${label}, picture ${i + 1}`);
    const canvas = Object.assign(button.firstChild, { width, height });
    canvas.getContext("2d").drawImage(frame, 0, i * height, width, height, 0, 0, width, height);
  });
}

// ---- What a side shows of the common state

const depths = () => Math.max(...pair.sides.map(({ blocks }) => blocks.length));

// The block at the chosen depth: the same number, or, in a model of fewer blocks, the same part of the way through.
function blockOf({ run: { blocks } }) {
  return depths() === 1 ? 0 : Math.round((state.depth * (blocks.length - 1)) / (depths() - 1));
}
const infoOf = (side) => side.layers[blockOf(side)]?.info ?? side.run.blocks[blockOf(side)];
const headOf = (side) => (state.head < infoOf(side).heads ? state.head : MEAN);
const modeOn = (side) => modeOf(infoOf(side), state.mode);
const streamOn = (side) => (isSigned(infoOf(side), modeOn(side)) ? state.stream : "positive");

function pointOn({ run: { box: [left, top, right, bottom] } }) {
  const { x, y, prefix } = state.query;
  return { x: clamp((x - left) / (right - left), 0, 0.9999), y: clamp((y - top) / (bottom - top), 0, 0.9999), prefix };
}

function queryAt({ run: { box: [left, top, right, bottom] } }, { x, y, prefix }) {
  return { x: left + x * (right - left), y: top + y * (bottom - top), prefix };
}

// ---- Drawing

function draw() {
  if (!sides.length || !root.clientWidth || !sides.every((side) => side.layers[blockOf(side)])) return;
  for (const side of sides) side.rows = rowsOf(side.layers[blockOf(side)], modeOn(side), headOf(side), pointOn(side));
  drawControls();
  sides.forEach(drawSide);
}

function limitsOf(stream) {
  const own = sides.map((side) => limitOf(side.rows, isSigned(infoOf(side), modeOn(side)) ? stream : "positive"));
  return state.scale === "own" ? own : own.map(() => Math.max(...own));
}

function drawSide(side, i) {
  const [info, mode] = [infoOf(side), modeOn(side)];
  const titles = titlesOf(info, mode);
  const signed = isSigned(info, mode);
  const queries = latticeOf(info, mode, "query");
  const query = nameOf(queries, indexAt(info, queries, pointOn(side)), side.run.prefixNames);
  const head = headOf(side) === MEAN ? `mean of ${info.heads} heads` : `head ${headOf(side) + 1}`;
  const title = titles[streamOn(side)];
  const where = `${title}: block ${blockOf(side) + 1} of ${side.run.blocks.length}, ${head}; ${query}`;
  side.root.querySelector("figcaption").textContent = where;
  const large = side.root.querySelector(".vc-large canvas");
  large.setAttribute("aria-label", `${side.run.name}. ${where}. Arrow keys move the query.`);
  drawCanvas(side, large, streamOn(side), limitsOf(streamOn(side))[i], true);
  for (const figure of side.root.querySelectorAll(".vv-panels figure")) {
    const { stream } = figure.dataset;
    figure.hidden = !signed && stream !== "positive";
    if (figure.hidden) continue;
    const limit = limitsOf(stream)[i];
    const button = figure.querySelector("button");
    button.textContent = titles[stream];
    press(button, stream === streamOn(side));
    figure.querySelector("canvas").setAttribute("aria-label", `${side.run.name}. ${titles[stream]}: map.`);
    figure.querySelector("i").style.background = barOf(props.palette, theme(), stream);
    const marks = stream === "differential" ? [`−${number(limit)}`, "0", `+${number(limit)}`] : ["0", number(limit)];
    figure.querySelector("p").replaceChildren(...marks.map((textContent) => make("span", { textContent })));
    drawCanvas(side, figure.querySelector("canvas"), stream, limit, false);
  }
}

function drawCanvas(side, canvas, stream, limit, isLarge) {
  drawMap(canvas, {
    info: infoOf(side),
    mode: modeOn(side),
    aspect: side.photo.naturalHeight / side.photo.naturalWidth,
    painted: paint(side.rows[stream], stream, limit, colours[isLarge ? "veil" : theme()]),
    photo: isLarge ? side.photo : null,
    prefixNames: isLarge ? side.run.prefixNames : null,
    point: pointOn(side),
  });
}

// ---- Words and numbers

function writeSide(side) {
  const { run } = side;
  side.root.querySelector("h2").textContent = run.name;
  side.root.querySelector(".vc-top").hidden = Boolean(film);
  side.root.querySelector(".vc-pictures").hidden = !film;
  if (film) return drawPictures(side);
  const top = run.top.map(([label, part]) => {
    const item = make("li");
    item.style.setProperty("--part", `${100 * part}%`);
    item.append(make("span", { textContent: label }), make("span", { textContent: `${(100 * part).toFixed(1)} %` }));
    return item;
  });
  side.root.querySelector(".vc-top").replaceChildren(...top);
}

function writeFacts() {
  const cells = (name, head, texts, scope) => {
    const line = make("tr");
    const first = make(head === null ? "td" : "th", { textContent: head ?? "" });
    if (head !== null) first.scope = "row";
    line.append(first, ...texts.map((textContent) => make(name, scope ? { textContent, scope } : { textContent })));
    return line;
  };
  find(".vc-facts thead").replaceChildren(cells("th", null, pair.sides.map(({ name }) => name), "col"));
  const rows = Object.keys(pair.sides[0].facts);
  find(".vc-facts tbody").replaceChildren(...rows.map((head) => cells("td", head, pair.sides.map(({ facts }) => facts[head]))));
  find(".vc-measured").textContent = "";
}

function writeLatency({ milliseconds, threads }) {
  const cells = [...find(".vc-facts tbody").lastChild.querySelectorAll("td")];
  cells.forEach((cell, i) => (cell.textContent = milliseconds ? `${milliseconds[i].toPrecision(3)} ms` : "not measured"));
  if (!milliseconds) return;
  find(".vc-measured").textContent =
    `Measured now on this server: medians of passes in turns, one image, float32, ${threads} ${threads === 1 ? "thread" : "threads"}. Other visitors' work slows both.`;
}

// λ by depth: circles and a solid line for stage I, squares and a dashed line for stage II.
const CHART = { height: 200, left: 44, right: 12, top: 12, bottom: 34 };
function drawLambdas() {
  const width = Math.min(find(".vc-chart").clientWidth || 640, 760);
  const series = pair.sides.flatMap(({ blocks }, side) =>
    [1, 2].map((stage) => ({ side, stage, values: blocks.map((info) => info[`lambda${stage}`]) })),
  ).filter(({ values }) => values.some((value) => value !== null));
  find(".vc-legend").replaceChildren(...pair.sides.map(({ name }, side) => {
    const item = make("span");
    const label = make("b", { textContent: name });
    label.dataset.side = side;
    const has = series.some((line) => line.side === side);
    item.append(label, has ? ": λ₁ ● solid, λ₂ ■ dashed" : ": no λ");
    return item;
  }));
  if (!series.length) return find(".vc-chart").replaceChildren();
  const all = series.flatMap(({ values }) => values.filter((value) => value !== null));
  const [low, high] = [Math.min(0, ...all), Math.max(0, ...all)];
  const { height, left, right, top, bottom } = CHART;
  const at = (part, value) => [
    left + part * (width - left - right),
    top + ((high - value) / (high - low || 1)) * (height - top - bottom),
  ].map((position) => position.toFixed(1));
  const parts = [low, 0, high].filter((value, i, list) => list.indexOf(value) === i).map((value) => {
    const [x, y] = at(0, value);
    return `<line class="vc-axis" x1="${x}" x2="${width - right}" y1="${y}" y2="${y}" stroke-width="${value === 0 ? 1 : 0.4}"/>
      <text x="${left - 8}" y="${y}" text-anchor="end" dominant-baseline="middle">${value === 0 ? 0 : number(value)}</text>`;
  });
  const style = [...root.querySelectorAll(".vc-side")].map((side) => getComputedStyle(side).getPropertyValue("--side"));
  for (const { side, stage, values } of series) {
    const points = values.flatMap((value, b) => (value === null ? [] : [{ b, value, at: at(values.length === 1 ? 0.5 : b / (values.length - 1), value) }]));
    parts.push(`<polyline fill="none" stroke="${style[side]}" stroke-width="2" ${stage === 2 ? 'stroke-dasharray="5 4"' : ""} points="${points.map((p) => p.at.join(",")).join(" ")}"/>`);
    for (const { b, value, at: [x, y] } of points) {
      const says = `<title>Block ${b + 1} of ${values.length}, λ${"₁₂"[stage - 1]} = ${value.toFixed(3)}</title>`;
      parts.push(stage === 1 ? `<circle cx="${x}" cy="${y}" r="4" fill="${style[side]}">${says}</circle>`
        : `<rect x="${x - 3.5}" y="${y - 3.5}" width="7" height="7" fill="${style[side]}">${says}</rect>`);
    }
  }
  parts.push(`<text x="${left}" y="${height - 8}">first block</text><text x="${width - right}" y="${height - 8}" text-anchor="end">last block</text>`);
  const words = series.map(({ side, stage, values }) => `${side ? "second" : "first"} model, lambda ${stage}: ${values.map((value) => value?.toFixed(3) ?? "none").join(", ")}`);
  const chart = make("div", { innerHTML: `<svg viewBox="0 0 ${width} ${height}" role="img">${parts.join("")}</svg>` }).firstChild;
  chart.setAttribute("aria-label", `Lambda by block. ${words.join(". ")}.`);
  find(".vc-chart").replaceChildren(chart);
}

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
