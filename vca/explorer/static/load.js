// The body of the function (element, props, server, trigger, watch) that gr.HTML runs once its element is on the page,
// and a saved page likewise. It makes ES modules of MODULES, [[name, source], ...], each after those that it imports,
// and mounts the last one. Nothing is asked of a server, so that a saved page does the same.
const urls = {};
for (const [name, source] of MODULES) {
  const linked = source.replace(/ from "\.\/([\w.]+)";$/gm, (_, imported) => ` from "${urls[imported]}";`);
  urls[name] = URL.createObjectURL(new Blob([linked, `\n//# sourceURL=${name}`], { type: "text/javascript" }));
}
const [entry] = MODULES.at(-1);
import(urls[entry]).then(({ mount }) => mount({ element, props, server, trigger, watch }));
