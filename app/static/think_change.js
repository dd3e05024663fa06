// "Turn it off": what the visitor changes of the model or of the photo. The model runs again with it, at once.

import { thousandths } from "./map_words.js";
import { choices, press } from "./panel.js";
import { outlined, unpack } from "./think_drawing.js";

const ALL = "all";

export class Change {
  asked = null; // the change that the newest answer on its way is for

  constructor(view) {
    this.view = view;
    this.slider = view.find(".vt-scale input");
    this.clear();
    this.slider.oninput = () => this.set({ scale: Number(this.slider.value) });
    view.find(".vt-reset").onclick = () => this.reset();
    for (const button of view.find(".vt-off").children) button.onclick = () => this.set({ off: toggled(this.off, button.dataset.off) });
  }

  clear() {
    Object.assign(this, { block: ALL, scale: 1, off: new Set(), muted: new Set(), patches: new Set() });
  }

  get isNothing() {
    return this.scale === 1 && !this.off.size && !this.muted.size && !this.patches.size;
  }

  // The blocks that are changed.
  get chosen() {
    const { blocks } = this.view;
    return this.block === ALL ? blocks : blocks.filter(({ block }) => block === this.block);
  }

  // For a new photo: it is shown as it is.
  build() {
    this.clear();
    this.view.find(".vt-change").hidden = !this.view.blocks.length;
  }

  reset() {
    this.clear();
    this.run();
  }

  set(change) {
    Object.assign(this, change);
    const heads = Math.min(...this.chosen.map((block) => block.heads));
    for (const head of this.muted) if (head >= heads) this.muted.delete(head);
    this.run();
  }

  // Paints a patch out, or brings it back. What is dragged over meanwhile goes the same way.
  paint(patch) {
    this.isPainting = !this.patches.has(patch);
    this.drag(patch);
  }

  drag(patch) {
    if (this.patches.has(patch) === this.isPainting) return;
    if (this.isPainting) this.patches.add(patch);
    else this.patches.delete(patch);
    this.run();
  }

  outlines() {
    const grid = this.view.blocks[0]?.grid;
    return [...this.patches].flatMap((patch) => outlined(grid, patch, 1));
  }

  // Asks for the answer to the change as it is now; of many at once, the last.
  async run() {
    const { view } = this;
    const { seen } = view;
    view.draw();
    if (this.asked) return;
    for (let wanted = this.request(); wanted !== this.asked; wanted = this.request()) {
      this.asked = wanted;
      const answer = this.isNothing ? null : await view.server.what_if(JSON.parse(wanted)).catch(() => ({ problem: "The server does not answer." }));
      if (view.seen !== seen) break;
      const problem = answer?.problem ?? (answer?.expired ? "This photo is no longer kept on the server." : "");
      view.find(".vt-actions [role=status]").textContent = problem;
      if (!problem || answer.top) view.now = answer?.top ? { ...answer, blocks: unpack(answer.blocks) } : null;
      view.draw();
    }
    this.asked = null;
  }

  request() {
    const { seen } = this.view;
    return JSON.stringify({
      model: seen.model, path: seen.path, block: this.block, head: [...this.muted], off: [...this.off],
      lambda_scale: this.scale === 1 ? null : this.scale, patches: [...this.patches],
    });
  }

  draw() {
    const { view, chosen } = this;
    if (!chosen.length) return;
    const places = [ALL, ...view.blocks.map(({ block }) => block)];
    choices(view.find(".vt-blocks"), places.map((place) => (place === ALL ? "all" : place + 1)), places.indexOf(this.block), (i) => this.set({ block: places[i] }));
    const heads = Math.min(...chosen.map((block) => block.heads));
    choices(view.find(".vt-mute"), Array.from({ length: heads }, (_, head) => head + 1), -1, (head) => this.set({ muted: toggled(this.muted, head) }));
    [...view.find(".vt-mute").children].forEach((button, head) => press(button, this.muted.has(head)));
    const can = (part) => chosen.every(({ changeable }) => changeable.includes(part));
    for (const button of view.find(".vt-off").children) {
      button.disabled = !can(button.dataset.off);
      press(button, this.off.has(button.dataset.off));
    }
    view.find(".vt-off").parentElement.hidden = ![...view.find(".vt-off").children].some((button) => !button.disabled);
    view.find(".vt-scale").hidden = !can("lambda1") && !can("lambda2");
    this.slider.value = this.scale;
    view.find(".vt-scale output").textContent = this.scale.toFixed(1).replace("-", "−");
    view.find(".vt-lambdas").textContent = this.words();
    view.find(".vt-change").dataset.changed = !this.isNothing;
    view.find(".vt-reset").disabled = this.isNothing;
  }

  // What lambda does in the blocks that are changed, by the model's own numbers.
  words() {
    const values = this.chosen.flatMap(({ lambdas }) => lambdas).filter((value) => value !== null);
    if (!values.length) return "This attention has no λ.";
    if (this.off.has("negative")) return "The second map is off, so λ does nothing.";
    const now = values.map((value) => value * this.scale);
    if (this.block !== ALL) {
      const [{ lambdas }] = this.chosen;
      const each = lambdas.map((value, i) => value !== null && `λ${"₁₂"[i]} = ${thousandths(value * this.scale)}`).filter(Boolean);
      return `${each.join(", ")}: ${effect(now)}`;
    }
    const negative = now.filter((value) => value < 0).length;
    return `${negative} of ${now.length} λ ${negative === 1 ? "is" : "are"} negative: ${effect(now)}`;
  }
}

function effect(values) {
  if (values.every((value) => value === 0)) return "the second map is ignored.";
  if (values.every((value) => value <= 0)) return "the second map is added, not taken off.";
  if (values.every((value) => value >= 0)) return "the second map is taken off.";
  return "there the second map is added, elsewhere taken off.";
}

function toggled(set, item) {
  const changed = new Set(set);
  if (!changed.delete(item)) changed.add(item);
  return changed;
}
