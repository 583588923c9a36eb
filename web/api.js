// The server's API: JSON requests, and streamed replies as they arrive.

const key = () => document.getElementById("key")?.value ?? "";

const headers = () => ({ "Content-Type": "application/json", ...(key() && { Authorization: `Bearer ${key()}` }) });

// Throw what the server says is wrong, with its code.
async function checked(answer) {
  if (answer.ok) return answer;
  const error = (await answer.json().catch(() => ({}))).error ?? {};
  throw Object.assign(new Error(error.message ?? `HTTP ${answer.status}`), { code: error.code });
}

export const get = async (path) => (await checked(await fetch(path, { headers: headers() }))).json();

export const post = async (path, body, signal) =>
  checked(await fetch(path, { method: "POST", headers: headers(), body: JSON.stringify(body), signal }));

// Send a record until the server has it; its nonce makes sure that it is written once.
export async function record(path, body) {
  const whole = { ...body, nonce: crypto.randomUUID?.() ?? `${Date.now()}-${Math.random()}` };
  for (let attempt = 0; ; attempt++) {
    try {
      return await (await post(path, whole)).json();
    } catch (error) {
      if (!(error instanceof TypeError) || attempt === 3) throw error;      // only a lost connection is tried again
      await new Promise((resolve) => setTimeout(resolve, 300 * 2 ** attempt));
    }
  }
}

// The choices of a streamed request, one after the other; a character that arrives in two parts stays whole.
export async function* streamed(path, body, signal) {
  const reader = (await post(path, { ...body, stream: true }, signal)).body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n\n");
    rest = lines.pop();
    for (const line of lines) {
      if (line === "data: [DONE]") return;
      const event = JSON.parse(line.slice("data: ".length));
      if (event.error) throw new Error(event.error.message);
      yield* event.choices;
    }
  }
}
