// The examples. `props.value` is what inputs.py sends (JSON): { mine, others, isKnown }, tiles { name, title, model,
// of, says, why, url }, where `of` is what the model is called. A click selects a tile's photo and its model.

import { make } from "./panel.js";

function tileOf(tile, trigger) {
  const button = make("button", { type: "button", onclick: () => trigger("select", { name: tile.name, model: tile.model }) });
  const words = tile.why || `${tile.title}${tile.says ? `: the model says ${tile.says}` : ""}`;
  button.title = words;
  button.setAttribute("aria-label", words);
  button.classList.toggle("ve-mistake", Boolean(tile.why));
  button.append(make("img", { src: tile.url, alt: "" }));
  if (tile.says) button.append(make("span", { textContent: tile.says }));
  return button;
}

export function mount(host) {
  const { element, props, trigger, watch } = host;
  const find = (selector) => element.querySelector(selector);
  const draw = () => {
    if (!props.value) return;
    const { mine, others, isKnown } = JSON.parse(props.value);
    const mistake = mine.find(({ why }) => why);
    find("h2").textContent = isKnown ? "Examples, and what the model says" : "Examples: this model knows none of their classes";
    find(".ve-mine").replaceChildren(...mine.map((tile) => tileOf(tile, trigger)));
    find(".ve-others").replaceChildren(...others.map((tile) => tileOf({ ...tile, says: "", title: `${tile.title}, for ${tile.of}` }, trigger)));
    find(".ve-more").hidden = !others.length;
    find(".ve-why").hidden = !mistake;
    find(".ve-why").textContent = mistake?.why ?? "";
  };
  watch("value", draw);
  draw();
}
