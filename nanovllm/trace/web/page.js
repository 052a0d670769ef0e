// Shows a step, and does what the reader asks for. Loaded last.
"use strict";

function show(index) {
  const { run } = view;
  view.index = Math.max(0, Math.min(index, run.steps.length - 1));
  if (!run.steps.length) {
    byId("sentence").textContent = "This run has no steps.";
    return;
  }
  const step = run.steps[view.index];
  const state = run.stateAt(view.index);
  document.body.dataset.step = view.index;
  byId("scrub").value = view.index;
  byId("where").textContent = `${run.stepName(view.index)} of ${run.lastNumber}`;
  byId("scrub").setAttribute("aria-valuetext", run.stepName(view.index));
  drawCursor();
  drawSentence(step);
  drawBudget(step);
  drawQueues(step, state);
  drawTimes(step);
  drawBlocks(step, state);
  drawDetail(state);
  drawSequences(step, state);
  clearTimeout(view.saving);
  view.saving = setTimeout(saveHash, 250);
}

// -- the tour -----------------------------------------------------------------------------------

function openTour() {
  view.tour = tourOf(view.run);
  byId("tour").hidden = false;
  byId("tour-button").setAttribute("aria-expanded", "true");
  document.body.classList.add("touring");
  byId("tour-stops").replaceChildren(
    ...view.tour.map((stop, i) =>
      el("li", {}, el("button", { type: "button", "data-stop": i }, stop.title)),
    ),
  );
  redraw();
  showStop(0);
}

function closeTour() {
  if (view.stop < 0) return false;
  view.stop = -1;
  byId("tour").hidden = true;
  byId("tour-button").setAttribute("aria-expanded", "false");
  document.body.classList.remove("touring");
  spot(null);
  redraw();
  return true;
}

function showStop(number) {
  const stop = view.tour[number];
  if (!stop) return;
  pause();
  view.stop = number;
  view.block = stop.block ?? null;
  show(stop.step);
  byId("tour-text").replaceChildren(
    el("h3", {}, `${number + 1}. ${stop.title}`),
    el("p", {}, withTerms(stop.text)),
  );
  byId("tour-place").textContent = `${number + 1} of ${view.tour.length}`;
  byId("tour-back").disabled = number === 0;
  byId("tour-next").disabled = number === view.tour.length - 1;
  for (const button of byId("tour-stops").querySelectorAll("button")) {
    const isShown = Number(button.dataset.stop) === number;
    button.setAttribute("aria-current", isShown ? "step" : "false");
    if (isShown) button.scrollIntoView({ block: "nearest" });
  }
  spot(document.querySelector(stop.target));
}

// Highlights one element and brings it into the window.
function spot(element) {
  document.querySelectorAll(".spot").forEach((other) => other.classList.remove("spot"));
  if (!element) return;
  element.classList.add("spot");
  const isTall = element.offsetHeight > innerHeight / 2;
  element.scrollIntoView({ block: isTall ? "start" : "nearest" });
}

// -- what the reader does -----------------------------------------------------------------------

function play() {
  if (view.index >= view.run.steps.length - 1) show(0);
  view.timer = setInterval(
    () => {
      if (view.index >= view.run.steps.length - 1) pause();
      else show(view.index + 1);
    },
    1000 / Number(byId("speed").value),
  );
  byId("play").setAttribute("aria-label", "Pause");
  document.body.classList.add("playing");
}

function pause() {
  if (view.timer === null) return;
  clearInterval(view.timer);
  view.timer = null;
  byId("play").setAttribute("aria-label", "Play");
  document.body.classList.remove("playing");
  show(view.index);
}

function toggle() {
  if (view.timer === null) play();
  else pause();
}

function go(index) {
  pause();
  show(index);
}

function chooseRun(number) {
  pause();
  closeTour();
  view.run = runs[number];
  view.block = null;
  view.allSequences = false;
  panels.clear();
  byId("title").textContent = runs.length > 1 ? view.run.name : "A run, step by step";
  document.body.dataset.run = number;
  byId("runs").replaceChildren(
    ...(runs.length > 1 ? runs : []).map((run, i) =>
      el(
        "button",
        { type: "button", "data-run": i, "aria-pressed": i === number ? "true" : "false" },
        run.name,
      ),
    ),
  );
  byId("note").textContent = view.run.note;
  byId("facts").replaceChildren(...runFacts(view.run));
  makeCells();
  drawChart();
  show(0);
}

function redraw() {
  drawChart();
  show(view.index);
}

