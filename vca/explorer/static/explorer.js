// The explorer. `props.value` is the run that explore.py sent (JSON); the maps of each block come once, from
// `server.fetch_maps`. From then on every click is drawn here, by the functions of maps.js. A saved web page runs this
// file too, on maps that it brings along.

import { buildChart, buildStrip, drawControls, listen } from "./explorer_controls.js";
import { addressOf, listenToLinks, listenToSaving, viewOfLink, writeLink } from "./explorer_saving.js";
import { colorTables, drawMap, overlayBar, paint, raster, theme } from "./map_drawing.js";
import { SCALES, describe, hundredths, lambdasOf, marksOf, meaningOf, nameOfHead, number, ordinal, thousandths, titlesOf } from "./map_words.js";
import { MEAN, clamp, indexAt, isSigned, latticeOf, limitOf, modeOf, nameOf, prepare, rowsOfHeads, total } from "./maps.js";
import { Panel, make, press, writeFigure } from "./panel.js";

const STAGES = ["λ₁", "λ₂"];

export class Explorer extends Panel {
  run = null;
  layers = []; // of maps.js, of each block, once its maps are here
  photo = null;
  strip = []; // strip[block]: head + 1 -> button
  table = []; // table[block]: head + 1 -> the rows of the query
  current = null; // the rows on show: { positive, negative, differential }
  hover = null; // index of the key under the pointer
  whatIf = null; // a lambda to draw the differential of this block with, instead of its own

  constructor(host) {
    super(host, ".vx");
    this.address = addressOf(this.root);
    this.large = this.find(".vx-large canvas");
    this.figures = [...this.root.querySelectorAll(".vv-panels figure")];
    this.colors = colorTables(this.props.palette);
    this.state = {
      mode: "effective",
      stream: "differential",
      block: Infinity,
      head: MEAN,
      scale: "map",
      look: "cells",
      query: { x: 0.5, y: 0.5, prefix: null },
      ...this.props.view,
      ...viewOfLink(),
    };
  }

  async receive() {
    const received = this.props.value ? JSON.parse(this.props.value) : null;
    if (this.isRepeated(received)) return;
    if (received?.stale) {
      this.run = this.current = null;
      return this.expire();
    }
    const run = received?.token ? received : null;
    this.isStale = false;
    this.run = run;
    this.layers = [];
    this.table = [];
    this.current = this.whatIf = null;
    this.root.dataset.state = run ? "loading" : "empty";
    this.find(".vx-body").hidden = !run;
    if (!run) return this.note(received?.problem ?? this.hint, { style: received ? "vv-problem" : "" });
    this.note("");
    this.photo = Object.assign(new Image(), { src: run.image });
    await this.photo.decode();
    if (this.run !== run) return;
    this.keepInside();
    buildStrip(this);
    buildChart(this);
    writeLink(this);
    await this.fetchMaps(run);
  }

  // The maps of every block, the one on show first.
  async fetchMaps(run) {
    const { state, layers } = this;
    for (let left = run.blocks.length; left; left--) {
      const block = layers[state.block] ? run.blocks.findIndex((_, b) => !layers[b]) : state.block;
      const arrays = await this.server.fetch_maps({ token: run.token, block }).catch(() => ({ lost: true }));
      if (this.run !== run) return;
      if (arrays.expired || arrays.lost) return this.noteLoss(arrays);
      layers[block] = prepare(run.blocks[block], arrays);
      if (block === state.block) this.draw();
      else if (this.table.length) {
        this.compute(block);
        this.drawStrip([block]);
      }
    }
    if (state.scale === "all") this.draw();
    this.root.dataset.state = "complete";
    const isLost = document.activeElement === document.body && navigator.userActivation?.hasBeenActive;
    if (isLost) this.large.focus({ preventScroll: true }); // it was on a button of another tab
  }

  noteLoss({ expired }) {
    this.subject = "";
    const text = expired ? "These maps are no longer kept on the server." : "The server does not answer.";
    this.note(text, { style: "vv-above", button: this.run.repeatable ? ".vx-again" : null });
  }

  // ---- The block on show

  get info() {
    return this.layers[this.state.block]?.info ?? this.run.blocks[this.state.block];
  }

