// Two models under one query. `props.value` is what compare.py sent (JSON): two sides, each a run like the explorer's;
// of generators also a film, the steps and pictures that can be looked into. The query is a point of the photo, so that
// it means the same in models that see different parts of it.

import { addressOf, drawControls, listen, readLink, writeLink } from "./compare_controls.js";
import { drawLambdas, drawSide, drawWipe, writeFacts, writeLatency, writeSide } from "./compare_drawing.js";
import { colorTables } from "./map_drawing.js";
import { MEAN, clamp, isSigned, limitOf, modeOf, prepare, rowsOf } from "./maps.js";
import { Panel } from "./panel.js";

// One of the two models: its run, its photo, its layers, and the rows on show.
class Side {
  layers = [];
  rows = null;

  constructor(view, run, root) {
    Object.assign(this, { view, run, root, photo: Object.assign(new Image(), { src: run.image }) });
  }

  // The block at the chosen depth: the same number, or, in a model of fewer blocks, the same part of the way through.
  get block() {
    const { depths, state } = this.view;
    return depths === 1 ? 0 : Math.round((state.depth * (this.run.blocks.length - 1)) / (depths - 1));
  }

  get layer() {
    return this.layers[this.block];
  }

  get info() {
    return this.layer?.info ?? this.run.blocks[this.block];
  }

  get head() {
    return this.view.state.head < this.info.heads ? this.view.state.head : MEAN;
  }

  get mode() {
    return modeOf(this.info, this.view.state.mode);
  }

  get stream() {
    return isSigned(this.info, this.mode) ? this.view.state.stream : "positive";
  }

  get aspect() {
    return this.photo.naturalHeight / this.photo.naturalWidth;
  }

  // A map that no query changes, such as a CNN's: it has one row.
  get isFixed() {
    return Boolean(this.run.fixed);
  }

  // The common query as a point of what this model sees, and back.
  get point() {
    if (this.isFixed) return { x: 0, y: 0, prefix: null };
    const [left, top, right, bottom] = this.run.box;
    const { x, y, prefix } = this.view.state.query;
    return { x: clamp((x - left) / (right - left), 0, 0.9999), y: clamp((y - top) / (bottom - top), 0, 0.9999), prefix };
  }

  queryAt({ x, y, prefix }) {
    const [left, top, right, bottom] = this.run.box;
    return { x: left + x * (right - left), y: top + y * (bottom - top), prefix };
  }

  limitOf(stream) {
    return limitOf(this.rows, isSigned(this.info, this.mode) ? stream : "positive");
  }
}

export class Comparison extends Panel {
  state = { mode: "effective", stream: "differential", depth: Infinity, head: MEAN, scale: "shared", query: { x: 0.5, y: 0.5, prefix: null } };
  pair = null; // as received
  sides = [];
  isStopped = false; // by the visitor, while pictures were made
  ask = ""; // what is said to who has not asked for pictures yet
  film = null; // of generators: what is shown of pair.film, { step, picture, withoutClass }, the step as an index

  constructor(host) {
    super(host, ".vc");
    this.colors = colorTables(this.props.palette);
    this.sections = [...this.root.querySelectorAll(".vc-side")];
    this.range = this.find(".vv-timeline input");
    this.address = addressOf(this.root);
    readLink(this);
  }

  get depths() {
    return Math.max(...this.pair.sides.map(({ blocks }) => blocks.length));
  }

  // The sides that the query, block and head are asked of.
  get asked() {
    return this.sides.filter((side) => !side.isFixed);
  }

  // ---- Data

  async receive() {
    const received = this.props.value ? JSON.parse(this.props.value) : null;
    if (this.isRepeated(received)) return;
    if (received?.stale) {
      this.pair = null;
      this.sides = [];
      return this.expire();
    }
    this.isStale = false;
    if (this.isStopped && (received?.steps || received?.failed)) return; // sent before the server knew, or because of it
    this.isStopped = false;
    this.ask = received?.note ?? this.ask;
    const pair = received?.sides ? received : null;
    this.pair = pair;
    this.sides = [];
    this.root.dataset.state = pair ? "loading" : received?.working ? "working" : "empty";
    this.find(".vc-body").hidden = !pair;
    if (received?.working) return this.noteWork(received);
    if (!pair) return this.note(received?.problem ?? received?.note ?? this.hint, { style: received?.problem ? "vv-problem" : "" });
    this.state.depth = Math.min(this.state.depth, this.depths - 1);
    this.film = pair.film.token ? { step: pair.film.steps.length - 1, picture: 0, withoutClass: false } : null;
    this.range.max = this.film ? this.film.step : 0;
    this.writeFilm();
    for (const section of this.root.querySelectorAll(".vc-lambdas, .vc-numbers")) section.hidden = Boolean(pair.isOneModel);
    if (!pair.isOneModel) {
      writeFacts(this);
      drawLambdas(this);
      this.measure(pair);
    }
    await this.open(pair);
  }

