// The sequences as panels: what each one does, its block table and its text.
"use strict";

const MOST_SEQUENCES = 24; // panels that are drawn before the reader asks for all
const MOST_TOKENS = 3600; // of all panels together; a browser lays out so many without a delay
const FEWEST_TOKENS = 120; // of one panel, which fill it

const panels = new Map(); // id of a sequence -> {element, signature}

function drawSequences(step, state) {
  const { run } = view;
  const all = [...run.sequences.values()];
  let shown = all;
  if (all.length > MOST_SEQUENCES && !view.allSequences) {
    const active = new Set([
      ...step.seqs.map((part) => part.seq),
      ...step.admitted.map((entry) => entry.seq),
      ...step.preempted,
    ]);
    shown = all.filter((sequence) => active.has(sequence.id)).slice(0, MOST_SEQUENCES);
  }
  const most = Math.max(FEWEST_TOKENS, Math.floor(MOST_TOKENS / shown.length));
  const elements = shown.map((sequence) => drawSequence(sequence, step, state, most));
  const box = byId("sequences");
  const isSame =
    box.children.length === elements.length &&
    elements.every((element, i) => box.children[i] === element);
  if (!isSame) box.replaceChildren(...elements);
  const more = byId("more-sequences");
  more.hidden = all.length <= MOST_SEQUENCES;
  more.textContent = view.allSequences
    ? "Show the sequences of the step only"
    : `Show all ${all.length} sequences`;
  scrollToNewest(shown);
}

// most: the number of tokens that its text may show.
function drawSequence(sequence, step, state, most) {
  const { run } = view;
  if (!panels.has(sequence.id)) {
    const element = el("article", {
      class: "sequence",
      id: `seq-${sequence.id}`,
      style: `--c: ${colour(sequence)}`,
    });
    panels.set(sequence.id, { element, signature: null, scrolled: true });
  }
  const panel = panels.get(sequence.id);
  const own = state.sequences.get(sequence.id);
  const generated = run.generatedCount(sequence, view.index);
  const status = statusOf(run, state, view.index, sequence.id);
  const table = state.tables.get(sequence.id) ?? [];
  const shared = table.map((id) => state.blocks.get(id)?.refs ?? 0);
  const signature = JSON.stringify([
    status,
    own,
    generated,
    table,
    shared,
    generatedNow(sequence, generated),
    shownRanges(sequence.promptLength + generated, own.computed, most),
  ]);
  if (signature === panel.signature) return panel.element;
  panel.signature = signature;
  panel.scrolled = false;
  panel.element.dataset.status = status;
  panel.element.dataset.generated = generated;
  panel.element.dataset.computed = own.computed;
  panel.element.replaceChildren(
    sequenceHead(sequence, own, status, generated),
    sequenceTable(table, state),
    sequenceText(sequence, own, status, generated, most),
  );
  return panel.element;
}

const STATUS_WORDS = {
  absent: ["not here yet", "request"],
  waiting: ["waits", "waiting"],
  preempted: ["preempted, waits", "preemption"],
  prefill: ["prefill", "prefill"],
  decode: ["decode", "decode"],
  idle: ["running", "running"],
  finished: ["finished", "finish"],
};

function sequenceHead(sequence, own, status, generated) {
  const [words, key] = STATUS_WORDS[status];
  const reason = own.reason && status === "finished" ? ` (${own.reason})` : "";
  const again = own.preemptions
    ? `, preempted ${own.preemptions === 1 ? "once" : `${own.preemptions} times`}`
    : "";
  const limit = sequence.request.max_tokens;
  return el(
    "header",
    {},
    chip(sequence.id),
    el("span", { class: `status ${status}` }, term(key, words + reason)),
    el(
      "small",
      {},
      `prompt ${sequence.promptLength}, new ${generated}${limit ? ` of ${limit}` : ""}${again}`,
    ),
  );
}

function sequenceTable(table, state) {
  const { run } = view;
  if (!table.length) return el("p", { class: "mini none" }, "no blocks");
  const most = 24;
  const list = table.length > most ? [...table.slice(0, 8), null, ...table.slice(8 - most)] : table;
  return el(
    "p",
    { class: "mini", "aria-label": "Block table" },
    list.map((id) => {
      if (id === null) return el("span", { class: "none" }, `… ${table.length - most} …`);
      const block = state.blocks.get(id);
      const button = blockButton(id);
      button.classList.add(blockKind(block));
      button.style.setProperty("--fill", `${((block?.filled ?? 0) / run.blockSize) * 100}%`);
      return button;
    }),
  );
}

// The tokens of a sequence. Of a long text the beginning and what surrounds the newest step.
function sequenceText(sequence, own, status, generated, most) {
  const total = sequence.promptLength + generated;
  const newest = generatedNow(sequence, generated) ? total - 1 : -1;
  const pieces = [];
  let position = 0;
  for (const [from, to] of shownRanges(total, own.computed, most)) {
    if (from > position) pieces.push(omission(from - position));
    for (position = from; position < to; position += 1)
      pieces.push(textToken(sequence, position, own, status, newest));
  }
  if (total > position) pieces.push(omission(total - position));
  if (status === "finished") pieces.push(sequence.ending.text);
  return el(
    "p",
    { class: "text", tabindex: 0, "aria-label": `Text of sequence ${sequence.label}` },
    pieces,
  );
}

// The positions [from, to) of a text that are shown, at most `most` of `total`.
function shownRanges(total, computed, most) {
  if (total <= most) return [[0, total]];
  const head = Math.floor(most / 4);
  const size = most - head;
  const centred = computed - Math.floor(size / 2);
  const from = Math.max(head, Math.min(centred, total - size));
  return [
    [0, head],
    [from, from + size],
  ];
}

function omission(count) {
  const tokens = count === 1 ? "token" : "tokens";
  return el("span", { class: "none" }, ` … ${number(count)} ${tokens} … `);
}

function textToken(sequence, position, own, status, newest) {
  const token = view.run.tokenAt(sequence, position);
  let kind = position < sequence.promptLength ? "token prompt" : "token answer";
  if (position < own.hit) kind += " from-cache";
  if (position >= own.computed && position !== newest && status !== "finished") kind += " ahead";
  if (position === newest) kind += " newest";
  const text = position === newest ? visibleText(token) : addedText(sequence, token);
  return el("span", { class: kind, "data-token": `${sequence.id}:${position}` }, text);
}

// Whether the step that is shown sampled the sequence's last token.
function generatedNow(sequence, generated) {
  return generated > 0 && sequence.generated[generated - 1].step === view.index;
}

// Scrolls the texts that have changed to their newest token. Reads all places before it scrolls,
// because the browser lays the page out again when reading follows writing.
function scrollToNewest(shown) {
  const changed = shown.map(({ id }) => panels.get(id)).filter((panel) => !panel.scrolled);
  const targets = changed.map((panel) => {
    panel.scrolled = true;
    const box = panel.element.querySelector(".text");
    const mark = box.querySelector(".newest, .ahead") ?? box.lastElementChild;
    const bottom = mark ? mark.offsetTop + mark.offsetHeight : 0;
    return { box, top: bottom + 8 - box.clientHeight };
  });
  for (const { box, top } of targets) box.scrollTop = top;
}
