// The Classify tab's view. `props.value` is what thinking.look sent (JSON): the answer, and what every head draws in.
// `server.look_inside` says how much each head matters; `server.what_if` runs the model again with a change.

import { Address, linked } from "./links.js";
import { colorTables, overlayBar, paint as painted } from "./map_drawing.js";
import { number, percent } from "./map_words.js";
import { Panel, make, press, redrawOnChange } from "./panel.js";
import { Change } from "./think_change.js";
import { drawOver, outlined, patchUnder, unpack } from "./think_drawing.js";
import { Heads } from "./think_heads.js";
import { Tour } from "./think_tour.js";

const TAB = "classify";

export class Thinking extends Panel {
  seen = null; // as received
  blocks = []; // of the model as it is
  now = null; // what the changed model says and its blocks, or null
  inside = null; // what look_inside gave
  state = { block: null, head: 0, look: "smooth" }; // block null: the one that matters most
  hover = null; // index of the patch under the pointer

  constructor(host) {
    super(host, ".vt");
    this.large = this.find(".vt-large canvas");
    this.colors = colorTables(this.props.palette);
    this.heads = new Heads(this);
    this.change = new Change(this);
    this.tour = new Tour(this);
    this.address = new Address(TAB, this.root, true);
    this.readLink();
  }

  async receive() {
    const received = this.props.value ? JSON.parse(this.props.value) : null;
    const seen = received?.top ? received : null;
    if (seen && this.seen && this.seen.model !== seen.model) this.state.block = null;
    Object.assign(this, { seen, blocks: seen ? unpack(seen.blocks) : [], now: null, inside: null, hover: null });
    this.root.dataset.state = seen ? "loading" : "empty";
    this.find(".vt-body").hidden = !seen;
    if (!seen) return this.note(received?.problem ?? this.hint, { style: received ? "vv-problem" : "" });
    this.note("");
    this.find(".vt-linked").textContent = "";
    const picture = (src) => Object.assign(new Image(), { src });
    [this.photo, this.grey] = [picture(seen.photo), picture(seen.grey)];
    await Promise.all([this.photo.decode(), this.grey.decode()]);
    if (this.seen !== seen) return;
    this.heads.build();
    this.change.build();
    this.tour.forget();
    this.draw();
    this.root.dataset.state = "drawn";
    const inside = await this.server.look_inside({ model: seen.model, path: seen.path }).catch(() => ({}));
    if (this.seen !== seen) return;
    this.inside = inside;
    this.heads.build();
    await this.tour.open(this.tour.wanted);
    if (this.seen !== seen) return;
    this.draw();
    this.root.dataset.state = "complete";
  }

  // Block and head on show, as indices.
  get place() {
    const { state, blocks, heads } = this;
    const isThere = state.block !== null && state.head < blocks[state.block]?.heads;
    return isThere ? [state.block, state.head] : (heads.order[0] ?? [0, 0]);
  }

  // The blocks on show: those of the changed model, if there is one.
  get shown() {
    return this.now?.blocks ?? this.blocks;
  }

  get top() {
    return this.now?.top ?? this.seen.top;
  }

  show(change) {
    Object.assign(this.state, change);
    if ("head" in change && this.tour.scene) this.tour.open(this.tour.scene.id);
    this.draw();
  }

  // ---- Drawing

  draw() {
    if (!this.seen || !this.root.clientWidth) return;
    this.drawAnswer();
    this.heads.draw();
    this.change.draw();
    this.tour.draw();
    this.drawMap();
    this.writeLink();
  }

  drawAnswer() {
    const { seen, now, top } = this;
    const [label, , part] = top[0];
    const [before, sure] = seen.top[0];
    const isOther = now && label !== before;
    this.find(".vt-best").textContent = isOther ? `${before} → ${label}` : label;
    this.find(".vt-sure").textContent = now ? `${percent(sure)} → ${percent(part)}` : percent(part);
    const verdict = this.find(".vt-verdict");
    verdict.classList.toggle("vt-doubt", Boolean(seen.verdict));
    verdict.textContent = seen.verdict || `The likeliest of ${seen.classes.toLocaleString("en")} classes.`;
    this.find(".vt-top").replaceChildren(...top.map(([name, was, is]) => {
      const item = make("li", { className: now ? "vt-moved" : "" });
      item.style.setProperty("--after", `${100 * is}%`);
      item.style.setProperty("--before", `${100 * was}%`);
      const numbers = make("span");
      if (now && percent(was) !== percent(is)) numbers.append(make("small", { textContent: `was ${percent(was)}` }));
      numbers.append(percent(is));
      item.append(make("span", { textContent: name }), numbers);
      return item;
    }));
  }