// Moves the focus in the grid of blocks. Returns whether the key did that.
function moveInGrid(key, cell) {
  const perRow = cells.filter(
    ({ button }) => button.offsetTop === cells[0].button.offsetTop,
  ).length;
  const moves = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -perRow, ArrowDown: perRow };
  const target = cells[Number(cell.dataset.block) + moves[key]];
  if (moves[key] === undefined) return false;
  if (target) {
    cell.tabIndex = -1;
    target.button.tabIndex = 0;
    target.button.focus();
  }
  return true;
}

function onKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const { key, target } = event;
  if (key === "Escape") {
    closeTerm() || closeTour() || (view.block !== null && openBlock(null));
    return;
  }
  if (target.matches("input, select, textarea")) return;
  // Arrows move in the grid if the keyboard brought the focus there, not after a click.
  if (target.matches(".block:focus-visible") && moveInGrid(key, target))
    return event.preventDefault();
  const far = event.shiftKey ? 10 : 1;
  const actions = {
    ArrowLeft: () => go(view.index - far),
    ArrowRight: () => go(view.index + far),
    Home: () => go(0),
    End: () => go(view.run.steps.length - 1),
    t: () => (view.stop < 0 ? openTour() : closeTour()),
  };
  if (key === " " && !target.closest("button, a, .text")) actions[" "] = toggle;
  const action = actions[key.length > 1 ? key : key.toLowerCase()];
  if (!action) return;
  event.preventDefault();
  action();
}

function onClick(event) {
  const button = event.target.closest("button");
  if (button?.matches(".term")) return openTerm(button, event.detail === 0);
  if (!event.target.closest("#popover")) closeTerm();
  if (!button) return;
  const { dataset } = button;
  if (dataset.block !== undefined) openBlock(Number(dataset.block));
  else if (dataset.step !== undefined) go(Number(dataset.step));
  else if (dataset.stop !== undefined) showStop(Number(dataset.stop));
  else if (dataset.run !== undefined) chooseRun(Number(dataset.run));
}

// The step under a point of the chart.
function stepAt(clientX) {
  const { x, column } = chart;
  return Math.floor((clientX - byId("chart").getBoundingClientRect().left - x(0)) / column);
}

function listen() {
  const clicks = {
    first: () => go(0),
    back: () => go(view.index - 1),
    play: toggle,
    forward: () => go(view.index + 1),
    last: () => go(view.run.steps.length - 1),
    "tour-button": () => (view.stop < 0 ? openTour() : closeTour()),
    "tour-close": closeTour,
    "tour-back": () => showStop(view.stop - 1),
    "tour-next": () => showStop(view.stop + 1),
    "more-sequences": () => {
      view.allSequences = !view.allSequences;
      show(view.index);
    },
  };
  for (const [id, action] of Object.entries(clicks)) byId(id).addEventListener("click", action);
  byId("scrub").addEventListener("input", (event) => go(Number(event.target.value)));
  byId("speed").addEventListener("change", () => {
    if (view.timer === null) return;
    pause();
    play();
  });
  byId("chart").addEventListener("pointerdown", (event) => go(stepAt(event.clientX)));
  byId("chart").addEventListener(
    "pointermove",
    (event) => event.buttons && go(stepAt(event.clientX)),
  );
  document.addEventListener("keydown", onKey);
  document.addEventListener("click", onClick);
  document.addEventListener("mouseover", (event) => {
    const span = event.target.closest("[data-token]");
    if (span) showTip(span);
    else byId("tip").hidden = true;
  });
  let width = innerWidth;
  addEventListener("resize", () => {
    if (innerWidth !== width) redraw();
    width = innerWidth;
  });
}

// The address of the page remembers run, step and block: #run=0&step=12&block=3, counted from 0.
function saveHash() {
  const parts = [`run=${runs.indexOf(view.run)}`, `step=${view.index}`];
  if (view.block !== null) parts.push(`block=${view.block}`);
  try {
    window.history.replaceState(null, "", `#${parts.join("&")}`);
  } catch {
    // Some viewers of local files do not let a page change its address.
  }
}

function loadHash() {
  const values = new URLSearchParams(location.hash.slice(1));
  const numberOf = (key) => (values.has(key) ? Number(values.get(key)) : null);
  const run = numberOf("run") ?? 0;
  const step = numberOf("step") ?? 0;
  const block = numberOf("block");
  chooseRun(runs[run] ? run : 0);
  if (block !== null) view.block = block;
  if (Number.isInteger(step)) show(step);
}

drawWords();
listen();
loadHash();
