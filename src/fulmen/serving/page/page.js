// The page: the conversation, what is typed and attached, the settings. documents.js has the other view.

import * as documents from "./documents.js";
import {
  addToTotals,
  count,
  newTotals,
  showContext,
  showPrices,
  showReceipt,
  showTotals,
} from "./figures.js";
import { loadInfo, megabytes, receive, requestAnswer } from "./server.js";
import { copy, drawText } from "./text.js";
import { fit, following, showWaiting } from "./view.js";

const PASTE_AS_DOCUMENT = 2000; // characters; a shorter paste stays in the message
const CHARACTERS_PER_TOKEN = 4; // a guess, and shown as one

const $ = (id) => document.getElementById(id);
const newChat = () => ({ messages: [], running: null, totals: newTotals() });
const copyOf = (id) => $(id).content.firstElementChild.cloneNode(true);

let info = null; // of the server, once it has answered
let chat = newChat();
let inDocuments = false; // the view that is shown
let attached = []; // {title, text}: goes with the next message

// ---- a turn -----------------------------------------------------------------------------------------------

async function ask(question, documents) {
  const mine = chat;
  const answer = { text: "", usage: null, finish: null };
  const turn = addTurn(question, documents);
  mine.messages.push({ role: "user", content: [...documents.map((one) => one.text), question].join("\n\n") });
  mine.running = new AbortController();
  showRunning();
  const { signal } = mine.running;
  const failure = await answerInto(answer, turn, mine.messages, signal).catch((error) => error);
  clearInterval(turn.timer);
  mine.running = null;
  if (mine !== chat) return; // a new chat has begun meanwhile
  showRunning();
  if (failure && !answer.text) withdraw(turn, question, documents);
  else keep(turn, answer, failure && noteOnFailure(signal));
  if (failure && !signal.aborted) showError(failure);
}

async function answerInto(answer, turn, messages, signal) {
  info ??= await loadInfo().then(showInfo);
  const temperature = $("temperature").value;
  const body = {
    model: info.model,
    messages,
    max_tokens: Number($("max-tokens").value),
    ...(temperature && { temperature: Number(temperature) }),
  };
  const stream = await requestAnswer(body, $("key").value, signal, info.max_body_bytes);
  await receive(
    stream,
    answer,
    oncePerFrame(() => following($("scroll"), () => showText(turn, answer.text))),
  );
}

function addTurn(question, documents) {
  const turn = copyOf("turn-template");
  turn.querySelector(".question .text").textContent = question;
  turn.querySelector(".attachments").replaceChildren(...documents.map(attachmentChip));
  turn.timer = showWaiting(turn);
  $("welcome").hidden = true;
  $("turns").append(turn);
  $("scroll").scrollTop = $("scroll").scrollHeight;
  return turn;
}

function showText(turn, text) {
  turn.querySelector(".waiting").hidden = true;
  turn.raw = text;
  drawText(turn.querySelector(".answer > .text"), text);
}

/** Nothing was answered: the question goes back to where it was typed. */
function withdraw(turn, question, documents) {
  turn.remove();
  chat.messages.pop();
  $("welcome").hidden = chat.messages.length > 0;
  $("question").value = [question, $("question").value].filter(Boolean).join("\n");
  fit($("question"));
  attach(documents, []);
}

function keep(turn, answer, failureNote) {
  chat.messages.push({ role: "assistant", content: answer.text });
  addToTotals(chat.totals, answer.usage);
  following($("scroll"), () => {
    showText(turn, answer.text);
    turn.querySelector(".answer").ariaBusy = "false";
    turn.querySelector(".note").textContent = failureNote || noteOn(answer);
    if (answer.usage) showReceipt(turn.querySelector(".receipt"), answer.usage, info);
    turn.querySelector(".foot").hidden = false;
  });
  showSums();
  $("announcer").textContent = failureNote || "Answer complete";
}

function noteOnFailure(signal) {
  return signal.aborted
    ? "Stopped. What was read and written until then is charged, but is not in the sums here."
    : "The answer broke off here; ask to go on.";
}

function noteOn(answer) {
  if (answer.finish === "length")
    return "The most tokens to write are reached: raise them in Settings, or ask to go on.";
  return answer.text ? "" : "The model answered with nothing.";
}

function oncePerFrame(draw) {
  let frame = 0;
  return () => {
    frame ||= requestAnimationFrame(() => {
      frame = 0;
      draw();
    });
  };
}

// ---- what is shown beside the turns -----------------------------------------------------------------------

function showInfo(loaded) {
  info = loaded;
  $("model").textContent = info.model;
  document.title = `${info.model} · fulmen`;
  $("explanation").textContent =
    `Attach, paste or drop a document, up to ${count.format(info.context)} tokens. It is read once; ` +
    "later questions take it from the cache." +
    (info.dsa
      ? ` For each token, attention reads at most ${count.format(info.dsa.topk)} (mean over layers).`
      : "");
  $("key-hint").textContent =
    `${info.needs_key ? "Needed" : "Not needed"} by this server. Kept until the tab is closed.`;
  $("key").required = info.needs_key;
  showPrices($("panel"), info);
  documents.showInfo(info);
  $("views").hidden = !info.documents;
  showView(info.documents && location.hash === "#documents");
  return info;
}

/** Show the conversation, or the questions about documents. */
function showView(isDocuments) {
  inDocuments = Boolean(isDocuments);
  $("chat").hidden = $("new-chat").hidden = $("temperature-label").hidden = inDocuments;
  $("documents").hidden = !inDocuments;
  $("show-chat").ariaCurrent = inDocuments ? null : "page";
  $("show-documents").ariaCurrent = inDocuments ? "page" : null;
  $("totals-title").textContent = inDocuments ? "These questions" : "This conversation";
  history.replaceState(null, "", inDocuments ? "#documents" : location.pathname + location.search);
  $(inDocuments ? "document-question" : "question").focus();
  showSums();
}

