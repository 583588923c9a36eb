// What the pages say, in English and Chinese, and the header that all of them share.

const WORDS = {
  chat: ["Chat", "聊天"], compare: ["Compare", "比较"], rate: ["Rate", "评分"], language: ["中文", "English"],
  settings: ["Settings", "设置"], model: ["Model", "模型"], temperature: ["Temperature", "温度"], top_p: ["Top p", "Top p"],
  max_tokens: ["Longest reply, tokens", "回答最长（词元）"], system: ["What comes before the conversation", "系统提示"],
  key: ["API key, if the server asks for one", "API 密钥（如需要）"], seed: ["Seed", "随机种子"],
  say: ["Say something. Enter sends, Shift+Enter makes a new line.", "说点什么吧。回车发送，Shift+回车换行。"],
  send: ["Send", "发送"], stop: ["Stop", "停止"], reset: ["Start afresh", "重新开始"], retry: ["Retry", "重试"],
  good: ["Good reply", "好回答"], bad: ["Bad reply", "差回答"], noted: ["noted", "已记录"],
  forgot: ["the oldest turns no longer fit and were left out", "最早的几轮已放不下，未包括在内"],
  stopped: ["stopped", "已停止"], cut: ["longest reply reached", "已到最大长度"],
  compare_say: ["One request, answered by every model.", "一个请求，所有模型一起回答。"],
  answer_all: ["Answer", "回答"],
  shading: ["The darker a word, the less the model expected it. Hold the pointer on one for its probability.",
            "颜色越深，模型越没有料到这个词。把指针停在上面可看概率。"],
  score: ["reward", "奖励"], tokens: ["tokens", "词元"], nats: ["nats a token", "纳特/词元"],
  name: ["Your name", "你的名字"], kind: ["How", "方式"], ranking: ["Ranking of all replies", "全部排序"],
  choice: ["Better of two", "二选一"], rubric: ["Marks 1-5", "1-5 分打分"], begin: ["Begin", "开始"],
  next: ["Next (Enter)", "下一个（回车）"], undo: ["Undo (U)", "撤销（U）"], skip: ["Skip (S)", "跳过（S）"],
  how_ranking: ["Type the numbers, best first; = before one makes it equal to the last; Backspace takes one back.",
                "按从好到差的顺序输入编号；先按 = 表示与上一个并列；退格键删除。"],
  how_choice: ["1 or 2 is better; = they are equal.", "1 或 2 更好；= 一样好。"],
  how_rubric: ["Four marks for each reply, 5 is best. Tab and arrow keys move.", "每个回答打四个分，5 最好。用 Tab 和方向键移动。"],
  accuracy: ["Accuracy", "准确"], relevance: ["Relevance", "切题"], naturalness: ["Naturalness", "自然"],
  concision: ["Concision", "简洁"], progress: ["judged", "已评"], done: ["Everything is judged. Thank you!", "全部评完了，谢谢！"],
  none: ["There are no replies to rate; start the server with --samples.", "没有可评的回答；请用 --samples 启动服务器。"],
  rank_all: ["Rank all replies first.", "请先给全部回答排序。"], mark_all: ["Give all marks first.", "请先打完所有分。"],
};

let chinese = (localStorage.language ?? navigator.language).startsWith("zh");

export const word = (name) => WORDS[name][chinese ? 1 : 0];

// An element with text and properties; text is never read as HTML.
export function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

// Put the words on everything that has data-say or data-hint.
export function speak() {
  document.documentElement.lang = chinese ? "zh" : "en";
  for (const place of document.querySelectorAll("[data-say]")) place.textContent = word(place.dataset.say);
  for (const place of document.querySelectorAll("[data-hint]")) {
    place.placeholder = word(place.dataset.hint);
    place.ariaLabel = word(place.dataset.hint);
  }
}

// Fill the header; `changed` is called when the language changes.
export function header(here, changed = () => {}) {
  const links = { chat: "./", compare: "compare.html", rate: "rate.html" };
  const other = element("button", { type: "button" });
  other.dataset.say = "language";
  other.onclick = () => {
    chinese = !chinese;
    localStorage.language = chinese ? "zh" : "en";
    speak();
    changed();
  };
  document.querySelector("header").append(element("strong", {}, "Sprout"), ...Object.entries(links).map(([name, href]) => {
    const link = element("a", { href });
    link.dataset.say = name;
    if (name === here) link.ariaCurrent = "page";
    return link;
  }), other);
  speak();
}

// Keep what stands in an input from visit to visit.
export function remember(...ids) {
  for (const id of ids) {
    const input = document.getElementById(id);
    input.value = localStorage.getItem(`sprout.${id}`) ?? input.value;
    input.addEventListener("change", () => localStorage.setItem(`sprout.${id}`, input.value));
  }
}
