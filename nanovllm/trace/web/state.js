// A run's records -> the state of the engine after any step. This file draws nothing.
//
// The state after step n is the empty state with the records of steps 0..n folded into it.
// A copy is kept after every SNAPSHOT_STEPS steps, so a jump folds few records.
"use strict";

const SNAPSHOT_STEPS = 50;

// One recorded run (docs/trace.md). `steps` are its steps in order. An `end` record is a step that
// computes nothing: it shows what the last step left. A step's index is its place in `steps`.
class Run {
  constructor({ name, note, stops, records }) {
    this.name = name;
    this.note = note;
    this.stopKeys = stops;
    this.facts = records.find((record) => record.kind === "run") ?? {};
    this.blockSize = this.facts.block_size;
    this.numBlocks = this.facts.num_blocks;
    this.steps = records.map((record) => this.asStep(record)).filter(Boolean);
    this.lastNumber = Math.max(-1, ...this.steps.map((step) => step.number ?? -1));
    this.sequences = new Map(); // id of a sequence -> what is known of it at the end of the run
    this.numAdmitted = 0; // sequences that were admitted at least once
    this.blockEvents = new Map(); // id of a block -> its events, with the index of their step
    this.snapshots = [];
    this.counts = []; // of each step: {held, cached} blocks
    records.forEach((record) => {
      if (record.kind === "request") this.addRequest(record);
    });
    this.steps.forEach((step, index) => this.indexStep(step, index));
    this.latest = { index: -1, state: emptyState(this) };
    this.steps.forEach((_, index) => this.counts.push(countBlocks(this.stateAt(index))));
  }

  asStep(record) {
    if (record.kind === "step") return record;
    if (record.kind !== "end") return null;
    const budget = { used: 0, max: this.facts.max_num_batched_tokens };
    return { admitted: [], seqs: [], tokens: [], us: {}, budget, ...record };
  }

  addRequest(record) {
    for (const id of record.seqs) {
      const number = this.sequences.size;
      this.sequences.set(id, {
        id,
        number,
        label: sequenceLabel(number),
        request: record,
        promptLength: record.prompt.length,
        admission: Infinity, // its place in the order of first admissions
        hasText: record.prompt_pieces.some((piece) => piece !== ""),
        generated: [], // its sampled tokens, with the index of their step
        ending: null, // {step, text}: text that the end adds to the text of the tokens
      });
    }
  }

  indexStep(step, index) {
    for (const { seq } of step.admitted) {
      const sequence = this.sequences.get(seq);
      if (sequence.admission === Infinity) sequence.admission = this.numAdmitted++;
    }
    for (const token of step.tokens) {
      this.sequences.get(token.seq).generated.push({ ...token, step: index });
    }
    for (const { seq, text } of step.finished) {
      this.sequences.get(seq).ending = { step: index, text: text ?? "" };
    }
    for (const event of step.blocks) {
      if (!this.blockEvents.has(event.block)) this.blockEvents.set(event.block, []);
      this.blockEvents.get(event.block).push({ ...event, step: index });
    }
  }

  // "Step 12", or "End" after the last step of all requests.
  stepName(index) {
    const { number } = this.steps[index];
    return number === undefined ? "End" : `Step ${number}`;
  }

  // The state after the step with this index. Callers must not change it.
  stateAt(index) {
    let { index: at, state } = this.latest;
    const usable = Math.min(Math.floor((index + 1) / SNAPSHOT_STEPS), this.snapshots.length);
    const snapshotIndex = usable * SNAPSHOT_STEPS - 1;
    if (at > index || at < snapshotIndex) {
      at = snapshotIndex;
      state = usable > 0 ? structuredClone(this.snapshots[usable - 1]) : emptyState(this);
    }
    while (at < index) {
      at += 1;
      fold(state, this.steps[at], this);
      if (at + 1 === (this.snapshots.length + 1) * SNAPSHOT_STEPS) {
        this.snapshots.push(structuredClone(state));
      }
    }
    this.latest = { index: at, state };
    return state;
  }

