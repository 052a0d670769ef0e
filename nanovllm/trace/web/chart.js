// The time line: one column a step, one row a sequence.
"use strict";

const THUMB = 16; // width of the slider's handle in pixels, as in page.css

let chart = null; // {x, width, cursor} of the drawn chart

function drawChart() {
  const { run } = view;
  const root = byId("chart");
  const width = root.clientWidth;
  const isNarrow = width < 600;
  const left = isNarrow ? 54 : 64;
  const count = Math.max(run.steps.length, 1);
  const column = (width - left - THUMB / 2) / count;
  const x = (index) => left + index * column;
  const strips = [tokenStrip, laneStrip, blockStrip, timeStrip];
  let top = 0;
  const drawn = strips.map((strip) => {
    const group = strip(run, x, column, top);
    top += Number(group.dataset.height) + 12;
    return group;
  });
  const cursor = svg("rect", {
    class: "cursor",
    y: 0,
    height: top - 8,
    width: Math.max(column, 2),
    rx: 2,
  });
  root.replaceChildren(cursor, ...drawn);
  root.setAttribute("viewBox", `0 0 ${width} ${top}`);
  root.setAttribute("height", top);
  chart = { x, column, cursor, left };
  const scrub = byId("scrub");
  scrub.max = run.steps.length - 1;
  scrub.style.marginLeft = `${x(0.5) - THUMB / 2}px`;
  scrub.style.width = `${x(count - 0.5) - x(0.5) + THUMB}px`;
}

function drawCursor() {
  const { x, column, cursor } = chart;
  cursor.setAttribute("x", x(view.index) - Math.max(0, (2 - column) / 2));
}

function strip(height, label, top, ...children) {
  const text = svg("text", { class: "strip-label", x: 0, y: top + 10 }, label);
  return svg("g", { "data-height": height }, text, ...children);
}

// Bars of the values, as one path.
function bars(values, x, column, bottom, scale) {
  const gap = column > 5 ? 1 : 0;
  return values
    .map(([from, to], i) => {
      if (to <= from) return "";
      const tall = (to - from) * scale;
      return `M${x(i) + gap / 2} ${bottom - from * scale}v${-tall}h${column - gap}v${tall}z`;
    })
    .join("");
}

function tokenStrip(run, x, column, top) {
  const height = 46;
  const split = run.steps.map((step) => {
    const decodes = step.seqs.filter((part) => part.kind === "decode").length;
    return [decodes, step.budget.used];
  });
  const budget = run.facts.max_num_batched_tokens;
  const most = Math.max(1, ...split.map(([, used]) => used));
  const isNear = budget <= most * 2;
  const scale = height / (isNear ? Math.max(budget, most) : most);
  const bottom = top + height;
  const group = strip(
    height,
    "tokens",
    top,
    svg("path", {
      class: "bar decode",
      d: bars(
        split.map(([decodes]) => [0, decodes]),
        x,
        column,
        bottom,
        scale,
      ),
    }),
    svg("path", { class: "bar prefill", d: bars(split, x, column, bottom, scale) }),
    svg("path", { class: "base", d: `M${x(0)} ${bottom + 0.5}H${x(run.steps.length)}` }),
  );
  if (isNear) {
    const y = bottom - budget * scale;
    group.append(svg("path", { class: "limit", d: `M${x(0)} ${y + 0.5}H${x(run.steps.length)}` }));
  }
  group.append(
    svg("text", { class: "strip-scale", x: 0, y: top + 22 }, `≤ ${number(isNear ? budget : most)}`),
  );
  return group;
}

// One row a sequence: a line while it waits, a tall bar for prefill, a low bar for decode.
// Rows too low for a label stand in the order of admission.
function laneStrip(run, x, column, top) {
  const sequences = [...run.sequences.values()];
  const row = Math.min(16, Math.max(1, 240 / Math.max(sequences.length, 1)));
  const hasLabels = row >= 10;
  if (!hasLabels) sequences.sort((a, b) => a.admission - b.admission);
  const group = strip(row * sequences.length, hasLabels ? "" : "seqs", top);
  group.classList.toggle("dense", !hasLabels);
  const segments = laneSegments(run);
  sequences.forEach((sequence, i) => {
    const y = top + i * row;
    const height = hasLabels ? row - 3 : row;
    const lane = svg("g", { class: "lane", style: `--c: ${colour(sequence)}` });
    for (const [kind, d] of Object.entries(lanePaths(segments.get(sequence.id), x, y, height))) {
      lane.append(svg("path", { class: kind, d }));
    }
    if (hasLabels) {
      const place = { class: "lane-label", x: x(0) - 8, y: y + height / 2 + 4 };
      lane.append(svg("text", place, sequence.label));
    }
    group.append(lane);
  });
  return group;
}

