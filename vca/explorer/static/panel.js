// What the views of the page have in common: a note to the visitor, buttons, small maps with a colour bar, and keys.

import { barOf, theme } from "./map_drawing.js";
import { marksOf } from "./map_words.js";
import { cellAt, clamp, outline } from "./maps.js";

export const make = (tag, properties) => Object.assign(document.createElement(tag), properties);
export const press = (button, pressed) => button.setAttribute("aria-pressed", pressed);

// A row of buttons; kept while their number stays, so that the focus does too.
export function choices(container, labels, chosen, choose) {
  if (container.children.length !== labels.length) {
    container.replaceChildren(...labels.map(() => make("button", { type: "button" })));
  }
  labels.forEach((textContent, i) => {
    press(Object.assign(container.children[i], { textContent, onclick: () => choose(i) }), i === chosen);
  });
}

// A view in the element `root`. `host` is what gr.HTML gives: { element, props, server, trigger, watch }.
export class Panel {
  constructor(host, selector) {
    Object.assign(this, host);
    this.root = host.element.querySelector(selector);
    this.hint = this.find(".vv-note span").textContent; // what is said while there is nothing to show
    this.subject = ""; // the photos and models of what is on show, if the server said them
  }

  // Whether this is about what is on show already: two inputs that change at once ask twice.
  isRepeated(received) {
    const subject = received?.stale ?? received?.subject;
    if (subject && JSON.stringify(subject) === this.subject) return true;
    this.subject = received?.subject ? JSON.stringify(received.subject) : "";
    return false;
  }

  find(selector) {
    return this.root.querySelector(selector);
  }

  // Another photo or model is on the page: the server is asked about it once the visitor looks here.
  expire() {
    this.isStale = true;
    this.root.dataset.state = "loading";
    if (this.root.clientWidth) this.renew();
  }

  renew() {
    this.isStale = false;
    this.trigger("submit");
  }

  // Says something above the view, or nothing. `button` selects the one of the note's buttons that is shown.
  note(text, { style = "", button = null } = {}) {
    const note = this.find(".vv-note");
    note.hidden = !text;
    note.className = `vv-note ${style}`;
    const words = note.querySelector("span");
    if (words.textContent !== text) words.textContent = text; // a screen reader says it once
    note.querySelector("progress")?.toggleAttribute("hidden", true);
    for (const each of note.querySelectorAll("button")) each.hidden = !button || !each.matches(button);
  }
}

// A small map's title, colour bar and numbers. The map itself is `drawMap`'s.
export function writeFigure(figure, { title, label, stream, limit, palette }) {
  figure.querySelector("button").textContent = title;
  figure.querySelector("canvas").setAttribute("aria-label", label);
  figure.querySelector("i").style.background = barOf(palette, theme(), stream);
  figure.querySelector(".vv-marks").replaceChildren(...marksOf(stream, limit).map((textContent) => make("span", { textContent })));
}

// The point one cell further: `right` and `down` are -1, 0 or 1. Above the first row are the prefix tokens.
export function moved(info, lattice, point, right, down) {
  if (point.prefix !== null && point.prefix < lattice.prefix) {
    return down > 0 ? { ...point, y: 0, prefix: null } : { ...point, prefix: clamp(point.prefix + right, 0, lattice.prefix - 1) };
  }
  const [r, c] = cellAt(info, lattice, point);
  if (down < 0 && r === 0 && lattice.prefix) return { ...point, prefix: 0 };
  const [row, column] = [clamp(r + down, 0, lattice.size[0] - 1), clamp(c + right, 0, lattice.size[1] - 1)];
  const [left, top, rightEdge, bottom] = outline(info, lattice, lattice.prefix + row * lattice.size[1] + column);
  return { x: (left + rightEdge) / 2, y: (top + bottom) / 2, prefix: null };
}

const KEYS = {
  ArrowLeft: ["query", -1, 0],
  ArrowRight: ["query", 1, 0],
  ArrowUp: ["query", 0, -1],
  ArrowDown: ["query", 0, 1],
  "[": ["block", -1],
  "]": ["block", 1],
  ",": ["head", -1],
  ".": ["head", 1],
};

// Keys move the query, the block and the head: `actions` has a function of the event and the step for each, and
// `isReady`, whether a key means anything now.
export function listenToKeys(root, actions) {
  root.addEventListener("keydown", (event) => {
    if (!KEYS[event.key] || event.ctrlKey || event.metaKey || event.altKey || !actions.isReady(event)) return;
    event.preventDefault();
    const [what, ...step] = KEYS[event.key];
    actions[what](event, ...step);
  });
}

// Calls `redraw` when the view changes its size or the page its theme.
export function redrawOnChange(root, redraw) {
  new ResizeObserver(redraw).observe(root);
  new MutationObserver(redraw).observe(document.body, { attributes: true, attributeFilter: ["class"] });
}
