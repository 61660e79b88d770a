// The shelf of LoRAs and the list of the chosen ones; gradio's gr.HTML runs this with element, props, server, watch.
// Names come from uploaded files: text goes in as textContent, never as HTML.
const root = element.querySelector(".ml-picker");
const opened = new Set();
let sentence = "";
let query = "";
let category = "all";

function make(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name in node && typeof value === "boolean") node[name] = value;
    else if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value);
  }
  node.append(...children.filter((c) => c !== null && c !== undefined));
  return node;
}

const uses = () => (Array.isArray(props.value) ? props.value : []);
const entryOf = (use) => props.library.find((e) => e.reference === use.reference) || { name: use.name || use.reference };
const copied = () => JSON.parse(JSON.stringify(uses()));
const isSchedule = (weight) => typeof weight === "string" && weight.includes("@");
const field = (id) => document.querySelector(`#${id} textarea, #${id} input`);
const numberOf = (id, otherwise) => Number(field(id)?.value) || otherwise;

function say(use, changes) {
  props.value = copied().map((u) => (u.name === use.name ? { ...u, ...changes } : u));
}

function announce(words) {
  live.textContent = words;
}

// -- the prompt -------------------------------------------------------------------------------------------------

const ORDER = ["character", "garment", "object", "background", "style"];
const article = (words) => (/^[aeiou]/i.test(words) ? "an " : "a ") + words;

function written(list) {
  const triggers = {};
  for (const use of list) {
    const entry = entryOf(use);
    if (entry.trigger) (triggers[entry.category] ||= []).push(entry.trigger.split(",")[0]);
  }
  const joined = (kind) => (triggers[kind] || []).map(article).join(" and ");
  const parts = [
    joined("character"),
    triggers.garment ? `in ${joined("garment")}` : "",
    triggers.object ? `holding ${joined("object")}` : "",
  ].filter(Boolean);
  const others = Object.keys(triggers).filter((kind) => !ORDER.includes(kind)).flatMap((kind) => triggers[kind]);
  return [
    parts.join(" "),
    triggers.background ? `on ${joined("background")}` : "",
    triggers.style ? `${triggers.style.join(" and ")} style` : "",
    ...others,
  ].filter(Boolean).join(", ");
}

function setPrompt(text) {
  const box = field("ml-prompt");
  if (!box) return;
  box.value = text;
  box.dispatchEvent(new Event("input", { bubbles: true }));
}

function prompted(list, added) {
  const box = field("ml-prompt");
  if (!box) return;
  const now = box.value.trim();
  if (now === "" || now === sentence) {
    sentence = written(list);
    setPrompt(sentence);
  } else if (added && added.trigger && !now.includes(added.trigger.split(",")[0])) {
    setPrompt(`${now}, ${article(added.trigger.split(",")[0])}`);
  }
}

function insert(trigger) {
  const box = field("ml-prompt");
  const at = box.selectionStart ?? box.value.length;
  const before = box.value.slice(0, at);
  const gap = before === "" || before.endsWith(" ") ? "" : " ";
  setPrompt(before + gap + trigger + box.value.slice(at));
  announce(`${trigger} written into the prompt`);
}

// -- the shelf --------------------------------------------------------------------------------------------------

function toggle(entry) {
  const list = copied();
  const at = list.findIndex((use) => use.reference === entry.reference);
  if (at >= 0) {
    list.splice(at, 1);
    announce(`${entry.name} taken out`);
  } else {
    let name = entry.name;
    for (let i = 2; list.some((use) => use.name === name); i++) name = `${entry.name}-${i}`;
    list.push({
      reference: entry.reference, name, weight: 1, on: true, text_encoder_weight: null, blocks: {},
      positive_only: false, mask: "",
    });
    announce(`${entry.name} added, ${list.length} chosen`);
  }
  props.value = list;
  prompted(list, at >= 0 ? null : entry);
  drawCards();
  drawList();
}