  // How many tokens a sequence has generated after a step.
  generatedCount(sequence, index) {
    let low = 0;
    let high = sequence.generated.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (sequence.generated[middle].step <= index) low = middle + 1;
      else high = middle;
    }
    return low;
  }

  // The token at a position of a sequence: {id, position, text, piece, ...}.
  // `text` is what the token adds to the text, `piece` the text of the token alone.
  tokenAt(sequence, position) {
    const after = position - sequence.promptLength;
    if (after >= 0) {
      const token = sequence.generated[after];
      return token && { ...token, piece: token.piece ?? token.text };
    }
    const { prompt, prompt_pieces: pieces } = sequence.request;
    return { id: prompt[position], position, text: pieces[position], piece: pieces[position] };
  }

  // The chain of registered blocks that ends with this block, the first of the sequence first:
  // {block, hash}. {block: null} stands for the blocks before a parent that was evicted.
  hashChain(state, blockId) {
    const chain = [];
    let id = blockId;
    while (id !== null) {
      const block = state.blocks.get(id);
      const isLost =
        block === undefined || block.hash === null || chain.some((link) => link.block === id);
      chain.unshift(isLost ? { block: null, hash: "" } : { block: id, hash: block.hash });
      id = isLost ? null : block.parent;
    }
    return chain;
  }

  // The sequences whose block tables have the block.
  holders(state, blockId) {
    const tables = [...state.tables].filter(([, table]) => table.includes(blockId));
    return tables.map(([id]) => id);
  }
}

// A, B, ..., Z, then 27, 28, ...
function sequenceLabel(number) {
  return number < 26 ? String.fromCharCode(65 + number) : String(number + 1);
}

function emptyState(run) {
  const sequences = new Map();
  for (const id of run.sequences.keys()) {
    // hit: tokens that the newest admission found in the cache
    sequences.set(id, { computed: 0, hit: 0, preemptions: 0, reason: null });
  }
  return {
    blocks: new Map(), // id -> {refs, hash, parent, seq, start, filled}; untouched blocks are absent
    tables: new Map(), // id of a sequence -> ids of its blocks
    sequences,
  };
}

function countBlocks(state) {
  const counts = { held: 0, cached: 0 };
  for (const block of state.blocks.values()) {
    if (block.refs > 0) counts.held += 1;
    else if (block.hash !== null) counts.cached += 1;
  }
  return counts;
}

function fold(state, step, run) {
  if (step.reset) {
    state.blocks.clear();
    state.tables.clear();
  }
  for (const { seq, reason } of step.finished) {
    state.sequences.get(seq).reason = reason;
    state.tables.delete(seq);
  }
  for (const id of step.preempted) {
    const sequence = state.sequences.get(id);
    sequence.computed = 0;
    sequence.hit = 0;
    sequence.preemptions += 1;
    state.tables.delete(id);
  }
  for (const { seq, cached } of step.admitted) {
    const sequence = state.sequences.get(seq);
    sequence.computed = cached;
    sequence.hit = cached;
  }
  for (const [id, table] of Object.entries(step.tables)) state.tables.set(Number(id), table);
  for (const event of step.blocks) foldBlockEvent(state, event, run.blockSize);
  for (const { seq, start, count } of step.seqs) {
    state.sequences.get(seq).computed = start + count;
    fillBlocks(state, state.tables.get(seq) ?? [], start, start + count, run.blockSize);
  }
}

function foldBlockEvent(state, event, blockSize) {
  let block = state.blocks.get(event.block);
  if (!block || event.event === "allocate") {
    block = { refs: 0, hash: null, parent: null, seq: event.seq, start: event.start, filled: 0 };
    state.blocks.set(event.block, block);
  }
  block.refs = event.refs;
  if (event.event === "register") {
    block.hash = event.hash;
    block.parent = event.parent;
    block.filled = blockSize;
  } else if (event.event === "evict") {
    block.hash = null;
    block.parent = null;
  }
  if (block.refs === 0 && block.hash === null) block.filled = 0;
}

// The tokens start..end of a sequence are in its blocks now.
function fillBlocks(state, table, start, end, blockSize) {
  for (let i = Math.floor(start / blockSize); i * blockSize < end && i < table.length; i += 1) {
    const block = state.blocks.get(table[i]);
    if (!block) continue;
    const filled = Math.min(blockSize, end - i * blockSize);
    if (block.refs > 0) block.filled = Math.max(block.filled, filled);
  }
}

// What a sequence does in a step: "absent" (not arrived), "waiting", "preempted" (waits again),
// "prefill", "decode", "idle" (runs, and computes nothing in this step), "finished".
function statusOf(run, state, index, id) {
  const step = run.steps[index];
  const sequence = state.sequences.get(id);
  if (sequence.reason !== null) return "finished";
  const part = step.seqs.find((entry) => entry.seq === id);
  if (part) return part.kind;
  if (step.waiting.includes(id)) return sequence.preemptions ? "preempted" : "waiting";
  if (step.running.includes(id)) return "idle";
  return "absent";
}
