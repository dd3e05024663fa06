// The address of what is on show: #TAB?model=...&image=..., and what the tab adds. `base` is what links.py gave of the
// photo and the model. Another tab, photo or model is a step for the browser's Back; a change within one is not.

const BASE = ["model", "image", "photo", "crop", "with"];
const PATIENCE = 60_000; // ms until an address that leads nowhere is given up

const split = () => {
  const [tab, ...rest] = location.hash.slice(1).split("?");
  return [tab, new URLSearchParams(rest.join("?"))];
};

// What the address says to a tab: nothing, if it is another tab's.
export function linked(tab) {
  const [at, link] = split();
  return at === tab ? link : new URLSearchParams();
}

// The address as a tab's view keeps it. It becomes another tab's only once the visitor has come there: while the page
// still opens, or Back has not yet led there, what is on show is not what the address says.
export class Address {
  // `isFirst`: of the tab that the page opens with.
  constructor(tab, root, isFirst = false) {
    Object.assign(this, { tab, root, hasCome: !isFirst });
    this.lead();
    addEventListener("popstate", () => this.lead()); // "hashchange" comes later: what is drawn before it would take Back back
  }

  // The address has changed, by a link or by Back: it stays until what it names is on show.
  lead() {
    this.leadsUntil = performance.now() + PATIENCE;
  }

  // Whether the address names another photo or model than what is on show.
  isAhead(base, link) {
    if (performance.now() > this.leadsUntil) return false;
    return BASE.some((key) => (link.has("model") || link.has(key)) && link.get(key) !== (base[key] ?? null));
  }

  // Call it whenever the view's size has changed.
  note() {
    if (!this.root.clientWidth) this.hasCome = true;
  }

  // `path` is the photo's file on the server: Back finds it again, in this browser alone.
  write(base, view, path = null) {
    const { tab, root } = this;
    const [at, before] = split();
    if (!root.clientWidth || (at && at !== tab && !this.hasCome)) return;
    this.hasCome = false;
    if (!base) return this.clear();
    if (at === tab && this.isAhead(base, before)) return;
    this.leadsUntil = 0;
    const link = new URLSearchParams({ ...base, ...view });
    const isStep = at && (at !== tab || BASE.some((key) => before.get(key) !== link.get(key)));
    history[isStep ? "pushState" : "replaceState"]({ ...history.state, path }, "", `#${tab}?${link}`);
  }

  // What is on show has no address.
  clear() {
    if (split()[0] === this.tab) history.replaceState(history.state, "", location.pathname + location.search);
  }
}