  get mode() {
    return modeOf(this.run.blocks[this.state.block], this.state.mode);
  }

  get stage() {
    return this.mode === "stage2" ? 2 : 1;
  }

  get aspect() {
    return this.photo.naturalHeight / this.photo.naturalWidth;
  }

  get headName() {
    return nameOfHead(this.state.head);
  }

  get queryName() {
    const lattice = this.lattice("query");
    return nameOf(lattice, indexAt(this.info, lattice, this.state.query), this.run.prefixNames);
  }

  lattice(side) {
    return latticeOf(this.info, this.mode, side);
  }

  streamOf(block) {
    const info = this.run.blocks[block];
    return isSigned(info, modeOf(info, this.state.mode)) ? this.state.stream : "positive";
  }

  compute(block) {
    const layer = this.layers[block];
    const lambda = block === this.state.block ? (this.whatIf ?? undefined) : undefined;
    this.table[block] = rowsOfHeads(layer, modeOf(layer.info, this.state.mode), this.state.query, lambda);
  }

  // The value of the strongest colour of one map, on the scale chosen.
  limitIn(block, head, stream) {
    const { state, table } = this;
    if (state.scale === "map") return limitOf(table[block][head + 1], stream);
    const sharing = state.scale === "block" ? [table[block]] : table.filter(Boolean);
    return sharing.flat().reduce((most, rows) => Math.max(most, limitOf(rows, stream)), 0);
  }

  limitOf(stream) {
    return this.limitIn(this.state.block, this.state.head, stream);
  }

  keepInside() {
    const { state, run } = this;
    state.block = clamp(state.block, 0, run.blocks.length - 1);
    state.head = clamp(state.head, MEAN, run.blocks[state.block].heads - 1);
  }

  // Shows another view. Another lambda is kept while block and map stay.
  show(change, lambda = this.whatIf) {
    const { state } = this;
    const before = `${state.block} ${state.mode}`;
    Object.assign(state, change);
    this.keepInside();
    const isOther = before !== `${state.block} ${state.mode}`;
    this.whatIf = isOther ? null : lambda;
    if (isOther) this.hover = null;
    this.draw();
    writeLink(this);
  }

  // ---- Drawing

  draw() {
    const { run, layers, table, state } = this;
    if (!run || !layers[state.block] || !this.root.clientWidth) return;
    const start = performance.now();
    const ready = run.blocks.map((_, block) => block).filter((block) => layers[block]);
    ready.forEach((block) => this.compute(block));
    this.current = table[state.block][state.head + 1];
    if (this.hover !== null && this.hover >= this.current.positive.length) this.hover = null;
    drawControls(this);
    this.drawWords();
    this.drawPanels();
    this.drawStrip(ready);
    this.root.dataset.drawMs = (performance.now() - start).toFixed(2);
  }

  drawPanels() {
    this.drawCanvas(this.large, this.streamOf(this.state.block));
    for (const figure of this.figures) if (!figure.hidden) this.drawCanvas(figure.querySelector("canvas"), figure.dataset.stream);
    this.drawHover();
  }

  drawCanvas(canvas, stream) {
    const isLarge = canvas === this.large;
    drawMap(canvas, {
      info: this.info,
      mode: this.mode,
      aspect: this.aspect,
      painted: paint(this.current[stream], stream, this.limitOf(stream), this.colors[isLarge ? "veil" : theme()]),
      photo: isLarge ? this.photo : null,
      prefixNames: isLarge ? this.run.prefixNames : null,
      point: this.state.query,
      hover: this.hover,
      isSmooth: isLarge && this.state.look === "smooth",
    });
  }

  drawStrip(blocks) {
    for (const block of blocks) {
      const [stream, { info }] = [this.streamOf(block), this.layers[block]];
      this.strip[block].forEach((button, i) => {
        const painted = paint(this.table[block][i][stream], stream, this.limitIn(block, i - 1, stream), this.colors[theme()]);
        raster(button.firstChild, info, modeOf(info, this.state.mode), painted);
      });
    }
  }

