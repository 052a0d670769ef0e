// What all drawing shares: the data of the page, what is shown of it, and makers of elements.
"use strict";

const COLOURS = 8; // colours of sequences in page.css; the label tells equal colours apart

const data = JSON.parse(document.getElementById("data").textContent);
const terms = new Map(data.terms.map((term) => [term.key, term]));
const runs = data.runs.map((run) => new Run(run));
const view = {
  run: runs[0],
  index: 0, // of the step that is shown
  block: null, // the block whose details are open
  timer: null, // set while the run plays
  saving: null, // the timer of saveHash
  allSequences: false,
  tour: [],
  stop: -1, // the stop of the tour that is shown; -1: the tour is closed
};

const byId = (id) => document.getElementById(id);

// An element with attributes and children. Text becomes text nodes, so no text is read as HTML.
function el(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  setAttributes(element, attributes);
  element.append(...children.flat().filter((child) => child !== null));
  return element;
}

function svg(tag, attributes = {}, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  setAttributes(element, attributes);
  element.append(...children);
  return element;
}

function setAttributes(element, attributes) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === false) continue;
    if (name === "style") element.style.cssText = value;
    else element.setAttribute(name, value === true ? "" : value);
  }
}

function term(key, words) {
  return el(
    "button",
    { class: "term", type: "button", "data-term": key, "aria-haspopup": "dialog" },
    words,
  );
}

// Text with [[budget|words]] in it -> nodes in which the words are terms.
function withTerms(text) {
  return text.split(/(\[\[.*?\]\])/).map((piece) => {
    const match = piece.match(/^\[\[(.*?)\|(.*)\]\]$/);
    return match ? term(match[1], match[2]) : piece;
  });
}

// Sequences that run together were mostly admitted one after the other, so their colours differ.
function colour(sequence) {
  const number = sequence.admission === Infinity ? sequence.number : sequence.admission;
  return `var(--c${number % COLOURS})`;
}

function chip(id, extra = null) {
  const sequence = view.run.sequences.get(id);
  const attributes = { class: "chip", style: `--c: ${colour(sequence)}`, "data-seq": id };
  return el("span", attributes, sequence.label, extra === null ? null : el("small", {}, extra));
}

// The text of a token alone, with line ends that can be seen. A token without text shows its id.
function visibleText({ piece, id }) {
  const text = piece.replaceAll("\n", "↵").replaceAll("\t", "⇥");
  return text === "" ? `⟨${id}⟩` : text;
}

// What a token adds to the text of its sequence. Without a tokenizer that is its id.
const addedText = (sequence, token) => (sequence.hasText ? token.text : ` ${visibleText(token)}`);

const number = (value) => value.toLocaleString("en-US");

function duration(us) {
  if (us === null || us === undefined) return "–";
  if (us < 1000) return `${Math.round(us)} µs`;
  if (us < 1e6) return `${(us / 1000).toPrecision(3)} ms`;
  return `${(us / 1e6).toPrecision(3)} s`;
}

function sentenceList(items) {
  const nodes = [];
  items.forEach((item, i) => {
    if (i > 0) nodes.push(i === items.length - 1 ? " and " : ", ");
    nodes.push(item);
  });
  return nodes;
}
