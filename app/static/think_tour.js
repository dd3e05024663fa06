// The guided tour: scenes over the photo on show. tour.py writes their sentences; here are their pictures.

import { overlayBar, paint } from "./map_drawing.js";
import { hundredths, percent } from "./map_words.js";
import { clamp, outline } from "./maps.js";
import { make, press } from "./panel.js";
import { decodeRow, doubled, drawOver, gridInfo } from "./think_drawing.js";

const [LOWEST, HIGHEST] = [-1, 1]; // of lambda under the visitor's finger

// The differential row of a lambda.
const contrast = (positive, negative, lambda) => positive.map((value, i) => value - lambda * negative[i]);

const largest = (values) => values.reduce((most, value) => Math.max(most, Math.abs(value)), 0);

export class Tour {
  scenes = [];
  wanted = null; // the id of the scene that a link or the visitor asks for
  at = null; // index of the scene on show, or null
  lambda = null;

  constructor(view) {
    this.view = view;
    const find = (selector) => view.find(selector);
    find(".vt-start").onclick = () => this.open("patches");
    find(".vt-leave").onclick = () => this.leave();
    find(".vt-back").onclick = () => this.go(this.at - 1);
    find(".vt-next").onclick = () => (this.at === this.scenes.length - 1 ? this.leave() : this.go(this.at + 1));
    this.slider = find(".vt-wipe input");
    this.slider.oninput = () => this.setLambda(Number(this.slider.value));
    find(".vt-wipe button").onclick = () => this.setLambda(this.scene.own);
  }

  get scene() {
    return this.at === null ? null : this.scenes[this.at];
  }

  // For a new photo, or once the heads are known: the scenes are those of the head on show.
  async open(id) {
    const { view } = this;
    const { seen } = view;
    this.wanted = id;
    if (!id || !view.inside || !view.blocks.length) return;
    const [block, head] = view.place;
    const request = { model: seen.model, path: seen.path, block: view.blocks[block].block, head };
    const { scenes } = await view.server.take_tour(request).catch(() => ({}));
    if (view.seen !== seen || this.wanted !== id) return;
    this.scenes = scenes ?? [];
    this.go(Math.max(0, this.scenes.findIndex((scene) => scene.id === id)));
  }

  // For another photo.
  forget() {
    this.wanted ??= this.scene?.id ?? null;
    this.at = null;
    this.scenes = [];
  }

  leave() {
    this.at = this.wanted = null;
    this.view.draw();
    this.view.find(".vt-start").focus();
  }

  go(index) {
    if (!this.scenes.length) return;
    this.at = clamp(index, 0, this.scenes.length - 1);
    this.wanted = this.scene.id;
    this.lambda = this.scene.own ?? null;
    this.view.draw();
    this.view.find(".vt-scene h2").focus({ preventScroll: true });
  }

  setLambda(value) {
    this.lambda = value;
    this.view.draw();
  }

  // The finger on the picture: left is the lowest lambda, right the highest.
  drag(part) {
    if (this.scene?.id !== "subtraction") return;
    this.setLambda(Math.round(100 * (LOWEST + part * (HIGHEST - LOWEST))) / 100);
  }

  // The row that the picture shows, or null.
  get row() {
    const { scene, view } = this;
    if (scene.id === "lens") return view.blocks[view.place[0]].rows[view.place[1]];
    if (!scene.values) return null;
    if (scene.applied && this.lambda === scene.own) return decodeRow(scene.applied); // the model's own numbers, to the bit
    const values = decodeRow(scene.values);
    return scene.second ? contrast(values, decodeRow(scene.second), this.lambda) : values;
  }

  draw() {
    const { view, scene } = this;
    const panel = view.find(".vt-scene");
    panel.hidden = !scene;
    view.find(".vt-change").hidden = Boolean(scene) || !view.blocks.length;
    view.find(".vt-start").hidden = Boolean(scene) || !view.blocks.length;
    if (!scene) return;
    const find = (selector) => panel.querySelector(selector);
    find("h2").textContent = `${this.at + 1} of ${this.scenes.length}: ${scene.title}`;
    if (find(".vt-text").textContent !== scene.text) find(".vt-text").textContent = scene.text;
    find("dl").replaceChildren(...Object.entries(scene.words).map(([word, meaning]) => {
      const row = make("div");
      row.append(make("dt", { textContent: word }), make("dd", { textContent: meaning }));
      return row;
    }));
    find(".vt-back").disabled = this.at === 0;
    find(".vt-next").textContent = this.at === this.scenes.length - 1 ? "Done: now turn it off" : "Next";
    find(".vt-steps").replaceChildren(...this.scenes.map(({ title }, i) => {
      const step = make("button", { type: "button", textContent: i + 1, title, onclick: () => this.go(i) });
      step.setAttribute("aria-label", `Scene ${i + 1}: ${title}`);
      press(step, i === this.at);
      return step;
    }));
    view.large.style.touchAction = scene.id === "subtraction" ? "pan-y" : "";
    this.drawWipe();
    this.drawChart();
    this.drawPicture();
  }