// kind -> the path of all segments of this kind.
function lanePaths(segments, x, y, height) {
  const paths = {};
  const low = height < 4 ? height : height * 0.45; // very low rows differ by their tint instead
  const middle = y + height / 2;
  for (const { kind, from, to } of segments) {
    let d = `M${x(from)} ${middle}H${x(to)}`;
    if (kind === "prefill") d = `M${x(from)} ${y}H${x(to)}v${height}H${x(from)}z`;
    if (kind === "decode") d = `M${x(from)} ${middle - low / 2}H${x(to)}v${low}H${x(from)}z`;
    if (kind === "end") d = `M${x(to)} ${y}v${height}`;
    paths[kind] = (paths[kind] ?? "") + d;
  }
  return paths;
}

// id of a sequence -> its runs of equal kind, {kind, from, to}: steps from..to-1.
function laneSegments(run) {
  const found = new Map([...run.sequences.keys()].map((id) => [id, []]));
  const lost = new Set(); // preempted, and not admitted again
  const add = (id, kind, index) => {
    const list = found.get(id);
    const last = list.at(-1);
    if (last && last.kind === kind && last.to === index) last.to = index + 1;
    else list.push({ kind, from: index, to: index + 1 });
  };
  run.steps.forEach((step, index) => {
    step.preempted.forEach((id) => lost.add(id));
    step.admitted.forEach(({ seq }) => lost.delete(seq));
    const computing = new Set();
    for (const { seq, kind } of step.seqs) {
      computing.add(seq);
      add(seq, kind, index);
    }
    for (const id of step.running) if (!computing.has(id)) add(id, "idle", index);
    for (const id of step.waiting) add(id, lost.has(id) ? "preempted" : "waiting", index);
    for (const { seq } of step.finished) add(seq, "end", index - 1);
  });
  return found;
}

function blockStrip(run, x, column, top) {
  const height = 36;
  const total = run.numBlocks;
  const held = run.counts.map((count) => [0, count.held]);
  const cached = run.counts.map((count) => [count.held, count.held + count.cached]);
  const most = Math.max(1, ...cached.map(([, to]) => to));
  const limit = total <= most * 2 ? total : most;
  const bottom = top + height;
  const group = strip(
    height,
    "blocks",
    top,
    svg("path", { class: "bar held", d: bars(held, x, column, bottom, height / limit) }),
    svg("path", { class: "bar cached", d: bars(cached, x, column, bottom, height / limit) }),
    svg("path", { class: "base", d: `M${x(0)} ${bottom + 0.5}H${x(run.steps.length)}` }),
    svg("text", { class: "strip-scale", x: 0, y: top + 22 }, `≤ ${number(limit)}`),
  );
  if (limit === total)
    group.append(
      svg("path", { class: "limit", d: `M${x(0)} ${top + 0.5}H${x(run.steps.length)}` }),
    );
  return group;
}

function timeStrip(run, x, column, top) {
  const height = 28;
  const times = run.steps.map((step) => hostTime(step));
  // The first steps may take far longer than all others, so the highest twentieth is cut off.
  const sorted = [...times].sort((a, b) => a - b);
  const limit = Math.max(1, sorted[Math.floor(sorted.length * 0.95)] * 1.1 || 1);
  const values = times.map((time) => [0, Math.min(time, limit)]);
  const bottom = top + height;
  return strip(
    height,
    "time",
    top,
    svg("path", { class: "bar time", d: bars(values, x, column, bottom, height / limit) }),
    svg("path", { class: "base", d: `M${x(0)} ${bottom + 0.5}H${x(run.steps.length)}` }),
    svg("text", { class: "strip-scale", x: 0, y: top + 22 }, `≤ ${duration(limit)}`),
  );
}

function hostTime(step) {
  return HOST_STAGES.reduce((sum, stage) => sum + (step.us[stage] ?? 0), 0);
}
