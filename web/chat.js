// Talk to a model: streaming, stop, retry, thumbs, a system prompt.
import { get, record, streamed } from "./api.js";
import { element, header, remember, speak, word } from "./words.js";

const $ = (id) => document.getElementById(id);
let turns = [];                                 // {role, content}, the conversation without the system prompt
let running = null;                             // AbortController of the reply that is being written

function show(turn) {
  const text = element("div", { className: "text" }, turn.content);
  const box = element("div", { className: `turn ${turn.role}` }, text);
  $("log").append(box);
  box.scrollIntoView({ block: "end" });
  return [box, text];
}

const asked = (some) => ($("system").value.trim() ? [{ role: "system", content: $("system").value }, ...some] : some);

// The newest turns that the model's context holds: the server says when they are too many.
async function* reply(signal, forgot) {
  for (let first = 0; ; first += 2) {
    const messages = asked(turns.slice(first));
    const body = { model: $("model").value, messages, temperature: +$("temperature").value, top_p: +$("top_p").value,
                   max_tokens: +$("max_tokens").value };
    try {
      yield* streamed("v1/chat/completions", body, signal);
      return;
    } catch (error) {
      if (error.code !== "context_length_exceeded" || first + 2 >= turns.length) throw error;
      forgot();
    }
  }
}

async function answer() {
  const turn = { role: "assistant", content: "" }, messages = asked([...turns]), model = $("model").value;
  const [box, text] = show(turn);
  const meta = element("span", { className: "meta" }), notes = new Set();
  const note = (name) => { meta.textContent = [...notes.add(word(name))].join(" · "); };
  running = new AbortController();
  text.classList.add("wait");
  $("send").hidden = true;
  $("stop").hidden = false;
  try {
    for await (const choice of reply(running.signal, () => note("forgot"))) {
      turn.content += choice.delta.content ?? "";
      text.textContent = turn.content;
      if (choice.finish_reason === "length") note("cut");
    }
  } catch (error) {
    if (error.name === "AbortError") note("stopped");
    else meta.replaceChildren(element("span", { className: "error" }, error.message));
  }
  text.classList.remove("wait");
  turns.push(turn);
  box.append(tools(turn, messages, model, meta));
  running = null;
  $("send").hidden = false;
  $("stop").hidden = true;
  $("text").focus();
}

function tools(turn, messages, model, meta) {
  const noted = element("span", { role: "status" });
  const thumbs = [["good", "👍", 1], ["bad", "👎", -1]].map(([name, sign, thumb]) => {
    const button = element("button", { type: "button", title: word(name), ariaLabel: word(name), ariaPressed: "false" }, sign);
    button.onclick = async () => {
      if (button.ariaPressed === "true" || thumbs.some((b) => b.disabled)) return;
      thumbs.forEach((b) => { b.disabled = true; });
      try {
        await record("thumbs", { messages, reply: turn.content, model, thumb });
        thumbs.forEach((b) => { b.ariaPressed = String(b === button); });
        noted.textContent = word("noted");
      } catch (error) {
        noted.textContent = error.message;
      }
      thumbs.forEach((b) => { b.disabled = false; });
    };
    return button;
  });
  const retry = element("button", { type: "button", className: "retry" }, word("retry"));
  retry.onclick = () => {
    if (running || turns.at(-1) !== turn) return;
    turns.pop();
    $("log").lastChild.remove();
    answer();
  };
  document.querySelectorAll(".retry").forEach((old) => old.remove());
  return element("div", { className: "tools" }, ...(turn.content.trim() ? thumbs : []), retry, noted, meta);
}

$("ask").onsubmit = (event) => {
  event.preventDefault();
  const content = $("text").value;
  if (running || !content.trim()) return;
  $("text").value = "";
  if (turns.at(-1)?.role === "assistant" && !turns.at(-1).content.trim()) turns.splice(-2);   // nothing was answered
  turns.push({ role: "user", content });
  show(turns.at(-1));
  answer();
};
$("text").onkeydown = (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {       // Enter ends a Chinese input first
    event.preventDefault();
    $("ask").requestSubmit();
  }
};
$("stop").onclick = () => running?.abort();
$("reset").onclick = () => {
  running?.abort();
  turns = [];
  $("log").replaceChildren();
  $("text").focus();
};

header("chat", speak);
remember("temperature", "top_p", "max_tokens", "system", "key");
get("v1/models").then(({ data }) => $("model").append(...data.filter((m) => m.stage !== "pretrain").concat(
  data.filter((m) => m.stage === "pretrain")).map(({ id }) => element("option", {}, id))),
(error) => show({ role: "assistant", content: error.message }));