  drawMap() {
    if (this.tour.scene) return;
    const { seen, state, large, shown, hover } = this;
    const [at, head] = this.place;
    const block = shown[at];
    const isMap = block && state.look !== "photo";
    const grid = block?.grid;
    const layers = [];
    const values = block?.rows[head];
    const limit = values?.reduce((most, value) => Math.max(most, Math.abs(value)), 0);
    if (isMap) layers.push({ info: block.info, painted: painted(values, "differential", limit, this.colors.veil), isSmooth: state.look === "smooth" });
    const boxes = [...this.change.outlines(), ...(hover === null || !grid ? [] : outlined(grid, hover))];
    drawOver(large, { photo: isMap ? this.grey : this.photo, layers, boxes });
    const isSigned = values?.some((value) => value < 0);
    const bar = this.find(".vt-large i");
    const marks = this.find(".vt-large .vv-marks");
    bar.hidden = marks.hidden = !isMap;
    for (const button of this.find(".vt-looks").querySelectorAll("[data-look]")) press(button, button.dataset.look === state.look);
    this.find(".vt-explore").hidden = !block;
    this.drawLink();
    if (!block) {
      this.find("figcaption").textContent = seen.problem;
      return large.setAttribute("aria-label", "The photo as the model sees it.");
    }
    bar.style.background = overlayBar(this.props.palette, isSigned);
    this.writeMarks(limit, isSigned, "drawn in");
    const words = `What ${seen.reader} draws in${isSigned ? " (orange) and pushes away (blue)" : ""}: block ${block.block + 1}, head ${head + 1}${this.now ? ", of the changed model" : ""}.`;
    this.find("figcaption").textContent = words;
    large.setAttribute("aria-label", `${words} Arrow keys move over the patches, Enter paints one out.`);
    this.find(".vt-value").textContent = hover === null ? "" : this.nameOf(hover, grid, values);
  }

  drawLink() {
    const { base } = this.seen;
    const button = this.find(".vt-link");
    const isOwn = base && !base.image && !base.photo;
    button.hidden = !base; // a visitor's own model is in no link
    button.textContent = isOwn ? "Link with my photo" : "Copy link";
    button.title = isOwn ? "Puts a reduced copy of your photo into the link itself; nobody sees it but who gets the link." : "";
  }

  writeMarks(limit, isSigned, most) {
    const words = [...(isSigned ? [`−${number(limit)} pushed away`] : []), "0", `${most} ${isSigned ? "+" : ""}${number(limit)}`];
    this.find(".vt-large .vv-marks").replaceChildren(...words.map((textContent) => make("span", { textContent })));
  }

  nameOf(patch, [, cols], values) {
    const place = `Patch in row ${Math.floor(patch / cols) + 1}, column ${(patch % cols) + 1}`;
    return `${place}: ${values[patch] > 0 ? "+" : ""}${number(values[patch])}`;
  }

  // ---- Links: #classify?model=...&image=...&block=...&head=...

  readLink() {
    if (!location.hash.startsWith(`#${TAB}`)) return;
    const link = linked(TAB);
    const index = (key) => (/^\d{1,4}$/.test(link.get(key) ?? "") ? Number(link.get(key)) - 1 : null);
    if (index("block") !== null) Object.assign(this.state, { block: index("block"), head: index("head") ?? 0 });
    const scene = link.get("scene");
    if (scene === (this.tour.scene?.id ?? null)) return;
    if (scene) this.tour.open(scene);
    else this.tour.leave();
  }