function card(entry) {
  const chosen = uses().some((use) => use.reference === entry.reference);
  return make(
    "button",
    {
      type: "button", class: "ml-card", "aria-pressed": String(chosen), title: entry.description || entry.name,
      "data-reference": entry.reference, onclick: () => toggle(entry),
    },
    entry.preview ? make("img", { src: entry.preview, alt: "" }) : make("span", { class: "ml-blank" }, "no preview"),
    make("span", { class: "ml-name" }, entry.name),
    make("span", { class: "ml-sub" }, entry.trigger || entry.category),
  );
}

function drawCards() {
  const words = query.toLowerCase().split(/\s+/).filter(Boolean);
  const shown = props.library.filter((e) => {
    const text = `${e.name} ${e.category} ${e.trigger} ${e.description}`.toLowerCase();
    return (category === "all" || e.category === category) && words.every((w) => text.includes(w));
  });
  const held = document.activeElement?.dataset?.reference;
  cards.replaceChildren(...shown.map(card));
  if (!shown.length) cards.append(make("p", { class: "ml-empty" }, "No LoRA like this. Add files in Library."));
  if (held) cards.querySelector(`[data-reference="${CSS.escape(held)}"]`)?.focus();
}

function drawChips() {
  const kinds = ["all", ...new Set(props.library.map((e) => e.category))];
  if (!kinds.includes(category)) category = "all";
  chips.replaceChildren(...kinds.map((kind) => make("button", {
    type: "button", class: "ml-chip", "aria-pressed": String(kind === category),
    onclick: () => { category = kind; drawChips(); drawCards(); },
  }, kind)));
}

// -- the list ---------------------------------------------------------------------------------------------------

function labelled(words, help, ...controls) {
  return make("label", { class: "ml-field", title: help }, make("span", {}, words), ...controls,
    help ? make("small", {}, help) : null);
}

function weight(use) {
  const scheduled = isSchedule(use.weight);
  const value = scheduled ? 1 : Number(use.weight);
  const about = { min: -1, max: 2, step: 0.05, value, disabled: scheduled };
  const range = make("input", { type: "range", ...about, "aria-label": `weight of ${use.name}` });
  const number = make("input", { type: "number", ...about, min: null, max: null,
    "aria-label": `weight of ${use.name} as number` });
  range.addEventListener("input", () => { number.value = range.value; say(use, { weight: Number(range.value) }); });
  number.addEventListener("input", () => {
    if (number.value === "") return;
    range.value = number.value;
    say(use, { weight: Number(number.value) });
  });
  return make("div", { class: "ml-weight" }, make("span", {}, scheduled ? "by schedule" : "weight"), range, number);
}

const PRESETS = {
  "always": "", "fades in": "0@0,1@1", "fades out": "1@0,0@1", "first half": "1@0.5,0@0.5", "second half": "0@0.5,1@0.5",
  "in the middle": "0@0,1@0.5,0@1",
};

function drawn(plot, said, note) {
  plot.replaceChildren();
  note.textContent = said.error || "";
  const points = said.points || (said.weights || []).map((w, i) => [i, w]);
  if (!points.length) return;
  const xs = points.map((p) => p[0]), ys = points.map((p) => p[1]);
  const low = Math.min(0, ...ys), high = Math.max(1, ...ys), left = Math.min(...xs), right = Math.max(...xs);
  const back = said.unit === "sigma"; // noise falls as the picture is drawn
  const x = (v) => 8 + 284 * (right > left ? (back ? right - v : v - left) / (right - left) : 0.5);
  const y = (v) => 8 + 54 * (1 - (v - low) / (high - low));
  const svg = (tag, attributes, text) => {
    const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
    if (text !== undefined) node.textContent = text;
    plot.append(node);
  };
  for (const level of new Set([low, 0, 1, high])) {
    svg("line", { x1: 8, x2: 292, y1: y(level), y2: y(level), class: "ml-grid" });
    svg("text", { x: 296, y: y(level) + 3 }, String(Math.round(level * 100) / 100));
  }
  svg("polyline", { points: points.map((p) => `${x(p[0])},${y(p[1])}`).join(" "), class: "ml-line" });
  if (points.length < 80) for (const p of points) svg("circle", { cx: x(p[0]), cy: y(p[1]), r: 2, class: "ml-dot" });
  svg("text", { x: 8, y: 76 }, back ? `noise ${right}` : "first step");
  svg("text", { x: 292, y: 76, "text-anchor": "end" }, back ? `noise ${left}` : "last step");
}

