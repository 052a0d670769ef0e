// One step in words, its token budget, the queues and the times.
"use strict";

const HOST_STAGES = ["schedule", "build", "launch", "collect", "output"];
const STAGES = [...HOST_STAGES, "device"];

function drawSentence(step) {
  const nodes = [...changeWords(step), ...computeWords(step)];
  byId("sentence").replaceChildren(el("b", {}, `${view.run.stepName(view.index)}. `), ...nodes);
  byId("sentence").setAttribute("aria-live", view.timer === null ? "polite" : "off");
}

// What happened before the step computes: who ended, lost its blocks, came in.
function changeWords(step) {
  const nodes = [];
  for (const { seq, reason } of step.finished) {
    nodes.push(chip(seq), " has ", term("finish", "ended"), ` (${reason}). `);
  }
  for (const id of step.preempted)
    nodes.push(chip(id), " is ", term("preemption", "preempted"), ". ");
  for (const { seq, cached, hit } of step.admitted) {
    nodes.push(chip(seq), " is ", term("admission", "admitted"));
    if (hit.length)
      nodes.push(
        " with a ",
        term("hit", "hit"),
        ` of ${plural(hit.length, "block")} (${plural(cached, "token")})`,
      );
    nodes.push(". ");
  }
  const evicted = step.blocks.filter((event) => event.event === "evict").length;
  if (evicted)
    nodes.push(
      `${plural(evicted, "block")} ${evicted === 1 ? "is" : "are"} `,
      term("eviction", "evicted"),
      ". ",
    );
  if (step.error) nodes.push(`The step raised ${step.error}. `);
  return nodes;
}

function computeWords(step) {
  if (!step.seqs.length) return ["No request is left."];
  const decodes = step.seqs.filter((part) => part.kind === "decode").length;
  const parts = step.seqs
    .filter((part) => part.kind === "prefill")
    .map((part) => {
      const key = part.samples ? "prefill" : "chunk";
      return el("span", {}, `${part.count} of `, chip(part.seq), " (", term(key, key), ")");
    });
  if (decodes)
    parts.push(
      el("span", {}, `${decodes} by `, term("decode", decodes === 1 ? "a decode" : "decodes")),
    );
  return [
    `${plural(step.budget.used, "token")} ${step.budget.used === 1 ? "is" : "are"} computed: `,
    ...sentenceList(parts),
    ".",
  ];
}

function runFacts(run) {
  const { facts } = run;
  const words = [
    facts.model.split("/").at(-1),
    `${facts.dtype} on ${facts.device}`,
    `${number(facts.num_blocks)} blocks of ${facts.block_size} tokens`,
    `budget ${number(facts.max_num_batched_tokens)} tokens`,
    `at most ${number(facts.max_num_seqs)} sequences at once`,
    facts.prefix_caching === false ? "no prefix caching" : null,
  ];
  return words.filter(Boolean).map((word) => el("span", {}, word));
}

function drawBudget(step) {
  const { used, max } = step.budget;
  const parts = step.seqs.filter((part) => part.count > 0);
  const isSmall = used < max / 5;
  const percent = (count, whole) => `${(count / whole) * 100}%`;
  const segments = (whole) =>
    parts.map((part) => {
      const sequence = view.run.sequences.get(part.seq);
      const what = part.kind === "prefill" && !part.samples ? "chunk" : part.kind;
      const title = `${sequence.label}: ${what}, ${plural(part.count, "token")} from position ${part.start}`;
      const share = part.count / whole;
      const label =
        share > 0.14 ? `${sequence.label} ${part.count}` : share > 0.045 ? sequence.label : "";
      return el(
        "div",
        {
          class: `segment ${part.kind}`,
          style: `--c: ${colour(sequence)}; width: ${percent(part.count, whole)}`,
          title,
          "data-seq": part.seq,
          "data-count": part.count,
        },
        label,
      );
    });
  const prefilled = parts
    .filter((part) => part.kind === "prefill")
    .reduce((sum, part) => sum + part.count, 0);
  const summary = el(
    "p",
    { class: "figures" },
    el("b", {}, number(used)),
    ` of ${number(max)} tokens: ${number(prefilled)} `,
    term("prefill", "prefill"),
    `, ${number(used - prefilled)} `,
    term("decode", "decode"),
  );
  const whole = el(
    "div",
    { class: "bar-row", role: "img", "aria-label": `${used} of ${max} tokens` },
    segments(max),
  );
  const rows = [summary, whole];
  if (isSmall && used > 0) {
    rows.push(
      el("div", { class: "lens", style: `--share: ${percent(used, max)}`, "aria-hidden": "true" }),
    );
    rows.push(el("div", { class: "bar-row close", "aria-hidden": "true" }, segments(used)));
  }
  byId("budget-bar").replaceChildren(...rows);
}