  drawWords() {
    const { info, mode, state, whatIf } = this;
    const titles = titlesOf(info, mode);
    const signed = isSigned(info, mode);
    this.find(".vx-says").textContent = meaningOf(info, mode);
    this.find(".vx-query").textContent = this.queryName;
    this.find(".vx-kind").textContent = describe(info);
    this.find(".vx-lambdas").textContent = `block ${info.label}: ${lambdasOf(info).join(", ") || "none"}`;
    [this.find(".vx-term").textContent, this.find(".vx-caption").textContent] = this.run.caption;
    for (const figure of this.figures) {
      const { stream } = figure.dataset;
      figure.hidden = !signed && stream !== "positive";
      if (figure.hidden) continue;
      const title = titles[stream];
      const label = `${title}: ${this.summary(stream)} Arrow keys move the query.`;
      writeFigure(figure, { title, label, stream, limit: this.limitOf(stream), palette: this.props.palette });
      figure.querySelector("button").title = `Show “${title}” over the image`;
      figure.querySelector(".vx-sum").textContent = this.sumOf(stream);
    }
    const title = titles[signed ? state.stream : "positive"];
    const shown = `${title}${whatIf === null || state.stream !== "differential" ? "" : ` with λ = ${hundredths(whatIf)}`}`;
    const over = this.streamOf(state.block);
    this.find(".vx-large i").style.background = overlayBar(this.props.palette, over === "differential", over === "negative");
    this.find(".vx-large .vv-marks").replaceChildren(...marksOf(over, this.limitOf(over)).map((textContent) => make("span", { textContent })));
    for (const button of this.find(".vx-looks").children) press(button, button.dataset.look === state.look);
    this.find(".vx-large figcaption").textContent = `${shown} over the image: the stronger the colour, the larger the value.`;
    this.large.setAttribute("aria-label", `${shown} over the image: ${this.summary(this.streamOf(state.block))} Arrow keys move the query.`);
    this.find(".vx-strip h2").textContent = `${title}, of the same query in every head`;
    this.find(".vx-strip > p").textContent = `Heads (rows) by blocks (columns), ${SCALES[state.scale]}. Click one to see it above.`;
  }

  drawHover() {
    const { hover, current } = this;
    this.find(".vx-pointer").textContent = hover === null ? "–" : nameOf(this.lattice("key"), hover, this.run.prefixNames);
    for (const figure of this.figures) {
      const values = current[figure.dataset.stream];
      const rank = hover === null ? 0 : 1 + values.reduce((above, v) => above + (Math.abs(v) > Math.abs(values[hover])), 0);
      const seen = values.reduce((count, v) => count + !Number.isNaN(v), 0);
      const words = () => (Number.isNaN(values[hover]) ? "outside the window" : `${number(values[hover])} · ${ordinal(rank)} of ${seen}`);
      figure.querySelector(".vx-value").textContent = hover === null ? "" : words();
    }
  }

  sumOf(stream) {
    const { info, whatIf } = this;
    const values = this.current[stream];
    const sum = total(values);
    if (this.mode === "effective" && stream === "negative" && sum === 0) return "pushes nothing away";
    const lambda = whatIf ?? info[`lambda${this.stage}`];
    if (info.patches && info.slots > values.reduce((seen, v) => seen + !Number.isNaN(v), 0)) {
      return `row sum ${sum.toFixed(3)}, the rest on padding`;
    }
    const isRest = stream === "differential" && this.mode !== "effective" && Math.abs(1 - lambda - sum) < 0.002;
    return `row sum ${thousandths(sum)}${isRest ? ` = 1 − ${whatIf === null ? STAGES[this.stage - 1] : "λ"}` : ""}`;
  }

  // A map in words, for those who do not see it.
  summary(stream) {
    const values = this.current[stream];
    const strongest = values.reduce((best, v, i) => (Number.isNaN(values[best]) || Math.abs(v) > Math.abs(values[best]) ? i : best), 0);
    const where = nameOf(this.lattice("key"), strongest, this.run.prefixNames);
    return `block ${this.info.label}, ${this.headName}, query ${this.queryName}; strongest at ${where}, ${number(values[strongest])}.`;
  }
}

export function mount(host) {
  const view = new Explorer(host);
  const { root, state } = view;
  listen(view);
  listenToLinks(view);
  listenToSaving(view);
  host.watch("value", () => view.receive());
  root.explorer = { state, get rows() { return view.current; } };
  view.receive();
}
