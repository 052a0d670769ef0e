// The blocks of the cache as a grid, and the details of one block.
"use strict";

const CELL_SIZES = [
  [80, 46],
  [240, 34],
  [700, 22],
  [Infinity, 14],
]; // [up to this many blocks, pixels]
const EVENT_MARKS = { allocate: "+", acquire: "↻", evict: "×" };

let cells = []; // {button, signature} of the drawn blocks

function makeCells() {
  const { run } = view;
  const total = run.numBlocks;
  const highest = Math.max(-1, ...run.blockEvents.keys());
  const count = total <= 400 ? total : Math.min(total, highest + 1);
  const size = CELL_SIZES.find(([most]) => count <= most)[1];
  const grid = byId("blocks");
  grid.style.setProperty("--cell", `${size}px`);
  grid.className = size > 30 ? "large" : size > 20 ? "medium" : "small";
  cells = Array.from({ length: count }, (_, id) => ({
    button: el("button", {
      class: "block",
      type: "button",
      "data-block": id,
      tabindex: id === 0 ? 0 : -1,
    }),
    signature: null,
  }));
  grid.replaceChildren(...cells.map((cell) => cell.button));
  const hidden = total - count;
  byId("blocks-note").textContent =
    hidden > 0 ? `${number(hidden)} more blocks are empty during the whole run.` : "";
}

function drawBlocks(step, state) {
  const { run } = view;
  const total = run.numBlocks;
  const { held, cached } = run.counts[view.index];
  byId("cache-counts").replaceChildren(
    el("b", {}, number(held)),
    ` of ${number(total)} blocks held, `,
    el("b", {}, number(cached)),
    " ",
    term("cached", "cached"),
    `, ${number(total - held - cached)} empty`,
  );
  byId("cache-counts").dataset.held = held;
  const holders = new Map();
  for (const [id, table] of state.tables) {
    for (const block of table) {
      if (!holders.has(block)) holders.set(block, []);
      holders.get(block).push(id);
    }
  }
  const marks = new Map();
  for (const event of step.blocks) {
    if (EVENT_MARKS[event.event])
      marks.set(event.block, (marks.get(event.block) ?? "") + EVENT_MARKS[event.event]);
  }
  cells.forEach((cell, id) => {
    const block = state.blocks.get(id);
    drawBlock(cell, id, block, holders.get(id) ?? [], marks.get(id) ?? "");
  });
}

function drawBlock(cell, id, block, holders, mark) {
  const { run } = view;
  const kind = blockKind(block);
  const marks = [...new Set(mark)].join("");
  const signature = JSON.stringify([kind, block, holders, marks, view.block === id]);
  if (signature === cell.signature) return;
  cell.signature = signature;
  const { button } = cell;
  button.className = `block ${kind}${block?.hash ? " named" : ""}${view.block === id ? " open" : ""}`;
  button.dataset.refs = block?.refs ?? 0;
  button.dataset.kind = kind;
  const writer = block && run.sequences.get(block.seq);
  const colours = holders.map((holder) => colour(run.sequences.get(holder)));
  button.style.setProperty("--fill", `${block ? (block.filled / run.blockSize) * 100 : 0}%`);
  button.style.setProperty("--c", writer ? colour(writer) : "transparent");
  button.style.setProperty("--stripes", stripes(colours));
  const label =
    holders.length > 3 ? "" : holders.map((holder) => run.sequences.get(holder).label).join("");
  const refs = block && block.refs > 1 ? `×${block.refs}` : "";
  button.replaceChildren(
    el("span", { class: "id" }, String(id)),
    el("span", { class: "label" }, label || refs),
    el("span", { class: "refs" }, label ? refs : ""),
    el("span", { class: "event" }, marks),
  );
  button.setAttribute("aria-label", blockSentence(id, block, holders, marks));
}

// "empty", "held", "shared" (several holders) or "cached" (no holder, contents kept).
function blockKind(block) {
  if (!block || (block.refs === 0 && block.hash === null)) return "empty";
  if (block.refs === 0) return "cached";
  return block.refs > 1 ? "shared" : "held";
}

// A CSS image with one vertical stripe for each colour.
function stripes(colours) {
  if (colours.length < 2) return `linear-gradient(${colours[0] ?? "transparent"} 0 0)`;
  const share = 100 / colours.length;
  const stops = colours.map((c, i) => `${c} ${i * share}% ${(i + 1) * share}%`);
  return `linear-gradient(90deg, ${stops.join(", ")})`;
}

function blockSentence(id, block, holders, marks) {
  const kind = blockKind(block);
  const labels = holders.map((holder) => view.run.sequences.get(holder).label).join(", ");
  const what = {
    empty: "empty",
    cached: "cached, no holder",
    held: `held by ${labels}`,
    shared: `shared by ${labels}, reference count ${block?.refs}`,
  }[kind];
  const filled =
    block && kind !== "empty" ? `, ${block.filled} of ${view.run.blockSize} tokens` : "";
  const events = Object.entries({ "+": "allocated", "↻": "hit", "×": "evicted" });
  const happened = events
    .filter(([mark]) => marks.includes(mark))
    .map(([, word]) => `, ${word} in this step`);
  return `Block ${id}: ${what}${filled}${block?.hash ? ", registered" : ""}${happened.join("")}`;
}

