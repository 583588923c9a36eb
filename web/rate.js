// Judge replies: a ranking or a choice by number keys, or four marks each; what is judged is written at once.
import { get, record } from "./api.js";
import { element, header, remember, speak, word } from "./words.js";

const $ = (id) => document.getElementById(id);
const ASPECTS = ["accuracy", "relevance", "naturalness", "concision"];
let samples = [], at = 0, before = 0, total = 0;        // judged before this visit, and in all
let order = [], tied = false, busy = false;             // [[1], [3, 2]]: numbers as typed, best first
let judged = new Set();

const kind = () => $("kind").value;
const sample = () => samples[at];

async function begin(event) {
  event?.preventDefault();
  $("note").textContent = "";
  try {
    const name = encodeURIComponent($("annotator").value);
    const found = await get(`rate/samples?annotator=${name}&kind=${kind()}`);
    [samples, at, before, total, judged] = [found.samples, 0, found.done, found.total, new Set()];
    $("work").hidden = !samples.length;
    if (!samples.length) $("note").textContent = word(total ? "done" : "none");
    else draw();
    $("work").tabIndex = -1;
    $("work").focus();
  } catch (error) {
    $("note").textContent = error.message;
  }
}

function draw() {
  [order, tied] = [[], false];
  const done = before + judged.size;
  $("progress").max = total;
  $("progress").value = done;
  $("count").textContent = `${done} / ${total} ${word("progress")}`;
  $("prompt").replaceChildren(...sample().messages.map((turn) => element("div", { className: "text" }, turn.content)));
  $("how").textContent = word(`how_${kind()}`);
  $("replies").replaceChildren(...sample().replies.map((reply, i) => {
    const item = element("li", {}, element("div", { className: "text" }, reply.text));
    if (kind() === "rubric") item.append(...ASPECTS.map((aspect) => marks(aspect, i)));
    else item.onclick = () => type(String(i + 1));
    return item;
  }));
  $("undo").disabled = at === 0;
  status();
}

function marks(aspect, i) {
  const name = `${aspect}-${i}`;
  return element("fieldset", {}, element("legend", {}, word(aspect)), ...[1, 2, 3, 4, 5].map((mark) =>
    element("label", {}, element("input", { type: "radio", name, value: mark }), String(mark))));
}

function status() {
  const typed = order.map((tie) => tie.join(" = ")).join(" > ");
  $("order").textContent = typed + (tied ? " =" : "");
}

// A key of a ranking or a choice.
function type(key) {
  const number = +key, n = sample().replies.length;
  if (key === "=" && kind() === "choice") order = [[1, 2]];
  else if (key === "=") tied = order.length > 0 && !tied;
  else if (key === "Backspace") {
    if (tied) tied = false;
    else if (order.length && order.at(-1).length > 1) order.at(-1).pop();
    else order.pop();
  } else if (kind() === "choice" && (number === 1 || number === 2)) order = [[number], [3 - number]];
  else if (number >= 1 && number <= n && !order.flat().includes(number)) {
    if (tied) order.at(-1).push(number);
    else order.push([number]);
    tied = false;
  } else return false;
  status();
  return true;
}

function judgement() {
  const { replies } = sample();
  if (kind() !== "rubric") {
    if (order.flat().length < replies.length) throw new Error(word("rank_all"));
    return { ranking: order.map((tie) => tie.map((number) => replies[number - 1].id)) };
  }
  const scores = replies.map(({ id }, i) => [id, Object.fromEntries(ASPECTS.map((aspect) => {
    const chosen = document.querySelector(`input[name="${aspect}-${i}"]:checked`);
    if (!chosen) throw new Error(word("mark_all"));
    return [aspect, +chosen.value];
  }))]);
  return { scores: Object.fromEntries(scores) };
}

async function next() {
  if (busy) return;
  busy = true;
  try {
    await record("rate/ratings", { sample: sample().id, annotator: $("annotator").value, kind: kind(), ...judgement() });
    judged.add(sample().id);
    move(1);
  } catch (error) {
    $("note").textContent = error.message;
  }
  busy = false;
}

// To another sample; one that is judged again replaces its judgement.
function move(by) {
  $("note").textContent = "";
  at += by;
  if (at < samples.length) {
    draw();
    return;
  }
  $("work").hidden = true;
  if (judged.size === samples.length) $("note").textContent = word("done");
  else begin();                                         // those that were skipped
}

document.addEventListener("keydown", (event) => {
  if ($("work").hidden || event.ctrlKey || event.metaKey || event.altKey || event.isComposing) return;
  if (event.target.matches("#who input, #who select") || event.target.matches("button") && event.key === "Enter") return;
  const key = event.key.toLowerCase();
  if (event.key === "Enter") next();
  else if (key === "u") { if (at) move(-1); }
  else if (key === "s") move(1);
  else if (kind() === "rubric" || !type(event.key)) return;
  event.preventDefault();
});
$("who").onsubmit = begin;
$("next").onclick = next;
$("undo").onclick = () => at && move(-1);
$("skip").onclick = () => move(1);
header("rate", () => { if (!$("work").hidden) draw(); });
remember("annotator", "kind", "key");
speak();
