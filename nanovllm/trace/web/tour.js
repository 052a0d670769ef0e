// The guided tour. Each stop is found in the records by a rule, so every run has a tour.
//
// A stop is {key, title, find}. `find(run)` gives {step, target, text, block} or null:
//   step    the index of the step to show
//   target  the CSS selector of the element to highlight
//   text    two or three sentences; [[budget|words]] is a link to a term
//   block   the block whose details are opened, if any
"use strict";

const STOPS = [
  {
    key: "start",
    title: "One column is one step",
    find: (run) => ({
      step: 0,
      target: "#timeline",
      text:
        `This run has ${run.lastNumber + 1} [[step|steps]] and ${plural(run.sequences.size, "sequence")}. ` +
        "Each column of the chart is one step, and each row is one sequence. " +
        "Play it, or move through it with the arrow keys.",
    }),
  },
  {
    key: "prefill",
    title: "A prompt is computed",
    find(run) {
      const step = firstStep(run, (s) => s.seqs.some((part) => part.kind === "prefill"));
      if (step === null) return null;
      const part = run.steps[step].seqs.find((p) => p.kind === "prefill");
      return {
        step,
        target: "#budget",
        text:
          `${called(run, part.seq)} computes ${plural(part.count, "token")} of its prompt in one step: a ` +
          `[[prefill|prefill]]. All tokens of a step share one [[budget|budget]] of ` +
          `${run.steps[step].budget.max} tokens.`,
      };
    },
  },
  {
    key: "chunk",
    title: "A prompt in chunks",
    find(run) {
      const step = firstStep(run, (s) => chunkOf(s) !== undefined);
      if (step === null) return null;
      const part = chunkOf(run.steps[step]);
      const length = run.sequences.get(part.seq).promptLength;
      return {
        step,
        target: "#budget",
        text:
          `The budget leaves ${plural(part.count, "token")} for ${called(run, part.seq)}, whose prompt has ` +
          `${length}. It computes this [[chunk|chunk]] now and the rest in later steps. ` +
          "It samples nothing before its last prompt token is computed.",
      };
    },
  },
  {
    key: "token",
    title: "The first token",
    find(run) {
      const step = firstStep(run, (s) => s.tokens.length > 0);
      if (step === null) return null;
      const token = run.steps[step].tokens[0];
      return {
        step,
        target: `#seq-${token.seq}`,
        text:
          `The last prompt token of ${called(run, token.seq)} was computed, so the model has scores for ` +
          `the token after it. [[sampling|Sampling]] chose ${quoted(token.text)}. ` +
          "K and V of this new token are computed in the next step.",
      };
    },
  },
  {
    key: "decode",
    title: "One token a step",
    find(run) {
      const step = firstStep(
        run,
        (s) => s.seqs.length > 0 && s.seqs.every((p) => p.kind === "decode"),
      );
      if (step === null) return null;
      const count = run.steps[step].seqs.length;
      return {
        step,
        target: "#budget",
        text:
          `${count === 1 ? "The only running sequence computes" : `Each of ${count} sequences computes`} ` +
          "one token: a [[decode|decode]]. The device reads all weights of the model for it, so " +
          "more sequences in one step cost little more time than one.",
      };
    },
  },
  {
    key: "mixed",
    title: "Decodes beside a prefill",
    find(run) {
      const step = firstStep(run, (s) => has(s, "prefill") && has(s, "decode"));
      if (step === null) return null;
      const parts = run.steps[step].seqs;
      const decodes = parts.filter((part) => part.kind === "decode").length;
      const tokens = parts.filter((p) => p.kind === "prefill").reduce((sum, p) => sum + p.count, 0);
      return {
        step,
        target: "#budget",
        text:
          `One step computes ${plural(decodes, "decode")} and ${plural(tokens, "prompt token")} together. ` +
          "The engine has no prefill mode and no decode mode: a sequence computes what it has not " +
          "computed yet, as far as the [[budget|budget]] goes.",
      };
    },
  },
  {
    key: "waiting",
    title: "Some have to wait",
    find(run) {
      const step = firstStep(run, (s) => s.waiting.length > 0);
      if (step === null) return null;
      const { waiting, running, budget } = run.steps[step];
      let why = "not enough blocks are free for all of the next one's tokens";
      if (running.length >= run.facts.max_num_seqs) {
        why = `at most ${plural(run.facts.max_num_seqs, "sequence")} may run at once (max_num_seqs)`;
      } else if (budget.used >= budget.max) why = "the token budget of this step is used up";
      return {
        step,
        target: "#queues",
        text:
          `${plural(waiting.length, "sequence")} ${waiting.length === 1 ? "stands" : "stand"} in the ` +
          `[[waiting|waiting queue]], because ${why}. ` +
          "The first of the queue is [[admission|admitted]] first.",
      };
    },
  },
  {
    key: "join",
    title: "One ends, another joins",
    find(run) {
      const step = firstStep(run, (s) => s.admitted.length && s.finished.length);
      if (step === null) return null;
      const ended = run.steps[step].finished.map((entry) => called(run, entry.seq)).join(" and ");
      const joined = run.steps[step].admitted.map((entry) => called(run, entry.seq)).join(" and ");
      return {
        step,
        target: "#queues",
        text:
          `The step before gave ${ended} its last token, and ${joined} joins at once. This is ` +
          "[[batching|continuous batching]]: no sequence waits for the end of a batch, because " +
          "every step chooses its own.",
      };
    },
  },
  {
    key: "registered",
    title: "A full block gets a name",
    find(run) {
      const found = firstEvent(run, (event) => event.event === "register");
      if (!found) return null;
      return {
        step: found.step,
        block: found.block,
        target: "#detail",
        text:
          `Block ${found.block} is full, so it is [[registered|registered]] under a hash. The ` +
          "[[hash|hash]] covers its own tokens and all tokens before them. " +
          "A later prompt that begins alike can find the block.",
      };
    },
  },
  {
    key: "hit",
    title: "A prefix hit",
    find(run) {
      const step = firstStep(run, (s) => freshHit(run, s) !== undefined);
      if (step === null) return null;
      const { seq, cached, hit } = freshHit(run, run.steps[step]);
      const length = run.sequences.get(seq).promptLength;
      return {
        step,
        target: `#seq-${seq}`,
        text:
          `The prompt of ${called(run, seq)} has ${length} tokens, and ${plural(hit.length, "block")} with its first ` +
          `${cached} ${hit.length === 1 ? "is" : "are"} in the cache: a [[hit|prefix hit]]. ` +
          `It computes only the other ${length - cached}. ${inFlight(run, step, hit[0])}`,
      };
    },
  },
  {
    key: "shared",
    title: "Blocks with several holders",
    find(run) {
      let most = null;
      eachEvent(run, (event) => {
        if (event.event === "acquire" && event.refs > (most?.refs ?? 1)) most = event;
      });
      if (!most) return null;
      return {
        step: most.step,
        block: most.block,
        target: "#cache",
        text:
          `${most.refs} sequences hold block ${most.block}, so its [[refs|reference count]] is ${most.refs}. ` +
          "Its K and V are in memory once. The stripes show the holders.",
      };
    },
  },
  {
    key: "release",
    title: "A count goes down",
    find(run) {
      const found = firstEvent(run, (event) => event.event === "release" && event.refs > 0);
      if (!found) return null;
      return {
        step: found.step,
        block: found.block,
        target: "#detail",
        text:
          `${called(run, found.seq)} has ended and drops its references. ` +
          `${found.refs === 1 ? "Another sequence holds" : `${found.refs} other sequences hold`} block ` +
          `${found.block}, so the block stays in use.`,
      };
    },
  },
  {
    key: "cached",
    title: "Free, but not forgotten",
    find(run) {
      const step = firstStep(run, (_, index) => run.counts[index].cached > 0);
      if (step === null) return null;
      const { cached: count } = run.counts[step];
      return {
        step,
        target: "#cache",
        text:
          `${plural(count, "hatched block")} ${count === 1 ? "has" : "have"} no holder and ` +
          `${count === 1 ? "keeps its" : "keep their"} contents: [[cached|cached blocks]]. ` +
          "They are free for new tokens, and until then a prompt that begins alike can hit them.",
      };
    },
  },
  {
    key: "preemption",
    title: "The cache is full",
    find(run) {
      const step = firstStep(run, (s) => s.preempted.length > 0);
      if (step === null) return null;
      const lost = run.steps[step].preempted.map((id) => called(run, id)).join(" and ");
      return {
        step,
        target: "#queues",
        text:
          `The running sequences need more blocks than are free. ${lost}, the last of them, gives its ` +
          "blocks back and goes to the head of the waiting queue: a [[preemption|preemption]]. " +
          "Its tokens are kept, so its text does not change.",
      };
    },
  },
  {
    key: "eviction",
    title: "An old block is evicted",
    find(run) {
      const found = firstEvent(run, (event) => event.event === "evict");
      if (!found) return null;
      return {
        step: found.step,
        block: found.block,
        target: "#detail",
        text:
          `No empty block is left, so the least recently used cached block, block ${found.block}, loses its ` +
          "contents: an [[eviction|eviction]]. The ends of sequences go first, because a beginning " +
          "without its end can still be hit.",
      };
    },
  },
  {
    key: "return",
    title: "The preempted sequence returns",
    find(run) {
      const step = firstStep(run, (s) => returning(run, s) !== undefined);
      if (step === null) return null;
      const { seq, cached } = returning(run, run.steps[step]);
      const part = run.steps[step].seqs.find((entry) => entry.seq === seq);
      const computed = part
        ? `It computes ${plural(part.count, "token")} again in this step. `
        : "";
      return {
        step,
        target: `#seq-${seq}`,
        text:
          `Blocks are free again, so ${called(run, seq)} returns. The cache still has ${cached} of its tokens. ` +
          `${computed}Then it goes on where it was.`,
      };
    },
  },
  {
    key: "times",
    title: "Where the time goes",
    find(run) {
      const step = firstStep(run, (s) => has(s, "decode") && s.us.schedule > 0);
      if (step === null) return null;
      return {
        step,
        target: "#times",
        text:
          "The host plans the step, packs it, launches it, and turns tokens into text. The device runs " +
          "the model. With [[overlap|overlap]] the host does its part for one step while the device " +
          "computes another.",
      };
    },
  },
  {
    key: "end",
    title: "The end of the run",
    find(run) {
      const computed = run.steps.reduce((sum, s) => sum + s.budget.used, 0);
      const generated = run.steps.reduce((sum, s) => sum + s.tokens.length, 0);
      const hits = run.steps.reduce(
        (sum, s) => sum + s.admitted.reduce((n, e) => n + e.cached, 0),
        0,
      );
      return {
        step: run.steps.length - 1,
        target: "#requests",
        text:
          `The run computed ${plural(computed, "token")} in ${plural(run.lastNumber + 1, "step")}, sampled ` +
          `${generated}, and took ${hits} from the cache. Choose any block or word to see more, or go ` +
          "back and watch one sequence.",
      };
    },
  },
];