function showSums() {
  showTotals($("panel"), $("badge"), inDocuments ? documents.sums() : chat.totals, info);
  showContext($("context"), chat.totals.contextUsed, info.context);
}

function showRunning() {
  $("send").hidden = Boolean(chat.running);
  $("stop").hidden = !chat.running;
}

function showError(error) {
  $("error").textContent = error.message;
  $("announcer").textContent = "";
  leadToKey(error);
}

function leadToKey(error) {
  if (error.status === 401) openSettings($("key"));
}

/** On a narrow screen the panel opens over the conversation. */
function openSettings(control) {
  if (getComputedStyle($("panel-button")).display !== "none") $("panel").showPopover();
  control.focus();
}

// ---- documents --------------------------------------------------------------------------------------------

function attach(first, then) {
  attached = [...first, ...then];
  const chips = attached.map(attachmentChip);
  chips.forEach((chip, i) => {
    const remove = chip.querySelector(".remove");
    remove.hidden = false;
    remove.ariaLabel = `Remove ${attached[i].title}`;
    remove.onclick = () => {
      attach(attached.slice(0, i), attached.slice(i + 1));
      $("question").focus();
    };
  });
  $("attachments").replaceChildren(...chips);
}

function attachmentChip({ title, text }) {
  const chip = copyOf("attachment-template");
  const tokens = text.length / CHARACTERS_PER_TOKEN;
  chip.querySelector(".title").textContent = title;
  const tooLong = tokens > (info?.context ?? Infinity);
  const size = `about ${count.format(Number(tokens.toPrecision(2)))} tokens`;
  chip.querySelector(".size").textContent = tooLong ? `${size}, too long` : size;
  chip.classList.toggle("too-long", tooLong);
  return chip;
}

async function attachFiles(files) {
  for (const file of files) {
    if (info && file.size > info.max_body_bytes) {
      const most = megabytes(info.max_body_bytes);
      showError(new Error(`${file.name} is larger than ${most}: attach the part that matters.`));
      continue;
    }
    try {
      const text = new TextDecoder("utf-8", { fatal: true }).decode(await file.arrayBuffer());
      attach(attached, [{ title: file.name, text }]);
    } catch {
      showError(new Error(`${file.name} is not plain text in UTF-8: save it as text, then attach that.`));
    }
  }
  $("question").focus();
}

$("attach").onclick = () => $("file").click();
$("file").onchange = () => attachFiles([...$("file").files]).then(() => ($("file").value = ""));
$("question").onpaste = (event) => {
  const text = event.clipboardData.getData("text/plain");
  if (text.length < PASTE_AS_DOCUMENT) return;
  event.preventDefault();
  attach(attached, [{ title: "Pasted text", text }]);
};

const isDrop = (event) => event.dataTransfer?.types.some((type) => type === "Files" || type === "text/plain");
document.ondragover = (event) => {
  if (!isDrop(event)) return;
  event.preventDefault();
  $("drop").hidden = false;
};
document.ondragleave = (event) => ($("drop").hidden ||= !event.relatedTarget);
document.ondrop = (event) => {
  $("drop").hidden = true;
  if (!isDrop(event)) return;
  event.preventDefault();
  const text = event.dataTransfer.getData("text/plain");
  if (event.dataTransfer.files.length) attachFiles([...event.dataTransfer.files]);
  else if (text) attach(attached, [{ title: "Dropped text", text }]);
};

// ---- typing and buttons -----------------------------------------------------------------------------------

function send(event) {
  event.preventDefault();
  const question = $("question").value.trim();
  if (chat.running || !(question || attached.length)) return;
  if (!settingsAreRight()) return;
  const documents = attached;
  $("error").textContent = "";
  $("question").value = "";
  fit($("question"));
  attach([], []);
  ask(question, documents);
}

function settingsAreRight() {
  if ($("settings").checkValidity()) return true;
  openSettings($("settings").querySelector(":invalid"));
  $("settings").reportValidity();
  return false;
}

function turnTheme() {
  const dark = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
  const now = localStorage.getItem("theme") ?? dark;
  localStorage.setItem("theme", now === "dark" ? "light" : "dark");
  showTheme();
}

function showTheme() {
  document.documentElement.dataset.theme = localStorage.getItem("theme") ?? "";
}

$("composer").onsubmit = send;
$("settings").onsubmit = (event) => event.preventDefault();
$("question").oninput = () => fit($("question"));
$("question").onkeydown = (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) send(event);
};
$("stop").onclick = () => chat.running?.abort();
$("turns").onclick = (event) => event.target.matches(".copy") && copy(event.target);
$("theme").onclick = turnTheme;
$("key").oninput = () => sessionStorage.setItem("key", $("key").value);
$("new-chat").onclick = () => {
  chat.running?.abort();
  chat = newChat();
  $("turns").replaceChildren();
  $("welcome").hidden = false;
  $("error").textContent = "";
  showRunning();
  if (info) showSums();
  $("question").focus();
};
document.onkeydown = (event) => {
  if (event.key !== "Escape" || $("panel").matches(":popover-open") || $("excerpt").open) return;
  if (inDocuments) documents.stop();
  else chat.running?.abort();
};
$("show-chat").onclick = () => showView(false);
$("show-documents").onclick = () => showView(true);
documents.begin({ showSums, leadToKey, settingsAreRight });

$("key").value = sessionStorage.getItem("key") ?? "";
showTheme();
loadInfo().then(showInfo, showError);
$("question").focus();
