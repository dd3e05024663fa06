// The heads of all blocks as small maps: those that add most to the answer first.

import { paint } from "./map_drawing.js";
import { make, press } from "./panel.js";
import { drawOver } from "./think_drawing.js";

const FIRST = 12; // heads on show before the visitor asks for all

const signed = (value) => `${value < 0 ? "−" : "+"}${Math.abs(value).toFixed(2)}`;

export class Heads {
  order = []; // [block, head], as they stand
  isAll = false;

  constructor(view) {
    this.view = view;
    view.find(".vt-all").onclick = () => {
      this.isAll = !this.isAll;
      this.build();
      view.draw();
    };
  }

  relevanceOf([block, head]) {
    return this.view.inside?.relevance?.[block]?.[head] ?? null;
  }

  // A button for each head on show; until it is known which matter, the last block's come first.
  build() {
    const { view } = this;
    const all = view.blocks.flatMap(({ heads }, block) => Array.from({ length: heads }, (_, head) => [block, head]));
    const weight = (place) => Math.abs(this.relevanceOf(place) ?? 0);
    this.order = this.isAll ? all : all.sort((a, b) => weight(b) - weight(a) || b[0] - a[0] || a[1] - b[1]).slice(0, FIRST);
    view.find(".vt-heads").hidden = !all.length;
    const more = view.find(".vt-all");
    more.hidden = all.length <= FIRST;
    more.textContent = this.isAll ? `Show the ${FIRST} that matter most` : `Show all ${all.length} heads, block by block`;
    more.setAttribute("aria-expanded", this.isAll);
    view.find(".vt-strip").replaceChildren(...this.order.map(([block, head]) => {
      const button = make("button", { type: "button", onclick: () => view.show({ block, head }) });
      button.append(make("canvas"), make("span"), make("small"));
      return button;
    }));
  }

  draw() {
    const { view } = this;
    if (!this.order.length) return;
    const [label] = view.seen.top[0];
    const isKnown = Boolean(view.inside?.relevance);
    view.find(".vt-heads h2").textContent = this.isAll ? "Where every head looks" : "The heads that matter most";
    view.find(".vt-heads p").textContent = isKnown
      ? `The number says how much the head adds to the logit of “${label}”, to first order: mute it above and see. Each map is on a scale of its own; it is the same whichever class is asked for.`
      : "Each map is on a scale of its own.";
    [...view.find(".vt-strip").children].forEach((button, i) => {
      const [block, head] = this.order[i];
      const { info, rows, block: index } = view.shown[block];
      const values = rows[head];
      const limit = values.reduce((most, value) => Math.max(most, Math.abs(value)), 0);
      const relevance = this.relevanceOf([block, head]);
      drawOver(button.firstChild, {
        photo: view.grey,
        layers: [{ info, painted: paint(values, "differential", limit, view.colors.veil), isSmooth: view.state.look !== "cells" }],
      });
      const name = `Block ${index + 1}, head ${head + 1}`;
      button.children[1].textContent = name.replace("Block", "block");
      button.children[2].textContent = relevance === null ? "" : signed(relevance);
      button.setAttribute("aria-label", relevance === null ? name : `${name}: adds ${signed(relevance)} to the logit of ${label}`);
      press(button, block === view.place[0] && head === view.place[1]);
    });
  }
}