function drawQueues(step, state) {
  const again = step.waiting.filter((id) => state.sequences.get(id).preemptions > 0);
  const first = step.waiting.filter((id) => state.sequences.get(id).preemptions === 0);
  const rows = [
    ["running", term("running", "running"), step.running.map((id) => chip(id))],
    [
      "preempted",
      term("preemption", "preempted"),
      again.map((id) => chip(id, `↩${state.sequences.get(id).preemptions}`)),
    ],
    ["waiting", term("waiting", "waiting"), first.map((id) => chip(id))],
    ["ended", term("finish", "ended"), step.finished.map((entry) => chip(entry.seq, entry.reason))],
  ];
  byId("queue-rows").replaceChildren(
    ...rows.flatMap(([key, words, chips]) => [
      el("dt", {}, words, " ", el("b", {}, String(chips.length))),
      el(
        "dd",
        { "data-queue": key },
        chips.length ? chips.slice(0, 40) : el("span", { class: "none" }, "none"),
        chips.length > 40 ? ` and ${chips.length - 40} more` : null,
      ),
    ]),
  );
}

// Where each stage of a step lies, in microseconds after the step began.
function stageTimes(step) {
  const { us } = step;
  const after = (seconds) => (seconds - step.time) * 1e6;
  const stages = [{ stage: "schedule", from: 0, time: us.schedule }];
  stages.push({ stage: "build", from: us.schedule, time: us.build });
  stages.push({ stage: "launch", from: us.schedule + us.build, time: us.launch });
  stages.push({ stage: "collect", from: after(step.collect_time), time: us.collect });
  stages.push({ stage: "output", from: after(step.collect_time) + us.collect, time: us.output });
  stages.push({ stage: "device", from: after(step.device_time), time: us.device });
  return stages.filter(({ time }) => typeof time === "number");
}

function drawTimes(step) {
  const stages = stageTimes(step);
  const whole = Math.max(1, ...stages.map(({ from, time }) => from + time));
  const row = (name, names) =>
    el(
      "div",
      { class: "time-row" },
      el("span", {}, name),
      el(
        "div",
        { class: "bar-row thin" },
        stages
          .filter(({ stage }) => names.includes(stage))
          .map(({ stage, from, time }) =>
            el("div", {
              class: `stage ${stage}`,
              style: `left: ${(from / whole) * 100}%; width: ${(time / whole) * 100}%`,
              title: `${stage}: ${duration(time)}`,
            }),
          ),
      ),
    );
  const figures = STAGES.map((stage) =>
    el(
      "li",
      {},
      el("i", { class: `swatch ${stage}` }),
      term(stage, stage),
      el("b", {}, duration(step.us[stage])),
    ),
  );
  byId("time-bars").replaceChildren(
    row("host", HOST_STAGES),
    row("device", ["device"]),
    el("ul", { class: "stages" }, figures),
  );
  const launched = (step.us.schedule ?? 0) + (step.us.build ?? 0) + (step.us.launch ?? 0);
  const gap = stages.find(({ stage }) => stage === "collect")?.from - launched;
  if (gap > whole / 10) {
    byId("time-bars").append(
      el("p", {}, "In the gap the host works on other steps: ", term("overlap", "overlap"), "."),
    );
  }
}