// The stops of a run's tour, in order of their steps.
function tourOf(run) {
  if (!run.steps.length) return [];
  const keys = run.stopKeys ?? STOPS.map((stop) => stop.key);
  const found = [];
  for (const stop of STOPS) {
    const place = keys.includes(stop.key) ? stop.find(run) : null;
    if (!place) continue;
    const text = place.text[0].toUpperCase() + place.text.slice(1);
    found.push({ key: stop.key, title: stop.title, ...place, text });
  }
  return found.sort((a, b) => a.step - b.step);
}

// -- what the rules ask -----------------------------------------------------------------------

function firstStep(run, test) {
  const index = run.steps.findIndex(test);
  return index < 0 ? null : index;
}

function eachEvent(run, visit) {
  run.steps.forEach((step, index) =>
    step.blocks.forEach((event) => visit({ ...event, step: index })),
  );
}

function firstEvent(run, test) {
  let found = null;
  eachEvent(run, (event) => {
    if (!found && test(event)) found = event;
  });
  return found;
}

const has = (step, kind) => step.seqs.some((part) => part.kind === kind);
const chunkOf = (step) => step.seqs.find((part) => part.kind === "prefill" && !part.samples);

// The first admission of a sequence that hits blocks.
function freshHit(run, step) {
  return step.admitted.find(({ seq, hit }) => hit.length && !wasPreempted(run, seq, step));
}

// A hit may find a block that the very same step fills.
function inFlight(run, step, block) {
  const isNew = run.steps[step].blocks.some((e) => e.block === block && e.event === "register");
  return isNew
    ? "The same step fills these blocks: a block can be hit as soon as its tokens are scheduled."
    : "The underlined text was not computed again.";
}

function wasPreempted(run, seq, step) {
  return run.steps.some((other) => other.number < step.number && other.preempted.includes(seq));
}

function returning(run, step) {
  return step.admitted.find(({ seq }) => wasPreempted(run, seq, step));
}

const called = (run, id) => `sequence ${run.sequences.get(id)?.label ?? id}`;
const plural = (count, word) => `${count} ${word}${count === 1 ? "" : "s"}`;
const quoted = (text) => (text ? `“${text.replaceAll("\n", "↵")}”` : "a token without text");
