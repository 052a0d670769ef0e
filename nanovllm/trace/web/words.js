// Definitions of terms, and what a token tells under the pointer.
"use strict";

let popoverButton = null; // the term whose definition is open

function openTerm(button, isKeyboard) {
  const entry = terms.get(button.dataset.term);
  const popover = byId("popover");
  if (!entry || popoverButton === button) return closeTerm();
  popover.replaceChildren(el("b", {}, entry.name), el("p", {}, entry.sentence), codeLink(entry));
  popover.hidden = false;
  place(popover, button.getBoundingClientRect());
  popoverButton = button;
  if (isKeyboard) popover.querySelector("a").focus();
}

function closeTerm() {
  const popover = byId("popover");
  if (popover.hidden) return false;
  const hadFocus = popover.contains(document.activeElement);
  popover.hidden = true;
  if (hadFocus && popoverButton?.isConnected) popoverButton.focus();
  popoverButton = null;
  return true;
}

function codeLink(entry) {
  return el("a", { href: entry.link, target: "_blank", rel: "noopener" }, entry.place);
}

// Puts a box below a rectangle of the window, or above it, and inside the window.
function place(box, rectangle) {
  box.style.left = "0px";
  box.style.top = "0px";
  const { width, height } = box.getBoundingClientRect();
  const margin = 8;
  const left = Math.max(margin, Math.min(rectangle.left, innerWidth - width - margin));
  const isBelow =
    rectangle.bottom + height + margin < innerHeight || rectangle.top < height + margin;
  const top = isBelow ? rectangle.bottom + 6 : rectangle.top - height - 6;
  box.style.left = `${left + scrollX}px`;
  box.style.top = `${top + scrollY}px`;
}

function showTip(span) {
  const [id, position] = span.dataset.token.split(":").map(Number);
  const sequence = view.run.sequences.get(id);
  const token = view.run.tokenAt(sequence, position);
  if (!token) return;
  const table = view.run.stateAt(view.index).tables.get(id) ?? [];
  const block = table[Math.floor(position / view.run.blockSize)];
  const facts = [`token ${token.id}`, `position ${position}`];
  if (block !== undefined) facts.push(`block ${block}`);
  if (token.step !== undefined)
    facts.push(`sampled in ${view.run.stepName(token.step).toLowerCase()}`);
  const tip = byId("tip");
  tip.replaceChildren(
    el("b", {}, visibleText(token)),
    el("p", {}, facts.join(", ")),
    ...logprobRows(token),
  );
  tip.hidden = false;
  place(tip, span.getBoundingClientRect());
}

function logprobRows(token) {
  if (token.logprob === null || token.logprob === undefined) return [];
  const rows = [
    el("p", {}, `logprob ${token.logprob.toFixed(3)}, probability ${percentOf(token.logprob)}`),
  ];
  const top = (token.top ?? []).map(([piece, logprob]) =>
    el("li", {}, el("span", {}, visibleText({ piece, id: "?" })), ` ${percentOf(logprob)}`),
  );
  if (top.length) rows.push(el("ol", {}, top));
  return rows;
}

const percentOf = (logprob) =>
  logprob === null ? "0 %" : `${(Math.exp(logprob) * 100).toPrecision(3)} %`;

function drawWords() {
  byId("word-list").replaceChildren(
    ...[...terms.values()].map((entry) =>
      el("div", {}, el("dt", {}, entry.name), el("dd", {}, entry.sentence, " ", codeLink(entry))),
    ),
  );
  for (const span of document.querySelectorAll("span[data-term]")) {
    span.replaceWith(term(span.dataset.term, span.textContent));
  }
}