  // Shows the sides of the pair, as they were sent first or for another step or picture.
  async open(pair) {
    const runs = pair.sides;
    const isShown = () => this.pair === pair && pair.sides === runs;
    this.root.dataset.state = "loading";
    this.note("");
    const opened = runs.map((run, i) => new Side(this, run, this.sections[i]));
    await Promise.all(opened.map(({ photo }) => photo.decode()));
    if (!isShown()) return;
    this.sides = opened;
    this.sides.forEach(writeSide);
    drawControls(this);
    const arrived = await Promise.all(this.sides.map((side) => this.fetchMaps(side, isShown)));
    if (!isShown()) return;
    if (arrived.some(Boolean)) this.subject = "";
    if (arrived.includes("expired")) return this.noteForgotten();
    if (arrived.includes("lost")) return this.note("The server does not answer.", { style: "vv-above", button: this.film ? null : ".vc-again" });
    this.root.dataset.state = "complete";
  }

  // The maps of every block of a side, those on show first.
  async fetchMaps(side, isShown) {
    const { blocks, token } = side.run;
    for (let left = blocks.length; left; left--) {
      const block = side.layer ? blocks.findIndex((_, b) => !side.layers[b]) : side.block;
      const arrays = await this.server.fetch_maps({ token, block }).catch(() => ({ lost: true }));
      if (!isShown()) return "";
      if (arrays.expired) return "expired";
      if (arrays.lost) return "lost";
      side.layers[block] = prepare(blocks[block], arrays);
      if (block === side.block) this.draw();
    }
    return "";
  }

  async measure(pair) {
    const names = pair.sides.map(({ model }) => model);
    for (;;) {
      const answer = await this.server.measure(names).catch(() => ({ failed: true }));
      if (this.pair !== pair) return;
      if (!answer.busy) return writeLatency(this, answer);
      await new Promise((done) => setTimeout(done, 1500));
    }
  }

  // What the server is about: the name of a model and its steps, or that it will start.
  noteWork({ working, step, steps }) {
    this.note(steps ? `Pictures of ${working}` : working, { button: ".vc-stop" });
    this.find(".vv-note progress").hidden = !steps;
    Object.assign(this.find(".vv-note progress"), { value: step ?? 0, max: steps ?? 1 });
    if (steps) return;
    const { value } = this.props;
    const isWaiting = () => this.props.value === value && !this.isStopped;
    setTimeout(() => isWaiting() && this.note("Waiting for the pictures of other visitors …", { button: ".vc-stop" }), 2000);
  }

  noteForgotten() {
    if (this.film) return this.note("These pictures are no longer kept on the server. Please generate them again.", { style: "vv-above" });
    this.note("These maps are no longer kept on the server.", { style: "vv-above", button: ".vc-again" });
  }

  stop() {
    this.trigger("stop");
    this.isStopped = true;
    this.root.dataset.state = "empty";
    this.note(this.ask);
  }

  // ---- Steps and pictures of generators

  // Shows another step, picture or branch; of many wishes at once, the last.
  async look(wish) {
    const { film, pair } = this;
    Object.assign(film, wish);
    this.writeFilm();
    if (pair.isLooking) return;
    pair.isLooking = true;
    for (let asked = {}; this.pair === pair && Object.keys(film).some((key) => asked[key] !== film[key]); ) {
      asked = { ...film };
      const request = { ...asked, step: pair.film.steps[asked.step], token: pair.film.token };
      const answer = await this.server.look(request).catch(() => ({ expired: true }));
      if (this.pair !== pair) break;
      if (answer.expired) {
        this.noteForgotten();
        break;
      }
      pair.sides = pair.sides.map((side, i) => ({ ...side, ...answer.sides[i] }));
      await this.open(pair);
    }
    pair.isLooking = false;
  }

  writeFilm() {
    const { film, range } = this;
    this.find(".vc-film").hidden = !film;
    if (!film) return;
    const { steps, label, guided } = this.pair.film;
    const done = `after ${steps[film.step]} of ${steps.at(-1)} steps`;
    const where = film.step === steps.length - 1 ? "finished; the maps are those of the last step" : done;
    range.value = film.step;
    range.setAttribute("aria-valuetext", done);
    this.find(".vv-says").textContent = `${label}, picture ${film.picture + 1}: ${where}`;
    this.find(".vv-branch").hidden = !guided;
    this.find(".vv-branch input").checked = film.withoutClass;
  }

  // ---- What is on show

  show(change) {
    const { state, sides } = this;
    Object.assign(state, change);
    state.depth = clamp(state.depth, 0, this.depths - 1);
    state.head = clamp(state.head, MEAN, Math.max(...sides.map((side) => side.info.heads)) - 1);
    this.draw();
  }

  draw() {
    const { sides } = this;
    if (!sides.length || !this.root.clientWidth || !sides.every((side) => side.layer)) return;
    for (const side of sides) side.rows = rowsOf(side.layer, side.mode, side.head, side.point);
    drawControls(this);
    sides.forEach(drawSide);
    drawWipe(this);
    writeLink(this);
  }

  // The value of the strongest colour in the maps of a side, on the scale chosen.
  limitOf(side, stream) {
    if (this.state.scale === "own" || side.isFixed) return side.limitOf(stream);
    return Math.max(...this.asked.map((each) => each.limitOf(stream)));
  }
}

export function mount(host) {
  const view = new Comparison(host);
  const { root, state } = view;
  listen(view);
  host.watch("value", () => view.receive());
  root.compare = {
    state,
    get sides() { return view.sides; },
    get film() { return view.film; },
    get isIdle() { return !view.pair?.isLooking; },
  };
  view.receive();
}
