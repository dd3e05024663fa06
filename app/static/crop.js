// The crop box. `props.value` is what cropping.py sends (JSON): { url, aspect, model, seen, isChosen }, the photo, width
// by height of it and of what the model takes, and the part that the model sees, as left, top, right and bottom from 0
// to 1. Another part is asked for by the event `select`.

import { clamp } from "./maps.js";

const STEP = 0.02, LARGE_STEP = 0.1; // of the photo, by a key
const REST = 300; // ms after the last key
const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

class Crop {
  shown = null; // as received
  middle = [0.5, 0.5]; // of the part
  size = 1; // of the largest part that the photo holds
  moving = null; // the pointer's place in the part, while it is dragged
  timer = null;

  constructor({ element, props, trigger, watch }) {
    Object.assign(this, { props, trigger, root: element.querySelector(".vk") });
    this.frame = this.find(".vk-large");
    this.box = this.find(".vk-large i");
    this.slider = this.find("input");
    this.frame.addEventListener("pointerdown", (event) => this.press(event));
    this.frame.addEventListener("pointermove", (event) => this.moving && this.move(this.pointAt(event).map((p, i) => p - this.moving[i])));
    for (const name of ["pointerup", "pointercancel"]) this.frame.addEventListener(name, () => this.release());
    this.box.addEventListener("keydown", (event) => this.key(event));
    this.slider.addEventListener("input", () => this.resize(this.slider.value / 100));
    this.find("button").addEventListener("click", () => trigger("select", { seen: null }));
    watch("value", () => this.receive());
    this.receive();
  }

  find(selector) {
    return this.root.querySelector(selector);
  }

  receive() {
    this.root.hidden = !this.props.value;
    if (!this.props.value) return;
    const received = JSON.parse(this.props.value);
    const isSame = received.url === this.shown?.url && received.model === this.shown.model;
    this.shown = received;
    for (const image of this.root.querySelectorAll("img")) image.src = received.url;
    const [left, top, right, bottom] = received.seen;
    if (!isSame || !(this.moving || this.timer)) { // not while the visitor goes on
      this.middle = [(left + right) / 2, (top + bottom) / 2];
      this.size = (right - left) / this.largest[0];
    }
    this.draw();
  }

  // Width and height of the largest part, from 0 to 1 of the photo.
  get largest() {
    const wide = this.shown.model / this.shown.aspect;
    return [Math.min(1, wide), Math.min(1, 1 / wide)];
  }

  get sides() {
    return this.largest.map((side) => side * this.size);
  }

  move(middle) {
    this.middle = middle.map((at, i) => clamp(at, this.sides[i] / 2, 1 - this.sides[i] / 2));
    this.draw();
  }

  resize(size) {
    this.size = clamp(size, this.slider.min / 100, 1);
    this.move(this.middle);
    this.askSoon();
  }

  ask() {
    clearTimeout(this.timer);
    this.timer = null;
    const edges = [-1, 1].flatMap((sign) => this.middle.map((at, i) => clamp(at + (sign * this.sides[i]) / 2, 0, 1)));
    this.trigger("select", { seen: edges });
  }

  askSoon() {
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.ask(), REST);
  }

  pointAt({ clientX, clientY }) {
    const { left, top, width, height } = this.frame.getBoundingClientRect();
    return [(clientX - left) / width, (clientY - top) / height];
  }

  press(event) {
    const point = this.pointAt(event);
    const offset = point.map((p, i) => p - this.middle[i]);
    const isInside = offset.every((distance, i) => Math.abs(distance) <= this.sides[i] / 2);
    this.moving = isInside ? offset : [0, 0];
    this.frame.setPointerCapture(event.pointerId);
    if (!isInside) this.move(point);
  }

  release() {
    if (!this.moving) return;
    this.moving = null;
    this.ask();
  }

  key(event) {
    const arrow = ARROWS[event.key];
    const sign = { "+": 1, "=": 1, "-": -1 }[event.key];
    if ((!arrow && !sign) || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    if (sign) return this.resize(this.size + sign * STEP * 2);
    const step = event.shiftKey ? LARGE_STEP : STEP;
    this.move(this.middle.map((at, i) => at + step * arrow[i]));
    this.askSoon();
  }

  draw() {
    const { style } = this.root;
    const sides = this.sides;
    const percent = (part) => `${100 * part}%`;
    style.setProperty("--aspect", this.shown.aspect);
    ["--left", "--top"].forEach((name, i) => style.setProperty(name, percent(this.middle[i] - sides[i] / 2)));
    ["--width", "--height"].forEach((name, i) => style.setProperty(name, percent(sides[i])));
    this.slider.value = Math.round(100 * this.size);
    this.find("button").disabled = !this.shown.isChosen;
    const isWhole = sides.every((side) => side > 0.995);
    const words = this.shown.isChosen ? "the part you chose" : isWhole ? "all of the photo" : "the middle of the photo";
    this.find(".vk-words").textContent = `The model sees ${words}. Change it`;
    const [width, height] = sides.map((side) => Math.round(100 * side));
    const [x, y] = this.middle.map((at) => Math.round(100 * at));
    this.box.setAttribute("aria-label", `What the model sees: ${width} % of the width and ${height} % of the height, its middle at ${x} % from the left and ${y} % from the top. Arrow keys move it, + and − change its size.`);
  }
}

export function mount(host) {
  return new Crop(host);
}
