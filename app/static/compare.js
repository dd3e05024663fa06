// Two models under one query. `props.value` is what compare.py sent (JSON): two sides, each a run like the explorer's;
// of generators also a film, the steps and pictures that can be looked into. The query is a point of the photo, so that
// it means the same in models that see different parts of it. The functions are those of maps.js.

const root = element.querySelector(".vc");
const find = (selector) => root.querySelector(selector);
const colors = colorTables(props.palette);

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
