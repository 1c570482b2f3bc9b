// Questions about the served folder: an answer's steps as they are made, its citations, and its bill.
// What documents and models write is only set as text.

import { addBill, count, newTotals, showBill } from "./figures.js";
import { BROKE_OFF, questionEvents, ServerError } from "./server.js";
import { copy, drawText } from "./text.js";
import { fit, following, showWaiting } from "./view.js";

const $ = (id) => document.getElementById(id);
const copyOf = (id) => $(id).content.firstElementChild.cloneNode(true);
const many = (number, what) => `${count.format(number)} ${what}${number === 1 ? "" : "s"}`;

let info = null; // of the server
let page = null; // what the page does for this view: {showSums, leadToKey, settingsAreRight}
let running = null; // {abort, bill, hasEnded} of the question under way; hasEnded: the bill is the last one
const totals = newTotals(); // of those that have ended

/** The totals of all questions, with what the one under way has cost until now. */
export const sums = () => (running?.bill ? addBill({ ...totals }, running.bill) : totals);
export const stop = () => running?.abort.abort();

export function begin(ofPage) {
  page = ofPage;
  $("document-composer").onsubmit = send;
  $("document-question").oninput = () => fit($("document-question"));
  $("document-question").onkeydown = (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) send(event);
  };
  $("document-stop").onclick = stop;
  $("document-turns").onclick = (event) => {
    if (event.target.matches(".copy")) copy(event.target);
  };
  $("excerpt-close").onclick = () => $("excerpt").close();
  $("excerpt").onclick = (event) => {
    if (event.target === $("excerpt")) $("excerpt").close(); // beside it
  };
}

export function showInfo(loaded) {
  info = loaded;
  if (!info.documents) return;
  const { folder, count: documents } = info.documents;
  $("document-folder").textContent = `${many(documents, "document")} in ${folder}`;
  $("document-explanation").textContent =
    `${many(documents, "document")} of the folder ${folder}: the model reads them whole where they fit its ` +
    "context, else it searches them step by step. Its quotes are looked up in the documents, and open there.";
}

function send(event) {
  event.preventDefault();
  const question = $("document-question").value.trim();
  if (running || !question || !page.settingsAreRight()) return;
  $("document-error").textContent = "";
  $("document-question").value = "";
  fit($("document-question"));
  ask(question);
}

async function ask(question) {
  const turn = addTurn(question);
  running = { abort: new AbortController(), bill: null, hasEnded: false };
  showRunning();
  const { signal } = running.abort;
  const failure = await receive(turn, question, signal).catch((error) => error);
  clearInterval(turn.timer);
  const { bill, hasEnded } = running;
  running = null;
  if (bill) addBill(totals, bill);
  showRunning();
  if (failure && !bill) withdraw(turn, question);
  else finish(turn, failure && noteOnFailure(signal, hasEnded));
  if (bill && !hasEnded) totals.uncounted += 1;
  page.showSums();
  if (failure && !signal.aborted) showError(failure);
}

function addTurn(question) {
  const turn = copyOf("question-turn-template");
  turn.querySelector(".question .text").textContent = question;
  turn.timer = showWaiting(turn);
  $("document-welcome").hidden = true;
  $("document-turns").append(turn);
  $("document-scroll").scrollTop = $("document-scroll").scrollHeight;
  return turn;
}

/** Ask, and show in the turn what comes. */
async function receive(turn, question, signal) {
  const body = { question, max_new_tokens: Number($("max-tokens").value) };
  let last = null;
  for await (const event of questionEvents(body, $("key").value, signal)) {
    last = event.event;
    running.hasEnded = last === "answer" || last === "error";
    following($("document-scroll"), () => SHOW[last](turn, event));
    if (last === "error") throw new ServerError(0, event.message);
  }
  if (!running.hasEnded) throw new ServerError(0, BROKE_OFF);
}

const SHOW = { note: addNote, step: addStep, answer: showAnswer, error: showLastBill };

function addNote(turn, { text }) {
  const line = document.createElement("li");
  line.className = "soft";
  line.textContent = text;
  addLine(turn, line);
}