// -- one block ----------------------------------------------------------------------------------

function openBlock(id) {
  view.block = id;
  show(view.index);
}

function drawDetail(state) {
  const { run } = view;
  const id = view.block;
  byId("detail").dataset.block = id ?? "";
  if (id === null) {
    byId("detail-title").textContent = "One block";
    byId("detail-body").replaceChildren(
      el(
        "p",
        { class: "none" },
        "Choose a block to see its tokens, its hash chain and its history.",
      ),
    );
    return;
  }
  const block = state.blocks.get(id);
  const kind = blockKind(block);
  byId("detail-title").textContent = `Block ${id}`;
  byId("detail-body").replaceChildren(
    detailSentence(id, block, kind, run.holders(state, id)),
    ...(kind === "empty" ? [] : [blockTokens(block)]),
    ...(block?.hash ? [chainList(run.hashChain(state, id))] : []),
    historyList(run.blockEvents.get(id) ?? []),
  );
}

function detailSentence(id, block, kind, holders) {
  const nodes = [];
  if (kind === "empty") nodes.push("Empty: it is handed out first when a sequence needs a block.");
  if (kind === "cached") {
    nodes.push(
      "No sequence holds it. It is ",
      term("cached", "cached"),
      ": its contents stay until it is ",
      term("eviction", "evicted"),
      ".",
    );
  }
  if (holders.length) {
    nodes.push("Held by ", ...sentenceList(holders.map((holder) => chip(holder))), ". ");
    nodes.push(term("refs", "Reference count"), ` ${block.refs}.`);
  }
  if (kind === "held" && block.hash === null) {
    const isFull = block.filled === view.run.blockSize;
    nodes.push(
      isFull
        ? " It is not "
        : ` It has ${block.filled} of ${view.run.blockSize} tokens, so it is not `,
      term("registered", "registered"),
      " yet.",
    );
  }
  return el("p", {}, nodes);
}

function blockTokens(block) {
  const { run } = view;
  const sequence = run.sequences.get(block.seq);
  const shown = [];
  for (let i = 0; i < block.filled; i += 1)
    shown.push(tokenSpan(sequence, block.start + i, "token"));
  for (let i = block.filled; i < run.blockSize; i += 1)
    shown.push(el("span", { class: "token unused" }, " "));
  const last = block.start + Math.max(block.filled, 1) - 1;
  return el(
    "div",
    {},
    el("h3", {}, `Tokens at positions ${block.start} to ${last}, written by `, chip(block.seq)),
    el("p", { class: "tokens", id: "detail-tokens" }, shown),
  );
}

function tokenSpan(sequence, position, kind) {
  const token = view.run.tokenAt(sequence, position);
  return el(
    "span",
    { class: kind, "data-token": `${sequence.id}:${position}` },
    token ? visibleText(token) : "?",
  );
}

function chainList(chain) {
  const links = chain.map(({ hash, block }) =>
    block === null
      ? el("li", {}, el("span", { class: "none" }, "evicted"))
      : el("li", {}, blockButton(block), el("code", { title: hash }, hash.slice(0, 6))),
  );
  return el(
    "div",
    {},
    el("h3", {}, term("hash", "Hash chain"), ", from the first block to this one"),
    el("ol", { class: "chain", id: "detail-chain" }, links),
  );
}

function blockButton(id) {
  return el("button", { type: "button", class: "to-block", "data-block": id }, String(id));
}

const EVENT_WORDS = {
  allocate: ["allocated for", "block"],
  acquire: ["hit by", "hit"],
  register: ["registered by", "registered"],
  evict: ["evicted for", "eviction"],
  release: ["released by", "refs"],
  free: ["free after", "refs"],
};

function historyList(events) {
  const items = events.map((event) => {
    const [words, key] = EVENT_WORDS[event.event] ?? [event.event, "block"];
    const when = event.step === view.index ? "now" : event.step > view.index ? "later" : "past";
    return el(
      "li",
      { class: when },
      el(
        "button",
        { type: "button", class: "to-step", "data-step": event.step },
        view.run.stepName(event.step),
      ),
      " ",
      term(key, words),
      " ",
      view.run.sequences.has(event.seq) ? chip(event.seq) : "",
      ` → ${event.refs}`,
    );
  });
  const list = items.length
    ? el("ol", { class: "history", id: "detail-history" }, items)
    : el("p", { class: "none" }, "Nothing happens to it in this run.");
  return el(
    "div",
    {},
    el("h3", {}, "History, with the ", term("refs", "reference count"), " after each event"),
    list,
  );
}