  writeLink() {
    const { seen, state } = this;
    const view = state.block === null ? {} : { block: state.block + 1, head: state.head + 1 };
    if (this.tour.wanted) view.scene = this.tour.wanted;
    this.address.write(seen.base, view, seen.path);
  }

  // Copies the address. A photo of the visitor's own is not in it before this button is pressed: then a reduced copy is,
  // and the page shows that copy, so that both say the same.
  async copyLink() {
    const { base, path } = this.seen;
    const said = this.find(".vt-linked");
    if (!base.image && !base.photo) {
      const { photo, problem } = await this.server.reduce({ path }).catch(() => ({}));
      if (!photo) return (said.textContent = problem ?? "The server does not answer.");
      location.hash = `#${TAB}?${new URLSearchParams({ ...base, photo })}`;
    }
    const isCopied = await navigator.clipboard?.writeText(location.href).then(() => true, () => false);
    said.textContent = isCopied ? "The link is copied." : "The link is in the address bar.";
  }

  // Opens the head on show in Explore, with what the classifier reads as the query.
  explore() {
    const [block, head] = this.place;
    const view = { map: "effective", block: block + 1, head: head + 1, query: /token$/.test(this.seen.reader) ? "token1" : "0.5,0.5" };
    location.hash = `#explore?${new URLSearchParams({ ...this.seen.base, ...view })}`;
  }

  // ---- Controls

  point(patch) {
    if (patch === this.hover) return;
    this.hover = patch;
    this.drawMap();
  }

  listen() {
    const { large, state } = this;
    const grid = () => this.shown[this.place[0]]?.grid ?? null;
    for (const button of this.find(".vt-looks").querySelectorAll("[data-look]")) button.onclick = () => this.show({ look: button.dataset.look });
    this.find(".vt-explore").onclick = () => this.explore();
    this.find(".vt-link").onclick = () => this.copyLink();
    large.onpointerleave = () => this.point(null);
    large.onpointermove = (event) => {
      if (!grid()) return;
      if (this.tour.scene) return event.buttons === 1 && this.tour.drag(event.offsetX / large.clientWidth);
      this.point(patchUnder(large, event, grid()));
      if (event.buttons === 1 && event.pointerType !== "touch") this.change.drag(this.hover);
    };
    const paint = (event, isTouch) => {
      if (!grid() || this.tour.scene || (event.pointerType === "touch") !== isTouch) return;
      this.change.paint(patchUnder(large, event, grid()));
    };
    large.onpointerdown = (event) => (this.tour.scene ? this.tour.drag(event.offsetX / large.clientWidth) : paint(event, false));
    large.onclick = (event) => paint(event, true); // a touch that does not scroll
    large.onkeydown = (event) => {
      if (!grid() || this.tour.scene) return;
      const [rows, cols] = grid();
      const at = this.hover ?? Math.floor(rows / 2) * cols + Math.floor(cols / 2);
      const [row, column] = [Math.floor(at / cols), at % cols];
      const to = { ArrowLeft: [row, column - 1], ArrowRight: [row, column + 1], ArrowUp: [row - 1, column], ArrowDown: [row + 1, column] }[event.key];
      if (to && to[0] >= 0 && to[0] < rows && to[1] >= 0 && to[1] < cols) this.point(to[0] * cols + to[1]);
      else if (event.key === "Enter" || event.key === " ") this.change.paint(at);
      else if (event.key === "c") this.show({ look: state.look === "cells" ? "smooth" : "cells" });
      else if (!to) return;
      event.preventDefault();
    };
    const isPhoto = ({ target }) => target.matches?.(".vca-photo img");
    for (const [event, visibility] of [["error", "hidden"], ["load", ""]]) { // no icon of a broken image: words say it
      addEventListener(event, (happened) => isPhoto(happened) && Object.assign(happened.target.style, { visibility }), true);
    }
    addEventListener("hashchange", () => {
      this.readLink();
      this.draw();
      this.trigger("input");
    });
    redrawOnChange(this.root, () => {
      this.address.note();
      this.draw();
    });
  }
}

export function mount(host) {
  const view = new Thinking(host);
  view.listen();
  host.watch("value", () => view.receive());
  view.root.thinking = view;
  view.receive();
}
