// One request, answered by every model side by side: each token shaded by its surprise, each reply with its reward.
import { get, post, streamed } from "./api.js";
import { element, header, remember, speak, word } from "./words.js";

const $ = (id) => document.getElementById(id);
const DARKEST = 6;                              // nats of surprise that have the full shade
let running = null;
const { reward_model: judged } = await get("health");

// Puts tokens into a box as spans; a character whose bytes come in several tokens becomes one span.
function shader(box) {
  let bytes = [], logprob = 0;
  return (entry) => {
    bytes.push(...(entry.bytes ?? []));
    logprob += entry.logprob;
    let text;
    try {
      text = new TextDecoder("utf-8", { fatal: true }).decode(new Uint8Array(bytes));
    } catch {
      return;                                   // the rest of the character is still to come
    }
    const shade = Math.min(1, -logprob / DARKEST) * 0.7;
    const span = element("span", { title: `p = ${Math.exp(logprob).toPrecision(2)}` }, text);
    span.style.backgroundColor = `rgba(var(--shade), ${shade.toFixed(3)})`;
    box.append(span);
    bytes = [];
    logprob = 0;
  };
}

async function column({ id, stage }, content, signal) {
  const text = element("div", { className: "text wait" }), meta = element("p", { className: "meta" });
  const put = shader(text), chat = stage !== "pretrain";
  $("columns").append(element("article", {}, element("h2", {}, id), text, meta));
  const body = { model: id, temperature: +$("temperature").value, max_tokens: +$("max_tokens").value, seed: +$("seed").value };
  const messages = [{ role: "user", content }];
  let reply = "", sum = 0, n = 0;
  try {
    // A base model knows no conversation: it goes on with the text.
    const choices = chat ? streamed("v1/chat/completions", { ...body, messages, logprobs: true, top_logprobs: 0 }, signal)
      : streamed("v1/completions", { ...body, prompt: content }, signal);
    for await (const choice of choices) {
      const entries = choice.logprobs?.content ?? [], piece = chat ? choice.delta.content ?? "" : choice.text;
      reply += piece;
      if (chat) entries.forEach(put);
      else text.append(piece);
      for (const entry of entries) [sum, n] = [sum + entry.logprob, n + 1];
    }
    const parts = n ? [`${n} ${word("tokens")}`, `${(-sum / n).toFixed(2)} ${word("nats")}`] : [];
    if (judged && chat && reply.trim()) {
      const { score } = await (await post("score", { messages, reply }, signal)).json();
      parts.unshift(`${word("score")} ${score.toFixed(2)}`);
    }
    meta.textContent = parts.join(" · ");
  } catch (error) {
    if (error.name !== "AbortError") meta.replaceChildren(element("span", { className: "error" }, error.message));
  }
  text.classList.remove("wait");
}

$("ask").onsubmit = async (event) => {
  event.preventDefault();
  const content = $("text").value;
  if (running || !content.trim()) return;
  running = new AbortController();
  $("send").disabled = true;
  $("stop").hidden = false;
  $("columns").replaceChildren();
  try {
    const { data } = await get("v1/models");
    await Promise.all(data.map((model) => column(model, content, running.signal)));
  } catch (error) {
    $("columns").append(element("p", { className: "error" }, error.message));
  }
  running = null;
  $("send").disabled = false;
  $("stop").hidden = true;
};
$("text").onkeydown = (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    $("ask").requestSubmit();
  }
};
$("stop").onclick = () => running?.abort();
header("compare", speak);
remember("temperature", "max_tokens", "seed", "key");