function addStep(turn, step) {
  const line = copyOf("step-template");
  const show = (name, text) => (line.querySelector(`[data-field="${name}"]`).textContent = text);
  line.classList.add("step");
  show("does", step.tool ?? step.text);
  show("arguments", step.tool ? inWords(step.arguments) : "");
  show("result", step.tool ? `${withoutFrame(step.result)} (${many(step.characters, "character")})` : "");
  addLine(turn, line);
  showRunningBill(turn, step);
}

function addLine(turn, line) {
  turn.querySelector(".steps ol").append(line);
  const steps = turn.querySelectorAll(".step").length;
  turn.querySelector("summary").textContent = many(steps, "step");
}

/** Of the line that frames a part of a document, which part it is. */
const withoutFrame = (line) => line.match(/^<document \w+ file=".*" (lines .*)>$/)?.[1] ?? line;

/** A call's arguments without JSON's signs, where they are whole. */
function inWords(json) {
  try {
    const pairs = Object.entries(JSON.parse(json));
    return pairs.map(([name, value]) => `${name}: ${value}`).join(", ");
  } catch {
    return json; // cut for length
  }
}

function showLastBill(turn, error) {
  if (error.usage) showRunningBill(turn, error); // none before the first step
}

function showRunningBill(turn, bill) {
  running.bill = bill;
  showBill(turn.querySelector(".receipt"), bill, info);
  turn.querySelector(".foot").hidden = false;
  page.showSums();
}

function showAnswer(turn, answer) {
  turn.raw = answer.answer;
  drawText(turn.querySelector(".answer > .text"), answer.answer);
  turn.querySelector(".citations").replaceChildren(...answer.citations.map(citationLine));
  const dropped = `${many(answer.dropped, "quote")} left out: not in the documents, or too short.`;
  turn.querySelector(".note").textContent = [
    answer.complete ? "" : "The most tokens to write are reached: raise them in Settings.",
    answer.dropped ? dropped : "",
  ].join(" ");
  turn.querySelector(".steps").open = false;
  showRunningBill(turn, answer);
}

function citationLine(citation) {
  const line = copyOf("citation-template");
  const show = (name, text) => (line.querySelector(`[data-field="${name}"]`).textContent = text);
  show("place", `${citation.file}:${citation.span.first_line}`);
  show("quote", citation.quote);
  line.querySelector("button").onclick = () => openExcerpt(citation);
  return line;
}

/** The quote in its surroundings. */
function openExcerpt({ file, span, quote, before, after }) {
  const mark = document.createElement("mark");
  mark.textContent = quote;
  const { first_line: first, last_line: last } = span;
  $("excerpt-file").textContent = file;
  $("excerpt-lines").textContent = first === last ? `Line ${first}` : `Lines ${first} to ${last}`;
  $("excerpt-text").replaceChildren(before, mark, after);
  $("excerpt").showModal();
  mark.scrollIntoView({ block: "center" });
}

function finish(turn, failureNote) {
  following($("document-scroll"), () => {
    turn.querySelector(".waiting").hidden = true;
    turn.querySelector(".answer").ariaBusy = "false";
    if (failureNote) turn.querySelector(".note").textContent = failureNote;
  });
  $("announcer").textContent = failureNote || "Answer complete";
}

/** Nothing was done: the question goes back to where it was typed. */
function withdraw(turn, question) {
  turn.remove();
  $("document-welcome").hidden = $("document-turns").childElementCount > 0;
  $("document-question").value = question;
  fit($("document-question"));
}

function noteOnFailure(signal, hasEnded) {
  if (hasEnded) return "There is no answer.";
  return signal.aborted
    ? "Stopped. What the last request read and wrote until then is charged, but is not in the sums here."
    : "The answer broke off here.";
}

function showRunning() {
  $("document-ask").hidden = Boolean(running);
  $("document-stop").hidden = !running;
}

function showError(error) {
  $("document-error").textContent = error.message;
  $("announcer").textContent = "";
  page.leadToKey(error);
}