const asked = (text) => server.curve({ text, steps: numberOf("ml-steps", 25) });

function schedule(use, redraw) {
  const text = make("input", {
    type: "text", value: isSchedule(use.weight) ? use.weight : "", placeholder: "0@0,1@0.5", spellcheck: "false",
    "aria-label": `schedule of ${use.name}`,
  });
  const plot = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  plot.setAttribute("viewBox", "0 0 320 82");
  plot.setAttribute("class", "ml-curve");
  plot.setAttribute("role", "img");
  plot.setAttribute("aria-label", `curve of the weight of ${use.name}`);
  const note = make("p", { class: "ml-wrong", role: "alert" });
  let timer = null;
  const show = async () => drawn(plot, await asked(text.value || String(use.weight)), note);
  const taken = async (ready) => {
    const value = text.value.trim();
    const said = value ? await asked(value) : {};
    if (said.error) return drawn(plot, said, note);
    say(use, { weight: value.includes("@") ? value : Number(value || 1) });
    if (ready) redraw();
    else if (value) drawn(plot, said, note);
  };
  text.addEventListener("input", () => { clearTimeout(timer); timer = setTimeout(() => taken(false), 250); });
  text.addEventListener("change", () => { clearTimeout(timer); taken(true); });
  const preset = make("select", { "aria-label": `ready-made schedule of ${use.name}`, onchange: () => {
    text.value = PRESETS[preset.value];
    taken(true);
  } }, ...Object.keys(PRESETS).map((name) => make("option", { value: name }, name)));
  preset.value = Object.keys(PRESETS).find((name) => PRESETS[name] === text.value) || "always";
  show();
  return make("div", { class: "ml-part" }, make("b", {}, "Schedule"),
    make("small", {}, "weight@position, position 0 to 1 of the steps: 0@0,1@0.5 grows to 1 until half of the picture"),
    make("div", { class: "ml-line-of" }, preset, text), plot, note);
}

function blocks(use) {
  const parts = [["in", "down"], ["mid", "middle"], ["out", "up"]];
  const given = make("input", {
    type: "text", placeholder: "*attn2*=0.5, lbw=OUTALL", spellcheck: "false", "aria-label": `other blocks of ${use.name}`,
    value: Object.entries(use.blocks || {}).filter(([k]) => !parts.some((p) => p[0] === k)).map((p) => p.join("=")).join(", "),
  });
  const numbers = parts.map(([key, words]) => [key, make("input", {
    type: "number", step: 0.1, value: use.blocks?.[key] ?? 1, "aria-label": `${words} blocks of ${use.name}`,
  }), words]);
  const read = () => {
    const found = {};
    for (const [key, input] of numbers) if (input.value !== "" && Number(input.value) !== 1) found[key] = Number(input.value);
    for (const each of given.value.split(/,(?=[^=]*=)/)) {
      const at = each.lastIndexOf("=");
      if (at > 0) found[each.slice(0, at).trim()] = Number(each.slice(at + 1)) || 0;
    }
    say(use, { blocks: found });
  };
  for (const input of [given, ...numbers.map((n) => n[1])]) input.addEventListener("change", read);
  return make("div", { class: "ml-part" }, make("b", {}, "Blocks"),
    make("small", {}, "a factor for a part of the model: down blocks see the layout, up blocks draw detail"),
    make("div", { class: "ml-line-of" }, ...numbers.map(([, input, words]) => labelled(words, "", input))),
    labelled("others", "module names with * = factor, comma-separated", given));
}

function advanced(use, redraw) {
  const text = make("input", { type: "number", step: 0.1, value: use.text_encoder_weight ?? "", placeholder: "as weight",
    "aria-label": `text encoder weight of ${use.name}` });
  text.addEventListener("change", () => say(use, { text_encoder_weight: text.value === "" ? null : Number(text.value) }));
  const positive = make("input", { type: "checkbox", checked: Boolean(use.positive_only) });
  positive.addEventListener("change", () => say(use, { positive_only: positive.checked }));
  const more = make("details", { class: "ml-more", open: opened.has(use.name) },
    make("summary", {}, "Schedule, mask, blocks, text encoder"));
  const fill = () => {
    if (more.childElementCount > 1) return;
    more.append(schedule(use, redraw), MASK(use), blocks(use), make("div", { class: "ml-part" },
      labelled("text encoder", "its weight in the part that reads the prompt", text),
      make("label", { class: "ml-check" }, positive, "positive only: it leaves the negative prompt's half alone")));
  };
  more.addEventListener("toggle", () => {
    if (more.open) { opened.add(use.name); fill(); } else opened.delete(use.name);
  });
  if (more.open) fill();
  return more;
}