  drawWipe() {
    const { view, scene, lambda } = this;
    const wipe = view.find(".vt-wipe");
    wipe.hidden = scene.id !== "subtraction";
    if (wipe.hidden) return;
    this.slider.value = lambda;
    wipe.querySelector("output").textContent = hundredths(lambda);
    wipe.querySelector("button").disabled = lambda === scene.own;
    wipe.querySelector("button").textContent = `the model's ${hundredths(scene.own)}`;
  }

  // The answer after every block.
  drawChart() {
    const { view, scene } = this;
    const chart = view.find(".vt-chart");
    chart.hidden = !scene.chart;
    chart.replaceChildren(...(scene.chart ?? []).map(({ label, probability }, block) => {
      const item = make("li");
      item.style.setProperty("--after", `${100 * probability}%`);
      item.classList.toggle("vt-found", label === view.seen.top[0][0]);
      item.append(make("span", { textContent: `${block + 1}  ${label}` }), make("span", { textContent: percent(probability) }));
      return item;
    }));
  }

  drawPicture() {
    const { view, scene, row } = this;
    const block = view.blocks[view.place[0]];
    const info = gridInfo(block.grid, block.tokens);
    const stream = scene.id === "negative" ? "negative" : "differential";
    const limit = row ? this.limit : 0;
    const layers = row ? [{ info, painted: paint(row, stream, limit, view.colors.veil), isSmooth: view.state.look === "smooth" }] : [];
    drawOver(view.large, { photo: row ? view.grey : view.photo, layers, boxes: this.boxes(block, info), mark: this.mark });
    const bar = view.find(".vt-large i");
    bar.hidden = view.find(".vt-large .vv-marks").hidden = !row;
    const isSigned = row?.some((value) => value < 0);
    bar.style.background = overlayBar(view.props.palette, isSigned, stream === "negative");
    view.writeMarks(limit, isSigned, stream === "negative" ? "second map" : "most");
    view.find("figcaption").textContent = scene.id === "lens" ? `The effective map of ${scene.place}.` : scene.title;
    view.find(".vt-value").textContent = "";
    view.large.setAttribute("aria-label", `${scene.title}. ${scene.text}`);
  }

  // Of both streams one scale, so that a pale map means little; with lambda under the finger it stays.
  get limit() {
    const { scenes, scene, row } = this;
    if (scene.id === "lens" || scene.id === "attention") return largest(row);
    return Math.max(...scenes.filter(({ values, token }) => values && token !== undefined).map(({ values }) => largest(decodeRow(values))));
  }

  get mark() {
    return this.scene.id === "subtraction" ? (clamp(this.lambda, LOWEST, HIGHEST) - LOWEST) / (HIGHEST - LOWEST) : null;
  }

  // Lines between patches, the cells that were pooled, and the one that the sentences are about.
  boxes({ grid: [rows, cols], tokens }, info) {
    const { scene } = this;
    if (scene.id === "patches") {
      const lines = [
        ...Array.from({ length: rows }, (_, r) => [0, r / rows, 1, (r + 1) / rows]),
        ...Array.from({ length: cols }, (_, c) => [c / cols, 0, (c + 1) / cols, 1]),
      ];
      return lines.flatMap((box) => doubled(box, 1));
    }
    if (scene.token === undefined) return [];
    const lattice = { size: tokens, prefix: 0 };
    const cells = scene.id === "tokens" ? Array.from({ length: tokens[0] * tokens[1] }, (_, i) => outline(info, lattice, i)) : [];
    const marked = outline(info, lattice, scene.token);
    return [
      ...cells.flatMap((box) => doubled(box, 1.5)),
      { box: marked, color: "#000", thickness: 6 },
      { box: marked, color: "#ffd400", thickness: 3 },
    ];
  }
}