function moved(use, by) {
  const list = copied();
  const at = list.findIndex((u) => u.name === use.name), to = at + by;
  if (to < 0 || to >= list.length) return;
  list.splice(to, 0, ...list.splice(at, 1));
  props.value = list;
  drawList();
  rows.querySelector(`[data-name="${CSS.escape(use.name)}"] .ml-${by < 0 ? "up" : "down"}`)?.focus();
}

function row(use, number) {
  const entry = entryOf(use);
  const on = make("input", { type: "checkbox", checked: use.on !== false, "aria-label": `${use.name} on` });
  const item = make("li", { class: "ml-use", "data-name": use.name });
  const dim = () => item.classList.toggle("ml-off", !on.checked);
  on.addEventListener("change", () => { say(use, { on: on.checked }); dim(); });
  const icon = (kind, sign, words, act) => make("button", { type: "button", class: `ml-icon ml-${kind}`, title: words,
    "aria-label": `${words}: ${use.name}`, onclick: act }, sign);
  item.append(
    make("div", { class: "ml-head" },
      entry.preview ? make("img", { src: entry.preview, alt: "" }) : null,
      make("div", { class: "ml-title" }, make("b", {}, `${number + 1}. ${use.name}`),
        entry.trigger ? make("button", { type: "button", class: "ml-trigger", title: "write this trigger into the prompt",
          onclick: () => insert(entry.trigger.split(",")[0]) }, entry.trigger) : make("span", { class: "ml-sub" }, entry.category || "")),
      make("label", { class: "ml-check" }, on, "on"),
      icon("up", "↑", "earlier", () => moved(use, -1)), icon("down", "↓", "later", () => moved(use, 1)),
      icon("out", "✕", "take out", () => toggle({ reference: use.reference, name: use.name }))),
    weight(use), advanced(use, drawList));
  dim();
  return item;
}

function drawList() {
  const list = uses();
  const held = document.activeElement?.closest?.(".ml-use")?.dataset.name;
  rows.replaceChildren(...list.map((use, i) => row(uses().find((u) => u.name === use.name), i)));
  const words = list.length ? `${list.filter((u) => u.on !== false).length} of ${list.length} on` : "";
  title.replaceChildren(make("b", {}, "Chosen"), make("span", { class: "ml-sub" }, ` ${words}`),
    ...(list.length ? [make("button", { type: "button", class: "ml-chip", onclick: () => {
      props.value = []; prompted([], null); drawCards(); drawList(); announce("list emptied");
    } }, "clear")] : []));
  if (!list.length) rows.append(make("li", { class: "ml-empty" }, "None yet: the base model alone. Click previews above to add LoRAs."));
  if (held && !root.contains(document.activeElement)) rows.querySelector(`[data-name="${CSS.escape(held)}"] summary`)?.focus();
}

const search = make("input", { type: "search", placeholder: "Search LoRAs", "aria-label": "search LoRAs",
  oninput: () => { query = search.value; drawCards(); } });
const chips = make("div", { class: "ml-chips", role: "group", "aria-label": "category" });
const cards = make("div", { class: "ml-cards", role: "group", "aria-label": "LoRAs" });
const title = make("div", { class: "ml-list-title" });
const rows = make("ol", { class: "ml-uses" });
const live = make("p", { class: "ml-live", "aria-live": "polite" });
root.replaceChildren(make("div", { class: "ml-top" }, make("b", {}, "LoRAs"), search, chips), cards, title, rows, live);
const redrawAll = () => { drawChips(); drawCards(); drawList(); };
watch(["value", "library"], redrawAll);
redrawAll();
